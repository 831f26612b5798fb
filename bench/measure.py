"""One turn: the engine alone, or a server that is started, checked, and measured at each number of connections."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.servers import NAMES, ROOT, Running, ServerError, running
from bench.workload import Workload
from sentiment.errors import ProjectError
from sentiment.files import read_json

ALONE = "alone"  # the engine without a server, which takes its turn as they do
CLOSE = 0.01  # of a probability: what else is in a packed row changes it by up to 0.001
BOUND_SECONDS = 60  # for a server so slow that its answers are counted
LOGS = Path("logs")
log = logging.getLogger("sentiment.bench")


@dataclass(frozen=True)
class Measured:
    """One row of one round; latencies in ms, memory in MB."""

    server: str
    connections: int = 0
    rate: float = 0.0  # requests/s
    p50: float | None = None
    p99: float | None = None
    errors: int = 0
    memory: float | None = None
    agree: int | None = None  # of the probes
    client_cpu: float = 0.0  # cores that the load itself took
    others: float = 0.0  # cores that neither the load nor the server took
    note: str = ""  # why there is nothing, or what the first error was


def turn(name: str, work: Workload, connections: list[int], seconds: int) -> list[Measured]:
    """The rows of a server, started for them and ended after them; the last one says so if it failed."""
    if name == ALONE:
        return alone(work, seconds)
    rows: list[Measured] = []
    log_file = work.reviews.parent / f"{name}.log"
    try:
        with running(name, work, log_file) as server:
            agree = probe(server, work)
            for count in connections:
                rows.append(load(server, work, name, count, seconds, agree))
    except ProjectError as error:
        kept = keep(log_file)
        log.error("%s failed: %s; its log is %s", NAMES[name], error, kept)
        rows.append(Measured(name, note=f"failed: {error}; its log is {kept}"))
    return rows


def alone(work: Workload, seconds: int) -> list[Measured]:
    """Two rows: the engine's reviews/s of all reviews packed, and of one review after the other."""
    found = child(work, "bench.alone", str(work.reviews), "--seconds", str(seconds))
    log.info("the engine alone: %.1f reviews a second, %.1f one at a time", found["packed"]["rate"], found["lone"]["rate"])
    return [Measured(name, memory=found["memory"], **found[name]) for name in ("packed", "lone")]


def probe(server: Running, work: Workload) -> int:
    """How many texts a server gives the label of the engine alone; raises ServerError if it should to all and does not.

    Of two classes that are as good as equal, as random weights may leave them, either one will do.
    """
    texts = read_json(work.reviews)[: len(work.expected)]
    pairs = [(server.post(text), expected) for text, expected in zip(texts, work.expected, strict=True)]
    agree = sum(answer["sentiment"] == other["sentiment"] for answer, other in pairs)
    furthest = max(abs(answer["score"] - other["score"]) for answer, other in pairs)
    ties = sum(answer["sentiment"] != other["sentiment"] and other["score"] < 0.5 + CLOSE for answer, other in pairs)
    if not server.spec.bounded and (agree + ties < len(pairs) or furthest > CLOSE):
        raise ServerError(f"it gives {agree} of {len(pairs)} texts the engine's label, with scores up to {furthest:.3f} apart")
    return agree


def load(server: Running, work: Workload, name: str, connections: int, seconds: int, agree: int) -> Measured:
    """A server at a number of connections."""
    arguments = ["--port", server.port, "--connections", connections, "--labels", *work.labels]
    arguments += ["--list"] if server.spec.listed else []
    bound = ["--seconds", BOUND_SECONDS, "--answers", max(8, 2 * connections)] if server.spec.bounded else ["--seconds", seconds]
    start, busy, own = time.monotonic(), busy_seconds(), server.cpu_seconds()
    found = child(work, "bench.load", *map(str, [work.reviews, *arguments, *bound]))
    others = (busy_seconds() - busy - server.cpu_seconds() + own) / (time.monotonic() - start)
    server.check()
    log.info("%s at %d: %.1f requests a second", NAMES[name], connections, found["rate"])
    note = found.pop("error")
    return Measured(name, connections, memory=server.megabytes(), agree=agree, others=max(0.0, others), note=note, **found)


def busy_seconds() -> float:
    """What all cores have computed, or were kept from by other machines on the same hardware, but for this process' children."""
    times, children = psutil.cpu_times(), os.times()
    idle = sum(getattr(times, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))  # guests are in user, too
    return float(sum(times) - idle) - children.children_user - children.children_system


def child(work: Workload, module: str, *arguments: str) -> dict[str, Any]:
    """What a module of ours, in a process of its own, prints as JSON; raises ServerError if it fails."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, env=os.environ | work.environment)
    if done.returncode:
        raise ServerError(f"{module} failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def keep(log_file: Path) -> Path:
    """The log of a server that failed, where it outlives the benchmark's own folder."""
    LOGS.mkdir(exist_ok=True)
    return Path(shutil.copy(log_file, LOGS / f"bench-serve-{log_file.name}"))
