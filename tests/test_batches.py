"""Batches of a token budget: every review once, little padding, the same for the same generator."""

import numpy as np
import pytest

from sentiment import batches

BUDGET = 1024
RANDOM = {"grouped": batches.grouped, "packed": batches.packed}


@pytest.fixture(scope="module")
def lengths():
    """Lengths as B2W's are: a median of 25 tokens, some of them long."""
    return np.clip(np.random.default_rng(7).lognormal(np.log(25), 0.75, 6000).astype(int), 3, 256)


@pytest.fixture(params=["grouped", "packed", "by_length", "fill"])
def plan(request, lengths):
    if request.param in RANDOM:
        return RANDOM[request.param](lengths, BUDGET, np.random.default_rng(1))
    if request.param == "fill":
        return batches.fill(np.argsort(-lengths), lengths, BUDGET)
    return batches.by_length(lengths, BUDGET)


def test_every_review_stands_in_one_batch(plan, lengths):
    np.testing.assert_array_equal(np.sort(np.concatenate(plan)), np.arange(len(lengths)))


@pytest.mark.parametrize("step", [1, 8])
def test_no_padded_batch_is_over_the_budget(lengths, step):
    plans = batches.by_length(lengths, BUDGET, step), batches.grouped(lengths, BUDGET, np.random.default_rng(1), step)
    for rows in [rows for plan in plans for rows in plan]:
        assert len(rows) * -(-lengths[rows].max() // step) * step <= BUDGET


def test_no_packed_batch_is_over_the_budget(lengths):
    assert all(lengths[rows].sum() <= BUDGET for rows in batches.packed(lengths, BUDGET, np.random.default_rng(1)))


def test_less_than_three_in_a_hundred_tokens_are_padding(lengths):
    grouped = batches.grouped(lengths, BUDGET, np.random.default_rng(1))
    assert lengths.sum() / sum(lengths[rows].max() * len(rows) for rows in grouped) > 0.97
    packed = batches.packed(lengths, BUDGET, np.random.default_rng(1))
    assert lengths.sum() / (BUDGET * len(packed)) > 0.97


@pytest.mark.parametrize("make", [batches.by_length, lambda *args: batches.fill(np.arange(3), *args)])
def test_a_review_as_long_as_the_budget_or_longer_is_a_batch_of_its_own(make):
    plan = make(np.array([64, 8, 80]), 64)
    assert sorted(rows.tolist() for rows in plan) == [[0], [1], [2]]


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
def test_batches_are_the_same_for_the_same_generator_and_others_for_another(make, lengths):
    first, again, other = ([rows.tolist() for rows in make(lengths, BUDGET, np.random.default_rng(seed))] for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
def test_random_batches_come_in_no_order_of_length(make, lengths):
    means = [lengths[rows].mean() for rows in make(lengths, BUDGET, np.random.default_rng(1))]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.2


def test_a_packed_batch_is_filled_by_one_of_the_next_that_fits():
    plan = batches.fill(np.arange(6), np.array([40, 40, 20, 60, 10, 4]), 64)
    assert [rows.tolist() for rows in plan] == [[0, 2, 5], [1, 4], [3]]


def test_by_length_begins_with_the_longest_and_keeps_the_order_of_equals():
    lengths = np.array([5, 30, 5, 16, 30])
    assert np.concatenate(batches.by_length(lengths, 64)).tolist() == [1, 4, 3, 0, 2]


@pytest.mark.parametrize("make", [batches.by_length, lambda *args: batches.fill(np.array([], int), *args)])
def test_no_reviews_are_no_batches(make):
    assert make(np.array([], int), BUDGET) == []
