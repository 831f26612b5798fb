"""What computes a model's logits: torch, ONNX Runtime or OpenVINO, behind one small interface.

OpenVINO and ONNX Runtime read a packed graph (sentiment/bert.py) that sentiment/conversion.py made from a model folder;
torch reads the model folder itself, and so serves any architecture, and GPUs.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sentiment.errors import CheckpointError
from sentiment.logs import first_line
from sentiment.packing import Row, bins, capacity, pack, row_width

if TYPE_CHECKING:
    from sentiment.classifier import Classifier

ENGINES = ("openvino", "onnxruntime", "torch")
ROW_TOKENS = 256  # of a packed row: wide enough that matrices fill the cores, narrow enough that attention stays cheap
LANE_TOKENS = 192  # of a row that one thread computes: a wider one is no faster
GPU_TOKENS = 16_384
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class Engine(Protocol):
    """A loaded model. `logits` may be called by one thread at a time."""

    batch_tokens: int  # what one call best holds

    @property
    def lanes(self) -> Sequence["Engine"]:
        """The same model in narrow engines, if there are any: they compute side by side, but not beside this one."""
        ...

    def logits(self, reviews: Sequence[np.ndarray]) -> np.ndarray:
        """The logits of reviews that are token ids, [CLS] and [SEP] included: float32 [reviews, classes]."""
        ...


@dataclass(frozen=True)
class Choice:
    """Which engine a model is served by, and what was measured when it was chosen (see sentiment/selection.py)."""

    engine: str
    precision: str
    why: str
    device: str = "cpu"
    reviews_per_second: float | None = None
    macro_f1: float | None = None  # of this engine, on the labelled reviews
    macro_f1_change: float | None = None  # against the model in fp32, on the same reviews
    labels_changed: int | None = None
    reviews: int = 0  # how many labelled reviews that was measured on
    measured: tuple[dict[str, Any], ...] = ()  # each candidate with its numbers
    labelled: int = 0  # how many labelled reviews were there to measure on

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def load(folder: Path, converted: Path, choice: Choice, threads: int | None = None, lanes: int = 0) -> Engine:
    """The engine of a choice: from the model's folder for torch, else from the folder of its conversions.

    OpenVINO gets so many `lanes` beside it: they compute more than it does together, and a single review slower.

    Raises CheckpointError if that cannot be read.
    """
    threads = threads or cores()
    try:
        if choice.engine == "openvino":
            return OpenVino.load(converted / graph_name(choice.engine, choice.precision), choice.precision, threads, lanes)
        if choice.engine == "onnxruntime":
            return OnnxRuntime(converted / graph_name(choice.engine, choice.precision), threads)
    except Exception as error:
        raise CheckpointError(
            f"{choice.engine} cannot read its graph in {converted} ({first_line(error)}); remove that folder, and it is made anew"
        ) from error
    return torch_engine(folder, choice.precision, threads, choice.device)


def graph_name(engine: str, precision: str) -> str:
    """The file of an engine's graph; OpenVINO computes in bf16 from the same graph as in fp32."""
    kept = "int8" if precision == "int8" else "fp32"
    return f"{kept}.xml" if engine == "openvino" else f"{kept}.onnx"


