"""The gates of a promotion: planted cases, each bound from both sides, and null to turn one off."""

import numpy as np
import pandas as pd
import pytest

from sentiment import gates, params
from test_comparison import NAMES, answers

OFF: dict[str, float | None] = dict.fromkeys(
    (
        "confidence", "min_f1", "min_class_f1", "min_slice_accuracy", "max_slice_loss", "max_check_failure_rate",
        "max_calibration_error", "min_reviews_per_second", "max_megabytes", "known_data",
    )
) | {"min_delta": 0.0}  # fmt: skip
DATA = {"sha256": "ab" * 32}
SCORES = {
    "f1_macro": 0.9, "expected_calibration_error": 0.02, "reviews_per_second": 500.0, "worst_slice_accuracy_high": 0.7,
    "check_failure_rate": 0.2,
}  # fmt: skip


def judged(tmp_path, candidate, production=None, scores=SCORES, kinds=None, **rules):
    """The gates with all rules off but these, and whether a model of 2 MB of these answers passes them all."""
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "weights").write_bytes(b"\0" * 2_000_000)
    settings = params.load().promote.model_copy(update=OFF | rules)
    found = gates.judge(candidate, production, kinds or {}, scores, DATA, tmp_path / "model", NAMES, settings)
    return found, all(each["passed"] for each in found)


@pytest.mark.parametrize(
    ("rules", "passed"),
    [
        ({"min_f1": 0.89}, True), ({"min_f1": 0.9}, False),
        ({"min_slice_accuracy": 0.69}, True), ({"min_slice_accuracy": 0.7}, False),
        ({"max_check_failure_rate": 0.2}, True), ({"max_check_failure_rate": 0.19}, False),
        ({"max_calibration_error": 0.02}, True), ({"max_calibration_error": 0.019}, False),
        ({"min_reviews_per_second": 499.0}, True), ({"min_reviews_per_second": 501.0}, False),
        ({"max_megabytes": 2.0}, True), ({"max_megabytes": 1.9}, False),
        ({"known_data": ["ab" * 32]}, True), ({"known_data": ["cd" * 32]}, False),
    ],
)  # fmt: skip
def test_each_bound_lets_through_and_holds_back(tmp_path, rules, passed):
    found, verdict = judged(tmp_path, answers(0.9), **rules)
    assert verdict == passed
    assert len(found) == 1
    assert f"promote.{next(iter(rules))}" in found[0]["gate"]


def test_a_gate_that_is_off_is_not_listed(tmp_path):
    assert judged(tmp_path, answers(0.9)) == ([], True)
    found, _ = judged(tmp_path, answers(0.9), answers(0.8, seed=1))
    assert [each["gate"] for each in found] == ["f1_macro gained over production, above promote.min_delta"]


def test_a_model_that_is_better_on_the_whole_but_broken_for_a_class_is_held_back(tmp_path):
    broken, rng = answers(0.999), np.random.default_rng(0)
    rows = broken.index[(broken["label"] == "negativo") & (rng.random(len(broken)) < 0.7)]
    broken.loc[rows, "prediction"] = "positivo"
    found, verdict = judged(tmp_path, broken, min_class_f1=0.5)
    assert not verdict
    assert "f1_negativo" in found[0]["gate"]


def test_a_gain_of_noise_is_held_back_and_a_sure_one_is_not(tmp_path):
    production = answers(0.9)
    lucky = production.copy()
    wrong = lucky.index[lucky["prediction"] != lucky["label"]][:11]
    right = lucky.index[lucky["prediction"] == lucky["label"]][:9]
    lucky.loc[wrong, "prediction"] = lucky.loc[wrong, "label"]
    lucky.loc[right, "prediction"] = lucky.loc[right, "label"].map({"negativo": "positivo", "positivo": "negativo"})
    found, verdict = judged(tmp_path, lucky, production, confidence=0.95)
    assert (found[0]["passed"], found[1]["passed"], verdict) == (True, False, False)
    assert 0.5 < found[1]["value"] < 0.9
    assert judged(tmp_path, lucky, production)[1]
    assert judged(tmp_path, answers(0.95, seed=2), production, confidence=0.95)[1]


def test_models_that_differ_by_noise_alone_are_seldom_promoted(tmp_path):
    passed = 0
    for k in range(60):
        candidate, production = (answers(0.9, seed=2 * k + side, truth_seed=k) for side in (0, 1))
        passed += judged(tmp_path, candidate, production, confidence=0.95)[1]
    assert passed <= 9  # of 60 at 5%: 10 or more by chance once in a thousand


def test_a_tie_is_held_back_and_nothing_in_production_is_no_rival(tmp_path):
    table = answers(0.9)
    assert not judged(tmp_path, table, table, confidence=0.95)[1]
    assert judged(tmp_path, table, None, confidence=0.95)[1]


def test_a_metric_that_is_not_resampled_is_judged_by_accuracy(tmp_path):
    production, candidate = answers(0.9), answers(0.95, seed=2)
    found, verdict = judged(tmp_path, candidate, production, metric="matthews", confidence=0.95)
    assert verdict
    assert found[1]["gate"].startswith("probability that accuracy is better")
    assert ("accuracy", found[1]["value"]) == gates.probability_of_gain(candidate, production, "accuracy")


def test_the_order_of_the_reviews_does_not_matter(tmp_path):
    production, candidate = answers(0.9), answers(0.95, seed=2)
    shuffled = pd.DataFrame(production.sample(frac=1, random_state=0))
    assert judged(tmp_path, candidate, shuffled, confidence=0.9) == judged(tmp_path, candidate, production, confidence=0.9)


def test_a_model_that_is_better_on_the_whole_but_broken_on_a_slice_is_held_back(tmp_path):
    production, candidate = answers(0.9, 4000), answers(0.97, 4000, seed=2)
    category = pd.Series(np.where(np.arange(4000) % 20 == 0, "Livros", "outra"), dtype="string")
    rows = candidate.index[(category == "Livros") & (np.arange(4000) % 60 != 0)]
    candidate.loc[rows, "prediction"] = candidate.loc[rows, "label"].map({"negativo": "positivo", "positivo": "negativo"})
    rules = {"confidence": 0.95, "max_slice_loss": 0.03, "kinds": {"category": category}}
    found, verdict = judged(tmp_path, candidate, production, **rules)
    assert [each["passed"] for each in found] == [True, True, False]
    assert not verdict
    assert "category Livros" in found[2]["gate"]
    assert judged(tmp_path, answers(0.97, 4000, seed=2), production, **rules)[1]


def test_a_slice_that_loses_by_chance_is_no_loss(tmp_path):
    category = pd.Series(np.arange(2000) % 40, dtype="string")
    passed = [
        judged(tmp_path, answers(0.9, seed=2 * k), answers(0.9, seed=2 * k + 1), kinds={"category": category}, max_slice_loss=0.0)
        for k in range(30)
    ]
    assert sum(found[-1]["passed"] for found, _ in passed) >= 25  # of 30; wrong in at most one of twenty
