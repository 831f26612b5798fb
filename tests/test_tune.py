"""The search for parameters: what it draws from, what it makes of its experiments, and one search through DVC's own queue."""

import json
import re
import shutil
import signal
import subprocess
import threading
import time
from copy import deepcopy
from pathlib import Path

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.trial import TrialState

from conftest import change
from sentiment import experiments, params, search, space, tune
from sentiment.errors import ParamsError, TuneError

ROOT = Path(__file__).parent.parent
SHIPPED = space.read(ROOT / "params.yaml")


def settings(**changes):
    """`tune` of the shipped params.yaml with some of it changed, checked."""
    values = deepcopy(SHIPPED)
    values["tune"] |= changes
    return params.check(values).tune


def test_the_shipped_space_holds_the_shipped_values():
    drawn = space.distributions(settings().space, SHIPPED)
    assert all(space.contains(drawn[key], space.value_of(SHIPPED, key)) for key in drawn)


@pytest.mark.parametrize(
    ("searched", "words"),
    [
        ({"train.taxa": [1, 2]}, ["train.taxa", "no parameter"]),
        ({"train.lr.peak": [1, 2]}, ["train.lr.peak", "no parameter"]),
        ({"train.lr": {"low": -1.0, "high": 0.1}}, ["train.lr", "greater than 0", "-1"]),
        ({"train.epochs": {"low": 1, "high": 2.5}}, ["train.epochs", "integer", "2.5"]),
        ({"train.batch_tokens": [128, 1024]}, ["train.batch_tokens (128)", "tokenize.max_length (256)"]),
        ({"train.decay": ["linear", "quadratic"]}, ["train.decay", "'quadratic'"]),
        ({"prepare.test": {"low": 0.1, "high": 0.3}}, ["prepare.test", "reviews", "train, model, tokenize"]),
        ({"evaluate.bootstrap": [100, 200]}, ["evaluate.bootstrap", "train, model, tokenize"]),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_by_its_key(searched, words):
    with pytest.raises(ParamsError) as error:
        space.distributions(settings(space=searched).space, SHIPPED)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    "searched", [{}, {"train.lr": [1e-4]}, {"train.lr": 1e-4}, {"train.lr": {"low": 2, "high": 1}}, {"train.lr": {"low": 1}}]
)
def test_a_space_of_a_wrong_form_is_refused(searched):
    with pytest.raises(ParamsError, match=r"tune\.space"):
        settings(space=searched)


def test_a_range_of_whole_numbers_draws_whole_numbers():
    searched = settings(
        space={"train.epochs": {"low": 2, "high": 8}, "train.lr": {"low": 1.0e-5, "high": 1e-3, "log": True}}
    ).space
    drawn = optuna.create_study().ask(space.distributions(searched, SHIPPED)).params
    assert isinstance(drawn["train.epochs"], int)
    assert 2 <= drawn["train.epochs"] <= 8
    assert 1e-5 <= drawn["train.lr"] <= 1e-3


@pytest.mark.parametrize("value", [3e-05, 0.1, 512, True, None, "cosine", "balanced", "a, b=c", 'an "accent" é', "null", "1e-3"])
def test_dvc_reads_a_value_as_it_was_drawn(value):
    flag, argument = experiments.settings({"train.decay": value})
    read = OverridesParser.create().parse_override(argument)
    read = read.value()
    assert flag == "-S"
    assert getattr(read, "text", read) == value


def test_a_line_that_is_being_written_is_no_epoch_yet():
    assert experiments.column("step\tf1_macro\n83\t0.91\n166\t0.9") == [0.91]
    assert experiments.column("step\tf1_macro\n83\t0.91\n166\t0.92\n") == [0.91, 0.92]
    assert experiments.column("") == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("sh", "-c", "echo sem espaço >&2; exit 3"), "sem espaço"),
        (("sleep", "60"), "took more than 0.1 s"),
        (("nenhum-programa",), "there is no nenhum-programa on PATH"),
    ],
)
def test_a_command_that_fails_hangs_or_is_not_there_says_so(arguments, says):
    with pytest.raises(TuneError, match=says):
        experiments.command(*arguments, seconds=0.1 if arguments[0] == "sleep" else None)


