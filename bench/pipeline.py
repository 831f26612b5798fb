"""What the pipeline costs beside its computing: imports, DVC and DVCLive, in a fresh clone on the shipped sample.

Run: python -m bench.pipeline          some six minutes; nothing in this repository changes

HEAD is cloned without its tags, and `dvc repro --force` runs there once, away from the user's settings. A program called python,
first on PATH, times each stage's process, and has Python say how long each import took, those within functions, too. At last the
train stage runs once more with a timer around every call of DVCLive.
"""

import argparse
import inspect
import json
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
from ruamel.yaml import YAML

from sentiment import conversion, engines
from sentiment.errors import ProjectError
from sentiment.files import atomic
from sentiment.logs import run_stage

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("GIT_", "DVC_", "XDG_")  # variables of the user that would reach into the clone
HEAVY = ("torch", "transformers", "pandas", "sklearn")
TIMES = 3  # of which the median counts
TIMER = """#!{python} -IS
import subprocess, sys, time
start = time.perf_counter()
with open({file!r} + "." + sys.argv[-1], "w") as said:
    code = subprocess.call([{python!r}, "-X", "importtime", *sys.argv[1:]], stderr=said)
with open({file!r}, "a") as file:
    print(sys.argv[-1], time.perf_counter() - start, file=file)
sys.exit(code)
"""
IMPORT = re.compile(r"^import time:\s*\d+ \|\s*(\d+) \| ( *)([\w.]+)$", re.MULTILINE)  # its microseconds, its depth, its name
log = logging.getLogger("sentiment.bench")


class Stage(NamedTuple):
    """A stage's seconds: its whole process, and its imports; and what it imported."""

    name: str
    process: float
    importing: float
    imported: list[str]


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is removed then, too
    with tempfile.TemporaryDirectory(prefix="bench-pipeline-") as name:
        folder = Path(name)
        clone, environment = cloned(folder), outside(folder)
        log.info("dvc repro --force runs in a clone")
        whole, processes = repro(clone, environment, folder)
        start = median(wall(clone, environment, "pass") for _ in range(TIMES))
        stages = [measured(folder, stage, processes[stage]) for stage in processes]
        log.info("the train stage runs once more")
        live = python(clone, environment, f"{inspect.getsource(train_with_timed_dvclive)}\n{train_with_timed_dvclive.__name__}()")
        page = heading(clone, environment) + "\n" + table(stages, start) + "\n" + remarks(stages, whole, live)
    with atomic(options.output) as part:
        part.write_text(page, encoding="utf-8")
    print(page)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    description, _, details = (__doc__ or "").partition("\n")
    made = argparse.ArgumentParser(
        prog="python -m bench.pipeline",
        description=description,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--output", type=Path, default=Path("bench/pipeline-new.md"), help="default: bench/pipeline-new.md")
    return made


def outside(folder: Path) -> dict[str, str]:
    """The environment of every command: this interpreter's programs first, no settings of the user, no network."""
    home = folder / "home"
    home.mkdir()
    (home / "gitconfig").write_text("[user]\n\tname = bench\n\temail = bench@example.com\n", encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OUTSIDE)}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "HOME": str(home),
        "GIT_CONFIG_GLOBAL": str(home / "gitconfig"),
        "GIT_CONFIG_NOSYSTEM": "1",
        "DVC_GLOBAL_CONFIG_DIR": str(home / "dvc-global"),
        "DVC_SYSTEM_CONFIG_DIR": str(home / "dvc-system"),
        "DVC_SITE_CACHE_DIR": str(home / "dvc-site"),
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def cloned(folder: Path) -> Path:
    """A clone of this repository without its tags, so that nothing is in production there."""
    clone = folder / "clone"
    run(ROOT, dict(os.environ), "git", "clone", "--quiet", "--no-tags", str(ROOT), str(clone))
    return clone


def run(folder: Path, environment: dict[str, str], *command: str) -> str:
    """What a command prints; raises ProjectError with its last words if it fails."""
    done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()[-5:]
        raise ProjectError(f"{' '.join(command)[:100]} failed: {' / '.join(words)}")
    return done.stdout


def python(folder: Path, environment: dict[str, str], code: str) -> Any:
    """The last line that a Python program prints, as JSON."""
    return json.loads(run(folder, environment, sys.executable, "-c", code).splitlines()[-1])


def wall(folder: Path, environment: dict[str, str], code: str) -> float:
    """Seconds that the process of a Python program takes."""
    start = time.perf_counter()
    run(folder, environment, sys.executable, "-c", code)
    return time.perf_counter() - start


