"""Batches of a fixed token budget: reviews of like length together, so that little is padded."""

import numpy as np

from sentiment.tokens import LENGTH_STEP, Tokens

POOL_BATCHES = 50  # a shuffled pool is this many budgets long: sorted inside, so that batches stay nearly random


def widths(lengths: np.ndarray) -> np.ndarray:
    """Each length rounded up to a multiple of 8: what it costs in a batch of its like."""
    return -(-lengths // LENGTH_STEP) * LENGTH_STEP


def cut(order: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut `order`, sorted by length, into batches whose rows times their widest row stay within `budget` tokens."""
    batches, start, sizes = [], 0, widths(lengths[order])
    for stop in range(1, len(order) + 1):
        if stop == len(order) or max(sizes[start], sizes[stop]) * (stop + 1 - start) > budget:
            batches.append(order[start:stop])
            start = stop
    return batches


def by_length(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """All reviews, longest first, in batches of at most `budget` tokens: for evaluation and prediction."""
    return cut(np.argsort(-lengths, kind="stable"), lengths, budget)


def shuffled(lengths: np.ndarray, budget: int, rng: np.random.Generator) -> list[np.ndarray]:
    """One epoch's batches: shuffled into pools, sorted inside each pool, batches shuffled again."""
    order = rng.permutation(len(lengths))
    pool = max(1, round(POOL_BATCHES * budget / max(1.0, float(lengths.mean()))))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        batches += cut(rows[np.argsort(lengths[rows], kind="stable")], lengths, budget)
    return [batches[index] for index in rng.permutation(len(batches))]


def collate(tokens: Tokens, rows: np.ndarray, pad_id: int) -> dict[str, np.ndarray]:
    """Rows as one padded batch: input_ids and attention_mask int64 [rows, width], labels int64 [rows]."""
    lengths = tokens.offsets[rows + 1] - tokens.offsets[rows]
    width = int(widths(lengths).max(initial=LENGTH_STEP))
    mask = np.arange(width) < lengths[:, None]
    positions = (tokens.offsets[rows][:, None] + np.arange(width))[mask]
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    input_ids[mask] = tokens.input_ids[positions]
    return {"input_ids": input_ids, "attention_mask": mask.astype(np.int64), "labels": tokens.labels[rows].astype(np.int64)}
