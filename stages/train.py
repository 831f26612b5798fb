"""Fine-tune the classifier, keep its best epoch, and fit temperature and threshold on validation.

From: data/tokens, metrics/data.json, and the weights of `model.checkpoint` (random ones if there is none);
      with train.ensemble, the models of other versions, experiments or revisions instead
To:   models/sentiment (weights, tokenizer, inference.json, metadata.json, README.md), metrics/train (by DVCLive);
      models/checkpoint holds what an interrupted run resumes from, and goes when the run is done
Run:  python -m stages.train, or accelerate launch -m stages.train
"""

import hashlib
import importlib.metadata
import json
import logging
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from sentiment import calibration, card, checkpoint, devices, members, metrics, params, training
from sentiment.classifier import Classifier, Inference, pick_device
from sentiment.files import atomic, read_json, remove, sha256, write_json
from sentiment.live import recorder, show
from sentiment.logs import run_stage, timed
from sentiment.loop import seed
from sentiment.tokens import Tokens, load_tokenizer

TOKENS = Path("data/tokens")
DATA = Path("metrics/data.json")
MODEL = Path("models/sentiment")
CHECKPOINT = Path("models/checkpoint")
LIVE = Path("metrics/train")
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numpy")
log = logging.getLogger("stages.train")


def main() -> None:
    settings, started = params.load(), datetime.now(UTC)
    state = PartialState(cpu=pick_device(settings.train.device).type == "cpu")
    if not state.is_main_process:  # one of several devices: the first one speaks for all
        logging.getLogger("sentiment").setLevel(logging.WARNING)
        log.setLevel(logging.WARNING)
    if settings.train.ensemble:
        if state.is_main_process:
            save_average(settings, settings.train.ensemble, started)
        state.wait_for_everyone()
        return
    splits = {name: Tokens.load(TOKENS / f"{name}.safetensors") for name in ("train", "validation")}
    tokenizer = load_tokenizer(TOKENS / "tokenizer", settings.tokenize.max_length)
    seed(settings.train.seed)
    with timed(log, "loading the model"):
        model = checkpoint.load_model(settings.model, list(settings.prepare.labels), tokenizer, settings.tokenize.max_length)
    describe(model, splits, settings)
    with recorder(state, LIVE) as live:
        pad_id = tokenizer.token_to_id("[PAD]") or 0
        loop = training.FineTuning(
            model, splits["train"], splits["validation"], pad_id, list(settings.prepare.labels), settings.train,
            CHECKPOINT, fingerprint(settings), lambda step, values: show(live, step, values),
        )  # fmt: skip
        result = loop.run()
    if state.is_main_process:
        save(model, splits["validation"], settings, result, started)
        remove(CHECKPOINT)
    state.wait_for_everyone()


def save_average(settings: params.Params, names: list[str], started: datetime) -> None:
    """Write the average of other models as if it had been trained: temperature and threshold are its own."""
    data = read_json(DATA)
    with members.fetched(names) as found, recorder(PartialState(), LIVE) as live:
        members.check(found, settings, TOKENS / "tokenizer" / "tokenizer.json", data)
        model = members.average(found, list(settings.prepare.labels))
        log.info("the average of %s: %s parameters", ", ".join(names), f"{model.num_parameters():,}")
        seconds = sum(read_json(member.folder / "metadata.json")["training_seconds"] for member in found)
        result = training.Result([], 0, devices.describe(torch.device("cpu")), "fp32", seconds)
        described = [member.describe() for member in found]
        scores = save(model, Tokens.load(TOKENS / "validation.safetensors"), settings, result, started, described)
        show(live, 0, {f"validation/{name}": scores[name] for name in training.SHOWN})


