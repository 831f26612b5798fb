"""Score a file of reviews with a promoted model: label, score and probabilities as added columns, the order kept.

Run: python -m sentiment.predict reviews.csv --output scored.csv
     python -m sentiment.predict reviews.parquet --output scored.parquet --model v1.0.0
     python -m sentiment.predict - < one_review_a_line.txt

INPUT is a CSV, Parquet, JSON-lines or text file (one review a line), or - for lines on standard input; OUT is CSV, Parquet or
JSON-lines by its name, or - for JSON-lines on standard output. Memory does not grow with the file. Rows without text get no
label.

On a CPU the engine scores that was measured to be the fastest for the model on this machine (see sentiment/selection.py), by the
server or an earlier run. If none was, engines are measured now where the file is large; elsewhere torch scores, in fp32.
"""

import argparse
import csv
import gzip
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from sentiment import calibration, conversion, engines, selection, sources, text
from sentiment.classifier import Classifier, Inference, pick_device
from sentiment.engines import Choice, Engine
from sentiment.errors import CheckpointError, DataError, ProjectError
from sentiment.files import atomic, read_json
from sentiment.logs import first_line, run_stage
from sentiment.registry import Registry, resolve
from sentiment.repository import find_repository
from sentiment.sources import Row
from sentiment.tokens import encode, load_tokenizer

CHUNK_ROWS = 4096
LARGE = 20_000  # reviews from which on choosing an engine takes less time than the right one saves
REVIEW_BYTES = 300  # of a review in a text file, to guess how many it holds; B2W's with their columns have as many
GPU_FILES = ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")  # of NVIDIA, its Jetson, AMD, and Linux in Windows
STANDARD = "-"
WriteRows = Callable[[list[Row]], None]
log = logging.getLogger("sentiment.predict")


class Reviews(NamedTuple):
    """What there is to score: its rows with their lines, its format, and for Parquet its schema and number of rows."""

    rows: Iterator[tuple[int, Row]]
    format: str
    schema: pa.Schema | None = None
    total: int | None = None


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    kind = "jsonl" if options.output == STANDARD else sources.file_format(options.output)
    if kind == "text":
        raise DataError(f"{options.output} would hold no columns; name the output .csv, .jsonl or .parquet")
    if kind == "parquet" and options.output.lower().endswith(".gz"):
        raise DataError(f"{options.output}: Parquet is compressed in itself; name the output .parquet")
    reviews = read(options.input)
    name, folder = resolve(options.model)
    classifier = load(options, name, folder, expected(options.input, reviews))
    columns = options.text or (["text"] if reviews.format == "text" else classifier.inference.text)
    done = 0
    with writer(options.output, kind, schema(reviews, classifier)) as write, bar(reviews.total) as progress:
        while chunk := list(islice(reviews.rows, CHUNK_ROWS)):
            write(score(chunk, columns, classifier))
            done += len(chunk)
            progress.update(len(chunk))
        if not done and options.input != STANDARD:
            raise DataError(f"{options.input} holds no reviews; check that the file is the one you mean")
    log.info("%d reviews scored to %s", done, "standard output" if options.output == STANDARD else options.output)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    description, _, details = (__doc__ or "").partition("\n")
    made = argparse.ArgumentParser(
        prog="python -m sentiment.predict",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("input", metavar="INPUT", help="a .csv, .parquet, .jsonl or .txt file, or - for standard input")
    made.add_argument("--output", metavar="OUT", default=STANDARD, help="a .csv, .parquet or .jsonl file (default: -)")
    made.add_argument("--model", default="production", help="production, a version (v1.0.0), or a folder (default: production)")
    made.add_argument("--text", nargs="+", metavar="COLUMN", help="columns to read (default: those of the model's training)")
    made.add_argument("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"])
    made.add_argument("--engine", default="auto", choices=["auto", *engines.ENGINES], help="what computes on a CPU")
    return made


def read(name: str) -> Reviews:
    """The reviews of a file, or of standard input's lines."""
    if name == STANDARD:
        return Reviews(sources.parse(sys.stdin.buffer, "text", "standard input"), "text")
    path, kind = Path(name), sources.file_format(name)
    if not path.is_file():
        raise DataError(f"{name} is no file; give one that exists, or - for standard input")
    if kind != "parquet":
        return Reviews(sources.rows(path, kind), kind)
    try:
        metadata = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{name} is no whole Parquet file ({error}); fetch it again") from error
    return Reviews(sources.rows(path, kind), kind, metadata.schema_arrow, metadata.metadata.num_rows)


