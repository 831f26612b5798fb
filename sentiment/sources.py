"""Reviews from anywhere: a CSV, Parquet, JSON-lines or text file, on disk or behind https://, hf://, s3:// (by fsspec).

A malformed line stops with its number. Rows are numbered from 1: the line of a text file, the row of a Parquet file.
"""

import codecs
import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from sentiment.errors import DataError

FORMATS = {
    ".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "text",
}  # fmt: skip
CHUNK_ROWS = 20_000
LINE_COLUMN = "source_line"
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
SEPARATOR_LINE = re.compile(r"sep=(.)\s*")  # as Excel writes it before the header
Row = dict[str, Any]


class Fetched(NamedTuple):
    """A source's copy on this disk: its path, its size in bytes and the SHA-256 of its content."""

    path: Path
    bytes: int
    sha256: str


def is_remote(source: str) -> bool:
    """Whether a source is an address (`https://…`) and not a path."""
    return "://" in source


def file_format(source: str) -> str:
    """csv, jsonl, parquet or text, by the suffix (`.csv.gz` counts as csv); raises DataError for any other."""
    name = PurePosixPath(urlsplit(source).path if is_remote(source) else source).name.lower().removesuffix(".gz")
    suffix = PurePosixPath(name).suffix
    if suffix not in FORMATS:
        raise DataError(f"{source} has no known format; name it with one of {', '.join(FORMATS)} (or with .gz after it)")
    return FORMATS[suffix]


def fetch(source: str, folder: Path) -> Fetched:
    """The source as a file on this disk, with its checksum; an address is downloaded into `folder`.

    Raises DataError where it cannot be had.
    """
    if not is_remote(source):
        path = Path(source)
        if not path.is_file():
            raise DataError(f"{source} is no file; give download.source a path that exists, or an address")
        with path.open("rb") as file:
            return Fetched(path, *copy(file, None))
    path = folder / PurePosixPath(urlsplit(source).path).name
    try:
        import fsspec

        with fsspec.open(source, "rb") as remote, path.open("wb") as local:
            return Fetched(path, *copy(remote, local))
    except ImportError as error:
        raise DataError(f"{source} needs a package that is not here: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = "it is not there (404)" if isinstance(error, FileNotFoundError) else reason
        raise DataError(f"{source} cannot be read: {reason}; check the address and the network") from error


def copy(source: Any, target: BinaryIO | None) -> tuple[int, str]:
    """Read `source` to its end, writing it to `target` if there is one; returns the bytes and their SHA-256."""
    digest, size = hashlib.sha256(), 0
    while block := source.read(1 << 20):
        digest.update(block)
        size += len(block)
        if target:
            target.write(block)
    return size, digest.hexdigest()


def tables(path: Path, kind: str) -> Iterator[pa.Table]:
    """The file in tables of up to 20,000 rows, `source_line` among their columns.

    A Parquet file keeps its types; a text format comes as strings, nulls where a value is empty or missing.
    """
    if kind == "parquet":
        yield from parquet_tables(path)
        return
    numbered = rows(path, kind)
    columns: dict[str, None] = {}
    while chunk := list(islice(numbered, CHUNK_ROWS)):
        columns = columns or {name: None for _, row in chunk for name in row}
        for line, row in chunk:
            if new := row.keys() - columns:
                raise DataError(
                    f"{path}, line {line}: column {min(new)} is in none of the first {CHUNK_ROWS} rows; name it there too (null)"
                )
        strings = {name: pa.array([as_string(row.get(name)) for _, row in chunk], pa.string()) for name in columns}
        yield pa.table({**strings, LINE_COLUMN: pa.array([line for line, _ in chunk], pa.int64())})


def parquet_tables(path: Path) -> Iterator[pa.Table]:
    """A Parquet file's rows in tables of up to 20,000, its own types kept, `source_line` added."""
    done = 0
    try:
        file = pq.ParquetFile(path, pre_buffer=False)  # or it would hold all that it has read
        for batch in file.iter_batches(CHUNK_ROWS):
            table = pa.Table.from_batches([batch])
            if LINE_COLUMN in table.column_names:
                table = table.drop_columns([LINE_COLUMN])
            yield table.append_column(LINE_COLUMN, pa.array(range(done + 1, done + 1 + len(table)), pa.int64()))
            done += len(table)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{path} is no whole Parquet file ({str(error).splitlines()[0]}); fetch it again") from error


def rows(path: Path, kind: str) -> Iterator[tuple[int, Row]]:
    """The rows of a file one by one, each with its line; a text file's rows have the one column `text`."""
    if kind == "parquet":
        for table in parquet_tables(path):
            lines = table.column(LINE_COLUMN).to_pylist()
            yield from zip(lines, table.drop_columns([LINE_COLUMN]).to_pylist(), strict=True)
        return
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        yield from parse(file, kind, str(path))


def parse(file: Iterable[bytes], kind: str, name: str) -> Iterator[tuple[int, Row]]:
    """The rows of an open text file of format csv, jsonl or text; raises DataError naming the malformed line."""
    lines = decoded(file, name)
    if kind == "csv":
        yield from csv_rows(lines, name)
    elif kind == "jsonl":
        yield from json_rows(lines, name)
    else:
        yield from ((number, {"text": line.rstrip("\r\n")}) for number, line in enumerate(lines, 1))


def decoded(file: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a file as strings, their ends kept; raises DataError where one is not UTF-8 or the file is cut off."""
    number, encoding = 0, "cp1252"
    try:
        for number, line in enumerate(file, 1):
            encoding = "utf-16" if number == 1 and line.startswith(UTF_16) else encoding
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}, line {number}: not UTF-8 ({error.reason}); convert it: iconv -f {encoding} -t utf-8 FILE > NEW"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name}, after line {number}: {error}; fetch the file again") from None


def csv_rows(lines: Iterator[str], name: str) -> Iterator[tuple[int, Row]]:
    """Rows of a CSV file with a header, separated by whichever of `,` `;` `|` and tab its header has most of."""
    header, before = next(lines, ""), 1
    if said := SEPARATOR_LINE.fullmatch(header):
        header, before = next(lines, ""), 2
    if not header.strip():
        raise DataError(f"{name} is empty; check that the file is the one you mean")
    delimiter = said[1] if said else max(",;|\t", key=header.count)
    csv.field_size_limit(1 << 24)
    try:
        columns = next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error as error:
        raise DataError(f"{name}, line {before}: {error}; end its lines with \\n") from None
    if not any(columns) or len(set(columns)) < len(columns):
        raise DataError(f"{name}, line {before}: the header must name each column once; it reads {header.strip()[:100]!r}")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    start = before + 1
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{name}, line {start}: {error}; mend the quotes of that line") from None
        if values is None:
            return
        if values and len(values) != len(columns):
            raise DataError(f"{name}, line {start}: {len(values)} fields where the header has {len(columns)}; mend that line")
        if values:
            yield start, dict(zip(columns, values, strict=True))
        start = reader.line_num + before + 1


def json_rows(lines: Iterator[str], name: str) -> Iterator[tuple[int, Row]]:
    """Rows of a JSON-lines file: one object a line, empty lines passed over."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}, line {number}: not JSON ({error}); mend that line") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{name}, line {number}: {type(row).__name__} where an object {{…}} is needed; write one object a line"
            )
        yield number, row


def as_string(value: Any) -> str | None:
    """A value as a table of strings holds it: null for none and for an empty string, JSON for lists and objects."""
    if value is None or value == "":
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
