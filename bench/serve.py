"""The service under load beside others: the same model, engine, machine, reviews and load for all.

Run: python -m bench.serve --model models/sentiment --reviews data/raw/reviews.parquet
     python -m bench.serve --model bertimbau-shape:FOLDER --reviews FILE

Measured are: ours, as users start it; the naive one (Flask, one text at a time, padded to 512 tokens, torch in fp32); LitServe,
mosec and BentoML with the same packed engine behind their own batching (bench/peers); and the engine alone. A closed loop of
--connections sends up to 2000 reviews, the same in the same order to each. The table is Markdown, medians over --rounds.

bertimbau-shape:FOLDER makes a model with random weights, as fast as a trained one, from a config.json and a vocabulary.
"""

import argparse
import logging
import signal
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from bench.measure import ALONE, Measured, turn
from bench.servers import NAMES, PEER_NAMES, install_peers
from bench.table import heading, table
from bench.workload import SHAPE, prepare
from sentiment.files import atomic
from sentiment.logs import run_stage

PRECISIONS = {"openvino": ("int8", "bf16", "fp32"), "onnxruntime": ("int8", "fp32")}
log = logging.getLogger("sentiment.bench")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers are ended then, too
    if set(options.servers) & set(PEER_NAMES):
        install_peers()
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as name:
        log.info("reading the reviews and converting the model")
        with redirect_stdout(sys.stderr):  # where converters show their progress
            work = prepare(options.model, options.reviews, options.text, options.engine, options.precision, Path(name))
        measured: list[Measured] = []
        for k in range(options.rounds):
            for each in [ALONE, *options.servers][:: -1 if k % 2 else 1]:  # to and fro, against a drift of the machine
                measured += turn(each, work, options.connections, options.seconds)
            log.info("round %d of %d is done", k + 1, options.rounds)
            page = heading(work, options, k + 1) + table(measured, options.servers, options.connections)
            with atomic(options.output) as part:
                part.write_text(page, encoding="utf-8")
    print(page)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    description, _, details = (__doc__ or "").partition("\n")
    made = argparse.ArgumentParser(
        prog="python -m bench.serve",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model", required=True, help=f"a model folder, or {SHAPE}FOLDER for random weights")
    made.add_argument("--reviews", required=True, metavar="FILE", help="a .csv, .parquet, .jsonl or .txt file")
    made.add_argument("--text", nargs="+", metavar="COLUMN", help="columns to read (default: those of the model's training)")
    made.add_argument(
        "--connections", type=positive, nargs="+", metavar="N", default=[1, 8, 32, 64], help="at once (default: 1 8 32 64)"
    )
    made.add_argument(
        "--seconds", type=positive, metavar="N", default=20, help="that are counted, for each of them (default: 20)"
    )
    made.add_argument("--rounds", type=positive, metavar="N", default=2, help="in which all take turns (default: 2)")
    made.add_argument(
        "--servers",
        nargs="+",
        metavar="NAME",
        choices=list(NAMES),
        default=list(NAMES),
        help=f"of {', '.join(NAMES)} (default: all)",
    )
    made.add_argument(
        "--engine", choices=list(PRECISIONS), default="openvino", help="of all but the naive one (default: openvino)"
    )
    made.add_argument("--precision", choices=PRECISIONS["openvino"], default="int8", help="of that engine (default: int8)")
    made.add_argument("--output", type=Path, default=Path("bench/serve-new.md"), help="default: bench/serve-new.md")
    options = made.parse_args(arguments)
    if options.precision not in PRECISIONS[options.engine]:
        made.error(f"{options.engine} has no {options.precision}: use {' or '.join(PRECISIONS[options.engine])}")
    return options


def positive(value: str) -> int:
    """A whole number from 1 on, for argparse."""
    if (number := int(value)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


if __name__ == "__main__":
    run_stage("bench-serve", main)
