"""Which fold a review is held out in, and what the scores of all folds say together.

A fold is decided by the hash of a review's group, or of its text where it has none, as the split is (stages/prepare.py), but with
another salt: no group and no text stands in two folds, and more data moves no group to another one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t

from sentiment.errors import DataError
from sentiment.files import digest

METRICS = ("accuracy", "f1", "f1_macro", "roc_auc", "loss", "expected_calibration_error")
HASHES = 2**64
LEVEL = 0.95


class Fold(NamedTuple):
    """Which reviews a fold is trained, validated and scored on: bool [reviews] each."""

    train: np.ndarray
    validation: np.ndarray
    held_out: np.ndarray


def names(reviews: pd.DataFrame, group: str | None) -> pd.Series:
    """What decides a review's fold: its value of the column `group`, or its text's hash where it has none."""
    texts = "text:" + reviews["review_id"].astype("string")
    if group not in reviews:
        return texts
    return ("product:" + reviews[group].astype("string").replace("", pd.NA)).fillna(texts)


def hashes(of: pd.Series, salt: str) -> list[int]:
    """A number from 0 to 2**64 - 1 for each name."""
    return [int.from_bytes(digest(f"{salt}:{name}")) for name in of]


def cut(of: pd.Series, count: int, validation: float) -> list[Fold]:
    """The folds of reviews that go by these names; `validation` is the share of the names not held out that is validated on.

    Which those are goes around from fold to fold, so that what one validates on another one trains on.
    """
    place = np.array([number * count // HASHES for number in hashes(of, "fold")])
    turn = np.array([number / HASHES for number in hashes(of, "validation")])
    folds = []
    for index in range(count):
        held_out, validated = place == index, (turn + index / count) % 1 < validation
        folds.append(Fold(~held_out & ~validated, ~held_out & validated, held_out))
    return folds


def at_shares(fold: Fold, labels: np.ndarray, ids: pd.Series, shares: Sequence[float]) -> Fold:
    """The fold with as many of its validation and of its held out reviews as stand in these shares of the classes.

    Which ones stay is decided by the hash of their text, which `ids` are.
    """
    order = np.argsort(hashes(ids, "share"), kind="stable")
    parts = []
    for chosen in (fold.validation, fold.held_out):
        groups = [order[chosen[order] & (labels[order] == k)] for k in range(len(shares))]
        total = min(len(group) / share for group, share in zip(groups, shares, strict=True))
        kept = [group[: round(total * share)] for group, share in zip(groups, shares, strict=True)]
        parts.append(np.isin(np.arange(len(labels)), np.concatenate(kept)))
    return Fold(fold.train, *parts)


def check(folds: Sequence[Fold], labels: np.ndarray, classes: Sequence[str]) -> None:
    """Raise DataError unless every part of every fold holds every class."""
    for number, fold in enumerate(folds, 1):
        for part, chosen in fold._asdict().items():
            for index, name in enumerate(classes):
                if not (labels[chosen] == index).any():
                    raise DataError(
                        f"{part.replace('_', ' ')} of fold {number} has no review of class {name}; use more reviews, or lower "
                        "cross_validation.folds"
                    )


def summary(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each metric over the folds: mean, deviation (of a sample: ddof=1), and a 95% interval of the mean.

    Any two folds share most of what they are trained on, so their scores are not independent: the deviation understates how
    much a mean of other reviews would vary, and no unbiased estimate of that exists (Bengio & Grandvalet 2004, No Unbiased
    Estimator of the Variance of K-Fold Cross-Validation). The interval is the corrected resampled t (Nadeau & Bengio 2003,
    Inference for the Generalization Error): mean ± t(k - 1) · sqrt((1/k + n2/n1) · deviation²), where n2/n1, the reviews held
    out to the others, is 1/(k - 1) for k folds. It is a heuristic, and wide for few folds; it ends where the metric does.
    """
    count = len(rows)
    found: dict[str, float] = {"folds": count}
    for name in METRICS:
        values = np.array([row[name] for row in rows])
        mean, deviation = values.mean(), values.std(ddof=1)
        half = t.ppf((1 + LEVEL) / 2, count - 1) * deviation * np.sqrt(1 / count + 1 / (count - 1))
        most = np.inf if name == "loss" else 1.0
        low, high = np.clip([mean - half, mean + half], 0.0, most)
        row = {"mean": mean, "deviation": deviation, "mean_low": low, "mean_high": high}
        found |= {f"{name}_{key}": round(float(value), 6) for key, value in row.items()}
    return found
