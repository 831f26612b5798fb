"""Batches of a token budget: every review once, little padding, the same for the same generator."""

import numpy as np
import pytest

from sentiment import batches
from sentiment.tokens import ragged

BUDGET = 1024


@pytest.fixture(scope="module")
def lengths():
    return np.random.default_rng(7).integers(2, 257, 3000)


@pytest.fixture(params=["shuffled", "by_length"])
def plan(request, lengths):
    if request.param == "by_length":
        return batches.by_length(lengths, BUDGET)
    return batches.shuffled(lengths, BUDGET, np.random.default_rng(1))


def test_every_review_stands_in_one_batch(plan, lengths):
    np.testing.assert_array_equal(np.sort(np.concatenate(plan)), np.arange(len(lengths)))


def test_no_batch_is_over_the_budget_padding_included(plan, lengths):
    tokens = ragged([[1] * length for length in lengths], np.zeros(len(lengths)), 300)
    assert all(batches.collate(tokens, rows, 0)["input_ids"].size <= BUDGET for rows in plan)


def test_the_budget_is_used_and_little_is_padded(plan, lengths):
    computed = sum(int(batches.widths(lengths[rows]).max()) * len(rows) for rows in plan)
    assert computed / (BUDGET * len(plan)) > 0.8
    assert lengths.sum() / computed > 0.9


def test_a_review_as_long_as_the_budget_is_a_batch_of_its_own():
    plan = batches.by_length(np.array([64, 8, 64]), 64)
    assert [rows.tolist() for rows in plan] == [[0], [2], [1]]


def test_batches_are_the_same_for_the_same_generator_and_others_for_another(lengths):
    first, again, other = (
        [rows.tolist() for rows in batches.shuffled(lengths, BUDGET, np.random.default_rng(seed))] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_shuffled_batches_come_in_no_order_of_length(lengths):
    means = [lengths[rows].mean() for rows in batches.shuffled(lengths, BUDGET, np.random.default_rng(1))]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.2


def test_by_length_begins_with_the_longest_and_keeps_the_order_of_equals():
    lengths = np.array([5, 30, 5, 16, 30])
    assert np.concatenate(batches.by_length(lengths, 64)).tolist() == [1, 4, 3, 0, 2]


def test_no_reviews_are_no_batches():
    assert batches.by_length(np.array([], int), BUDGET) == []


@pytest.mark.parametrize("pad_id", [0, 99])
def test_collate_pads_at_the_end_and_masks_what_it_padded(pad_id):
    rows = [[2, 7, 3], [2, 11, 12, 13, 14, 15, 16, 17, 18, 3], [2, 3]]
    tokens = ragged(rows, np.array([1, 0, 2]), 300)
    order = np.array([2, 0, 1])
    batch = batches.collate(tokens, order, pad_id)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 16)
    for index, row in enumerate(order):
        length = len(rows[row])
        assert batch["input_ids"][index].tolist() == rows[row] + [pad_id] * (16 - length)
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (16 - length)
    assert batch["labels"].tolist() == [2, 1, 0]
    assert {values.dtype for values in batch.values()} == {np.dtype(np.int64)}