def repro(clone: Path, environment: dict[str, str], folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds of one `dvc repro --force`, and those of each stage's process in it, in the order in which they ran."""
    programs, times = folder / "programs", folder / "times"
    programs.mkdir()
    timer = programs / "python"
    timer.write_text(TIMER.format(python=sys.executable, file=str(times)), encoding="utf-8")
    timer.chmod(0o755)
    start = time.perf_counter()
    run(clone, environment | {"PATH": f"{programs}{os.pathsep}{environment['PATH']}"}, "dvc", "repro", "--force")
    whole = time.perf_counter() - start
    lines = (line.rsplit(" ", 1) for line in times.read_text(encoding="utf-8").splitlines())
    processes = {module.removeprefix("stages."): float(seconds) for module, seconds in lines}
    expected = set(YAML(typ="safe", pure=True).load(clone / "dvc.yaml")["stages"])
    if set(processes) != expected:
        raise ProjectError(f"of {', '.join(sorted(expected))} only {', '.join(sorted(processes))} ran as `python -m stages.NAME`")
    return whole, processes


def measured(folder: Path, name: str, process: float) -> Stage:
    """A stage whose process took `process` seconds, by what Python said of its imports."""
    found = IMPORT.findall((folder / f"times.stages.{name}").read_text("utf-8"))
    names = {module for _, _, module in found}
    seconds = sum(int(microseconds) for microseconds, depth, _ in found if not depth) / 1e6
    return Stage(name, process, seconds, [package for package in HEAVY if package in names])


def train_with_timed_dvclive() -> None:
    """Run the train stage and print its seconds, and the calls of DVCLive with the seconds that they took (a JSON list)."""
    import json
    import time
    from typing import Any

    from dvclive import Live

    from stages import train

    spent: list[float] = []
    inside: list[str] = []

    def timed(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if inside:  # a call that another one of DVCLive's makes
                return function(*arguments, **named)
            inside.append(function.__name__)
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent.append(time.perf_counter() - start)
                inside.pop()

        return call

    for name in ("__init__", "log_metric", "next_step", "make_summary", "end"):
        setattr(Live, name, timed(getattr(Live, name)))
    start = time.perf_counter()
    train.main()
    print(json.dumps([time.perf_counter() - start, len(spent), sum(spent)]))


def heading(clone: Path, environment: dict[str, str]) -> str:
    """What the numbers are of."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("dvc", "dvclive", "torch", "transformers"))
    memory = psutil.virtual_memory().total / 1e9
    lines = [
        "# The pipeline",
        "",
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, by `python -m bench.pipeline`",
        f"- machine: {conversion.machine()['cpu']}, {engines.cores()} cores used of {psutil.cpu_count()}, {memory:.0f} GB",
        f"- versions: Python {platform.python_version()}, {packages}",
        f"- `dvc repro --force` in a fresh clone of {run(clone, environment, 'git', 'rev-parse', '--short', 'HEAD').strip()}",
    ]
    return "\n".join(lines) + "\n"


def table(stages: list[Stage], start: float) -> str:
    """A row a stage, in seconds; computing is all that is neither the interpreter's start nor an import."""
    columns = ("stage", "process", "interpreter", "imports", "computing", "imported")
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 2) + "---|"]
    for each in stages:
        computing = each.process - start - each.importing
        cells = (f"{value:.2f}" for value in (each.process, start, each.importing, computing))
        lines.append(f"| {each.name} | {' | '.join(cells)} | {', '.join(each.imported) or 'none'} |")
    return "\n".join(lines) + "\n"


def remarks(stages: list[Stage], whole: float, live: tuple[float, int, float]) -> str:
    """How to read the table, and what DVC and DVCLive cost."""
    processes, imports = sum(each.process for each in stages), sum(each.importing for each in stages)
    training, calls, spent = live
    second = f"of the {training:.1f} s that train computed in a second run, with a timer around each call"
    lines = [
        f"- seconds; imports: by -X importtime in the same run, those within functions, too; imported: of {', '.join(HEAVY)}",
        "- computing: all but the interpreter's start and the imports",
        f"- all stages: {processes:.2f} s, of which {imports:.2f} s imports ({imports / processes:.0%})",
        f"- DVC: {whole - processes:.2f} s of the {whole:.2f} s of `dvc repro --force` ({(whole - processes) / whole:.0%})",
        f"- DVCLive: {spent * 1000:.0f} ms in {calls} calls, {spent / training:.1%} {second}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_stage("bench-pipeline", main)
