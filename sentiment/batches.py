"""Batches of a fixed token budget: reviews of like length together, or packed one behind the other, so that little is padded."""

from collections import deque

import numpy as np

POOL_BATCHES = 100  # a shuffled pool is this many budgets long: sorted inside, so that batches stay nearly random
LOOK_AHEAD = 32  # reviews that do not fit any more, after which a packed batch is closed
SHORTEST = 3  # tokens
FEW_IN = 64  # times the longest review: from such a budget on, what is left free at the end of a batch is not worth looking for


def cut(order: np.ndarray, lengths: np.ndarray, budget: int, step: int = 1) -> list[np.ndarray]:
    """Cut `order`, sorted by length, into batches whose rows times their widest row stay within `budget` tokens.

    Widths are rounded up to a multiple of `step`. A review longer than the budget is a batch of its own.
    """
    batches, start, sizes = [], 0, (-(-lengths[order] // step) * step).tolist()
    for stop in range(1, len(order) + 1):
        if stop == len(order) or max(sizes[start], sizes[stop]) * (stop + 1 - start) > budget:
            batches.append(order[start:stop])
            start = stop
    return batches


def fill(order: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut `order` into batches of at most `budget` tokens in all: what does not fit any more begins the next one."""
    if len(order) and FEW_IN * int(lengths[order].max()) <= budget:
        return in_turn(order, lengths, budget)
    batches: list[np.ndarray] = []
    waiting, sizes = deque(order.tolist()), lengths.tolist()
    while waiting:
        batch, room = [waiting.popleft()], budget
        passed: list[int] = []
        room -= sizes[batch[0]]
        while waiting and room >= SHORTEST and len(passed) < LOOK_AHEAD:
            row = waiting.popleft()
            if sizes[row] <= room:
                batch.append(row)
                room -= sizes[row]
            else:
                passed.append(row)
        waiting.extendleft(reversed(passed))
        batches.append(np.array(batch))
    return batches


def in_turn(order: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut `order` into batches of at most `budget` tokens in all, each review in its turn: some 18 times as fast as `fill`."""
    batches, start, ends = [], 0, np.cumsum(lengths[order])
    while start < len(order):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + budget, side="right")))
        batches.append(order[start:stop])
        start = stop
    return batches


def by_length(lengths: np.ndarray, budget: int, step: int = 1) -> list[np.ndarray]:
    """All reviews, longest first, in batches of at most `budget` tokens: for evaluation and prediction."""
    return cut(np.argsort(-lengths, kind="stable"), lengths, budget, step)


def grouped(lengths: np.ndarray, budget: int, rng: np.random.Generator, step: int = 1) -> list[np.ndarray]:
    """One epoch's batches of like lengths: shuffled into pools, sorted inside each pool, batches shuffled again."""
    order = rng.permutation(len(lengths))
    pool = max(1, round(POOL_BATCHES * budget / max(1.0, float(lengths.mean()))))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        batches += cut(rows[np.argsort(lengths[rows], kind="stable")], lengths, budget, step)
    return [batches[index] for index in rng.permutation(len(batches))]


def packed(lengths: np.ndarray, budget: int, rng: np.random.Generator) -> list[np.ndarray]:
    """One epoch's packed batches, in random order all through."""
    return fill(rng.permutation(len(lengths)), lengths, budget)
