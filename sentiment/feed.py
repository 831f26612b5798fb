"""From a split's tokens to a model's inputs: padded rows of like length, or reviews packed one behind the other.

Both are made by torch where the tokens are, which is the model's device if they fit there: then a batch costs no transfer but
that of its rows' numbers.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from sentiment import batches
from sentiment.tokens import LENGTH_STEP, Tokens

PACKED_STEP = 128  # tokens that a packed batch is padded to a multiple of: with a full budget, one shape
ROOM = 0.1  # of the device's free memory that tokens may take
IGNORED = -100  # the label of a place without a review, as torch's cross_entropy takes it
Inputs = dict[str, Any]


class Shape(NamedTuple):
    """What packed batches of the same shape have: tokens, places for reviews, and the most tokens of a review or of padding."""

    tokens: int
    reviews: int
    longest: int


class Batch(NamedTuple):
    """What a model's forward takes by name, and the labels int64 [reviews]."""

    inputs: Inputs
    labels: torch.Tensor


class Feed:
    """The batches of a split, by the numbers of their reviews."""

    def __init__(self, tokens: Tokens, device: torch.device, pad_id: int, packed: bool = False) -> None:
        self.device, self.pad_id, self.packed = device, pad_id, packed
        self.step = PACKED_STEP if packed else width_step(device)
        self.lengths = tokens.lengths
        home = device if fits(tokens, device) else torch.device("cpu")
        signed = {2: np.int16, 4: np.int32}[tokens.input_ids.itemsize]  # torch has few operations for unsigned ones
        self.mask = (1 << 8 * tokens.input_ids.itemsize) - 1
        self.ids = torch.from_numpy(tokens.input_ids.view(signed)).to(home)
        self.starts = torch.from_numpy(tokens.offsets[:-1]).to(home)
        self.sizes = torch.from_numpy(np.asarray(tokens.lengths, np.int64)).to(home)
        self.labels = torch.from_numpy(np.asarray(tokens.labels, np.int64)).to(home)

    def in_random_order(self, budget: int, rng: np.random.Generator) -> list[np.ndarray]:
        """One epoch's batches of at most `budget` tokens."""
        if self.packed:
            return batches.packed(self.lengths, budget, rng)
        return batches.grouped(self.lengths, budget, rng, self.step)

    def in_order(self, budget: int) -> list[np.ndarray]:
        """All reviews once, the longest first, in batches of at most `budget` tokens."""
        if self.packed:
            return batches.fill(np.argsort(-self.lengths, kind="stable"), self.lengths, budget)
        return batches.by_length(self.lengths, budget, self.step)

    def computed(self, rows: np.ndarray) -> int:
        """Tokens that a batch of these reviews is computed on, padding included."""
        lengths = self.lengths[rows]
        if self.packed:
            return round_up(int(lengths.sum()), self.step)
        return len(rows) * round_up(int(lengths.max()), self.step)

    def shape(self, budget: int, plan: list[np.ndarray]) -> Shape:
        """The shape of most packed batches of a plan that was made for `budget` tokens."""
        reviews = round_up(max(map(len, plan)), PACKED_STEP)
        return Shape(round_up(budget, self.step), reviews, round_up(int(self.lengths.max()) + self.step, PACKED_STEP))

    def has_shape(self, rows: np.ndarray, shape: Shape) -> bool:
        """Whether these reviews can be packed in that shape: all but the last ones of an epoch, as a rule."""
        return len(rows) <= shape.reviews and 0 <= shape.tokens - int(self.lengths[rows].sum()) <= shape.longest

    def batch(self, rows: np.ndarray, shape: Shape | None = None) -> Batch:
        """These reviews on the device.

        Packed: input_ids and positions int64 [tokens], bounds int32 [reviews + 2] (where each review begins; what is after the
        last one is padding), first int64 [reviews], longest: the most tokens between two bounds. With a shape there are more
        places than reviews: reviews of no tokens, labelled IGNORED. Else: input_ids and, if anything is padded, attention_mask
        int64 [reviews, width]: a model takes none for all 1.
        """
        chosen = torch.from_numpy(rows).to(self.starts.device, non_blocking=True)
        inputs = self.pack(rows, chosen, shape) if self.packed else self.pad(rows, chosen)
        moved = {
            name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        labels = self.labels[chosen].to(self.device, non_blocking=True)
        missing = shape.reviews - len(rows) if shape else 0
        return Batch(moved, torch.nn.functional.pad(labels, (0, missing), value=IGNORED) if missing else labels)

    def pad(self, rows: np.ndarray, chosen: torch.Tensor) -> Inputs:
        """Padded rows."""
        width = round_up(int(self.lengths[rows].max()), self.step)
        place = torch.arange(width, device=chosen.device)
        ids = self.token_ids((self.starts[chosen, None] + place).clamp_(max=len(self.ids) - 1))
        if int(self.lengths[rows].min()) == width:  # known here, without waiting for the device
            return {"input_ids": ids}
        mask = place < self.sizes[chosen, None]
        return {"input_ids": torch.where(mask, ids, self.pad_id), "attention_mask": mask.long()}

    def pack(self, rows: np.ndarray, chosen: torch.Tensor, shape: Shape | None) -> Inputs:
        """Reviews one behind the other, then padding: a review of its own."""
        number, total = len(rows), int(self.lengths[rows].sum())
        width, places = (shape.tokens, shape.reviews) if shape else (round_up(total, self.step), number)
        padding = width - total
        sizes = self.sizes[chosen]
        bounds = torch.full((places + 2,), total, dtype=torch.int64, device=chosen.device)
        bounds[0], bounds[-1] = 0, width
        torch.cumsum(sizes, 0, out=bounds[1 : number + 1])
        first = torch.zeros(places, dtype=torch.int64, device=chosen.device)
        first[:number] = bounds[:number]
        of = torch.repeat_interleave(torch.arange(number, device=chosen.device), sizes, output_size=total)
        positions = torch.arange(total, device=chosen.device) - bounds[of]
        ids = self.token_ids(self.starts[chosen][of] + positions)
        longest = shape.longest if shape else round_up(max(int(self.lengths[rows].max()), padding), PACKED_STEP)
        return {
            "input_ids": torch.nn.functional.pad(ids, (0, padding), value=self.pad_id),
            "positions": torch.nn.functional.pad(positions, (0, padding)),
            "bounds": bounds.int(),
            "first": first,
            "longest": longest,
        }

    def token_ids(self, places: torch.Tensor) -> torch.Tensor:
        """The token ids at places of the flat array: int64."""
        return self.ids[places].long() & self.mask


def forward(module: Any, inputs: Inputs) -> torch.Tensor:
    """A module's logits: [reviews, classes]."""
    outputs = module(**inputs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def width_step(device: torch.device) -> int:
    """What widths of padded batches are a multiple of: on a CPU anything is as good, elsewhere aligned rows and few shapes."""
    return 1 if device.type == "cpu" else LENGTH_STEP


def round_up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step


def fits(tokens: Tokens, device: torch.device) -> bool:
    """Whether a split's tokens have room on a device beside a model."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return tokens.input_ids.nbytes + 24 * len(tokens) < ROOM * free
