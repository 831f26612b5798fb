"""From a model's logits to probabilities that mean what they say, and from these to a label; fitted on validation."""

from collections.abc import Sequence

import numpy as np

LOG_TEMPERATURES = (-3.0, 3.0)
BIASES = (-6.0, 6.0)
SIGNIFICANCE = 0.05  # of the likelihood-ratio test that a bias has to pass
RESAMPLES = 2000  # behind the standard error of macro-F1
WIDTH = 3.92  # of a 95% interval, in standard errors


def probabilities(logits: np.ndarray, temperature: float, bias: Sequence[float] | None = None) -> np.ndarray:
    """softmax(logits / temperature + bias): float64 [reviews, classes]."""
    scaled = np.asarray(logits, np.float64) / temperature
    if bias is not None:
        scaled += np.asarray(bias)
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))  # as scipy.special does it, whose import takes 0.1 s
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of the least negative log-likelihood (Guo et al. 2017)."""
    from scipy.optimize import minimize_scalar

    from sentiment.metrics import negative_log_likelihood

    found = minimize_scalar(
        lambda log: negative_log_likelihood(probabilities(logits, np.exp(log)), labels),
        bounds=LOG_TEMPERATURES,
        method="bounded",
    )
    return float(np.exp(found.x))


def fit_bias(logits: np.ndarray, labels: np.ndarray) -> tuple[float, list[float]] | None:
    """Temperature and a bias a class of the least negative log-likelihood together, the biases 0 in all; None for no bias.

    Bias-corrected temperature scaling (Alexandari et al. 2020): a model that learnt from classes in other shares than those it
    is used on is too sure of those that it saw more of. There is none unless the likelihood-ratio test against the temperature
    alone says so (Wilks 1938), or where a class has no review.
    """
    from scipy.optimize import minimize
    from scipy.stats import chi2

    from sentiment.metrics import negative_log_likelihood

    classes = logits.shape[1]
    if len(np.unique(labels)) < classes:
        return None

    def loss(values: np.ndarray) -> float:
        return negative_log_likelihood(probabilities(logits, np.exp(values[0]), [*values[1:], 0.0]), labels)

    start = np.array([np.log(fit_temperature(logits, labels)), *[0.0] * (classes - 1)])
    found = minimize(loss, start, method="L-BFGS-B", bounds=[LOG_TEMPERATURES, *[BIASES] * (classes - 1)])
    if chi2.sf(2 * len(labels) * (loss(start) - found.fun), classes - 1) > SIGNIFICANCE:
        return None
    bias = np.append(found.x[1:], 0.0)
    return float(np.exp(found.x[0])), [float(value) for value in bias - bias.mean()]


def fit_threshold(values: np.ndarray, labels: np.ndarray) -> float | None:
    """The probability of the last class from which on it is the answer, for macro-F1; None unless there are two classes.

    Of those that are as good as the best to within its standard error it is the nearest to 0.5 (the one-standard-error rule,
    Breiman et al. 1984): probabilities are calibrated, and on few reviews the very best threshold is mostly chance.
    """
    if values.shape[1] != 2:
        return None
    from sentiment.metrics import intervals

    positive, truth = values[:, 1], labels == 1
    edges = np.unique(positive)
    thresholds = np.concatenate([[0.0, 0.5], (edges[1:] + edges[:-1]) / 2, [1.0]])
    hits = np.searchsorted(np.sort(positive[truth]), thresholds)
    misses = np.searchsorted(np.sort(positive[~truth]), thresholds)
    true_positive, true_negative = truth.sum() - hits, misses
    false_positive, false_negative = (~truth).sum() - misses, hits
    f1_positive = 2 * true_positive / np.maximum(1, 2 * true_positive + false_positive + false_negative)
    f1_negative = 2 * true_negative / np.maximum(1, 2 * true_negative + false_positive + false_negative)
    macro = (f1_positive + f1_negative) / 2
    best = decide(values, thresholds[macro.argmax()])
    found = intervals(best, labels, 2, RESAMPLES)
    error = (found["f1_macro_high"] - found["f1_macro_low"]) / WIDTH
    good = thresholds[macro >= macro.max() - error]
    return float(good[np.abs(good - 0.5).argmin()])


def decide(values: np.ndarray, threshold: float | None) -> np.ndarray:
    """The class of each row of probabilities [reviews, classes], int64 [reviews]: by the threshold, else the likeliest."""
    if threshold is None:
        return values.argmax(axis=1)
    return (values[:, 1] >= threshold).astype(np.int64)
