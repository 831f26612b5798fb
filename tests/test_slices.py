"""The parts that test reviews are told apart into, and how good a model is for each."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from sentiment import slices

COLUMNS = {
    "stars": "rating",
    "gender": "reviewer_gender",
    "age": "reviewer_birth_year",
    "month": "submission_date",
    "state": "uf",
}


@pytest.fixture
def reviews():
    """400 reviews with some of the columns, some of their values unknown."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "text": [" ".join(["bom"] * n) for n in rng.integers(1, 100, 400)],
            "rating": pd.Series(rng.choice([1.0, 5.0], 400), dtype="Float64"),
            "reviewer_gender": rng.choice(["F", "M", None], 400),
            "reviewer_birth_year": rng.choice([1950.0, 1990.0, 1800.0, np.nan], 400),
            "submission_date": rng.choice(["2018-01-05 10:00:00", "2018-02-01 00:00:00"], 400),
        }
    )


def predictions(reviews, right=0.8):
    truth = np.where(reviews["rating"] == 5, "positivo", "negativo")
    rng = np.random.default_rng(1)
    other = np.where(truth == "positivo", "negativo", "positivo")
    return pd.DataFrame({"label": truth, "prediction": np.where(rng.random(len(truth)) < right, truth, other)})


def test_reviews_are_told_apart_by_each_column_that_is_there(reviews):
    found = slices.groups(reviews, COLUMNS)
    assert set(found) == {"length", "stars", "gender", "age", "month"}
    assert set(found["stars"]) == {"1", "5"}
    assert set(found["month"]) == {"2018-01", "2018-02"}
    known = {1950.0: "65 and over", 1990.0: "25 to 34"}
    for born, age in zip(reviews["reviewer_birth_year"], found["age"], strict=True):
        assert (pd.isna(age) and born not in known) or age == known[born]
    for text, length in zip(reviews["text"], found["length"], strict=True):
        words = len(text.split())
        assert (length == "up to 5 words") == (words <= 5)
        assert (length == "over 80") == (words > 80)


@pytest.mark.parametrize("unknown", [None, np.nan, "", "  "])
def test_what_is_not_known_is_no_group(reviews, unknown):
    reviews["uf"] = pd.Series(["SP", unknown, "RJ", unknown] * 100, dtype=object)
    found = slices.groups(reviews, COLUMNS)["state"]
    assert found.isna().tolist() == [False, True, False, True] * 100
    assert set(found.dropna()) == {"SP", "RJ"}


def test_small_groups_are_taken_together():
    of = pd.Series(["a"] * 40 + ["b"] * 5 + ["c"] * 6 + [None], dtype="string")
    assert slices.merged(of, 10).value_counts().to_dict() == {"a": 40, slices.REST: 11}


def test_each_group_is_scored_on_its_own_reviews(reviews):
    answers = predictions(reviews)
    rows = slices.table(reviews, answers, ["negativo", "positivo"], COLUMNS, 20, 200).set_index(["slice", "group"])
    women = reviews["reviewer_gender"] == "F"
    part = answers[women]
    row = rows.loc["gender", "F"]
    assert row["reviews"] == women.sum()
    assert row["accuracy"] == pytest.approx((part["label"] == part["prediction"]).mean())
    assert row["f1_macro"] == pytest.approx(f1_score(part["label"], part["prediction"], average="macro"))
    assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
    assert row["f1_macro_low"] < row["f1_macro"] < row["f1_macro_high"]
    assert rows.loc[("stars", "5")]["f1_macro"] != rows.loc[("stars", "5")]["f1_macro"]  # a single class has none


def test_wilsons_interval_is_the_textbooks():
    labels, said = np.zeros(10, int), np.array([0] * 8 + [1] * 2)
    found = slices.scores(labels, said, 2, 100)
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_a_broken_group_is_the_weakest_and_a_small_unlucky_one_is_not(reviews):
    answers = predictions(reviews, 0.9)
    men = reviews["reviewer_gender"] == "M"
    answers.loc[men, "prediction"] = "negativo"
    rows = slices.table(reviews, answers, ["negativo", "positivo"], COLUMNS, 20, 200)
    assert tuple(slices.worst(rows[rows["slice"] != "stars"], 1).iloc[0][["slice", "group"]]) == ("gender", "M")