def describe(model: Any, splits: dict[str, Tokens], settings: params.Params) -> None:
    """Log the data, the model and its size."""
    for name, split in splits.items():
        counts = ", ".join(f"{label} {(split.labels == k).sum()}" for k, label in enumerate(settings.prepare.labels))
        log.info("%s: %d reviews (%s), %.1f tokens a review", name, len(split), counts, split.lengths.mean())
    base = settings.model.checkpoint or "from scratch"
    log.info("%s (%s): %s parameters", type(model).__name__, base, f"{model.num_parameters():,}")
    log.info("parameters: %s", settings.train.model_dump_json())


def fingerprint(settings: params.Params) -> str:
    """What decides a run's result: parameters, data, code, versions, and how many devices share it."""
    parts: list[Any] = [settings.model.model_dump(), settings.train.model_dump(), list(settings.prepare.labels)]
    parts += [sha256(path) for path in sorted(TOKENS.rglob("*")) if path.is_file()]
    parts += [sha256(path) for path in sorted([Path(__file__), *Path(training.__file__).parent.glob("*.py")])]
    if settings.model.checkpoint and Path(settings.model.checkpoint).is_dir():
        files = sorted(path for path in Path(settings.model.checkpoint).iterdir() if path.is_file())
        parts += [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    parts += [versions(), str(PartialState().device), PartialState().num_processes, torch.get_num_threads()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of the packages that the result depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def save(
    model: Any, validation: Tokens, settings: params.Params, result: training.Result, started: datetime,
    averaged: list[dict[str, str]] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Write the model folder, whole or not at all: weights, tokenizer, what was fitted on validation, metadata, card.

    Returns the scores on validation.
    """
    with atomic(MODEL) as part:
        model.save_pretrained(part)
        for path in sorted((TOKENS / "tokenizer").iterdir()):
            shutil.copyfile(path, part / path.name)
        fixed = (settings.tokenize.max_length, settings.prepare.lowercase, settings.prepare.text)
        Inference(*fixed, temperature=1.0, threshold=None).save(part)
        scores, inference = fit(Classifier.load(part, settings.train.device), validation, settings)
        inference.save(part)
        metadata = describe_run(settings, result, scores, started) | {
            "parameters_count": model.num_parameters(),
            "members": averaged,
        }
        write_json(part / "metadata.json", metadata)
        (part / "README.md").write_text(card.write(metadata), encoding="utf-8")
    log.info("validation, calibrated: macro-F1 %.4f, loss %.4f", scores["f1_macro"], scores["loss"])
    return scores


def fit(classifier: Classifier, validation: Tokens, settings: params.Params) -> tuple[dict[str, float], Inference]:
    """Temperature and threshold for the model, and its scores on validation with them."""
    labels = validation.labels.astype(int)
    raw = classifier.token_logits(validation, settings.evaluate.batch_tokens)
    temperature = calibration.fit_temperature(raw, labels)
    values = calibration.probabilities(raw, temperature)
    threshold = calibration.fit_threshold(values, labels)
    log.info("fitted on validation: temperature %.3f, threshold %s", temperature, threshold)
    scores = metrics.score(values, calibration.decide(values, threshold), labels, classifier.labels)
    fixed = classifier.inference
    return scores, Inference(fixed.max_length, fixed.lowercase, fixed.text, temperature, threshold)


def describe_run(settings: params.Params, result: training.Result, scores: dict[str, float], started: datetime) -> dict[str, Any]:
    """What metadata.json says of how the model came to be."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "started": started.isoformat(timespec="seconds"),
        "training_seconds": round(result.seconds, 2),
        "base": {
            "checkpoint": settings.model.checkpoint,
            "revision": settings.model.revision,
            "commit": checkpoint.commit(settings.model),
        },
        "labels": list(settings.prepare.labels),
        "data": read_json(DATA),
        "validation": scores,
        "best_epoch": result.best_epoch,
        "history": result.history,
        "device": result.device,
        "precision": result.precision,
        "versions": versions(),
        "params": settings.model_dump(),
    }


if __name__ == "__main__":
    run_stage("train", main)