def expected(name: str, reviews: Reviews) -> int:
    """About how many reviews there are: of a text file by its size, 0 for standard input, whose end is not known."""
    if reviews.total is not None:
        return reviews.total
    return 0 if name == STANDARD else Path(name).stat().st_size // REVIEW_BYTES


@dataclass(frozen=True)
class EngineClassifier:
    """A model folder whose logits an engine computes, for `score` like a Classifier; torch is loaded only if it is the engine."""

    engine: Engine
    tokenizer: Any
    inference: Inference
    labels: list[str]

    @classmethod
    def load(cls, folder: Path, converted: Path, choice: Choice) -> "EngineClassifier":
        """The model folder with the engine of a choice; raises CheckpointError if one of them cannot be read."""
        try:
            inference = Inference.load(folder)
            names = read_json(folder / "config.json")["id2label"]
        except Exception as error:
            raise CheckpointError(
                f"{folder} cannot be loaded ({first_line(error)}); fetch it again: `dvc checkout dvc.yaml`"
            ) from error
        engine = engines.load(folder, converted, choice)
        tokenizer = load_tokenizer(folder, inference.max_length)
        return cls(engine, tokenizer, inference, [names[str(k)] for k in range(len(names))])

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Calibrated probabilities of the classes for texts as people write them: float64 [texts, classes]."""
        cleaned = (self.inference.read(value) for value in texts)
        input_ids = [np.asarray(ids, np.int64) for ids in encode(self.tokenizer, cleaned)]
        return self.inference.probabilities(self.engine.logits(input_ids))

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """The class index of each row, by the model's own threshold: int64 [texts]."""
        return calibration.decide(probabilities, self.inference.threshold)


Scorer = Classifier | EngineClassifier


def load(options: argparse.Namespace, name: str, folder: Path, number: int) -> Scorer:
    """What scores so many reviews: torch on a GPU, the engine of a choice on the CPU."""
    if not on_cpu(options.device):
        if options.engine not in ("auto", "torch"):
            raise ProjectError(f"{options.engine} computes on the CPU alone; add --device cpu, or leave --engine out")
        classifier = Classifier.load(folder, options.device)
        log.info("model %s (%s): torch on %s", name, ", ".join(classifier.labels), classifier.device)
        return classifier
    choice, converted = choose(options.engine, name, folder, number)
    plain = (choice.engine, choice.precision) == ("torch", "fp32")
    scorer = Classifier.load(folder, "cpu") if plain else EngineClassifier.load(folder, converted, choice)
    labels = ", ".join(scorer.labels)
    log.info("model %s (%s): %s in %s on the CPU (%s)", name, labels, choice.engine, choice.precision, choice.why)
    return scorer


def on_cpu(device: str) -> bool:
    """Whether the CPU computes; torch, which takes seconds to import, is asked only where there may be another device."""
    if device == "auto" and sys.platform == "linux" and not any(Path(name).exists() for name in GPU_FILES):
        return True
    return device == "cpu" or (device == "auto" and pick_device(device).type == "cpu")


def choose(engine: str, name: str, folder: Path, number: int) -> tuple[Choice, Path]:
    """The engine to score with on the CPU and the folder of its graph: chosen before, or now if there are many reviews."""
    converted = conversion.folder_of(conversion.CACHE, folder)
    for asked in (engine, "auto"):
        kept = selection.known(converted, asked)
        if kept and engine in ("auto", kept.engine):
            return kept, converted
    if number >= LARGE and (engine != "auto" or can_convert(folder)):
        return measure(engine, name, folder, converted), converted
    if engine in ("auto", "torch"):
        return Choice("torch", "fp32", why="nothing was measured for this model here"), converted
    return selection.quick(folder, converted, engine)


def can_convert(folder: Path) -> bool:
    """Whether there are other engines than torch for a model: they read BERT and ensembles of it."""
    try:
        config = read_json(folder / "config.json")
        return all(member["model_type"] == "bert" for member in config.get("members", [config]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}/config.json cannot be read ({first_line(error)}); fetch it: `dvc checkout dvc.yaml`"
        ) from error


def measure(engine: str, name: str, folder: Path, converted: Path) -> Choice:
    """The choice by measurement, as the server makes it; it is kept for both."""
    log.info("many reviews: engines are measured first, for seconds, or some minutes with a BERT-base; the choice is kept")
    registry = None if Path(name).is_dir() else Registry(find_repository(Path()))
    version = registry.find(name) if registry else None
    with redirect_stdout(sys.stderr):  # NNCF draws progress bars where the rows may go
        return selection.choose_once(folder, converted, engine, registry, version)


