"""From a model's logits to probabilities that mean what they say, and from these to a label; fitted on validation."""

import numpy as np

LOG_TEMPERATURES = (-3.0, 3.0)
RESAMPLES = 2000  # behind the standard error of macro-F1
WIDTH = 3.92  # of a 95% interval, in standard errors


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature): float64 [reviews, classes]."""
    scaled = np.asarray(logits, np.float64) / temperature
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
