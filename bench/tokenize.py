"""Tokenization beside the bare `tokenizers` library: reviews and tokens a second, the cache file's size, memory.

Run: python -m bench.tokenize --reviews data/raw/reviews.parquet --tokenizer data/tokens/tokenizer
     python -m bench.tokenize --reviews FILE --tokenizer FOLDER --growth 1000000 10000000

Measured are: encode_batch and encode_batch_fast of the library on texts that are in memory, their results dropped; and ours, from
a prepared Parquet file to a split's file, as the tokenize stage does it. Each runs in a process of its own without its imports
being counted, they take turns over --rounds, and the best one counts. --growth takes ours alone through several numbers of
reviews: memory should stay as it is, and time grow as they do.
"""

import argparse
import logging
import platform
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from sentiment.errors import DataError, ProjectError
from sentiment.files import atomic
from sentiment.logs import run_stage
from sentiment.tokens import Tokens, load_tokenizer
from stages import tokenize  # what only this process needs is imported by what needs it: it would count as memory of ours

SCHEMA = pa.schema({"text": pa.string(), "label": pa.int8()})
ROWS = 100_000  # of a row group
EVERY = 0.2  # seconds between two looks at the memory
OPENINGS = 9
POINTS = ("at its start", "at 10%", "at 50%", "at 100%", "at most")  # of a run's time
OURS = "ours: Parquet to split's file"
BARE = {"tokenizers, encode_batch": "encode_batch", "tokenizers, encode_batch_fast": "encode_batch_fast"}
FIRST = next(iter(BARE))  # what the others are compared with
Run = Callable[[], int]  # returns the tokens, 0 where they are not counted
log = logging.getLogger("sentiment.bench")


class Memory(NamedTuple):
    """What a process has in memory, in bytes: all of it, and what is its own (no pages of files that others map, too)."""

    rss: int
    uss: int


