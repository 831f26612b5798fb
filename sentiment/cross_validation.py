"""k-fold cross-validation of the train and validation splits together: a model a fold, scored once on what it never saw.

The test split is not read. Each fold's model begins, is trained and is fitted as the train stage's is, with the same parameters
and the same seed; the tokenizer is that of the run. `models/folds` holds the rows of the folds that are done and the checkpoint
of the one under way, so that an interrupted run goes on where it was.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from accelerate import PartialState

from sentiment import checkpoint, fitting, folds, metrics, training
from sentiment.classifier import pick_device
from sentiment.files import read_json, remove, write_json
from sentiment.loop import seed
from sentiment.params import Params
from sentiment.tokens import Tokens, joined, load_tokenizer

PREPARED = Path("data/prepared")
TOKENS = Path("data/tokens")
FOLDS = Path("models/folds")
SPLITS = ("train", "validation")
log = logging.getLogger(__name__)


def run(settings: Params, count: int) -> list[dict[str, Any]]:
    """A row a fold: fold (from 1), train, validation, held_out (all in reviews), best_epoch, and folds.METRICS on those held out.

    Raises DataError if a part of a fold lacks a class.
    """
    PartialState(cpu=pick_device(settings.train.device).type == "cpu")
    tokens = joined(Tokens.load(TOKENS / f"{name}.safetensors") for name in SPLITS)
    plan = planned(settings, count, tokens.labels)
    mark = fingerprint(settings, count)
    keep_only_rows_of(mark)
    return [row_of(number, fold, tokens, settings, mark) for number, fold in enumerate(plan, 1)]


def planned(settings: Params, count: int, labels: np.ndarray) -> list[folds.Fold]:
    """The folds; what is not trained on is sampled to prepare.shares if there are any, as the splits are."""
    rules = settings.prepare
    reviews = read(rules.group)
    plan = folds.cut(folds.names(reviews, rules.group), count, rules.validation)
    if rules.shares is not None:
        shares = [rules.shares[name] for name in rules.labels]
        plan = [folds.at_shares(fold, labels, reviews["review_id"], shares) for fold in plan]
    folds.check(plan, labels, list(rules.labels))
    return plan


def read(group: str | None) -> pd.DataFrame:
    """review_id and, where the source has it, the group of every review, in the order of its tokens."""
    tables = [pq.read_table(PREPARED / f"{name}.parquet") for name in SPLITS]
    columns = [name for name in ("review_id", group) if name in tables[0].column_names]
    return pd.concat([table.select(columns).to_pandas(integer_object_nulls=True) for table in tables], ignore_index=True)


def fingerprint(settings: Params, count: int) -> str:
    """What decides the rows."""
    files = [*TOKENS.glob("tokenizer/*"), *(TOKENS / f"{name}.safetensors" for name in SPLITS)]
    files += [PREPARED / f"{name}.parquet" for name in SPLITS]
    rules = settings.prepare
    return training.fingerprint(
        settings, files, count, rules.group, rules.validation, rules.shares, settings.evaluate.calibration_bins
    )


def keep_only_rows_of(mark: str) -> None:
    """Clear what a cross-validation of other parameters, data, code or versions left."""
    path = FOLDS / "fingerprint"
    if path.is_file() and path.read_text() == mark:
        return
    remove(FOLDS)
    FOLDS.mkdir(parents=True)
    path.write_text(mark)


def row_of(number: int, fold: folds.Fold, tokens: Tokens, settings: Params, mark: str) -> dict[str, Any]:
    """The row of a fold: what an interrupted run left, or else by training."""
    done, folder = FOLDS / f"{number}.json", FOLDS / str(number)
    if not done.is_file():
        sizes = {name: int(chosen.sum()) for name, chosen in fold._asdict().items()}
        log.info("fold %d: %s", number, ", ".join(f"{name} {size}" for name, size in sizes.items()))
        write_json(done, {"fold": number} | sizes | scores(fold, tokens, settings, folder, mark))
    remove(folder)
    row = read_json(done)
    log.info("fold %d: %s", number, ", ".join(f"{name} {row[name]:.4f}" for name in folds.METRICS))
    return row


def scores(fold: folds.Fold, tokens: Tokens, settings: Params, folder: Path, mark: str) -> dict[str, float]:
    """Train and fit a model; its best epoch, and folds.METRICS on the reviews held out."""
    train, validation, held_out = (tokens.where(chosen) for chosen in fold)
    tokenizer, names = load_tokenizer(TOKENS / "tokenizer", settings.tokenize.max_length), list(settings.prepare.labels)
    seed(settings.train.seed)
    model = checkpoint.load_model(settings.model, names, tokenizer, settings.tokenize.max_length)
    pad_id = tokenizer.token_to_id("[PAD]") or 0
    result = training.FineTuning(
        model, train, validation, pad_id, names, settings.train, folder / "checkpoint", mark, lambda *_: None
    ).run()
    classifier, _ = fitting.save(model, TOKENS / "tokenizer", validation, settings, folder / "model")
    values = classifier.token_probabilities(held_out, settings.evaluate.batch_tokens)
    labels = held_out.labels.astype(int)
    found = metrics.score(values, classifier.decide(values), labels, names)
    found["expected_calibration_error"] = metrics.expected_calibration_error(values, labels, settings.evaluate.calibration_bins)
    return {"best_epoch": result.best_epoch} | {name: round(found[name], 6) for name in folds.METRICS}