def test_what_dvc_shows_is_read_by_name():
    def shown(name, executor):
        return {"revs": [{"rev": f"of {name}"}], "executor": executor, "name": name}

    running = {"state": "running", "local": {"root": "/tmp/x", "pid": 7}}
    commits = [
        {"rev": "a", "experiments": [shown("one", running), shown("two", running), shown("two", {"state": "success"})]},
        {"rev": "b", "experiments": [shown("three", None), shown("four", {"state": "failed", "local": None})]},
        {"rev": "c", "experiments": None},
    ]
    found = experiments.listed(commits)
    assert {name: each.state for name, each in found.items()} == {
        "one": "running", "two": "success", "three": "success", "four": "failed",
    }  # fmt: skip
    assert found["one"] == ("running", "of one", Path("/tmp/x"), 7)


def test_the_epochs_of_an_earlier_training_are_not_taken_for_those_of_one_that_has_not_begun(small, inside, tmp_path):
    inside(small)
    table = tmp_path / experiments.EPOCHS
    table.parent.mkdir(parents=True)
    running = experiments.Experiment("running", "HEAD", tmp_path, 1)
    assert running.epochs() == []
    shutil.copy(small.path / experiments.EPOCHS, table)
    assert running.epochs() == []
    table.write_text("step\tf1_macro\n83\t0.5\n")
    assert running.epochs() == [0.5]
    assert len(running._replace(state="success").epochs()) > 1


class Pretended:
    """A queue whose experiments train an epoch from one look to the next; `learns` gives the epochs for a learning rate."""

    def __init__(self, learns):
        self.learns, self.values, self.states, self.seen, self.killed = learns, {}, {}, {}, []

    def queue(self, name, values, target):
        assert target == "train"
        assert name not in self.values
        self.values[name], self.states[name], self.seen[name] = values, "running", 0

    def kill(self, name):
        self.killed.append(name)
        self.states[name] = "failed"

    def experiments(self, commits):
        assert set(commits) <= {"c0ffee"}
        for name in [name for name, state in self.states.items() if state == "running"]:
            epochs = self.learns(self.values[name]["train.lr"])
            self.seen[name] += 1
            if not epochs or self.seen[name] > len(epochs):
                self.states[name] = "success" if epochs else "failed"
        return {name: Shown(self, name) for name in self.states}


class Shown:
    """An experiment of a pretended queue."""

    alive = True

    def __init__(self, queue, name):
        self.commit = "decaf"
        self.state, self.all, self.seen = queue.states[name], queue.learns(queue.values[name]["train.lr"]), queue.seen[name]

    def epochs(self):
        return self.all[: self.seen]


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A function that gives a queue, pretended from then on, whose experiments learn in some way."""

    def pretended(learns):
        queue = Pretended(learns)
        for name in ("queue", "kill", "experiments"):
            monkeypatch.setattr(experiments, name, getattr(queue, name))
        return queue

    shutil.copy(ROOT / "params.yaml", tmp_path)
    change(tmp_path / "params.yaml", {"tune.space": {"train.lr": {"low": 1e-5, "high": 1e-2, "log": True}}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "start", lambda jobs: None)
    monkeypatch.setattr(experiments, "why_failed", lambda name: "no more memory")
    monkeypatch.setattr(search, "command", lambda *_: "c0ffee\n")
    monkeypatch.setattr(search, "basis", lambda: {"code": "one", "tune.space": "two"})
    monkeypatch.setattr(search.Search, "wait", lambda *_: None)
    return pretended


def searching(**changes):
    """A search in this folder's study, as a call of the command makes it."""
    made = settings(
        **{"space": {"train.lr": {"low": 1e-5, "high": 1e-2, "log": True}}, "trials": 6, "prune_after": None} | changes
    )
    return search.Search("tune", Path("tune.journal"), made, space.distributions(made.space, SHIPPED))


def stopping(after):
    """What says after so many looks that the search is to stop, in the middle of whatever runs."""
    stopped = threading.Event()
    looks = iter(range(after))
    stopped.is_set = lambda: next(looks, None) is None
    return stopped


def test_a_search_tries_the_shipped_values_first_and_ends_with_the_wanted_number_of_results(pretend):
    queue = pretend(lambda lr: [0.5, 0.5 + lr, 0.4])
    made = searching()
    made.run(threading.Event())
    assert list(queue.values) == [f"tune-{number}" for number in range(6)]
    assert queue.values["tune-0"] == {"train.lr": 3e-4}
    trials = made.trials()
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert [trial.value for trial in trials] == [pytest.approx(0.5 + each["train.lr"]) for each in queue.values.values()]


