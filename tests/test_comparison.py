"""Whether two models differ: against textbook values, other libraries, and models whose difference is known."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score

from sentiment import comparison
from sentiment.errors import DataError

NAMES = ["negativo", "positivo"]


def answers(right, number=2000, seed=0, truth_seed=9, names=NAMES):
    """A model's table of predictions: of `number` reviews it has each right with probability `right`."""
    truth = np.random.default_rng(truth_seed).integers(0, len(names), number)
    rng = np.random.default_rng(seed)
    values = rng.dirichlet(np.ones(len(names)), number)
    values.sort(axis=1)
    said = np.where(rng.random(number) < right, truth, (truth + 1) % len(names))
    for row, answer in enumerate(said):
        values[row] = np.roll(values[row], answer - len(names) + 1)
    columns = {f"probability_{name}": values[:, k] for k, name in enumerate(names)}
    by_name = np.array(names, dtype=object)
    return pd.DataFrame(
        {"review_id": [f"r{k}" for k in range(number)], "label": by_name[truth], "prediction": by_name[said]} | columns
    )


def found(a, b, **more):
    return {each.metric: each for each in comparison.differences(comparison.pair(a, b), **more)}


@pytest.mark.parametrize("names", [NAMES, ["ruim", "neutro", "bom"]])
def test_each_metric_is_scikit_learns(names):
    a, b = answers(0.9, names=names), answers(0.8, seed=1, names=names)
    values = found(a, b, resamples=200)
    for end, table in (("a", a), ("b", b)):
        truth, said = table["label"], table["prediction"]
        chances = table[[f"probability_{name}" for name in sorted(names)]].to_numpy()
        expected = {
            "accuracy": accuracy_score(truth, said),
            "f1": f1_score(truth, said, average="weighted"),
            "f1_macro": f1_score(truth, said, average="macro"),
            "loss": log_loss(truth, chances),
        }
        expected |= {f"f1_{name}": f1_score(truth, said, labels=[name], average=None)[0] for name in names}
        if names == NAMES:
            expected["roc_auc"] = roc_auc_score(truth == "positivo", table["probability_positivo"])
        assert {name: getattr(each, end) for name, each in values.items()} == pytest.approx(expected)


def test_the_interval_is_that_of_resampling_review_by_review():
    a, b = answers(0.9, 500), answers(0.87, 500, seed=1)
    of = comparison.pair(a, b)
    rng, samples = np.random.default_rng(3), []
    groups = [np.flatnonzero(of.labels == k) for k in (0, 1)]
    for _ in range(2000):
        rows = np.concatenate([rng.choice(group, len(group)) for group in groups])
        f1 = [f1_score(of.labels[rows], said[rows], average="macro") for said in (of.a, of.b)]
        samples.append(f1[0] - f1[1])
    low, high = np.percentile(samples, [2.5, 97.5])
    macro = found(a, b)["f1_macro"]
    assert (macro.low, macro.high) == pytest.approx((low, high), abs=0.004)


def test_a_difference_of_noise_is_none_and_a_real_one_is():
    noise = [
        found(answers(0.9, seed=2 * k, truth_seed=k), answers(0.9, seed=2 * k + 1, truth_seed=k), resamples=1000)
        for k in range(60)
    ]
    for metric in ("f1_macro", "accuracy", "roc_auc"):
        assert sum(each[metric].p < 0.05 for each in noise) <= 9  # of 60: beyond 9 by chance once in a thousand
    real = found(answers(0.93), answers(0.88, seed=1))
    for name in ("f1_macro", "accuracy"):
        assert real[name].p < 0.001
        assert real[name].low > 0
        assert real[name].a_better > 0.999
    assert real["loss"].high < 0 < real["loss"].a_better - 0.99


def test_a_model_against_itself_differs_in_nothing():
    table = answers(0.9)
    for each in found(table, table).values():
        assert (each.difference, each.low, each.high, each.p, each.a_better) == (0, 0, 0, 1, 0.5)
    assert comparison.mcnemar(comparison.pair(table, table)) == (0, 0, 1.0)


def test_mcnemars_test_is_exact():
    label = ["positivo"] * 21
    a = table(label, ["positivo"] * 15 + ["negativo"] * 6)
    b = table(label, ["negativo"] * 15 + ["positivo"] * 5 + ["negativo"])
    only_a, only_b, p = comparison.mcnemar(comparison.pair(a, b))
    assert (only_a, only_b) == (15, 5)
    assert p == pytest.approx(0.04138947)  # 2 * P(X <= 5), X binomial of 20 and 1/2: 2 * 21700 / 2**20


def table(labels, said, confidence=0.9):
    """Predictions of a given confidence."""
    rows = {"review_id": [f"r{k}" for k in range(len(labels))], "label": labels, "prediction": said}
    chances = {f"probability_{name}": [confidence if each == name else 1 - confidence for each in said] for name in NAMES}
    return pd.DataFrame(rows | chances)


def test_a_paired_difference_is_narrower_than_that_of_two_intervals():
    a = answers(0.9)
    b = a.copy()
    flipped = b.index[:20]
    b.loc[flipped, "prediction"] = a.loc[flipped, "label"]
    macro = found(b, a)["f1_macro"]
    assert macro.high - macro.low < 0.01


def test_the_surest_disagreements_come_first():
    label = ["positivo", "negativo", "positivo"]
    a, b = table(label, ["positivo", "positivo", "positivo"]), table(label, ["negativo", "negativo", "positivo"])
    b.loc[1, ["probability_negativo", "probability_positivo"]] = [0.99, 0.01]
    rows = comparison.disagreements(comparison.pair(a, b))
    assert rows["review_id"].tolist() == ["r1", "r0"]
    assert rows.iloc[0][["label", "a", "b"]].tolist() == ["negativo", "positivo", "negativo"]


def test_only_shared_reviews_are_compared_whatever_their_order():
    a, b = answers(0.9), answers(0.8, seed=1)
    of = comparison.pair(a, b.iloc[::-1].iloc[:500])
    assert len(of.labels) == 500
    assert set(of.review_ids) == set(b["review_id"][-500:])


def test_what_cannot_be_compared_is_said():
    a = answers(0.9)
    with pytest.raises(DataError, match="other classes"):
        comparison.pair(a, answers(0.9, names=["ruim", "bom"]))
    with pytest.raises(DataError, match="share none"):
        comparison.pair(a, a.assign(review_id="x" + a["review_id"]))
    with pytest.raises(DataError, match="another label"):
        comparison.pair(a, a.assign(label="positivo"))
