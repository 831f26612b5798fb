"""What a set of probabilities is worth against the true labels, and the curves behind it.

`f1`, `precision` and `recall` are means over the classes weighted by their counts, `*_macro` unweighted means, `*_CLASS` one
class's. `loss` is the mean negative log-likelihood in nats. `roc_auc` and `pr_auc` (average precision) are unweighted means
over the classes, each against the rest: with two classes `roc_auc` is the usual one.
"""

from typing import TYPE_CHECKING

import numpy as np
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    matthews_corrcoef,
    precision_recall_curve,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
)

if TYPE_CHECKING:
    import pandas as pd

BANDS = ((0.8, "Excelente"), (0.7, "Bom"), (0.6, "Razoável"), (-1.0, "Baixo"))  # of f1, from the top
SMALLEST = 1e-12  # probabilities are kept above this in logarithms
RESAMPLES_AT_ONCE = 250  # of the bootstrap over reviews: some 40 MB for 10,000 reviews
Z = 1.959964  # of a two-sided 95% interval


def score(probabilities: np.ndarray, predictions: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, float]:
    """All metrics but the intervals: probabilities [reviews, classes], predictions and labels int [reviews]."""
    classes = np.arange(len(names))
    per_class = precision_recall_fscore_support(labels, predictions, labels=classes, zero_division=0)
    shares = per_class[3] / max(1, per_class[3].sum())
    result = {
        "reviews": len(labels),
        "loss": negative_log_likelihood(probabilities, labels),
        "accuracy": float((predictions == labels).mean()),
    }
    for name, values in zip(("precision", "recall", "f1"), per_class, strict=False):
        result |= {name: float(values @ shares), f"{name}_macro": float(values.mean())}
        result |= {f"{name}_{label}": float(value) for label, value in zip(names, values, strict=True)}
    one_hot = np.eye(len(names), dtype=int)[labels]
    precision_areas = [average_precision_score(one_hot[:, k], probabilities[:, k]) for k in classes]
    return result | {
        "roc_auc": float(np.mean([roc_auc_score(one_hot[:, k], probabilities[:, k]) for k in classes])),
        "pr_auc": float(np.mean(precision_areas)),
        **{f"pr_auc_{label}": float(area) for label, area in zip(names, precision_areas, strict=True)},
        "matthews": float(matthews_corrcoef(labels, predictions)),
    }


def f1_macro(predictions: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """The unweighted mean of the classes' F1."""
    hits = np.bincount(labels[predictions == labels], minlength=classes)
    told, support = (np.bincount(values, minlength=classes) for values in (predictions, labels))
    return float((2 * hits / np.maximum(1, told + support)).mean())


def rescore(predictions: "pd.DataFrame", names: list[str]) -> dict[str, float]:
    """The metrics of a table of predictions (see stages/evaluate.py), the classes in the order of `names`."""
    index = {name: k for k, name in enumerate(names)}
    values = predictions[[f"probability_{name}" for name in names]].to_numpy()
    chosen, labels = (predictions[column].map(index).to_numpy() for column in ("prediction", "label"))
    return score(values, chosen, labels, names)


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p(true class), in nats."""
    chosen = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(chosen, SMALLEST)).mean())


def band(f1: float) -> str:
    """Excelente from 0.8, Bom from 0.7, Razoável from 0.6, else Baixo."""
    return next(name for floor, name in BANDS if f1 >= floor)


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> list[dict[str, float]]:
    """Bins of equal width over the top probability: mean confidence, accuracy and number of reviews of each that has any."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        {
            "confidence": float(confidence[index == k].mean()),
            "accuracy": float(correct[index == k].mean()),
            "reviews": int((index == k).sum()),
        }
        for k in np.unique(index)
    ]


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Mean over reviews of |accuracy - confidence| of their bin (Guo et al. 2017, On Calibration of Modern Neural Networks)."""
    rows = reliability(probabilities, labels, bins)
    return sum(row["reviews"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / max(1, len(labels))


def intervals(predictions: np.ndarray, labels: np.ndarray, classes: int, resamples: int, seed: int = 0) -> dict[str, float]:
    """95% intervals of accuracy, f1 and f1_macro as `*_low` and `*_high`, by the bootstrap stratified by true class.

    Resampling a class's reviews with replacement draws its row of the confusion matrix from a multinomial distribution, so
    the matrices are drawn directly (Efron & Tibshirani 1993, percentile interval).
    """
    rng = np.random.default_rng(seed)
    matrix = confusion_matrix(labels, predictions, labels=np.arange(classes))
    support = matrix.sum(axis=1)
    drawn = np.stack(
        [rng.multinomial(n, row / max(1, n), size=resamples) for n, row in zip(support, matrix, strict=True)], axis=1
    )
    hits = np.diagonal(drawn, axis1=1, axis2=2)
    f1 = 2 * hits / np.maximum(1, drawn.sum(axis=1) + support)
    samples = {"accuracy": hits.sum(axis=1) / support.sum(), "f1": f1 @ (support / support.sum()), "f1_macro": f1.mean(axis=1)}
    return ends({name: np.percentile(values, [2.5, 97.5]) for name, values in samples.items()})


def probability_intervals(
    probabilities: np.ndarray, labels: np.ndarray, bins: int, resamples: int, seed: int = 0
) -> dict[str, float]:
    """95% intervals of roc_auc, loss and expected_calibration_error as `*_low` and `*_high`."""
    samples = of_reviews(probabilities, labels, bins, resamples, seed)
    bounds = {name: np.percentile(values, [2.5, 97.5]) for name, values in samples.items()}
    return ends(bounds | {"roc_auc": roc_auc_interval(probabilities, labels)})


def ends(bounds: dict[str, np.ndarray]) -> dict[str, float]:
    """Intervals by their ends' names."""
    return {f"{name}_{end}": float(bounds[name][k]) for name in bounds for k, end in enumerate(("low", "high"))}


