"""Find the model that is to be served, fetch it, and choose its engine: in a process of its own, which then ends.

DVC, torch, transformers and NNCF, which that takes, would weigh on the process that serves, and one of them might fail.

Run: python -m serve.prepare --output prepared.json --model production
"""

import argparse
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from sentiment import conversion, engines, logs, selection
from sentiment.engines import Choice
from sentiment.errors import ProjectError
from sentiment.files import write_json
from sentiment.logs import first_line
from sentiment.registry import COPIES, Registry, Version

SHOWN_METRICS = ("f1_macro", "f1_macro_low", "f1_macro_high", "f1", "accuracy", "roc_auc", "reviews")
log = logging.getLogger("serve.prepare")


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # so that nothing half-made is left
    logging.basicConfig(level=logging.INFO, format=logs.FORMAT)
    try:
        write_json(options.output, prepare(options))
    except ProjectError as error:
        write_json(options.output, {"error": str(error)})
        sys.exit(str(error))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m serve.prepare", description=__doc__)
    made.add_argument("--output", type=Path, required=True, help="JSON file to write")
    made.add_argument("--model", default="production", help="a stage, a version, or a model folder")
    made.add_argument("--repo", default=".", help="a clone's folder, or a git URL")
    made.add_argument("--engine", default="auto", choices=["auto", *engines.ENGINES])
    made.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    made.add_argument("--cache", type=Path, default=conversion.CACHE)
    made.add_argument("--copies", type=Path, default=COPIES)
    made.add_argument("--reviews", type=Path, help="labelled reviews, instead of the version's own test split")
    made.add_argument("--threads", type=int)
    made.add_argument("--quick", action="store_true", help="do not measure engines if that was not done before")
    return made


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """What the serving process needs to load the model; see Prepared in serve/model.py for the keys."""
    registry, version, folder = locate(options.model, options.repo, options.copies)
    found = {"version": version.name if version else folder.name, "commit": version.commit if version else None}
    choice, converted, final = choose(options, registry, version, folder)
    return found | {
        "folder": str(folder.resolve()),
        "converted": str(converted.resolve()),
        "choice": choice.as_dict(),
        "final": final,
        "metrics": metrics(registry, version),
    }


def locate(name: str, repo: str, copies: Path) -> tuple[Registry | None, Version | None, Path]:
    """The registry, the version and the folder of a model; the first two are None for a plain folder."""
    if Path(name).is_dir():
        return None, None, Path(name)
    registry = Registry.open(repo, copies)
    registry.fetch()
    version = registry.find(name)
    return registry, version, registry.folder(version)


def choose(
    options: argparse.Namespace, registry: Registry | None, version: Version | None, folder: Path
) -> tuple[Choice, Path, bool]:
    """The engine, the folder of its graph, and whether that is final.

    With --quick, what was not measured before is served in fp32 for now, from a folder of its own: another process may be
    measuring the same model for minutes.
    """
    converted = conversion.folder_of(options.cache, folder)
    if gpu := on_gpu(options.device, options.engine):
        return gpu, converted, True
    if kept := selection.known(converted, options.engine, options.reviews, options.threads):
        return kept, converted, True
    if options.quick:
        return *selection.quick(folder, converted, options.engine), False
    made = selection.choose_once(folder, converted, options.engine, registry, version, options.reviews, options.threads)
    return made, converted, True


def on_gpu(device: str, engine: str) -> Choice | None:
    """The choice of torch on a CUDA GPU, or None where there is none or not wanted; raises ProjectError if it must be there."""
    wanted = engine in ("auto", "torch") and Path("/dev/nvidiactl").exists()
    if device == "cpu" or (device == "auto" and not wanted):
        return None
    import torch

    from sentiment.classifier import pick_device

    if device == "auto" and not torch.cuda.is_available():
        return None
    pick_device("cuda")
    precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return Choice("torch", precision, why="a CUDA GPU is here", device="cuda")


def metrics(registry: Registry | None, version: Version | None) -> dict[str, Any] | None:
    """The headline metrics of a version on its test split, or None for a plain folder."""
    if not registry or not version:
        return None
    try:
        found = json.loads(registry.read(version, "metrics/test.json"))
    except (ProjectError, ValueError) as error:
        log.warning("%s has no metrics/test.json: %s", version.name, first_line(error))
        return None
    return {name: found[name] for name in SHOWN_METRICS if name in found}


if __name__ == "__main__":
    main()