def test_as_many_run_at_a_time_as_there_are_jobs(pretend):
    queue = pretend(lambda lr: [0.5, 0.5])
    searching(jobs=3).run(stopping(1))
    assert list(queue.states.values()) == ["running"] * 3


def test_a_search_that_was_stopped_goes_on_with_what_runs_and_chooses_as_if_it_had_not_been(pretend, tmp_path):
    def learns(lr):
        return [0.5, 0.9 - abs(lr - 2e-3)]

    whole = pretend(learns)
    searching(trials=14).run(threading.Event())
    (tmp_path / "tune.journal").unlink()
    queue = pretend(learns)
    for after in (2, 4, 7):
        searching(trials=14).run(stopping(after))
    made = searching(trials=14)
    made.run(threading.Event())
    assert len(made.trials(TrialState.COMPLETE)) == 14
    assert queue.values == whole.values


def test_more_trials_are_added_to_those_that_are_done(pretend):
    queue = pretend(lambda lr: [0.5])
    searching(trials=3).run(threading.Event())
    searching(trials=5).run(threading.Event())
    assert len(queue.values) == 5


def test_values_whose_experiment_is_gone_are_tried_again(pretend):
    queue = pretend(lambda lr: [0.5, 0.6])
    searching(trials=2).run(stopping(2))
    values = queue.values.pop("tune-0")
    del queue.states["tune-0"]
    made = searching(trials=2)
    made.run(threading.Event())
    assert made.trials()[0].state is TrialState.FAIL
    assert values in queue.values.values()
    assert len(made.trials(TrialState.COMPLETE)) == 2


def test_a_poor_trial_is_ended_early_and_keeps_its_last_value(pretend):
    queue = pretend(lambda lr: [0.8, 0.9, 0.9, 0.9] if len(queue.values) <= 4 else [0.7, 0.6, 0.5, 0.4])
    made = searching(trials=5, prune_after=2)
    made.run(threading.Event())
    poor = made.trials()[4]
    assert queue.killed == ["tune-4"]
    assert poor.state is TrialState.PRUNED
    assert poor.intermediate_values == {1: 0.7, 2: 0.6}
    assert poor.value == 0.6


def test_without_pruning_a_poor_trial_runs_to_its_end(pretend):
    queue = pretend(lambda lr: [0.8, 0.9, 0.9, 0.9] if len(queue.values) <= 4 else [0.7, 0.6, 0.5, 0.4])
    searching(trials=5).run(threading.Event())
    assert queue.killed == []


def test_a_failed_trial_is_noted_with_its_reason_and_the_search_goes_on(pretend):
    queue = pretend(lambda lr: [] if len(queue.values) == 2 else [0.5])
    made = searching(trials=3)
    made.run(threading.Event())
    assert [trial.state.name for trial in made.trials()] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert made.trials()[1].user_attrs["reason"] == "no more memory"


def test_three_failures_in_a_row_stop_the_search_until_it_is_called_again(pretend):
    queue = pretend(lambda lr: [])
    with pytest.raises(TuneError, match=r"3 trials in a row failed, tune-2 with: no more memory"):
        searching().run(threading.Event())
    assert len(queue.values) == 3
    queue.learns = lambda lr: [0.5]
    made = searching()
    made.run(threading.Event())
    assert len(made.trials(TrialState.COMPLETE)) == 6


@pytest.mark.parametrize("name", ["code", "tune.space"])
def test_a_study_that_rests_on_something_else_is_not_gone_on_with(pretend, monkeypatch, name):
    pretend(lambda lr: [0.5])
    searching(trials=1).run(threading.Event())
    monkeypatch.setattr(search, "basis", lambda: {"code": "one", "tune.space": "two"} | {name: "other"})
    with pytest.raises(TuneError, match=rf"other {re.escape(name)}, .* --study NAME"):
        searching()


def test_a_change_in_the_middle_of_a_search_stops_it(pretend, monkeypatch):
    queue = pretend(lambda lr: [0.5])
    made = searching()
    made.run(stopping(1))
    monkeypatch.setattr(search, "basis", lambda: {"code": "other", "tune.space": "two"})
    with pytest.raises(TuneError, match="have changed"):
        made.run(threading.Event())
    assert list(queue.values) == ["tune-0"]