def of_reviews(probabilities: np.ndarray, labels: np.ndarray, bins: int, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """What is a sum over reviews, in each resample stratified by true class: loss and expected_calibration_error, [resamples].

    A resample is how often each review was drawn; with these counts the sums of all bins are one product of matrices. The
    calibration error of few reviews is too high by its own noise, and so are both ends of its interval.
    """
    rng, number = np.random.default_rng(seed), len(labels)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    losses = -np.log(np.maximum(probabilities[np.arange(number), labels], SMALLEST))
    gaps = np.zeros((number, bins + 1))
    gaps[np.arange(number), np.minimum((confidence * bins).astype(int), bins - 1)] = correct - confidence
    gaps[:, bins] = losses
    strata = [np.flatnonzero(labels == k) for k in range(probabilities.shape[1])]
    sums = []
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        many = min(RESAMPLES_AT_ONCE, resamples - start)
        drawn = np.zeros((many, bins + 1))
        for rows in filter(len, strata):
            chosen = rng.integers(len(rows), size=(many, len(rows))) + len(rows) * np.arange(many)[:, None]
            counts = np.bincount(chosen.ravel(), minlength=many * len(rows)).reshape(many, len(rows))
            drawn += counts @ gaps[rows]
        sums.append(drawn)
    means = np.concatenate(sums) / number
    return {"loss": means[:, bins], "expected_calibration_error": np.abs(means[:, :bins]).sum(axis=1)}


def roc_auc_interval(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The 95% interval of roc_auc by DeLong's variance (DeLong et al. 1988), on the logit scale, so that it stays within 0 and 1.

    With several classes it is that of their mean, as if their areas rose and fell together: rather too wide than too narrow.
    """
    found = [delong(probabilities[:, k], labels == k) for k in range(probabilities.shape[1])]
    area = float(np.clip(np.mean([value for value, _, _ in found]), SMALLEST, 1 - SMALLEST))
    deviation = np.mean([np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)) for _, a, b in found])
    half, middle = Z * deviation / (area * (1 - area)), np.log(area / (1 - area))
    return 1 / (1 + np.exp(-np.array([middle - half, middle + half])))


def delong(scores: np.ndarray, positive: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The area under the ROC curve, and what each positive and each negative review contributes to it."""
    from scipy.stats import rankdata

    ranks, m, n = rankdata(scores), int(positive.sum()), int((~positive).sum())
    over_negative = (ranks[positive] - rankdata(scores[positive])) / n
    under_positive = 1 - (ranks[~positive] - rankdata(scores[~positive])) / m
    return float(over_negative.mean()), over_negative, under_positive


def thin(points: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of a curve's points [points, 2], spread evenly along its length, both ends among them."""
    if len(points) <= most:
        return points
    along = np.concatenate([[0], np.cumsum(np.abs(np.diff(points, axis=0)).sum(axis=1))])
    return points[np.unique(np.searchsorted(along, np.linspace(0, along[-1], most)).clip(0, len(points) - 1))]


def roc_points(probabilities: np.ndarray, labels: np.ndarray, index: int, most: int) -> np.ndarray:
    """The ROC curve of one class against the rest: (false positive rate, true positive rate) [points, 2]."""
    false_positives, true_positives, _ = roc_curve(labels == index, probabilities[:, index])
    return thin(np.stack([false_positives, true_positives], axis=1), most)


def precision_recall_points(probabilities: np.ndarray, labels: np.ndarray, index: int, most: int) -> np.ndarray:
    """The precision-recall curve of one class against the rest: (recall, precision) [points, 2], recall rising."""
    precision, recall, _ = precision_recall_curve(labels == index, probabilities[:, index])
    return thin(np.stack([recall, precision], axis=1)[::-1], most)
