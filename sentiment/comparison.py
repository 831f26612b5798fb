"""Whether two models differ on the same reviews by more than chance: paired intervals, p-values, and where they disagree.

A table of predictions has a row for each review: review_id, label and prediction (names of classes), and probability_CLASS
for each class, as stages/evaluate.py writes it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from sentiment.errors import DataError
from sentiment.metrics import delong

RESAMPLES = 10_000
LOSS_CHUNK = 250  # resamples of the loss drawn together: some 20 MB for 10,000 reviews
SMALLEST = 1e-12  # probabilities are kept above this in logarithms


class Difference(NamedTuple):
    """A metric of two models, A - B with its 95% interval, its p-value, and the share of resamples in which A is better."""

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    a_better: float


class McNemar(NamedTuple):
    """Reviews that only A has right, that only B has right, and the two-sided p-value of the exact test."""

    only_a: int
    only_b: int
    p: float


@dataclass(frozen=True)
class Pair:
    """Two models' answers for the same reviews: classes int [reviews], probabilities float [reviews, classes]."""

    names: list[str]
    review_ids: np.ndarray
    labels: np.ndarray
    a: np.ndarray
    b: np.ndarray
    a_values: np.ndarray
    b_values: np.ndarray


def pair(a: pd.DataFrame, b: pd.DataFrame) -> Pair:
    """The reviews that two tables of predictions share.

    Raises DataError if the tables are of other classes, share no review, or disagree about a review's label.
    """
    names = [name.removeprefix("probability_") for name in a if name.startswith("probability_")]
    others = {name.removeprefix("probability_") for name in b if name.startswith("probability_")}
    if set(names) != others:
        raise DataError(
            f"one tells {', '.join(names)}, the other {', '.join(sorted(others))}: models of other classes are not compared"
        )
    shared = a.merge(b, on="review_id", suffixes=("_a", "_b"), validate="one_to_one")
    if shared.empty:
        raise DataError(f"of {len(a)} and {len(b)} test reviews they share none; evaluate both on the same test split")
    if (shared["label_a"] != shared["label_b"]).any():
        number = int((shared["label_a"] != shared["label_b"]).sum())
        raise DataError(f"{number} reviews have another label in the one than in the other; evaluate both on the same labels")
    index = {name: k for k, name in enumerate(names)}
    classes = {column: shared[column].map(index).to_numpy() for column in ("label_a", "prediction_a", "prediction_b")}
    values = [shared[[f"probability_{name}_{end}" for name in names]].to_numpy() for end in "ab"]
    return Pair(names, shared["review_id"].to_numpy(), *classes.values(), *values)


def differences(of: Pair, resamples: int = RESAMPLES, seed: int = 0) -> list[Difference]:
    """Accuracy, F1 (by support, macro, of each class), loss and, with two classes, the area under the ROC curve."""
    found = [*of_decisions(of, resamples, seed), of_loss(of, resamples, seed)]
    return [*found, of_roc_auc(of)] if len(of.names) == 2 else found


def of_decisions(of: Pair, resamples: int = RESAMPLES, seed: int = 0) -> list[Difference]:
    """The metrics that follow from the two confusion matrices, by the paired bootstrap stratified by true class.

    Resampling a class's reviews with replacement draws the counts of its pairs of answers (A's, B's) from a multinomial
    distribution, so that these are drawn directly (Efron & Tibshirani 1993, percentile interval). p is twice the smaller
    share of resamples on one side of 0, a tie counted half.
    """
    rng, classes = np.random.default_rng(seed), len(of.names)
    counts = np.zeros((classes, classes, classes), np.int64)  # true class, A's answer, B's answer
    np.add.at(counts, (of.labels, of.a, of.b), 1)
    support = counts.sum(axis=(1, 2))
    drawn = np.stack(
        [rng.multinomial(n, row.ravel() / max(1, n), size=resamples) for n, row in zip(support, counts, strict=True)], axis=1
    ).reshape(resamples, classes, classes, classes)
    scores = [
        decision_scores(matrix, of.names) for matrix in (counts.sum(2)[None], counts.sum(1)[None], drawn.sum(3), drawn.sum(2))
    ]
    return [
        summary(name, float(scores[0][name][0]), float(scores[1][name][0]), scores[2][name] - scores[3][name])
        for name in scores[0]
    ]


