"""What pre-training and more reviews are worth: the baseline, BERT from scratch and from checkpoints, on few reviews and many.

Run: python -m bench.results models/base [OTHER …]      after `dvc repro prepare`, with prepare.shares as the test set is to be

Each way is trained on the first N reviews (by the hash of their text) of data/prepared/train.parquet, with the parameters of
params.yaml but the epochs, which --epochs gives for each N; the epoch and the threshold are chosen on validation, and the table
is of the test split. `from scratch` is the BERT of the sizes in params.yaml's section model. reviews/s are those of the test
split on this machine with torch, batched without padding.
"""

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sentiment import calibration, checkpoint, metrics, params, text, tokens, training
from sentiment.classifier import logits
from sentiment.feed import Feed
from sentiment.files import atomic
from sentiment.logs import run_stage, timed
from sentiment.loop import seed

PREPARED = Path("data/prepared")
SPLITS = ("train", "validation", "test")
BASELINE, SCRATCH = "TF-IDF and logistic regression", "from scratch"
SIZES = (500, 2000, 20000, 0)
EPOCHS = (12, 8, 4, 3)
RESAMPLES = 10_000
HEADER = ("way", "reviews", "accuracy", "macro-F1", "95%", "ROC-AUC", "parameters", "training s", "reviews/s")
log = logging.getLogger("stages.bench-results")


@dataclass(frozen=True)
class Scored:
    """What a way says of validation and of test: probabilities [reviews, classes]; parameters; seconds to train and to score."""

    validation: np.ndarray
    test: np.ndarray
    parameters: int
    seconds: float
    scoring: float


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m bench.results", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="folders of checkpoints to begin with")
    made.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="reviews to train on; 0: all")
    made.add_argument("--epochs", type=int, nargs="+", default=EPOCHS, metavar="N", help="for each of the sizes")
    made.add_argument("--seeds", type=int, default=1)
    made.add_argument("--without", nargs="*", default=[], choices=[BASELINE, SCRATCH], help="ways to leave out")
    made.add_argument("--scratch-lr", type=float, default=5e-4, help="learning rate of `from scratch`; others have train.lr")
    made.add_argument("--output", type=Path, default=Path("bench/results-new.md"))
    options = made.parse_args()
    if len(options.sizes) != len(options.epochs):
        made.error("give --epochs a number for each of --sizes")
    settings = params.load()
    frames = {name: pd.read_parquet(PREPARED / f"{name}.parquet", columns=["review_id", "text", "label"]) for name in SPLITS}
    frames["train"] = frames["train"].sort_values("review_id", kind="stable")  # its ids are hashes
    rows: list[str] = []
    for size, epochs in zip(options.sizes, options.epochs, strict=True):
        parts = frames | {"train": frames["train"].iloc[: size or None]}
        for way in (BASELINE, SCRATCH, *options.checkpoints):
            for number in range(options.seeds if way not in options.without else 0):
                with timed(log, f"{way}, {len(parts['train'])} reviews"):
                    rows.append(row(way, parts, measure(way, parts, changed(settings, way, epochs, number, options)), settings))
                log.info(rows[-1])
                with atomic(options.output) as part:
                    part.write_text(page(rows, frames["test"], settings), encoding="utf-8")
    print("\n".join(rows))


def changed(settings: params.Params, way: str, epochs: int, number: int, options: argparse.Namespace) -> params.Params:
    """The parameters of a way."""
    values = settings.model_dump()
    values["train"] |= {"epochs": epochs, "patience": None, "seed": number, "checkpoint_every": 10**9}
    values["model"]["checkpoint"] = None if way in (BASELINE, SCRATCH) else way
    if way == SCRATCH:
        values["train"] |= {"lr": options.scratch_lr, "layer_decay": 1.0}
    result: params.Params = params.check(values)
    return result


def measure(way: str, parts: dict[str, pd.DataFrame], settings: params.Params) -> Scored:
    """Train a way, and let it score."""
    return baseline(parts) if way == BASELINE else fine_tuned(parts, settings)


