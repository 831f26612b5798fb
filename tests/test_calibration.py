"""Temperature and threshold: found where they were put, and no better one to be had."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import f1_score, log_loss

from sentiment.calibration import decide, fit_bias, fit_temperature, fit_threshold, probabilities


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_known_temperature_is_found_again(temperature, classes):
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (20_000, classes)) * temperature
    labels = (softmax(logits / temperature, axis=1).cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    losses = [log_loss(labels, probabilities(logits, found * factor)) for factor in (0.95, 1.0, 1.05)]
    assert losses[1] == min(losses)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("bias", [[-0.4, 0.4], [0.7, -0.5, -0.2]])
def test_a_known_bias_is_found_again_with_its_temperature(temperature, bias):
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 2, (20_000, len(bias))) * temperature
    truth = softmax(logits / temperature + bias, axis=1)
    labels = (truth.cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    found = fit_bias(logits, labels)
    assert found[0] == pytest.approx(temperature, rel=0.05)
    assert found[1] == pytest.approx(bias, abs=0.06)
    np.testing.assert_allclose(probabilities(logits, *found), truth, atol=0.02)


def test_a_model_of_other_class_shares_than_it_meets_is_corrected():
    """Labels 0 and 1 are even where it learnt, and 3 in 10 and 7 in 10 where it is used: Bayes' rule gives the bias."""
    rng = np.random.default_rng(7)
    labels = (rng.random(20_000) < 0.7).astype(int)
    logit = rng.normal(np.where(labels == 1, 1.0, -1.0), 1.0) * 2  # of two normal distributions, even shares
    temperature, bias = fit_bias(np.stack([0 * logit, logit], axis=1), labels)
    assert temperature == pytest.approx(1.0, abs=0.05)
    assert bias[1] - bias[0] == pytest.approx(np.log(0.7 / 0.3), abs=0.1)


def test_where_there_is_no_bias_none_is_found_but_by_chance():
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 2, (500, 2))
        labels = (rng.random(500) < softmax(logits, axis=1)[:, 1]).astype(int)
        found.append(fit_bias(logits, labels) is not None)
    assert sum(found) <= 6  # of 40 at 5%, which would be exceeded once in 200 times


@pytest.mark.parametrize("labels", [np.zeros(50, int), np.repeat([0, 1], 25)], ids=["one class", "told apart without fault"])
def test_what_says_nothing_of_a_bias_gives_none(labels):
    logits = np.stack([1.0 - 2 * labels, 2.0 * labels - 1], axis=1)
    assert fit_bias(logits, labels) is None


def test_probabilities_sum_to_one_and_temperature_only_spreads_them():
    logits = np.random.default_rng(2).normal(0, 30, (50, 3)).astype(np.float32)
    cold, hot = probabilities(logits, 0.5), probabilities(logits, 4.0)
    for values in (cold, hot):
        assert values.dtype == np.float64
        np.testing.assert_allclose(values.sum(axis=1), 1)
        np.testing.assert_array_equal(values.argmax(axis=1), logits.argmax(axis=1))
    assert (cold.max(axis=1) >= hot.max(axis=1)).all()


def scored(reviews, seed, best):
    """Values of two classes, four in five reviews of the last one, that are best told apart at `best`."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(reviews) < 0.8).astype(int)
    positive = np.clip(rng.normal(best - 0.2 + 0.4 * labels, 0.2), 0, 1)
    return np.stack([1 - positive, positive], axis=1), labels


def macro_f1(values, labels, threshold):
    return f1_score(labels, decide(values, threshold), average="macro", zero_division=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("reviews", [80, 20_000])
def test_the_threshold_is_as_good_as_the_best_to_a_standard_error(seed, reviews):
    values, labels = scored(reviews, seed, 0.6)
    best = max(np.linspace(0, 1, 201), key=lambda threshold: macro_f1(values, labels, threshold))
    rng = np.random.default_rng(seed)
    samples = [rng.integers(reviews, size=reviews) for _ in range(200)]
    error = np.std([macro_f1(values[rows], labels[rows], best) for rows in samples])
    assert macro_f1(values, labels, fit_threshold(values, labels)) > macro_f1(values, labels, best) - 1.3 * error


def test_many_reviews_move_the_threshold():
    values, labels = scored(20_000, 0, 0.7)
    found = fit_threshold(values, labels)
    assert 0.5 < found < 0.7
    assert macro_f1(values, labels, found) > macro_f1(values, labels, 0.5) + 0.03


def test_few_reviews_leave_it_at_a_half():
    values, labels = scored(150, 1, 0.53)
    best = max(np.linspace(0, 1, 201), key=lambda threshold: macro_f1(values, labels, threshold))
    assert macro_f1(values, labels, best) > macro_f1(values, labels, 0.5)
    assert abs(fit_threshold(values, labels) - 0.5) < abs(best - 0.5) / 3


def test_of_equally_good_thresholds_it_is_the_nearest_to_a_half():
    positive = np.array([0.1, 0.2, 0.4, 0.9])
    found = fit_threshold(np.stack([1 - positive, positive], axis=1), np.array([0, 0, 1, 1]))
    assert found == pytest.approx(0.3)


def test_three_classes_have_no_threshold():
    assert fit_threshold(np.full((6, 3), 1 / 3), np.array([0, 1, 2] * 2)) is None


def test_the_threshold_itself_is_positive():
    values = np.array([[0.71, 0.29], [0.7, 0.3], [0.4, 0.6]])
    assert decide(values, 0.3).tolist() == [0, 1, 1]


def test_without_a_threshold_the_likeliest_class_is_the_answer():
    assert decide(np.array([[0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.4, 0.3, 0.3]]), None).tolist() == [1, 2, 0]