class Measured(NamedTuple):
    """One run: its seconds, its tokens, and its memory every 0.2 s from its start."""

    seconds: float
    tokens: int
    memory: list[Memory]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed then, too
    tokenizer = load_tokenizer(options.tokenizer, options.max_length)
    with tempfile.TemporaryDirectory(prefix="bench-tokenize-") as name:
        folder = Path(name)
        rows = store(texts(options.reviews, options.text), folder / "reviews.parquet")
        log.info("%d reviews are prepared", rows)
        page = heading(options, rows, tokenizer.get_vocab_size())
        if options.rounds > 0:
            page += "\n" + comparison(folder, options.repeat or rows, options)
        if options.growth:
            page += "\n" + growth(folder, options)
    with atomic(options.output) as part:
        part.write_text(page, encoding="utf-8")
    print(page)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    from bench.serve import positive

    description, _, details = (__doc__ or "").partition("\n")
    made = argparse.ArgumentParser(
        prog="python -m bench.tokenize",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--reviews", required=True, metavar="FILE", help="a .csv, .parquet, .jsonl or .txt file")
    made.add_argument("--text", nargs="+", metavar="COLUMN", help="columns to read (default: prepare.text of params.yaml)")
    made.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER", help="a folder with a tokenizer.json")
    made.add_argument("--max-length", type=positive, metavar="N", default=256, help="tokens a review (default: 256)")
    made.add_argument("--repeat", type=positive, metavar="N", help="so many reviews, the file's over and over (default: as is)")
    made.add_argument("--rounds", type=int, metavar="N", default=3, help="in which all take turns (default: 3; 0: none)")
    made.add_argument("--growth", type=positive, nargs="+", metavar="N", default=[], help="numbers of reviews for ours alone")
    made.add_argument("--output", type=Path, default=Path("bench/tokenize-new.md"), help="default: bench/tokenize-new.md")
    return made.parse_args(arguments)


def texts(name: str, columns: list[str] | None) -> Iterator[str]:
    """A file's texts as the prepare stage cleans them, the empty ones left out."""
    from bench.workload import joined
    from sentiment import params, predict

    reviews = predict.read(name)
    chosen = ["text"] if reviews.format == "text" else columns or params.load().prepare.text
    return filter(None, (joined(line, row, chosen) for line, row in reviews.rows))


def store(values: Iterator[str], path: Path) -> int:
    """Write texts as a prepared file, the label of each 0; returns how many there are (none raises DataError)."""
    rows = 0
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        while group := list(islice(values, ROWS)):
            writer.write_table(pa.table({"text": group, "label": np.zeros(len(group), np.int8)}, SCHEMA))
            rows += len(group)
    if not rows:
        raise DataError("the file holds no reviews; check that it is the one you mean")
    return rows


def repeat(source: Path, target: Path, rows: int) -> None:
    """Write a prepared file's reviews over and over until there are `rows`, one row group in memory at a time."""
    with pq.ParquetWriter(target, SCHEMA, compression="zstd") as writer:
        while rows:
            with pq.ParquetFile(source, pre_buffer=False) as file:  # or it keeps what is read
                for batch in file.iter_batches(ROWS):
                    writer.write_batch(batch.slice(0, rows), ROWS)
                    rows -= min(rows, len(batch))
                    if not rows:
                        break


def bare(method: str, prepared: Path, tokenizer: Path, max_length: int) -> Run:
    """A run of the library alone, the texts being in memory."""
    encode = getattr(load_tokenizer(tokenizer, max_length), method)
    chunks = [chunk for chunk, _ in tokenize.read(prepared)]

    def run() -> int:
        for chunk in chunks:
            encode(chunk)
        return 0

    return run


def ours(prepared: Path, tokenizer: Path, max_length: int) -> Run:
    """A run of what the tokenize stage does with a split; its file is written beside the prepared one."""
    loaded = load_tokenizer(tokenizer, max_length)

    def run() -> int:
        lengths = tokenize.write(prepared, split_of(prepared), loaded, "pt").reviews
        return int((lengths * np.arange(len(lengths))).sum())

    return run


def split_of(prepared: Path) -> Path:
    """Where ours writes."""
    return prepared.with_suffix(".safetensors")


def measure(make: Callable[..., Run], *arguments: Any) -> Measured:
    """What `make` returns, run in a process of its own; raises ProjectError if that process fails."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, make, arguments))
    process.start()
    sender.close()
    try:
        receiver.recv()  # it has imported and read what it needs
        watched, memory = psutil.Process(process.pid), list[Memory]()
        while not memory or not receiver.poll(EVERY):
            now = watched.memory_full_info()
            memory.append(Memory(now.rss, now.uss))
        seconds, tokens = receiver.recv()
        return Measured(seconds, tokens, memory)
    except (EOFError, psutil.NoSuchProcess):
        raise ProjectError("what was measured failed; its trace is above") from None
    finally:
        process.kill()
        process.join()


def child(sender: Connection, make: Callable[..., Run], arguments: tuple[Any, ...]) -> None:
    """In the process of its own: make a run, say that it begins, time it, and send seconds and tokens."""
    run = make(*arguments)
    sender.send("begins")
    start = time.perf_counter()
    tokens = run()
    sender.send((time.perf_counter() - start, tokens))


def comparison(folder: Path, rows: int, options: argparse.Namespace) -> str:
    """The library and ours on the same reviews, and what ours wrote."""
    prepared = folder / "repeated.parquet"
    repeat(folder / "reviews.parquet", prepared, rows)
    fixed = (prepared, options.tokenizer, options.max_length)
    subjects: dict[str, tuple[Any, ...]] = {name: (bare, method, *fixed) for name, method in BARE.items()}
    subjects[OURS] = (ours, *fixed)
    rounds: dict[str, list[Measured]] = {name: [] for name in subjects}
    for k in range(options.rounds):
        for name in list(subjects)[:: -1 if k % 2 else 1]:  # to and fro, against a drift of the machine
            rounds[name].append(measure(*subjects[name]))
            log.info("%s: %.0f reviews/s", name, rows / rounds[name][-1].seconds)
    best = {name: min(each, key=lambda run: run.seconds) for name, each in rounds.items()}
    return speeds(best, rows) + "\n" + written(split_of(prepared), best[OURS])


def speeds(best: dict[str, Measured], rows: int) -> str:
    """The table of the best runs."""
    lines = ["| | seconds | reviews/s | tokens/s | to encode_batch |", "|---|---:|---:|---:|---:|"]
    tokens = best[OURS].tokens
    for name, run in best.items():
        ratio = best[FIRST].seconds / run.seconds
        lines.append(f"| {name} | {run.seconds:.2f} | {rows / run.seconds:,.0f} | {tokens / run.seconds:,.0f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def written(split: Path, run: Measured) -> str:
    """What there is to say of ours beside its speed."""
    size = split.stat().st_size
    lines = [
        f"- split's file: {size / 1e6:.1f} MB, {size / run.tokens:.2f} bytes a token (ids, lengths and labels)",
        f"- opened in {opening(split):.2f} ms (median of {OPENINGS}, the file being warm)",
        f"- memory of ours in MB, as RSS (USS): {', '.join(map(' '.join, zip(POINTS, course(run.memory), strict=True)))}",
    ]
    return "\n".join(lines) + "\n"


def opening(split: Path) -> float:
    """Milliseconds that Tokens.load takes."""
    times = []
    for _ in range(OPENINGS + 1):
        start = time.perf_counter()
        Tokens.load(split)
        times.append((time.perf_counter() - start) * 1000)
    return median(times[1:])


def course(memory: list[Memory]) -> list[str]:
    """How a run's memory went, in MB, at the POINTS: RSS, and USS in brackets."""
    last = len(memory) - 1
    most = Memory(max(each.rss for each in memory), max(each.uss for each in memory))
    points = [memory[0], memory[last // 10], memory[last // 2], memory[last], most]
    return [f"{each.rss / 1e6:.0f} ({each.uss / 1e6:.0f})" for each in points]


def growth(folder: Path, options: argparse.Namespace) -> str:
    """Ours alone on several numbers of reviews, one at a time on the disk."""
    lines = ["Ours alone; memory in MB, as RSS (USS), at the start, after shares of the time, and at most:", ""]
    columns = ("reviews", "seconds", "reviews/s", "split's file, MB", *POINTS)
    lines += [f"| {' | '.join(columns)} |", "|---:" * len(columns) + "|"]
    for rows in options.growth:
        prepared = folder / "grown.parquet"
        repeat(folder / "reviews.parquet", prepared, rows)
        run = measure(ours, prepared, options.tokenizer, options.max_length)
        log.info("%d reviews: %.1f s", rows, run.seconds)
        size = split_of(prepared).stat().st_size / 1e6
        cells = (f"{rows:,}", f"{run.seconds:.2f}", f"{rows / run.seconds:,.0f}", f"{size:.1f}", *course(run.memory))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def heading(options: argparse.Namespace, rows: int, vocabulary: int) -> str:
    """What the numbers are of."""
    from sentiment import conversion, engines

    repeated = f", repeated to {options.repeat:,}" if options.repeat else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "pyarrow", "numpy"))
    memory = psutil.virtual_memory().total / 1e9
    lines = [
        "# Tokenization",
        "",
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, by `python -m bench.tokenize`",
        f"- machine: {conversion.machine()['cpu']}, {engines.cores()} cores used of {psutil.cpu_count()}, {memory:.0f} GB",
        f"- versions: Python {platform.python_version()}, {packages}",
        f"- reviews: {rows:,} of {Path(options.reviews).name}{repeated}",
        f"- tokenizer: {vocabulary:,} tokens, at most {options.max_length} a review",
    ]
    if options.rounds > 0:
        lines.append(f"- values: the best of {options.rounds} round{'s' * (options.rounds > 1)}, each in a process of its own")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_stage("bench-tokenize", main)