def baseline(parts: dict[str, pd.DataFrame]) -> Scored:
    """TF-IDF of words and word pairs with logistic regression, as bench.baseline has it."""
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=2000))
    start = time.perf_counter()
    model.fit(parts["train"]["text"], parts["train"]["label"])
    trained = time.perf_counter()
    test = model.predict_proba(parts["test"]["text"])
    scored = time.perf_counter()
    size = model[-1].coef_.size + 1
    return Scored(model.predict_proba(parts["validation"]["text"]), test, size, trained - start, scored - trained)


def fine_tuned(parts: dict[str, pd.DataFrame], settings: params.Params) -> Scored:
    """BERT, by the project's own steps."""
    names = list(settings.prepare.labels)
    with TemporaryDirectory(prefix="bench-results-") as folder:
        told = {name: [text.tell_emoji(value, settings.tokenize.emoji) for value in part["text"]] for name, part in parts.items()}
        checkpoint.save_tokenizer(settings.model, told["train"], Path(folder) / "tokenizer")
        tokenizer = tokens.load_tokenizer(Path(folder) / "tokenizer", settings.tokenize.max_length)
        rows = {
            name: tokens.ragged(tokens.encode(tokenizer, told[name]), part["label"].to_numpy(), tokenizer.get_vocab_size())
            for name, part in parts.items()
        }
        seed(settings.train.seed)
        model: Any = checkpoint.load_model(settings.model, names, tokenizer, settings.tokenize.max_length)
        run = training.FineTuning(
            model, rows["train"], rows["validation"], tokenizer.token_to_id("[PAD]") or 0, names, settings.train,
            Path(folder) / "run", "bench", lambda *_: None,
        )  # fmt: skip
        result = run.run()
        run.model.eval()
        found = {}
        for name in ("validation", "test"):
            start = time.perf_counter()
            feed = Feed(rows[name], run.device, run.feed.pad_id, run.feed.packed)
            with run.accelerator.autocast():
                outputs = logits(run.module, feed, feed.in_order(settings.evaluate.batch_tokens), len(names))
            found[name] = outputs.float().cpu().numpy()
            seconds = time.perf_counter() - start
    bias = calibration.fit_bias(found["validation"], parts["validation"]["label"].to_numpy().astype(int))
    values = {name: calibration.probabilities(outputs, *(bias or (1.0, None))) for name, outputs in found.items()}
    return Scored(values["validation"], values["test"], model.num_parameters(), result.seconds, seconds)


def row(way: str, parts: dict[str, pd.DataFrame], found: Scored, settings: params.Params) -> str:
    """A line of the table: the threshold is the best one on validation."""
    names, labels = list(settings.prepare.labels), parts["test"]["label"].to_numpy().astype(int)
    threshold = calibration.fit_threshold(found.validation, parts["validation"]["label"].to_numpy().astype(int))
    predictions = calibration.decide(found.test, threshold)
    scores = metrics.score(found.test, predictions, labels, names)
    scores |= metrics.intervals(predictions, labels, len(names), RESAMPLES)
    cells = (
        way, len(parts["train"]), f"{scores['accuracy']:.4f}", f"{scores['f1_macro']:.4f}",
        f"{scores['f1_macro_low']:.4f} to {scores['f1_macro_high']:.4f}", f"{scores['roc_auc']:.4f}", f"{found.parameters:,}",
        f"{found.seconds:.0f}", f"{len(labels) / found.scoring:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def page(rows: list[str], test: pd.DataFrame, settings: params.Params) -> str:
    """The page, in Markdown."""
    counts = ", ".join(f"{(test['label'] == k).sum()} {name}" for k, name in enumerate(settings.prepare.labels))
    lines = [
        "# What pre-training and more reviews are worth",
        "",
        f"{len(test)} test reviews ({counts}). By `python -m bench.results`.",
    ]
    return "\n".join([*lines, "", f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}", *rows]) + "\n"


if __name__ == "__main__":
    run_stage("bench-results", main)
