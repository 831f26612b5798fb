"""Clean the texts, drop what is short, repeated or to be tested on, and hold some out.

From: the files of corpus.files, in data/text or in git; the files of corpus.exclude
To:   data/pretraining/corpus/{train,held_out}.parquet (text, repeat), metrics/pretraining/corpus.json
Run:  python -m pretrain.corpus
"""

import logging
import re
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sentiment import pretraining_params, sources, text
from sentiment.errors import DataError
from sentiment.files import atomic, digest, write_json
from sentiment.logs import run_stage

CORPUS = Path("data/pretraining/corpus")
METRICS = Path("metrics/pretraining/corpus.json")
SENTENCE_END = re.compile(r"(?<=[.!?…])\s+")
SCHEMA = pa.schema({"text": pa.string(), "repeat": pa.int16()})
CHUNK = 10_000
TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)
log = logging.getLogger("stages.corpus")


def main() -> None:
    settings = pretraining_params.load().corpus
    to_exclude, left_out = excluded(settings.exclude)
    seen, counts = set[bytes](), Counter[str]()
    with atomic(CORPUS) as part:
        part.mkdir()
        files = {name: pq.ParquetWriter(part / f"{name}.parquet", SCHEMA, compression="zstd") for name in ("train", "held_out")}
        rows: dict[str, list[dict[str, str | int]]] = {name: [] for name in files}
        for file in settings.files:
            for piece, held_out in texts(file, settings, left_out, seen, counts):
                name = "held_out" if held_out else "train"
                counts[name] += 1
                rows[name].append({"text": piece, "repeat": file.repeat if name == "train" else 1})
                if len(rows[name]) == CHUNK:
                    files[name].write_table(pa.Table.from_pylist(rows.pop(name), SCHEMA))
                    rows[name] = []
        for name, writer in files.items():
            writer.write_table(pa.Table.from_pylist(rows[name], SCHEMA))
            writer.close()
        if not counts["train"] or not counts["held_out"]:
            raise DataError("corpus.files leave no texts to train on, or none to hold out; add files, or raise corpus.held_out")
    write_json(METRICS, {"to_exclude": to_exclude, **counts})
    log.info(", ".join(f"{name.replace('_', ' ')} {number}" for name, number in counts.items()))
    found = {left_out[mark] for mark in seen & left_out.keys()}
    log.info("of %d texts that corpus.exclude names, these files have %d", to_exclude, len(found))


def excluded(paths: list[str]) -> tuple[int, dict[bytes, bytes]]:
    """How many texts are not to be learnt from; and what stands for each, and for its longest column, with what stands for it."""
    found: dict[bytes, bytes] = {}
    for path in paths:
        if not Path(path).is_file():
            raise DataError(f"corpus.exclude names {path}, which is no file; run `dvc repro prepare`, or take it from the list")
        for value in pq.read_table(path, columns=["text"])["text"].to_pylist():
            whole = digest(text.key(value))
            found |= {digest(text.key(text.longest_part(value))): whole, whole: whole}
    return len(set(found.values())), found


def texts(
    file: pretraining_params.File,
    settings: pretraining_params.Corpus,
    left_out: Container[bytes],
    seen: set[bytes],
    counts: Counter[str],
) -> Iterator[tuple[str, bool]]:
    """The cleaned texts of a file that were not seen before, in pieces, and whether they are to be held out.

    A piece has corpus.min_words to corpus.max_words words. Texts that are left out are counted. All pieces of a text are held
    out, or none.
    """
    for value in lines(file):
        counts["read"] += 1
        cleaned = text.clean(value)
        mark, beside = digest(text.key(cleaned)), digest(text.key(text.longest_part(cleaned)))
        if beside in left_out:  # a text that stands beside its title
            mark = beside
        if mark in left_out or mark in seen:
            counts["excluded" if mark in left_out else "repeated"] += 1
        elif len(cleaned.split()) < settings.min_words:
            counts["too_short"] += 1
        else:
            held_out = is_held_out(cleaned, settings.held_out)
            found = pieces(cleaned, settings.max_words)
            yield from ((piece, held_out) for piece in found if len(piece.split()) >= settings.min_words)
        seen.add(mark)


def lines(file: pretraining_params.File) -> Iterator[str]:
    """The texts of a file: its lines, or the values of its column."""
    path, kind = Path(file.path), sources.file_format(file.path)
    if not path.is_file():
        raise DataError(f"corpus.files names {file.path}, which is no file; put it or a link to it into data/text")
    column = file.column or "text"
    if kind == "text" and file.column:
        raise DataError(f"corpus.files gives {file.path} a column, but a text file has none; take it away")
    for table in sources.tables(path, kind):
        if column not in table.column_names:
            raise DataError(f"{file.path} has no column {column}; name one of {', '.join(table.column_names)} in corpus.files")
        yield from filter(None, strings(table[column], file.path, column))


def strings(values: pa.ChunkedArray, path: str, column: str) -> list[str | None]:
    """A column of texts, also one whose bytes are not marked as such; raises DataError if it is none."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if any(is_a(kind) for is_a in TEXTS):
        try:
            return values.cast(pa.string()).to_pylist()
        except pa.ArrowInvalid:
            raise DataError(f"{path}: column {column} holds bytes that are not UTF-8; write it as text") from None
    raise DataError(f"{path}: column {column} is of type {values.type}, which is no text; name another one in corpus.files")


def pieces(value: str, max_words: int) -> Iterator[str]:
    """A text in pieces of at most `max_words` words, cut between sentences; within one only where it is longer than that."""
    piece: list[str] = []
    for sentence in SENTENCE_END.split(value):
        words = sentence.split()
        if piece and len(piece) + len(words) > max_words:
            yield " ".join(piece)
            piece = []
        piece += words
        while len(piece) > max_words:
            yield " ".join(piece[:max_words])
            piece = piece[max_words:]
    if piece:
        yield " ".join(piece)


def is_held_out(value: str, share: float) -> bool:
    """Whether a text is one of those held out: by its hash, so that more texts move none of them."""
    return int.from_bytes(digest(text.key(value))) / 2**64 < share


if __name__ == "__main__":
    run_stage("corpus", main)
