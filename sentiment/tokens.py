"""Ragged tokens: one flat array of ids and how long each review is; never padded on disk.

A split's file is a safetensors file with `input_ids` (uint16 where the vocabulary allows, else uint32) [tokens], `lengths`
uint16 [reviews] and `labels` int16 [reviews]; the ids of the reviews follow each other, [CLS] and [SEP] included, and review i
is row i of the prepared Parquet file of the same name.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from sentiment.errors import CheckpointError, DataError

CHUNK = 4096  # texts encoded together: enough to keep all cores at work, few enough to take little memory
LENGTH_STEP = 8  # position tables, and a GPU's padded batches, are multiples of this: few shapes, aligned rows
HEADER = 512  # bytes kept for a file's header, which is known when all else is written
UNKNOWN = ("[UNK]", "<unk>")
TYPES = {"U16": np.uint16, "U32": np.uint32, "I16": np.int16}


@dataclass(frozen=True)
class Tokens:
    """The reviews of a split as token ids; see the module for the arrays."""

    input_ids: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each review begins, and where the last one ends: int64 [reviews + 1]."""
        offsets = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        return offsets

    def where(self, chosen: np.ndarray) -> "Tokens":
        """The chosen reviews, bool [reviews], in their order."""
        return Tokens(self.input_ids[np.repeat(chosen, self.lengths)], self.lengths[chosen], self.labels[chosen])

    def save(self, path: Path) -> None:
        """Write the split's file."""
        with Writer(path, self.input_ids.dtype) as file:
            file.add(self.input_ids, self.lengths, self.labels)

    @classmethod
    def load(cls, path: Path) -> "Tokens":
        """The split's file, mapped into memory: it is read where it is used. Raises DataError if it is missing or broken."""
        try:
            with safe_open(path, "numpy"):  # the library checks that header and file belong together
                pass
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            arrays = {name: mapped(path, 8 + size, header[name]) for name in ("input_ids", "lengths", "labels")}
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}); run `dvc repro tokenize`") from error
        return cls(arrays["input_ids"], arrays["lengths"].astype(np.int64), arrays["labels"])


def joined(splits: Iterable[Tokens]) -> Tokens:
    """The reviews of several splits, one split after the other."""
    columns = zip(*((each.input_ids, each.lengths, each.labels) for each in splits), strict=True)
    return Tokens(*(np.concatenate(column) for column in columns))


def mapped(path: Path, start: int, entry: dict[str, Any]) -> np.ndarray:
    """One array of a safetensors file whose data begin at byte `start`."""
    dtype, shape, begin = np.dtype(TYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"][0]
    if 0 in shape:  # nothing to map
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "c", start + begin, shape)  # writable, in memory alone: torch warns of what is not


class Writer:
    """Writes a split's file as its reviews come, in memory that does not grow with them."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.counts = {"input_ids": 0, "lengths": 0, "labels": 0}

    def __enter__(self) -> Self:
        self.file = self.path.open("wb")
        self.file.write(b"\0" * HEADER)
        self.after = {
            name: tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115  closed by __exit__
            for name in ("lengths", "labels")
        }
        return self

    def add(self, input_ids: np.ndarray, lengths: np.ndarray, labels: np.ndarray) -> None:
        """Append reviews: their ids, one after the other, how many each has, and their labels."""
        parts = {"input_ids": input_ids, "lengths": lengths, "labels": labels}
        for name, values in parts.items():
            target, dtype = self.after.get(name, self.file), self.types[name]
            target.write(np.ascontiguousarray(values, dtype).data)
            self.counts[name] += len(values)

    @property
    def types(self) -> dict[str, np.dtype]:
        """The type of each array, in the order in which they stand in the file."""
        return {"input_ids": self.dtype, "lengths": np.dtype(np.uint16), "labels": np.dtype(np.int16)}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self.file:
            if kind is None:
                for part in self.after.values():
                    part.seek(0)
                    shutil.copyfileobj(part, self.file)
                self.file.seek(0)
                self.file.write(self.header())
        for part in self.after.values():
            part.close()

    def header(self) -> bytes:
        """The header of the format (its size, then JSON with where each array is), filled up with blanks to 512 bytes."""
        names, entries, end = {np.dtype(dtype): name for name, dtype in TYPES.items()}, {}, 0
        for name, dtype in self.types.items():
            begin, end = end, end + self.counts[name] * dtype.itemsize
            entries[name] = {"dtype": names[dtype], "shape": [self.counts[name]], "data_offsets": [begin, end]}
        return (HEADER - 8).to_bytes(8, "little") + json.dumps(entries).encode("ascii").ljust(HEADER - 8)


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


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The token for what the vocabulary has none for, by the names that models have for it; None where there is no such token."""
    return next((found for name in UNKNOWN if (found := tokenizer.token_to_id(name)) is not None), None)


def id_type(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds the ids of a vocabulary."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """The token ids of each text, in order, [CLS] and [SEP] included."""
    texts = iter(texts)
    while chunk := list(islice(texts, CHUNK)):
        for encoding in tokenizer.encode_batch_fast(chunk):
            yield encoding.ids


class Encoded(NamedTuple):
    """Texts as token ids: those of all one after the other, and of each text how many it has and whether its end was cut off."""

    input_ids: np.ndarray  # uint16 or uint32 [tokens]
    lengths: np.ndarray  # int64 [texts]
    cut: np.ndarray  # bool [texts]


def encode_chunks(tokenizer: Tokenizer, chunks: Iterable[Sequence[str]]) -> Iterator[Encoded]:
    """Each chunk of texts, encoded.

    While a chunk is being encoded, which takes all cores but not Python's lock, the next one is read and the one before used.
    """
    dtype = id_type(tokenizer.get_vocab_size())
    with ThreadPoolExecutor(1) as encoder:
        under_way = None
        for chunk in chunks:
            following = encoder.submit(tokenizer.encode_batch_fast, list(chunk))
            if under_way:
                yield flat(under_way.result(), dtype)
            under_way = following
        if under_way:
            yield flat(under_way.result(), dtype)


def flat(encodings: Sequence[Any], dtype: Any) -> Encoded:
    """Encodings, which have no more than their ids copied where nothing was cut off."""
    rows = [encoding.ids for encoding in encodings]
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    cut = np.zeros(len(rows), bool)
    for index in np.flatnonzero(lengths == lengths.max(initial=0)):  # what was cut is as long as a text can be
        cut[index] = bool(encodings[int(index)].overflowing)
    return Encoded(np.fromiter(chain.from_iterable(rows), dtype, int(lengths.sum())), lengths, cut)


def ragged(rows: Iterable[Sequence[int] | np.ndarray], labels: np.ndarray, vocab_size: int) -> Tokens:
    """Lists of token ids as Tokens, in the smallest type that holds the vocabulary."""
    dtype = id_type(vocab_size)
    arrays = [np.asarray(row, dtype) for row in rows]
    lengths = np.array([len(array) for array in arrays], np.int64)
    return Tokens(np.concatenate([np.empty(0, dtype), *arrays]), lengths, np.asarray(labels, np.int16))
