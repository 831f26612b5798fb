"""DVC's experiment queue, by DVC's own commands: to put an experiment in, to see how far each one is, to stop one.

DVCLive writes the macro-F1 of an epoch as it ends to a table of the folder that the experiment runs in, and DVC commits the table
with the experiment. (metrics.json has the last epoch alone, and is not there before the end.)
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from sentiment.errors import TuneError

SHOW_SECONDS = 120
EPOCHS = Path("metrics/train/plots/metrics/validation/f1_macro.tsv")


class Experiment(NamedTuple):
    """An experiment as `dvc exp show` has it, and while it runs, the folder and the process in which it does."""

    state: str  # queued, running, failed or success
    commit: str  # of its result, or before there is one, of what it begins from
    folder: Path | None
    pid: int | None

    @property
    def alive(self) -> bool:
        """Whether the process that runs it is there."""
        return self.pid is not None and psutil.pid_exists(self.pid)

    def epochs(self) -> list[float]:
        """The macro-F1 on validation of each epoch so far; raises TuneError where there is a result without it."""
        if self.state == "success":
            return column(command("git", "show", f"{self.commit}:./{EPOCHS}"))
        try:
            table = (self.folder / EPOCHS).read_text(encoding="utf-8") if self.folder else ""
        except FileNotFoundError:
            return []
        return column(table) if table != self.inherited() else []

    def inherited(self) -> str:
        """The table of an earlier training, which lies there until this one begins."""
        try:
            return command("git", "show", f"{self.commit}:./{EPOCHS}")
        except TuneError:
            return ""


def column(table: str) -> list[float]:
    """The last column of a tab-separated table with a header, without a line that is not written to its end."""
    return [float(line.rsplit("\t", 1)[-1]) for line in table.splitlines(keepends=True)[1:] if line.endswith("\n")]


def command(*arguments: str, seconds: float | None = None) -> str:
    """What a command prints; raises TuneError with its own words if it fails, or if it takes more than so many seconds.

    It runs in a session of its own, out of reach of Ctrl-C, which would leave a working tree half changed by DVC. Its output goes
    through files, since the workers that DVC starts would hold a pipe open.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        try:
            done = subprocess.run(
                arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=errors,
                start_new_session=True, check=False, timeout=seconds,
            )  # fmt: skip
        except FileNotFoundError:
            raise TuneError(f"there is no {arguments[0]} on PATH; `source .venv/bin/activate`, or `make tune`") from None
        except subprocess.TimeoutExpired:
            raise TuneError(f"`{' '.join(arguments[:3])}` took more than {seconds:g} s; try it by hand") from None
        out.seek(0)
        errors.seek(0)
        if done.returncode:
            raise TuneError(f"`{' '.join(arguments[:3])}` failed: {' '.join(errors.read().split()) or done.returncode}")
        return out.read()


def queue(name: str, values: dict[str, Any], target: str) -> None:
    """Put an experiment into the queue: the pipeline up to `target`, with other parameters."""
    command("dvc", "exp", "run", "--queue", "--name", name, *settings(values), target)


def settings(values: dict[str, Any]) -> list[str]:
    """The arguments of `dvc exp run` that set parameters, by dotted key; Hydra, which reads them, takes values as in JSON."""
    return [part for key, value in values.items() for part in ("-S", f"{key}={json.dumps(value, ensure_ascii=False)}")]


def start(jobs: int) -> None:
    """See to it that so many workers run what is queued; they end by themselves when nothing is."""
    command("dvc", "queue", "start", "--jobs", str(jobs))


def kill(name: str) -> None:
    """Interrupt a running experiment, or mark it as failed if nothing runs it; raises TuneError where it is not running."""
    command("dvc", "queue", "kill", name)


def workers() -> int:
    """How many workers of the queue there are; raises TuneError where DVC does not say."""
    shown = command("dvc", "queue", "status")
    found = re.search(r"(\d+) active, (\d+) idle", shown)
    if not found:
        raise TuneError(f"`dvc queue status` names no workers: {' '.join(shown.split())}")
    return sum(map(int, found.groups()))


def why_failed(name: str) -> str:
    """What a failed experiment says: the first error in its output, or its last line."""
    try:
        lines = [line.strip() for line in command("dvc", "queue", "logs", name).splitlines() if line.strip()]
    except TuneError as error:
        return str(error)
    errors = [line for line in lines if " ERROR " in line or line.startswith("ERROR")]
    return (errors or lines[-1:] or ["it printed nothing"])[0]


def experiments(commits: Iterable[str]) -> dict[str, Experiment]:
    """The experiments that were queued at some commits, by name.

    Raises TuneError where DVC cannot list them, as in the moments in which it prepares one; where it clears up after one, it has
    been seen to wait for ever.
    """
    wanted = [part for commit in sorted(set(commits)) for part in ("--rev", commit)]
    return listed(json.loads(command("dvc", "exp", "show", "--json", "--hide-workspace", *wanted, seconds=SHOW_SECONDS)))


def listed(shown: list[dict[str, Any]]) -> dict[str, Experiment]:
    """The experiments of what `dvc exp show --json` prints, by name; one that is both running and a success is a success."""
    found: dict[str, Experiment] = {}
    for each in [experiment for commit in shown for experiment in commit.get("experiments") or ()]:
        executor = each["executor"] or {"state": "success"}
        local = executor.get("local") or {}
        folder = Path(local["root"]) if local.get("root") else None
        if each["name"] not in found or executor["state"] == "success":
            found[each["name"]] = Experiment(executor["state"], each["revs"][0]["rev"], folder, local.get("pid"))
    return found