def test_dvc_is_asked_again_when_it_could_not_answer(pretend, monkeypatch):
    queue = pretend(lambda lr: [0.5])
    answers = iter([True, False, True, False, False])

    def experiments_of(commits):
        if not next(answers, True):
            raise TuneError("unexpected error")
        return queue.experiments(commits)

    monkeypatch.setattr(experiments, "experiments", experiments_of)
    made = searching(trials=2)
    made.run(threading.Event())
    assert len(made.trials(TrialState.COMPLETE)) == 2


def blinded(queue, monkeypatch, lost):
    """DVC shows nothing while the experiment `lost` is said to run; returns the looks, which end what other experiments run."""
    looks = []

    def experiments_of(commits):
        looks.append(commits)
        if queue.states.get(lost) == "running":
            raise TuneError("No such file or directory: '….run'")
        return queue.experiments(commits)

    monkeypatch.setattr(experiments, "experiments", experiments_of)
    return looks


def test_an_experiment_that_was_lost_with_its_worker_is_released_and_its_values_are_tried_again(pretend, monkeypatch):
    queue = pretend(lambda lr: [0.5])
    blinded(queue, monkeypatch, "tune-0")
    monkeypatch.setattr(experiments, "workers", lambda: 0)
    made = searching(trials=2)
    made.run(threading.Event())
    assert queue.killed == ["tune-0"]
    assert queue.values["tune-1"] == queue.values["tune-0"]
    assert made.trials()[0].user_attrs["reason"] == "its experiment was lost"
    assert len(made.trials(TrialState.COMPLETE)) == 2


def test_nothing_is_released_while_a_worker_is_there(pretend, monkeypatch):
    queue = pretend(lambda lr: [0.5])
    looks = blinded(queue, monkeypatch, "tune-0")
    monkeypatch.setattr(experiments, "workers", lambda: 0 if len(looks) > 100 else 1)
    searching(trials=1).run(threading.Event())
    assert queue.killed == ["tune-0"]
    assert len(looks) > 100


def test_a_search_ends_where_dvc_shows_nothing_though_nothing_runs(pretend, monkeypatch):
    queue = pretend(lambda lr: [0.5])
    blinded(queue, monkeypatch, "tune-0")
    monkeypatch.setattr(experiments, "kill", queue.killed.append)
    monkeypatch.setattr(experiments, "workers", lambda: 0)
    with pytest.raises(TuneError, match="No such file"):
        searching(trials=1).run(threading.Event())
    assert queue.killed == ["tune-0"]


@pytest.mark.parametrize(
    ("shown", "number"),
    [("Task  Name\n66f4352  tune-1\n\nWorker status: 0 active, 0 idle\n", 0), ("Worker status: 1 active, 2 idle", 3)],
)
def test_the_workers_are_those_that_dvc_counts(monkeypatch, shown, number):
    monkeypatch.setattr(experiments, "command", lambda *_: shown)
    assert experiments.workers() == number


def test_a_status_without_workers_is_an_error(monkeypatch):
    monkeypatch.setattr(experiments, "command", lambda *_: "No experiment tasks in the queue.\n")
    with pytest.raises(TuneError, match="names no workers: No experiment"):
        experiments.workers()


def test_the_table_has_the_best_first_and_the_command_sets_its_values():
    study = optuna.create_study(direction="maximize")
    drawn = {"train.lr": optuna.distributions.FloatDistribution(1e-5, 1.0)}
    for lr, epochs, state in [
        (0.123456789, [0.7, 0.8], TrialState.COMPLETE),
        (0.2, [0.6, 0.5], TrialState.PRUNED),
        (0.3, [], TrialState.FAIL),
        (0.0456789, [0.9, 0.85], TrialState.COMPLETE),
    ]:
        study.add_trial(
            optuna.create_trial(
                state=state, params={"train.lr": lr}, distributions=drawn, intermediate_values=dict(enumerate(epochs, start=1)),
                values=[max(epochs)] if state is TrialState.COMPLETE else None, user_attrs={"result": "0123456789abcdef"},
            )
        )  # fmt: skip
    lines = tune.summary(study.get_trials(), "tune", ["train.lr"]).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["experiment", "state", "macro-F1", "epoch", "train.lr"],
        ["tune-3", "complete", "0.9000", "1", "0.04568"],
        ["tune-0", "complete", "0.8000", "2", "0.1235"],
        ["tune-1", "pruned", "0.6000", "1", "0.2"],
        ["tune-2", "fail", "-", "-", "0.3"],
    ]
    assert lines[-1] == "git restore --source 0123456789 params.yaml dvc.lock metrics && dvc exp run"


