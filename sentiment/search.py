"""A study of Optuna whose trials are experiments in DVC's queue, and which goes on wherever it was stopped."""

import logging
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from sentiment import experiments, params
from sentiment.errors import ParamsError, TuneError
from sentiment.experiments import Experiment, command
from sentiment.space import PARAMS, TARGET, basis, changed, contains, read, rounded, value_of

DONE = (TrialState.COMPLETE, TrialState.PRUNED)
LOOKS = 6  # at an experiment that is not listed, or whose process is not there, before it is given up
FAILURES = 3  # in a row, after which a search stops
MEDIAN_OF = 4  # trainings that went to their end, before one is stopped for being below their median
log = logging.getLogger("stages.tune")


class Search:
    """`run` brings a study to so many trials with a result.

    A trial's number is in its experiment's name. Of its user attributes, `commit` is where it was queued, `result` what it left,
    `ended` why it was interrupted ("pruned", or "lost" with its worker), and `reason` why it failed.
    """

    def __init__(self, name: str, file: Path, settings: params.Tune, space: dict[str, BaseDistribution]) -> None:
        self.name, self.settings, self.space = name, settings, space
        self.storage = optuna.storages.JournalStorage(JournalFileBackend(str(file)))
        self.study = optuna.create_study(
            storage=self.storage, study_name=name, direction="maximize", pruner=pruner(settings.prune_after), load_if_exists=True
        )
        self.first = len(self.trials())  # number of this call
        self.absent: Counter[int] = Counter()  # looks at which a trial's experiment was not there, or not alive
        self.failures = self.blind = 0  # trials in a row that failed; looks in a row that DVC did not answer
        self.released = False  # whether what seemed to run was called failed since DVC answered last
        self.found: list[Experiment] = []  # at the last look
        self.basis = basis()
        self.begin()

    def begin(self) -> None:
        """Note what a new study's trials rest on, and let it try params.yaml as it is first.

        Raises TuneError where the study is there already and rests on something else.
        """
        noted = self.study.user_attrs.get("basis")
        if noted is None:
            self.study.set_user_attr("basis", self.basis)
            values = {key: value_of(read(PARAMS), key) for key in self.space}
            self.study.enqueue_trial({key: value for key, value in values.items() if contains(self.space[key], value)})
        elif noted != self.basis:
            others = " and ".join(name for name in self.basis if noted.get(name) != self.basis[name])
            raise TuneError(
                f"the trials of study {self.name} were made with other {others}, and would not compare with new ones; take the "
                "change back, or begin another study with --study NAME"
            )

    def run(self, stopped: threading.Event) -> None:
        """Follow what runs and queue what is missing, until there are enough results or `stopped` is set."""
        while not stopped.is_set():
            self.look()
            done, running = len(self.trials(*DONE)), len(self.trials(TrialState.RUNNING))
            if done >= self.settings.trials and not running:
                return
            missing = min(self.settings.jobs, self.settings.trials - done) - running
            for _ in range(missing):
                self.queue()
            if missing > 0 or any(experiment.state == "queued" for experiment in self.found):
                experiments.start(self.settings.jobs)
            self.wait(stopped)

    def wait(self, stopped: threading.Event) -> None:
        """Wait for news from what runs, for a minute at most; where something is about to begin or to end, five seconds."""
        steady = len(self.found) > 0 and all(experiment.state == "running" and experiment.alive for experiment in self.found)
        before = news(self.found)
        for _ in range(60 if steady else 5):
            if stopped.wait(1) or news(self.found) != before:
                return

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The study's trials in some states, or all of them."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def trial(self, number: int) -> optuna.Trial:
        """A trial to report to, which may be of an earlier call."""
        study = self.storage.get_study_id_from_name(self.name)
        return optuna.Trial(self.study, self.storage.get_trial_id_from_study_id_trial_number(study, number))

    def experiment(self, trial: FrozenTrial | optuna.Trial) -> str:
        """The name of a trial's experiment."""
        return f"{self.name}-{trial.number}"

    def queue(self) -> None:
        """Let Optuna choose values and queue their experiment; raises TuneError if code, data or parameters have changed.

        A seed for each trial, so that a search that was interrupted chooses as one that was not.
        """
        if basis() != self.basis:
            raise TuneError("code, reviews or params.yaml have changed since the search began; take the change back, then go on")
        self.study.sampler = optuna.samplers.TPESampler(seed=self.settings.seed + len(self.trials()))
        trial = self.study.ask(self.space)
        values = rounded(trial.params)
        try:
            params.check(changed(read(PARAMS), values), f"the values of {self.experiment(trial)}")
        except ParamsError as error:
            self.fail(trial, str(error))
            return
        trial.set_user_attr("commit", command("git", "rev-parse", "HEAD").strip())
        try:
            experiments.queue(self.experiment(trial), values, TARGET)
        except TuneError as error:
            self.lose(trial)
            raise TuneError(f"{error}; if there is such an experiment already, begin another study with --study NAME") from error
        log.info("%s is queued: %s", self.experiment(trial), " ".join(experiments.settings(values)[1::2]))

    def look(self) -> None:
        """Take over what the experiments of the running trials have come to."""
        running = self.trials(TrialState.RUNNING)
        self.found = []
        if not running:
            return
        try:
            found = experiments.experiments({trial.user_attrs["commit"] for trial in running if "commit" in trial.user_attrs})
        except TuneError:
            self.blind += 1
            if self.blind % LOOKS == 0 and not experiments.workers():
                if self.released:
                    raise
                self.release(running)
            return
        self.blind, self.released = 0, False
        for trial in running:
            experiment = found.get(self.experiment(trial))
            self.found += [experiment] if experiment else []
            self.follow(trial, experiment)

    def release(self, running: list[FrozenTrial]) -> None:
        """Have DVC call failed what no worker is left to run.

        A worker that takes an experiment as it ends leaves it running for ever, and `dvc exp show` fails for as long
        (treeverse/dvc, issue 10673).
        """
        self.released = True
        for trial in running:
            self.trial(trial.number).set_user_attr("ended", "lost")
            self.kill(trial)

    def follow(self, trial: FrozenTrial, experiment: Experiment | None) -> None:
        """Take over what one trial's experiment has come to."""
        state, ended = experiment and experiment.state, trial.user_attrs.get("ended")
        if experiment is None:
            self.absent[trial.number] += 1
            if "commit" not in trial.user_attrs or self.absent[trial.number] >= LOOKS:
                self.lose(trial)
        elif state == "running":
            self.watch(trial, experiment)
        elif state == "success":
            self.complete(trial, experiment)
        elif state == "failed" and ended == "pruned":
            self.study.tell(trial.number, state=TrialState.PRUNED)
            log.info("%s was pruned", self.experiment(trial))
        elif state == "failed" and ended == "lost":
            self.lose(trial)
        elif state == "failed":
            self.fail(trial, experiments.why_failed(self.experiment(trial)))

    def watch(self, trial: FrozenTrial, experiment: Experiment) -> None:
        """Report a running experiment's epochs; end it if Optuna finds them poor, or if its process is gone."""
        told, ended = self.trial(trial.number), "ended" in trial.user_attrs
        if experiment.alive and not ended:
            self.absent[trial.number] = 0
            self.report(trial, experiment.epochs())
            if self.settings.prune_after and experiment.epochs() and told.should_prune():
                told.set_user_attr("ended", "pruned")
                self.kill(trial)
            return
        self.absent[trial.number] += 1
        if self.absent[trial.number] % LOOKS == 0:
            if not ended:
                told.set_user_attr("ended", "lost")
            self.kill(trial)

    def report(self, trial: FrozenTrial, epochs: list[float]) -> None:
        """Hand Optuna the epochs that it has not had."""
        for epoch in range(len(trial.intermediate_values) + 1, len(epochs) + 1):
            self.trial(trial.number).report(epochs[epoch - 1], epoch)
            log.info("%s epoch %d: macro-F1 %.4f", self.experiment(trial), epoch, epochs[epoch - 1])

    def kill(self, trial: FrozenTrial) -> None:
        """Interrupt an experiment; if it ended by itself meanwhile, the next look finds out."""
        try:
            experiments.kill(self.experiment(trial))
        except TuneError as error:
            log.info("%s was not interrupted: %s", self.experiment(trial), error)

    def complete(self, trial: FrozenTrial, experiment: Experiment) -> None:
        """Note the result of an experiment that is done: its best epoch's macro-F1."""
        try:
            epochs = experiment.epochs()
        except TuneError as error:
            self.fail(trial, str(error))
            return
        self.report(trial, epochs)
        self.trial(trial.number).set_user_attr("result", experiment.commit)
        self.study.tell(trial.number, max(epochs))
        self.failures = 0
        log.info("%s is done: macro-F1 %.4f", self.experiment(trial), max(epochs))

    def fail(self, trial: FrozenTrial | optuna.Trial, why: str) -> None:
        """Note a trial that failed; raises TuneError at the third of this call in a row."""
        self.end(trial, why)
        name = self.experiment(trial)
        log.error("%s failed: %s", name, why)
        self.failures += trial.number >= self.first
        if self.failures >= FAILURES:
            raise TuneError(
                f"{FAILURES} trials in a row failed, {name} with: {why}; mend it (`dvc queue logs {name}` has the whole output), "
                "then the same command goes on"
            )

    def lose(self, trial: FrozenTrial | optuna.Trial) -> None:
        """Have the values of a trial tried again whose experiment was never queued, was removed, or died with its worker."""
        self.end(trial, "its experiment was lost")
        self.study.enqueue_trial(trial.params)
        log.warning("the experiment %s is lost; its values will be tried again", self.experiment(trial))

    def end(self, trial: FrozenTrial | optuna.Trial, why: str) -> None:
        """Mark a trial as failed."""
        self.trial(trial.number).set_user_attr("reason", why)
        self.study.tell(trial.number, state=TrialState.FAIL)


def news(found: list[Experiment]) -> list[Any]:
    """What changes while experiments run: whether each is still there, and its epochs."""
    return [(experiment.alive, experiment.epochs()) for experiment in found if experiment.state == "running"]


def pruner(after: int | None) -> optuna.pruners.BasePruner:
    """What ends a training early: from so many epochs on, its best one is below the median of the others up to the same epoch."""
    if after is None:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=MEDIAN_OF, n_warmup_steps=after)
