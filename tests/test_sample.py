"""The sample that a clone trains on: natural mix, many products, no two reviews alike, nobody's data, free to use."""

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from sentiment import text

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
COLUMNS = [
    "submission_date", "reviewer_id", "product_id", "product_name", "product_brand", "site_category_lv1", "site_category_lv2",
    "review_title", "overall_rating", "recommend_to_a_friend", "review_text", "reviewer_birth_year", "reviewer_gender",
    "reviewer_state",
]  # fmt: skip
STARS = {1: 20.7, 2: 6.3, 3: 12.3, 4: 24.4, 5: 36.2}  # per cent of the reviews of B2W-Reviews01
RUN = 8


@pytest.fixture(scope="module")
def sample():
    return pd.read_csv(SAMPLE / "reviews.csv", dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def words(sample):
    """The words of every review, without case and punctuation."""
    return [text.key(value).split() for value in sample["review_text"]]


def test_it_has_the_columns_of_b2w_and_enough_reviews(sample):
    assert list(sample) == COLUMNS
    assert len(sample) >= 1500
    assert sample["review_text"].str.strip().ne("").all()


def test_its_stars_are_mixed_as_in_b2w(sample):
    share = sample["overall_rating"].astype(int).value_counts(normalize=True) * 100
    assert share.to_dict() == pytest.approx(STARS, abs=2)


def test_it_covers_many_categories_and_products(sample):
    assert sample["site_category_lv1"].nunique() >= 40
    assert sample["product_id"].nunique() >= 400


def test_its_reviews_are_short_and_long(sample):
    lengths = sample["review_text"].str.split().str.len()
    assert lengths.min() <= 5
    assert lengths.max() > 100
    assert 10 <= lengths.median() <= 30


def test_no_two_reviews_say_the_same(words):
    assert len({" ".join(review) for review in words}) == len(words)


def test_no_two_reviews_share_half_of_their_pairs_of_words(words):
    bigrams = [set(pairwise(review)) for review in words]
    holders, alike = defaultdict(list), []
    for k, pairs in enumerate(bigrams):
        shared = defaultdict(int)
        for pair in pairs:
            for other in holders[pair]:
                shared[other] += 1
            holders[pair].append(k)
        alike += [(other, k) for other, n in shared.items() if n / (len(pairs) + len(bigrams[other]) - n) >= 0.5]
    assert alike == []


def test_no_run_of_eight_words_stands_in_three_reviews(words):
    holders = defaultdict(set)
    for k, review in enumerate(words):
        for start in range(len(review) - RUN + 1):
            holders[" ".join(review[start : start + RUN])].add(k)
    assert [run for run, reviews in holders.items() if len(reviews) >= 3] == []


@pytest.mark.parametrize("column", ["review_title", "review_text", "product_name"])
@pytest.mark.parametrize(
    "pattern",
    [
        r"\S@\S",
        r"(?i)https?:|www\.|\.(?:com|net|org|br)\b",
        r"\d{4}[-. ]?\d{4}\b|\(\d{2}\)|\d{8,}",
    ],
    ids=["e-mail", "address", "telephone"],
)
def test_nobody_can_be_reached_by_it(sample, column, pattern):
    assert sample.loc[sample[column].str.contains(pattern), column].tolist() == []


def test_its_licence_is_cc0():
    licence = (SAMPLE / "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith("SPDX-License-Identifier: CC0-1.0\n")