@pytest.fixture
def small(project):
    """The project with a search over two trials of a tiny model."""
    searched = {"train.lr": {"low": 1e-3, "high": 1e-1, "log": True}}
    chosen = {"train.lr": 5e-3, "train.epochs": 3, "tune.space": searched, "tune.trials": 2, "tune.prune_after": None}
    change(project.path / "params.yaml", chosen)
    project.commit("a busca")
    return project


@pytest.fixture
def ready(small):
    """The same with the reviews prepared, and that committed."""
    small.run("dvc", "repro", "audit", "tokenize")
    small.commit("os dados")
    return small


def test_a_file_that_queued_experiments_would_lack_is_named(small, inside):
    inside(small)
    before = space.basis()
    (small.path / "models" / "base" / "novo.json").write_text("{}")
    with pytest.raises(TuneError, match=r"models/base/novo\.json.*git add"):
        space.basis()
    (small.path / "models" / "base" / "novo.json").unlink()
    assert space.basis() == before


@pytest.mark.parametrize(
    ("key", "value", "others"),
    [
        ("train.lr", 0.5, set()),
        ("tune.trials", 9, set()),
        ("promote.min_f1", 0.9, set()),
        ("train.epochs", 4, {"parameters"}),
        ("prepare.test", 0.3, {"parameters"}),
        ("tune.space", {"train.epochs": [2, 3]}, {"tune.space", "parameters"}),
    ],
)
def test_trials_compare_unless_what_they_rest_on_changes(small, inside, key, value, others):
    inside(small)
    before = space.basis()
    change(small.path / "params.yaml", {key: value})
    after = space.basis()
    assert {name for name in before if before[name] != after[name]} == others


def test_trials_compare_while_code_and_reviews_are_the_same(small, inside):
    inside(small)
    before = space.basis()
    for name in ("sentiment/predict.py", "README.md"):
        with (small.path / name).open("a") as file:
            file.write("\n")
    assert space.basis() == before
    for name in ("sentiment/training.py", "data/sample/reviews.csv"):
        with (small.path / name).open("a") as file:
            file.write("\n")
    after = space.basis()
    assert {name for name in before if before[name] != after[name]} == {"code", "reviews"}


def shown(repository):
    """The experiments of a repository, by name."""
    return experiments.listed(json.loads(repository.run("dvc", "exp", "show", "--json").stdout))


def changes(repository, experiment):
    """The files in which a finished experiment differs from what it began with."""
    return repository.git("diff", "--name-only", "HEAD", experiment.commit).split()


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_in_dvc_s_queue_and_its_best_is_not_trained_again(ready):
    command = ("python", "-m", "sentiment.tune")
    killed = subprocess.Popen(command, cwd=ready.path, env=ready.environment, stderr=subprocess.DEVNULL)
    log = ready.path / "logs" / "tune.log"
    for _ in range(1200):
        if log.is_file() and "tune-0 is queued" in log.read_text():
            break
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = ready.run(*command)
    lost = re.findall(
        r"experiment (\S+) is lost", log.read_text()
    )  # one that a worker of DVC's took as it ended: treeverse/dvc, 10673
    kept = ["tune-0", "tune-2" if lost else "tune-1"]
    assert lost in ([], ["tune-1"])
    rows = [row for line in done.stdout.splitlines() if line.startswith("tune-") and (row := line.split())[0] not in lost]
    assert log.read_text().count("is queued") == 2 + len(lost)
    assert {row[0]: row[1] for row in rows} == dict.fromkeys(kept, "complete")
    assert rows[0][2] > rows[1][2] > "0.4"
    found = shown(ready)
    assert {name: found[name].state for name in kept} == dict.fromkeys(kept, "success")
    assert found.keys() - set(kept) <= set(lost)
    assert "metrics/train/metrics.json" in changes(ready, found["tune-0"])
    assert "metrics/test.json" not in changes(ready, found["tune-0"])
    assert ready.tags() == set()
    assert ready.git("status", "--porcelain") == ""
    again = ready.run("sh", "-c", f"{done.stdout.splitlines()[-1]} train").stdout
    assert "'train' didn't change" in again or "'train' is cached" in again
    assert "Running stage 'train'" not in again