def decision_scores(matrices: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """Metrics of confusion matrices [matrices, classes, classes], rows by true class: each [matrices]."""
    support = matrices[0].sum(axis=1)
    hits = np.diagonal(matrices, axis1=1, axis2=2)
    f1 = 2 * hits / np.maximum(1, matrices.sum(axis=1) + support)
    scores = {"accuracy": hits.sum(axis=1) / support.sum(), "f1": f1 @ (support / support.sum()), "f1_macro": f1.mean(axis=1)}
    return scores | {f"f1_{name}": f1[:, k] for k, name in enumerate(names)}


def of_loss(of: Pair, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """The mean negative log-likelihood in nats, by the paired bootstrap. A is better where its loss is less."""
    rng, rows = np.random.default_rng(seed), np.arange(len(of.labels))
    a, b = (-np.log(np.maximum(values[rows, of.labels], SMALLEST)) for values in (of.a_values, of.b_values))
    samples = []
    for start in range(0, resamples, LOSS_CHUNK):
        chosen = rng.integers(len(rows), size=(min(LOSS_CHUNK, resamples - start), len(rows)))
        samples.append((a - b)[chosen].mean(axis=1))
    found = summary("loss", float(a.mean()), float(b.mean()), np.concatenate(samples))
    return found._replace(a_better=1 - found.a_better)


def summary(name: str, a: float, b: float, samples: np.ndarray) -> Difference:
    """A metric's difference, from the differences of the resamples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    above = float((samples > 0).mean() + 0.5 * (samples == 0).mean())
    p = min(1.0, 2 * min(above, 1 - above))
    return Difference(name, a, b, a - b, float(low), float(high), max(p, 1 / len(samples)), above)


def of_roc_auc(of: Pair) -> Difference:
    """The area under the ROC curve of the last of two classes, by DeLong's test (DeLong et al. 1988; Sun & Xu 2014).

    p is 1 where the two models order all reviews alike.
    """
    positive = of.labels == 1
    parts = [delong(values[:, 1], positive) for values in (of.a_values, of.b_values)]
    (a, a_positive, a_negative), (b, b_positive, b_negative) = parts
    over_positive, over_negative = a_positive - b_positive, a_negative - b_negative
    deviation = float(np.sqrt(over_positive.var(ddof=1) / len(over_positive) + over_negative.var(ddof=1) / len(over_negative)))
    if deviation == 0:
        return Difference("roc_auc", a, b, a - b, a - b, a - b, 1.0, 0.5)
    half = float(stats.norm.ppf(0.975)) * deviation
    better = float(stats.norm.cdf((a - b) / deviation))
    return Difference("roc_auc", a, b, a - b, a - b - half, a - b + half, 2 * min(better, 1 - better), better)


def mcnemar(of: Pair) -> McNemar:
    """McNemar's exact test: whether one of the two has more reviews right that the other has wrong (McNemar 1947)."""
    a, b = of.a == of.labels, of.b == of.labels
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return McNemar(only_a, only_b, p)


def disagreements(of: Pair) -> pd.DataFrame:
    """The reviews for which the two answer differently, those where both are surest first.

    Columns: review_id, label, a, b (names of classes), a_confidence, b_confidence (probability of the answer).
    """
    rows = np.flatnonzero(of.a != of.b)
    names = np.array(of.names, dtype=object)
    found = pd.DataFrame(
        {
            "review_id": of.review_ids[rows],
            "label": names[of.labels[rows]],
            "a": names[of.a[rows]],
            "b": names[of.b[rows]],
            "a_confidence": of.a_values[rows, of.a[rows]],
            "b_confidence": of.b_values[rows, of.b[rows]],
        }
    )
    order = (found["a_confidence"] + found["b_confidence"]).sort_values(ascending=False, kind="stable").index
    return found.loc[order].reset_index(drop=True)
