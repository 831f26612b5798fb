"""Metrics against scikit-learn, against cases worked out by hand, and against a bootstrap of the plain kind."""

import math

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    log_loss,
    matthews_corrcoef,
    precision_recall_curve,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from sentiment import metrics

NAMES = {2: ["negativo", "positivo"], 3: ["negativo", "neutro", "positivo"]}


def draw(classes, reviews=300, seed=3):
    """Probabilities that are better than chance, and true labels, the classes of unequal size."""
    rng = np.random.default_rng(seed)
    shares = np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()
    labels = rng.choice(classes, reviews, p=shares)
    raw = np.exp(rng.normal(size=(reviews, classes)) + np.eye(classes)[labels])
    return raw / raw.sum(axis=1, keepdims=True), labels


@pytest.mark.parametrize("classes", [2, 3])
def test_every_metric_is_that_of_scikit_learn(classes):
    values, labels = draw(classes)
    predictions, one_hot, names = values.argmax(axis=1), np.eye(classes)[labels], NAMES[classes]
    expected = {
        "reviews": 300,
        "loss": log_loss(labels, values),
        "accuracy": accuracy_score(labels, predictions),
        "matthews": matthews_corrcoef(labels, predictions),
        "roc_auc": roc_auc_score(one_hot, values, average="macro"),
        "pr_auc": average_precision_score(one_hot, values, average="macro"),
    }
    for key, function in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        expected[key] = function(labels, predictions, average="weighted")
        expected[f"{key}_macro"] = function(labels, predictions, average="macro")
        expected |= {f"{key}_{names[k]}": value for k, value in enumerate(function(labels, predictions, average=None))}
    areas = average_precision_score(one_hot, values, average=None)
    expected |= {f"pr_auc_{names[k]}": area for k, area in enumerate(areas)}
    assert metrics.score(values, predictions, labels, names) == pytest.approx(expected)


def test_with_two_classes_roc_auc_is_the_usual_one():
    values, labels = draw(2)
    scores = metrics.score(values, values.argmax(axis=1), labels, NAMES[2])
    assert scores["roc_auc"] == pytest.approx(roc_auc_score(labels, values[:, 1]))


def test_a_class_that_is_never_predicted_scores_zero():
    values, labels = draw(3)
    scores = metrics.score(values, np.full(len(labels), 2), labels, NAMES[3])
    assert scores["f1_negativo"] == scores["precision_negativo"] == scores["recall_negativo"] == 0
    assert scores["f1_macro"] == pytest.approx(scores["f1_positivo"] / 3)


def test_a_probability_of_zero_for_the_true_class_leaves_the_loss_finite():
    assert math.isfinite(metrics.negative_log_likelihood(np.array([[1.0, 0.0]]), np.array([1])))


@pytest.mark.parametrize(
    ("f1", "name"),
    [
        (1.0, "Excelente"),
        (0.8, "Excelente"),
        (0.7999, "Bom"),
        (0.7, "Bom"),
        (0.6999, "Razoável"),
        (0.6, "Razoável"),
        (0.5999, "Baixo"),
        (0.0, "Baixo"),
    ],
)
def test_a_band_holds_its_lower_edge(f1, name):
    assert metrics.band(f1) == name


def test_calibration_error_of_a_case_worked_out_by_hand():
    top = np.array([0.9, 0.9, 0.7, 0.65])  # bins of 0.2: (0.9, 0.9) half right; (0.7, 0.65) all right
    values, labels = np.stack([top, 1 - top], axis=1), np.array([0, 1, 0, 0])
    low, high = metrics.reliability(values, labels, 5)
    assert low == pytest.approx({"confidence": 0.675, "accuracy": 1.0, "reviews": 2})
    assert high == pytest.approx({"confidence": 0.9, "accuracy": 0.5, "reviews": 2})
    assert metrics.expected_calibration_error(values, labels, 5) == pytest.approx((0.325 + 0.4) / 2)


def test_a_certain_prediction_stands_in_the_last_bin():
    values = np.array([[1.0, 0.0], [0.05, 0.95]])
    assert metrics.reliability(values, np.array([0, 1]), 10) == [{"confidence": 0.975, "accuracy": 1.0, "reviews": 2}]


