"""The engine without a server: what is possible on the same reviews, as one JSON object on standard output.

Run: python -m bench.alone REVIEWS.json --seconds 20          in the environment that bench/peers reads, as bench/serve.py does
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.peers import Scorer
from sentiment.engines import Engine
from sentiment.files import read_json

FEWEST = 50  # texts, one at a time, whatever the seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.alone", description=__doc__)
    parser.add_argument("reviews", type=Path, help="a JSON list of texts")
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    scorer, texts = Scorer.from_environment(), read_json(options.reviews)
    reviews = scorer.reader.token_ids(texts)
    found = {
        "packed": {"rate": offline(scorer.engine, reviews, options.seconds)},
        "lone": lone(scorer.engine, reviews, options.seconds),
        "memory": psutil.Process().memory_full_info().pss / 1e6,
    }
    print(json.dumps(found))


def offline(engine: Engine, reviews: list[np.ndarray], seconds: float) -> float:
    """The reviews/s of all reviews packed by sentiment.packing.bins, in the best pass of as many as there is time for."""
    engine.logits(reviews[:FEWEST])
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        engine.logits(reviews)
        best = min(best, time.perf_counter() - start)
    return len(reviews) / best


def lone(engine: Engine, reviews: list[np.ndarray], seconds: float) -> dict[str, Any]:
    """One review after the other, in their order: reviews/s, and p50 and p99 in ms."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < FEWEST or time.perf_counter() < begin + seconds:
        start = time.perf_counter()
        engine.logits([reviews[len(times) % len(reviews)]])
        times.append(time.perf_counter() - start)
    p50, p99 = np.percentile(times, [50, 99]) * 1000
    return {"rate": len(times) / sum(times), "p50": p50, "p99": p99}


if __name__ == "__main__":
    main()
