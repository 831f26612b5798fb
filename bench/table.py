"""The Markdown page: what was measured, where and with what, a row for each server and number of connections, and two lines."""

import platform
from argparse import Namespace
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import mean, median

import psutil

from bench.load import WARM_UP
from bench.measure import BOUND_SECONDS, Measured
from bench.servers import NAMES, PEER_NAMES, REQUIREMENTS
from bench.workload import PROBES, Workload
from sentiment import conversion, engines

OURS = "ours"
COLUMNS = ("server", "connections", "requests/s", "p50 ms", "p99 ms", "errors", "memory MB", "requests/s to ours")
PACKAGES = ("openvino", "onnxruntime", "torch", "tokenizers", "gunicorn", "flask")


def heading(work: Workload, options: Namespace, rounds: int) -> str:
    """What the numbers are of."""
    memory = psutil.virtual_memory().total / 1e9
    window = f"{options.seconds} s for each number of connections after {WARM_UP:g} s of warming up"
    lines = [
        "# The service under load",
        "",
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, by `python -m bench.serve`",
        f"- load: a closed loop on the same machine, {window}",
        f"- values: medians of {rounds} round{'s' * (rounds > 1)} (errors: in all); memory: PSS of all processes of a server",
        f"- machine: {conversion.machine()['cpu']}, {engines.cores()} cores used of {psutil.cpu_count()}, {memory:.0f} GB",
        f"- versions: {', '.join([f'Python {platform.python_version()}', *versions(options.servers)])}",
        *(f"- {fact}" for fact in work.facts),
    ]
    return "\n".join(lines) + "\n\n"


def versions(servers: list[str]) -> list[str]:
    """Name and version of what computes and of what serves."""
    pinned = [line for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines() if "==" in line]
    peers = [line.replace("==", " ") for line in pinned if line.partition("==")[0] in set(servers) & set(PEER_NAMES)]
    return [*(f"{name} {version(name)}" for name in PACKAGES), *peers]


def table(measured: list[Measured], servers: list[str], connections: list[int]) -> str:
    """The rows, medians over rounds, and what follows from them."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}"]
    for name, said in (("packed", "engine alone, all packed"), ("lone", "engine alone, one at a time")):
        lines.append(row(said, [each for each in measured if each.server == name], ""))
    for name in servers:
        for count in connections:
            if rows := rows_of(measured, name, count):
                lines.append(row(NAMES[name], rows, ratio(rows, rows_of(measured, OURS, count))))
        if any(each.server == name and not each.connections for each in measured):
            lines.append(f"| {NAMES[name]} | failed |{' |' * (len(COLUMNS) - 2)}")
    return "\n".join([*lines, "", *conclusions(measured, connections), *remarks(measured)]) + "\n"


def rows_of(measured: list[Measured], name: str, count: int) -> list[Measured]:
    """A server's rows at a number of connections, one a round."""
    return [each for each in measured if each.server == name and each.connections == count]


def row(said: str, rows: list[Measured], to_ours: str) -> str:
    """One line of the table."""
    errors = str(sum(each.errors for each in rows)) if rows[0].connections else ""
    cells = [
        said,
        str(rows[0].connections or ""),
        number(middle(rows, lambda each: each.rate)),
        number(middle(rows, lambda each: each.p50)),
        number(middle(rows, lambda each: each.p99)),
        errors,
        number(middle(rows, lambda each: each.memory), places=0),
        to_ours,
    ]
    return f"| {' | '.join(cells)} |"


def middle(rows: list[Measured], of: Callable[[Measured], float | None]) -> float | None:
    """The median over the rounds that have a value."""
    values = [value for each in rows if (value := of(each)) is not None]
    return median(values) if values else None


def number(value: float | None, places: int = 1) -> str:
    """A cell."""
    return "" if value is None else f"{value:.{places}f}"


def ratio(rows: list[Measured], ours: list[Measured]) -> str:
    """Requests/s as a multiple of ours, at the same number of connections."""
    own = middle(ours, lambda each: each.rate)
    return f"{(middle(rows, lambda each: each.rate) or 0.0) / own:.2f}" if own else ""


def conclusions(measured: list[Measured], connections: list[int]) -> list[str]:
    """Ours against the engine alone: its share of the offline rate, and what one text takes."""
    offline = middle([each for each in measured if each.server == "packed"], lambda each: each.rate)
    alone = middle([each for each in measured if each.server == "lone"], lambda each: each.p50)
    rates = {count: middle(rows_of(measured, OURS, count), lambda each: each.rate) for count in connections}
    shares = [f"{rate / offline:.0%} at {count}" for count, rate in rates.items() if rate and offline]
    lines = [f"- ours reaches, of the engine's offline rate: {', '.join(shares)}"] if shares else []
    if (own := middle(rows_of(measured, OURS, 1), lambda each: each.p50)) and alone:
        lines.append(
            f"- one text at a time: p50 {own:.1f} ms of ours, {alone:.1f} ms of the engine alone ({own - alone:+.1f} ms)"
        )
    return lines


def remarks(measured: list[Measured]) -> list[str]:
    """What one must know to read the numbers."""
    loaded = [each for each in measured if each.connections]
    checked = {NAMES[each.server]: each.agree for each in loaded}
    lines = [f"- of {PROBES} texts, the engine's own label: {', '.join(f'{name} {agree}' for name, agree in checked.items())}"]
    if loaded:
        lines.append(f"- the load itself took {mean(each.client_cpu for each in loaded):.2f} of a core on average")
        worst = max(loaded, key=lambda each: each.others)
        lines.append(
            f"- other work on the machine took {mean(each.others for each in loaded):.2f} cores on average,"
            f" {worst.others:.2f} at most ({NAMES[worst.server]} at {worst.connections})"
        )
    if any(each.server == "naive" for each in loaded):
        lines.append(
            f"- the naive one is measured for twice as many answers as connections (8 at least), or {BOUND_SECONDS} s: at many"
            " connections its latencies are still growing then"
        )
    for each in measured:
        if each.note:
            lines.append(f"- {NAMES[each.server]}{f', {each.connections} connections' * bool(each.connections)}: {each.note}")
    return list(dict.fromkeys(lines))