def plain_bootstrap(predictions, labels, classes, resamples):
    """Rows of each class resampled with replacement, and the metrics computed anew."""
    rng = np.random.default_rng(11)
    of_class = [np.flatnonzero(labels == k) for k in range(classes)]
    samples = []
    for _ in range(resamples):
        rows = np.concatenate([rng.choice(members, len(members)) for members in of_class])
        truth, said = labels[rows], predictions[rows]
        f1 = [2 * ((truth == k) & (said == k)).sum() / ((truth == k).sum() + (said == k).sum()) for k in range(classes)]
        samples.append([(truth == said).mean(), np.average(f1, weights=np.bincount(truth, minlength=classes)), np.mean(f1)])
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    names = ("accuracy", "f1", "f1_macro")
    return dict(zip((f"{name}_low" for name in names), low, strict=True)) | dict(
        zip((f"{name}_high" for name in names), high, strict=True)
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_intervals_hold_the_point_and_agree_with_resampled_rows(classes):
    values, labels = draw(classes)
    predictions = values.argmax(axis=1)
    scores = metrics.score(values, predictions, labels, NAMES[classes])
    found = metrics.intervals(predictions, labels, classes, 4000)
    for name in ("accuracy", "f1", "f1_macro"):
        assert found[f"{name}_low"] < scores[name] < found[f"{name}_high"]
    assert found == pytest.approx(plain_bootstrap(predictions, labels, classes, 2000), abs=0.01)
    assert found == metrics.intervals(predictions, labels, classes, 4000)


def test_intervals_of_probabilities_agree_with_resampled_rows():
    values, labels = draw(2)
    of_class = [np.flatnonzero(labels == k) for k in range(2)]
    rng, samples = np.random.default_rng(11), []
    for _ in range(2000):
        rows = np.concatenate([rng.choice(members, len(members)) for members in of_class])
        area = roc_auc_score(labels[rows], values[rows, 1])
        error = metrics.expected_calibration_error(values[rows], labels[rows], 10)
        samples.append((area, metrics.negative_log_likelihood(values[rows], labels[rows]), error))
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    found = metrics.probability_intervals(values, labels, 10, 4000)
    for k, name in enumerate(("roc_auc", "loss", "expected_calibration_error")):
        width = high[k] - low[k]
        assert (found[f"{name}_low"], found[f"{name}_high"]) == pytest.approx((low[k], high[k]), abs=0.12 * width)


@pytest.mark.parametrize("classes", [2, 3])
def test_intervals_of_probabilities_hold_the_point(classes):
    values, labels = draw(classes)
    scores = metrics.score(values, values.argmax(axis=1), labels, NAMES[classes])
    found = metrics.probability_intervals(values, labels, 10, 1000)
    assert found["roc_auc_low"] < scores["roc_auc"] < found["roc_auc_high"] < 1
    assert found["loss_low"] < scores["loss"] < found["loss_high"]
    assert found == metrics.probability_intervals(values, labels, 10, 1000)


def test_where_all_is_right_the_interval_is_a_point():
    labels = np.array([0] * 20 + [1] * 30)
    assert set(metrics.intervals(labels, labels, 2, 100).values()) == {1.0}


@pytest.mark.parametrize("most", [2, 10, 200])
def test_a_thinned_curve_keeps_both_ends_and_at_most_so_many_points(most):
    x = np.linspace(0, 1, 5000)
    points = np.stack([x, np.sqrt(x)], axis=1)
    thinned = metrics.thin(points, most)
    assert 2 <= len(thinned) <= most
    assert thinned[[0, -1]].tolist() == points[[0, -1]].tolist()
    assert {tuple(point) for point in thinned} <= {tuple(point) for point in points}
    assert (np.diff(thinned, axis=0) > 0).all()
    np.testing.assert_allclose(np.abs(np.diff(thinned, axis=0)).sum(axis=1), 2 / (most - 1), atol=0.03)


def test_a_curve_of_few_points_is_left_as_it_is():
    points = np.array([[0.0, 0.0], [0.5, 0.9], [1.0, 1.0]])
    assert metrics.thin(points, 3).tolist() == points.tolist()


@pytest.mark.parametrize("index", [0, 1])
def test_curves_are_those_of_the_class_against_the_rest(index):
    values, labels = draw(2)
    false_positives, true_positives, _ = roc_curve(labels == index, values[:, index])
    roc = metrics.roc_points(values, labels, index, 1000)
    np.testing.assert_array_equal(roc, np.stack([false_positives, true_positives], axis=1))
    precision, recall, _ = precision_recall_curve(labels == index, values[:, index])
    points = metrics.precision_recall_points(values, labels, index, 1000)
    np.testing.assert_array_equal(points[::-1], np.stack([recall, precision], axis=1))
    assert (np.diff(points[:, 0]) >= 0).all()