class Packed:
    """An engine that reads packed rows, one after the other; a little more than a row is one, too, since each has its price."""

    batch_tokens = ROW_TOKENS
    lanes: Sequence["Packed"] = ()

    @property
    def widest(self) -> int:
        """The tokens of a row of several reviews at most."""
        return self.batch_tokens * 3 // 2

    def logits(self, reviews: Sequence[np.ndarray]) -> np.ndarray:
        """The logits of the reviews: float32 [reviews, classes]."""
        found: list[np.ndarray] = [np.empty(0)] * len(reviews)
        lengths = [len(ids) for ids in reviews]
        for chosen in bins(lengths, self.widest if sum(lengths) <= self.widest else self.batch_tokens):
            out = self.run(pack([reviews[k] for k in chosen]))
            for k, values in zip(chosen, out, strict=False):
                found[k] = values
        return np.stack(found).astype(np.float32)

    def run(self, row: Row) -> np.ndarray:
        """The logits of a row's reviews: [width // 4, classes]."""
        raise NotImplementedError

    def warm_up(self, longest: int) -> None:
        """Compute a row of every width that reviews of up to `longest` tokens can need: each is compiled when first seen."""
        for width in sorted({row_width(n) for n in range(1, max(self.widest, longest) + 1)}):
            part = max(1, width // capacity(width))
            self.run(pack([np.ones(part, np.int64)] * (width // part)))
        for lane in self.lanes:
            lane.warm_up(longest)


class OpenVino(Packed):
    """OpenVINO on the CPU. int8 and bf16 leave what they do not quantise to bf16, where the processor has it."""

    def __init__(self, request: Any, batch_tokens: int = ROW_TOKENS, lanes: Sequence[Packed] = ()) -> None:
        self.request, self.batch_tokens, self.lanes = request, batch_tokens, lanes

    @classmethod
    def load(cls, graph: Path, precision: str, threads: int, lanes: int = 0) -> "OpenVino":
        """The graph on all threads, and again as lanes, on its share of them each."""
        import openvino

        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": True})
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision != "fp32" and bf16_on_openvino() else "f32",
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # two services on one machine would be pinned to the same cores
        }
        whole = core.compile_model(str(graph), "CPU", settings | {"NUM_STREAMS": 1}).create_infer_request()
        if lanes < 2:
            return cls(whole)
        streams = core.compile_model(str(graph), "CPU", settings | {"NUM_STREAMS": lanes})
        return cls(whole, lanes=[cls(streams.create_infer_request(), LANE_TOKENS) for _ in range(lanes)])

    def run(self, row: Row) -> np.ndarray:
        """The logits of a row's reviews: [width // 4, classes]."""
        return self.request.infer(list(row), share_inputs=True)[0]


def without_telemetry() -> None:
    """Keep OpenVINO and NNCF from sending usage statistics: both do without the package that sends them."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    os.environ.setdefault("NNCF_CI", "1")


def bf16_on_openvino() -> bool:
    """Whether OpenVINO computes in bf16 on this processor natively."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OnnxRuntime(Packed):
    """ONNX Runtime on the CPU."""

    def __init__(self, graph: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        self.names = [each.name for each in self.session.get_inputs()]

    def run(self, row: Row) -> np.ndarray:
        """The logits of a row's reviews: [width // 4, classes]."""
        return self.session.run(None, dict(zip(self.names, row, strict=True)))[0]


class Torch:
    """A classifier of any architecture, in padded batches of like lengths."""

    lanes: Sequence[Engine] = ()

    def __init__(self, classifier: "Classifier") -> None:
        self.classifier = classifier
        self.batch_tokens = GPU_TOKENS if classifier.device.type == "cuda" else ROW_TOKENS

    def logits(self, reviews: Sequence[np.ndarray]) -> np.ndarray:
        """The logits of the reviews: float32 [reviews, classes]."""
        from sentiment.tokens import ragged

        labels = np.zeros(len(reviews), np.int16)
        tokens = ragged(iter(reviews), labels, self.classifier.tokenizer.get_vocab_size())
        return self.classifier.token_logits(tokens, self.batch_tokens)


def torch_engine(folder: Path, precision: str, threads: int, device: str) -> Torch:
    """A model folder on torch; raises CheckpointError if it cannot be loaded."""
    import torch

    from sentiment.classifier import Classifier

    torch.set_num_threads(threads)
    classifier = Classifier.load(folder, device)
    if precision == "bf16":
        classifier.model.to(torch.bfloat16)
    return Torch(classifier)


def cores() -> int:
    """The processors that this process may use: those of its affinity, and no more than its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP_QUOTA.read_text(encoding="ascii").split()
        return max(1, min(allowed, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no cgroups here, or `max`: no quota
        return allowed


without_telemetry()
