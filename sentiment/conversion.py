"""A model as OpenVINO's or ONNX Runtime's graph, in a folder named by the model's hash, and the choice of its engine there.

sentiment/selection.py makes the choice. The graphs read packed rows (sentiment/bert.py).
"""

import hashlib
import logging
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from sentiment import engines
from sentiment.classifier import Classifier
from sentiment.engines import Choice, graph_name
from sentiment.errors import CheckpointError
from sentiment.files import atomic, read_json, remove, write_json
from sentiment.logs import first_line
from sentiment.packing import Row, bins, pack

CACHE = Path("models/registry/engines")
HASHED = ("model.safetensors", "config.json", "tokenizer.json", "inference.json")
QUICK = "quick"  # the folder, within a model's, of what is made in a hurry
FORMAT = 2  # of the files in the cache
THREADS = "-threads-"  # in the name of a choice for fewer threads than there are processors, or more
CALIBRATION_ROWS = 64  # packed rows whose activations int8 is fitted to


def folder_of(cache: Path, model: Path) -> Path:
    """Where a model's conversions are kept: a folder named by the hash of all that decides its answers."""
    digest = hashlib.sha256(str(FORMAT).encode())
    for name in HASHED:
        try:
            with (model / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise CheckpointError(
                f"{model} lacks {name} ({first_line(error)}); fetch the model again: `dvc checkout dvc.yaml`"
            ) from error
    return cache / digest.hexdigest()[:16]


def locked(converted: Path) -> FileLock:
    """One conversion of a model at a time, over all processes."""
    converted.mkdir(parents=True, exist_ok=True)
    return FileLock(converted / "lock")


def machine(threads: int | None = None) -> dict[str, str]:
    """What a choice holds for: another processor, number of threads (None: all) or version of an engine is measured anew."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = dict(
            line.split(":", 1) for line in info.read_text(encoding="utf-8", errors="replace").splitlines() if ":" in line
        )
        fields = {name.strip(): value.strip() for name, value in lines.items()}
        cpu = " ".join(filter(None, (fields.get("model name"), fields.get("model"), fields.get("stepping"))))
    return {"cpu": cpu, "threads": str(threads or engines.cores())} | {name: version(name) for name in engines.ENGINES}


def choice_file(converted: Path, engine: str, threads: int | None = None) -> Path:
    """Where a choice is kept; `engine` is auto or one engine, `threads` None for those of all processors."""
    return converted / (f"{engine}.json" if threads in (None, engines.cores()) else f"{engine}{THREADS}{threads}.json")


def read_choice(converted: Path, engine: str, threads: int | None = None) -> Choice | None:
    """The choice made before for this machine and so many threads, or None."""
    return choice_in(choice_file(converted, engine, threads), threads)


def choice_in(path: Path, threads: int | None) -> Choice | None:
    """The choice in a file, if it holds here."""
    try:
        kept = read_json(path)
        if kept["machine"] != machine(threads):
            return None
        choice = Choice(**kept["choice"])
        return choice if all((path.parent / name).is_file() for name in graph_files(choice)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def graph_files(choice: Choice) -> set[str]:
    """The files that a choice's engine reads: none for torch, which reads the model folder."""
    if choice.engine == "torch":
        return set()
    graph = graph_name(choice.engine, choice.precision)
    return {graph, graph.replace(".xml", ".bin")}


def write_choice(converted: Path, engine: str, choice: Choice, threads: int | None = None) -> None:
    """Keep a choice, for this machine and so many threads, and drop the graphs that no choice needs."""
    kept = {"machine": machine(threads), "choice": choice.as_dict()}
    write_json(choice_file(converted, engine, threads), kept)
    needed: set[str] = set()
    for path in converted.glob("*.json"):
        _, _, number = path.stem.partition(THREADS)
        if other := choice_in(path, int(number) if number.isdecimal() else None):
            needed |= graph_files(other)
    for path in converted.iterdir():
        if path.suffix in (".xml", ".bin", ".onnx") and path.name not in needed:
            path.unlink()
    for path in [path for path in converted.iterdir() if path.is_dir()]:  # made in a hurry, or left by what was killed
        remove(path)


def convert(classifier: Classifier, converted: Path, engine: str, precision: str, examples: list[np.ndarray]) -> None:
    """Make the graph of an engine at a precision, unless it is there or the engine needs none; int8 is fitted to `examples`."""
    if engine == "torch" or (converted / graph_name(engine, precision)).is_file():
        return
    made = {"openvino": to_openvino, "onnxruntime": to_onnx}[engine]
    made(classifier, converted, precision, examples)


def to_openvino(classifier: Classifier, converted: Path, precision: str, examples: list[np.ndarray]) -> None:
    """An OpenVINO graph in fp32, or quantised from it by NNCF (symmetric weights, activations fitted to the examples)."""
    import openvino

    if precision != "int8":
        sizes = [openvino.PartialShape([-1])] * len(Row._fields)
        graph = openvino.convert_model(packed(classifier), example_input=example(), input=sizes)
        for place, name in zip(graph.inputs, Row._fields, strict=True):
            place.get_tensor().set_names({name})
    else:
        import nncf

        to_openvino(classifier, converted, "fp32", [])
        rows = [row._asdict() for row in calibration_rows(examples)]
        nncf.set_log_level(logging.ERROR)
        graph = nncf.quantize(
            openvino.Core().read_model(str(converted / graph_name("openvino", "fp32"))),
            nncf.Dataset(rows),
            subset_size=len(rows),
            model_type=nncf.ModelType.TRANSFORMER,
        )
    name = graph_name("openvino", precision)
    with tempfile.TemporaryDirectory(dir=converted) as part:
        openvino.save_model(graph, str(Path(part) / name), compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            (Path(part) / name).with_suffix(suffix).replace((converted / name).with_suffix(suffix))


def to_onnx(classifier: Classifier, converted: Path, precision: str, examples: list[np.ndarray]) -> None:
    """An ONNX graph in fp32, or with int8 weights and activations scaled as they come (dynamic quantisation)."""
    import torch

    target = converted / graph_name("onnxruntime", precision)
    if precision == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        to_onnx(classifier, converted, "fp32", examples)
        with atomic(target) as part:
            quantize_dynamic(
                converted / graph_name("onnxruntime", "fp32"),
                part,
                weight_type=QuantType.QInt8,
                per_channel=True,
                reduce_range=False,
            )
        return
    axes = {name: {0: "width"} for name in Row._fields} | {"first": {0: "reviews"}, "logits": {0: "reviews"}}
    with atomic(target) as part:
        torch.onnx.export(
            packed(classifier),
            example(),
            str(part),
            input_names=list(Row._fields),
            output_names=["logits"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )


def packed(classifier: Classifier) -> Any:
    """The model as it reads packed rows, with dropout off."""
    from sentiment.bert import row_reader

    return row_reader(classifier.model).eval()


def example() -> tuple[Any, ...]:
    """A packed row of two short reviews, as tensors."""
    import torch

    return tuple(torch.from_numpy(values) for values in pack([np.arange(1, 20), np.arange(1, 8)]))


def calibration_rows(examples: list[np.ndarray]) -> list[Row]:
    """Packed rows of the examples, at most 64."""
    chosen = bins([len(ids) for ids in examples], engines.ROW_TOKENS)[:CALIBRATION_ROWS]
    return [pack([examples[k] for k in indices]) for indices in chosen]
