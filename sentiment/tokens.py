"""Ragged tokens: one flat array of ids and where each review begins; never padded on disk.

A split's file is a safetensors file with `input_ids` (uint16 where the vocabulary allows, else uint32) [tokens],
`offsets` int64 [reviews + 1] and `labels` int16 [reviews]; review i holds input_ids[offsets[i]:offsets[i + 1]], [CLS] and
[SEP] included, and is row i of the prepared Parquet file of the same name.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from sentiment.errors import CheckpointError, DataError

CHUNK = 10_000
LENGTH_STEP = 8  # batch widths and position tables are multiples of this: few shapes, aligned rows


@dataclass(frozen=True)
class Tokens:
    """The reviews of a split as token ids; see the module for the arrays."""

    input_ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each review: int64 [reviews]."""
        return np.diff(self.offsets)

    def save(self, path: Path) -> None:
        """Write the split's file."""
        save_file({"input_ids": self.input_ids, "offsets": self.offsets, "labels": self.labels}, path)

    @classmethod
    def load(cls, path: Path) -> "Tokens":
        """Read the split's file; raises DataError if it is missing or broken."""
        try:
            with safe_open(path, "numpy") as file:
                return cls(*(file.get_tensor(name) for name in ("input_ids", "offsets", "labels")))
        except (FileNotFoundError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read ({error}); run `dvc repro tokenize`") from error


def load_tokenizer(folder: Path, max_length: int) -> Tokenizer:
    """The tokenizer of a folder's tokenizer.json, set to cut at `max_length` tokens and not to pad.

    Raises CheckpointError if there is none.
    """
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(f"{folder}/tokenizer.json cannot be read ({error})") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """The token ids of each text, in order, [CLS] and [SEP] included."""
    texts = iter(texts)
    while chunk := list(islice(texts, CHUNK)):
        for encoding in tokenizer.encode_batch_fast(chunk):
            yield encoding.ids


def ragged(rows: Iterable[Sequence[int] | np.ndarray], labels: np.ndarray, vocab_size: int) -> Tokens:
    """Lists of token ids as Tokens, in the smallest type that holds the vocabulary."""
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    arrays = [np.asarray(row, dtype) for row in rows]
    offsets = np.zeros(len(arrays) + 1, np.int64)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return Tokens(np.concatenate([np.empty(0, dtype), *arrays]), offsets, np.asarray(labels, np.int16))
