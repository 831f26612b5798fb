"""Search for parameters: each trial is an experiment of DVC's queue, chosen by Optuna, that trains and is scored on validation.

Run: python -m sentiment.tune                               `tune` in params.yaml says what is searched, and how long
     python -m sentiment.tune --trials 40 --jobs 2          the same study to 40 trials, two at a time
     python -m sentiment.tune --study wide                  another study, beginning with none

A trial counts by its best epoch's macro-F1 on validation, the epoch whose model training keeps. No trial is evaluated on the test
split or promoted. A study is a file in .dvc/tmp/tune; whatever stops a search, the same command goes on with it.
"""

import argparse
import json
import logging
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState

from sentiment import params
from sentiment.errors import TuneError
from sentiment.experiments import command
from sentiment.logs import guarded, setup
from sentiment.search import Search
from sentiment.space import PARAMS, TARGET, distributions, read, rounded, stages_up_to

STUDIES = Path(".dvc/tmp/tune")  # beside DVC's queue, so that the two are kept or lost together
SHOWN = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
log = logging.getLogger("stages.tune")


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings, study = parse(sys.argv[1:], params.load().tune)
    space = distributions(settings.space, read(PARAMS))
    STUDIES.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(STUDIES / f"{study}.lock", blocking=False), until_a_signal() as stopped:
            search = Search(study, STUDIES / f"{study}.journal", settings, space)
            warn_of_repetition()
            search.run(stopped)
    except Timeout:
        raise TuneError(f"another process searches in study {study}; wait for it, or name another --study") from None
    if stopped.is_set():
        log.warning(
            "stopped; the same command goes on. What is queued is trained meanwhile: `dvc queue stop` ends that after the trials "
            "that run, `dvc queue kill NAME` ends one of those"
        )
        raise KeyboardInterrupt
    sys.stdout.write(summary(search.trials(), study, list(space)) + "\n")


def parse(arguments: list[str], settings: params.Tune) -> tuple[params.Tune, str]:
    """The settings, with what the command line changes of them, and the study's name."""
    made = argparse.ArgumentParser(prog="python -m sentiment.tune", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--trials", type=int, default=settings.trials, metavar="N", help="trials in all (default: %(default)s)")
    made.add_argument("--jobs", type=int, default=settings.jobs, metavar="N", help="trials at a time (default: %(default)s)")
    made.add_argument("--study", default="tune", metavar="NAME", help="what its experiments are named by (default: %(default)s)")
    options = made.parse_args(arguments)
    if min(options.trials, options.jobs) < 1:
        made.error("--trials and --jobs must be at least 1")
    if not re.fullmatch(r"[a-z0-9]+([_-][a-z0-9]+)*", options.study):
        made.error("--study must be of lower-case letters and digits, with single - or _ between them")
    return settings.model_copy(update={"trials": options.trials, "jobs": options.jobs}), options.study


@contextmanager
def until_a_signal() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a polite kill sets, so that no command of DVC is cut short."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def warn_of_repetition() -> None:
    """Say so where dvc.lock does not have the stages before training as they would run."""
    *before, _ = stages_up_to(TARGET, read("dvc.yaml")["stages"])
    if json.loads(command("dvc", "status", "--json", *before)):
        log.warning("each trial prepares the reviews anew; `dvc repro %s` and a commit would spare that", " ".join(before))


def summary(trials: list[FrozenTrial], study: str, keys: list[str]) -> str:
    """The trials as a table, the best first, and the command that goes on with the best."""
    ended = sorted(
        (trial for trial in trials if trial.state in SHOWN),
        key=lambda trial: (SHOWN.index(trial.state), -max(trial.intermediate_values.values(), default=0), trial.number),
    )
    rows = [("experiment", "state", "macro-F1", "epoch", *keys), *(cells(trial, study, keys) for trial in ended)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if ended and ended[0].state is TrialState.COMPLETE:
        lines += ["", "To evaluate the best on the test split, and promote it if it is better, without training it again:"]
        commit = ended[0].user_attrs["result"][:10]
        lines += [f"git restore --source {commit} params.yaml dvc.lock metrics && dvc exp run"]
    return "\n".join(lines)


def cells(trial: FrozenTrial, study: str, keys: list[str]) -> tuple[str, ...]:
    """A trial as text, with the epoch that it counts by."""
    epochs, values = trial.intermediate_values, rounded(trial.params)
    best = max(epochs, key=lambda epoch: (epochs[epoch], -epoch), default=None)
    score = ("-", "-") if best is None else (f"{epochs[best]:.4f}", str(best))
    return f"{study}-{trial.number}", trial.state.name.lower(), *score, *(str(values.get(key, "-")) for key in keys)


if __name__ == "__main__":
    sys.exit(guarded("tune", main, setup("tune")))
