"""Fine-tune the classifier, keep its best epoch, and fit temperature, bias and threshold on validation.

From: data/tokens, metrics/data.json, and the weights of `model.checkpoint` (random ones if there is none);
      with train.ensemble, the models of other versions, experiments or revisions instead
To:   models/sentiment (weights, tokenizer, inference.json, metadata.json, README.md), metrics/train (by DVCLive);
      models/checkpoint holds what an interrupted run resumes from, and goes when the run is done
Run:  python -m stages.train, or accelerate launch -m stages.train
"""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState

from sentiment import card, checkpoint, devices, fitting, members, params, training
from sentiment.classifier import pick_device
from sentiment.files import atomic, read_json, remove, write_json
from sentiment.live import recorder, show
from sentiment.logs import run_stage, timed
from sentiment.loop import seed, state_of
from sentiment.tokens import Tokens, load_tokenizer

TOKENS = Path("data/tokens")
DATA = Path("metrics/data.json")
MODEL = Path("models/sentiment")
CHECKPOINT = Path("models/checkpoint")
LIVE = Path("metrics/train")
log = logging.getLogger("stages.train")


def main() -> None:
    settings, started = params.load(), datetime.now(UTC)
    state = state_of(settings.train)
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
    """Write the average of other models as if it had been trained: temperature, bias and threshold are its own."""
    data = read_json(DATA)
    with members.fetched(names) as found, recorder(PartialState(), LIVE) as live:
        members.check(found, settings, TOKENS / "tokenizer" / "tokenizer.json", data)
        model = members.average(found, list(settings.prepare.labels))
        log.info("the average of %s: %s parameters", ", ".join(names), f"{model.num_parameters():,}")
        seconds = sum(read_json(member.folder / "metadata.json")["training_seconds"] for member in found)
        result = training.Result([], 0, devices.describe(pick_device("cpu")), "fp32", seconds)
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
    """What decides a run's result: see training.fingerprint."""
    return training.fingerprint(settings, [Path(__file__), *(path for path in TOKENS.rglob("*") if path.is_file())])


def save(
    model: Any, validation: Tokens, settings: params.Params, result: training.Result, started: datetime,
    averaged: list[dict[str, str]] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Write the model folder, whole or not at all: weights, tokenizer, what was fitted on validation, metadata, card.

    Returns the scores on validation.
    """
    with atomic(MODEL) as part:
        _, scores = fitting.save(model, TOKENS / "tokenizer", validation, settings, part)
        metadata = describe_run(settings, result, scores, started) | {
            "parameters_count": model.num_parameters(),
            "members": averaged,
        }
        write_json(part / "metadata.json", metadata)
        (part / "README.md").write_text(card.write(metadata), encoding="utf-8")
    log.info("validation, calibrated: macro-F1 %.4f, loss %.4f", scores["f1_macro"], scores["loss"])
    return scores


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
            "licence": checkpoint.licence(settings.model),
        },
        "labels": list(settings.prepare.labels),
        "data": read_json(DATA),
        "validation": scores,
        "best_epoch": result.best_epoch,
        "history": result.history,
        "device": result.device,
        "precision": result.precision,
        "versions": training.versions(),
        "params": settings.model_dump(),
    }


if __name__ == "__main__":
    run_stage("train", main)
