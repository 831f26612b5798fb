"""Reviews side by side in one row of tokens, without padding between them: what PackedBert and its exports read."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """Reviews packed into a row of `width` tokens; `first` has `width // 4` places, those not used are 0."""

    input_ids: np.ndarray  # int64 [width]
    positions: np.ndarray  # int64 [width], of each token within its review
    reviews: np.ndarray  # int64 [width], which review a token is of; -1 where there is none
    first: np.ndarray  # int64 [width // 4], where each review begins


def row_width(tokens: int) -> int:
    """The width of the row that `tokens` are packed into: a multiple of 32, of 128 from 384 on, so that few shapes occur."""
    step = 32 if tokens <= 384 else 128
    return max(32, -(-tokens // step) * step)


def capacity(width: int) -> int:
    """How many reviews a row holds at most."""
    return width // 4


def pack(reviews: Sequence[np.ndarray]) -> Row:
    """Reviews of at most `capacity` together, as one row: `reviews` are the token ids of each, int [tokens]."""
    lengths = np.array([len(ids) for ids in reviews])
    tokens, width = int(lengths.sum()), row_width(max(int(lengths.sum()), 4 * len(reviews)))
    starts = np.cumsum(lengths) - lengths
    row = Row(*(np.zeros(size, np.int64) for size in (width, width, width, capacity(width))))
    row.input_ids[:tokens] = np.concatenate(reviews)
    row.positions[:tokens] = np.arange(tokens) - np.repeat(starts, lengths)
    row.reviews[:] = -1
    row.reviews[:tokens] = np.repeat(np.arange(len(reviews)), lengths)
    row.first[: len(reviews)] = starts
    return row


def bins(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of reviews put together into rows of at most `budget` tokens (a longer review is a row of its own).

    First-fit decreasing, which needs at most 11/9 of the fewest possible rows and one more (Johnson 1973).
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        for k, free in enumerate(room):
            if lengths[index] <= free and len(rows[k]) < capacity(budget):
                rows[k].append(index)
                room[k] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(budget - lengths[index])
    return rows