def added(classifier: Scorer) -> list[str]:
    """The names of the columns that are added."""
    return ["sentiment", "score", *(f"probability_{label}" for label in classifier.labels)]


def schema(reviews: Reviews, classifier: Scorer) -> pa.Schema | None:
    """The output's Arrow schema where the input has one."""
    if reviews.schema is None:
        return None
    kept = [column for column in reviews.schema if column.name not in added(classifier)]
    new = [pa.field(name, pa.string() if name == "sentiment" else pa.float64()) for name in added(classifier)]
    return pa.schema(kept + new)


def score(chunk: list[tuple[int, Row]], columns: list[str], classifier: Scorer) -> list[Row]:
    """The rows with the added columns (null where there is no text); raises DataError if a text column is not there."""
    texts = []
    for line, row in chunk:
        if missing := [name for name in columns if name not in row]:
            raise DataError(f"row {line} has no column {', '.join(missing)}; it has {', '.join(row)}: name one with --text")
        texts.append(text.join([as_text(row[name], name, line) for name in columns]))
    with_text = [index for index, value in enumerate(texts) if value]
    results: list[list[Any]] = [[None] * len(added(classifier))] * len(texts)
    if with_text:
        values = classifier.probabilities([texts[index] for index in with_text])
        chosen = classifier.decide(values)
        for index, row_values, k in zip(with_text, values.tolist(), chosen.tolist(), strict=True):
            results[index] = [classifier.labels[k], row_values[k], *row_values]
    names = added(classifier)
    return [row | dict(zip(names, result, strict=True)) for (_, row), result in zip(chunk, results, strict=True)]


def as_text(value: Any, column: str, line: int) -> str | None:
    """A value of a text column; bytes, as Parquet holds texts not marked as such, are UTF-8. Raises DataError if they are not."""
    try:
        return value.decode() if isinstance(value, bytes) else None if value is None else str(value)
    except UnicodeDecodeError:
        raise DataError(
            f"row {line}: column {column} holds bytes that are not UTF-8; write it as text, or name another"
        ) from None


@contextmanager
def writer(name: str, kind: str, arrow: pa.Schema | None) -> Iterator[WriteRows]:
    """A function that writes rows to a file, which appears whole or not at all, or to standard output."""
    if name == STANDARD:
        yield json_lines(sys.stdout)
        return
    with atomic(name) as part:
        if kind == "parquet":
            with Parquet(part, arrow) as table:
                yield table.write
        else:
            opener: Any = gzip.open if name.lower().endswith(".gz") else open
            with opener(part, "wt", encoding="utf-8", newline="") as file:
                yield json_lines(file) if kind == "jsonl" else csv_lines(file, "\t" if ".tsv" in Path(name).suffixes else ",")


def json_lines(file: Any) -> WriteRows:
    """Writes rows as JSON, one a line; what JSON has no form for (dates) as a string."""

    def write(rows: list[Row]) -> None:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)

    return write


def csv_lines(file: Any, delimiter: str) -> WriteRows:
    """Writes rows as CSV, the header before the first."""
    made: list[csv.DictWriter] = []

    def write(rows: list[Row]) -> None:
        if not made:
            made.append(csv.DictWriter(file, columns_of(rows), delimiter=delimiter, lineterminator="\n"))
            made[0].writeheader()
        check_columns(rows, made[0].fieldnames)
        made[0].writerows(rows)

    return write


class Parquet:
    """Writes rows to a Parquet file, by the given schema or by that of the first rows."""

    def __init__(self, path: Path, arrow: pa.Schema | None) -> None:
        self.path, self.schema = path, arrow
        self.writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer:
            self.writer.close()

    def write(self, rows: list[Row]) -> None:
        """Write some rows."""
        if self.schema is None:
            columns = columns_of(rows)
            self.schema = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows]).schema
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.path, self.schema, compression="zstd")
        check_columns(rows, self.schema.names)
        try:
            self.writer.write_table(pa.Table.from_pylist(rows, self.schema))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"a value does not fit its column's type ({error}); write .jsonl or .csv instead") from error


def columns_of(rows: list[Row]) -> list[str]:
    """All columns that some rows have, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def check_columns(rows: list[Row], known: Iterable[Any]) -> None:
    """Raise DataError for a row with a column that the output has not."""
    names = set(known)
    for row in rows:
        if new := row.keys() - names:
            raise DataError(f"column {min(new)} is in none of the first {CHUNK_ROWS} rows; write .jsonl instead")


def bar(total: int | None) -> tqdm:
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(total=total, unit="reviews", disable=not sys.stderr.isatty(), leave=False)


if __name__ == "__main__":
    run_stage("predict", main)
