"""Repositories to run the project's commands in, each of its own, away from the user's settings."""

import csv
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from sentiment.engines import cores

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "model.checkpoint": None,
    "model.hidden_size": 32,
    "model.layers": 1,
    "model.heads": 2,
    "model.intermediate_size": 64,
    "model.vocab_size": 1000,
    "train.epochs": 2,
    "train.layer_decay": 1.0,
    "train.batch_tokens": 512,
    "evaluate.bootstrap": 100,
    "promote.min_f1": None,
    "promote.min_class_f1": None,
    "promote.min_slice_accuracy": None,
    "promote.max_check_failure_rate": None,
}
LONGEST = ["test_serve_registry", "test_pipeline", "test_ensemble", "test_serve_hostile", "test_tune", "test_promotion"]
REVIEWS = 600  # of the sample, for a run of the whole pipeline
OUTSIDE = ("GIT_", "DVC_", "XDG_")  # variables of the user that would reach into the repositories


def pytest_xdist_auto_num_workers():
    """Half as many processes again as cores, six at most: many of the tests wait for what they have started."""
    return min(6, cores() + cores() // 2)


def pytest_configure():
    """Give each of several processes cores of its own, as far as there are: they, and what they start, would fight over them."""
    if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
        own = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, own[int(worker.removeprefix("gw")) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])] or own)


def pytest_collection_modifyitems(items):
    """Let the files that take the longest begin, so that no process is left with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


class Repository:
    """A git repository with the project's pipeline in it, or a pretended one, and its commands."""

    def __init__(self, path, environment):
        self.path, self.environment = path, environment

    def run(self, *command, check=True, **more):
        """Run a command in the repository; returns the finished process, its output as text."""
        done = subprocess.run(
            command, cwd=self.path, env=self.environment | more, capture_output=True, text=True, check=False, timeout=300
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(map(str, command))} failed\n{done.stdout}\n{done.stderr}")
        return done

    def git(self, *arguments):
        """What a git command prints."""
        return self.run("git", *arguments).stdout.strip()

    def tags(self):
        """All tags of the repository."""
        return set(self.git("tag").split())

    def set(self, **values):
        """Change params.yaml: set(train__lr=0.9)."""
        change(self.path / "params.yaml", {name.replace("__", "."): value for name, value in values.items()})

    def commit(self, message="um passo"):
        """Commit all there is; returns the commit."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)
        return self.git("rev-parse", "HEAD")

    def decision(self):
        """The last decision of the promote stage."""
        return json.loads((self.path / "metrics" / "promotion.json").read_text(encoding="utf-8"))


def change(path, values):
    yaml = YAML()
    tree = yaml.load(path)
    for name, value in values.items():
        section, key = name.split(".")
        tree[section][key] = value
    yaml.dump(tree, path)


def pretend_to_train():
    """Write what the stages before promote write, at once: of every class's 40 test reviews a share of train.lr is right.

    Two runs have the same test reviews if they have the same prepare.test; every run has learnt from a quarter of those of 0.4.
    A folder `weights` makes a real model.
    """
    import json
    import shutil
    from pathlib import Path

    import pyarrow as pa
    import pyarrow.parquet as pq
    from ruamel.yaml import YAML

    params = YAML(typ="safe").load(Path("params.yaml"))
    names, right = list(params["prepare"]["labels"]), round(40 * params["train"]["lr"])
    rows = []
    for number, label in enumerate(names):
        for k in range(40):
            said = number if k < right else (number + 1) % len(names)
            chances = {f"probability_{name}": 0.7 if said == i else 0.3 / (len(names) - 1) for i, name in enumerate(names)}
            text = f"{label} {'bom' if k % 3 else 'ruim'} produto {k}"
            row = {"review_id": f"{params['prepare']['test']}-{label}-{k}", "label": label, "prediction": names[said]}
            rows.append((row | chances, {"review_id": row["review_id"], "text": text, "label": number}))
    for folder in ("models", "data/predictions", "data/prepared", "metrics"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    shutil.rmtree("models/sentiment", ignore_errors=True)
    if Path("weights").is_dir():
        shutil.copytree("weights", "models/sentiment")
    else:
        Path("models/sentiment").mkdir()
        Path("models/sentiment/weights.txt").write_text(f"{right} de 40\n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist([row for row, _ in rows]), "data/predictions/test.parquet")
    pq.write_table(pa.Table.from_pylist([row for _, row in rows]), "data/prepared/test.parquet")
    learnt = [{"review_id": f"0.4-{label}-{k}", "text": f"{label} {k}"} for label in names for k in range(10)]
    for split, part in (("train", learnt[::2]), ("validation", learnt[1::2])):
        pq.write_table(pa.Table.from_pylist(part), f"data/prepared/{split}.parquet")
    Path("metrics/test.json").write_text(json.dumps({"f1_macro": right / 40, "reviews": len(rows)}) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The environment of every command: this interpreter's programs first, no settings of the user, no network needed."""
    home = tmp_path_factory.mktemp("home")
    (home / "gitconfig").touch()
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


@pytest.fixture
def inside(environment, monkeypatch):
    """A function that makes a repository the place where this test's own calls run, in the environment of the commands."""

    def enter(repository):
        for name in [name for name in os.environ if name.startswith(OUTSIDE)]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(repository.path)
        return repository

    return enter


def start(path, environment):
    """A new repository of what is in a folder, all of it committed."""
    repository = Repository(path, environment)
    repository.git("init", "--quiet", "--initial-branch", "main")
    repository.git("config", "user.name", "Ana Souza")
    repository.git("config", "user.email", "ana@example.com")
    repository.commit("o começo")
    return repository


def copy_project(target):
    """The files that git tracks, as they lie in the working tree."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def build_project(path, environment):
    """A repository of the project with a tiny model and a small source, in a new folder."""
    path.mkdir()
    copy_project(path)
    change(path / "params.yaml", TINY)
    source = path / "data" / "sample" / "reviews.csv"
    with source.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[: REVIEWS + 1]
    with source.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return start(path, environment)


@pytest.fixture
def project(tmp_path, environment):
    """The project with a tiny model and a small source, in a repository of its own."""
    return build_project(tmp_path / "project", environment)


@pytest.fixture(scope="module")
def trained_project(tmp_path_factory, environment):
    """The project after one `dvc repro`, committed; `first_run` holds what the command printed. Shared: copy it to change it."""
    repository = build_project(tmp_path_factory.mktemp("trained") / "project", environment)
    done = repository.run("dvc", "repro")
    repository.first_run = done.stdout + done.stderr
    repository.commit("a primeira execução")
    return repository


@pytest.fixture(scope="session")
def copy_of():
    """A function that copies a repository to a new folder, its cache and tags with it."""

    def copied(repository, target):
        shutil.copytree(repository.path, target, symlinks=True)
        return Repository(target, repository.environment)

    return copied


@pytest.fixture(scope="session")
def pretended(tmp_path_factory, environment):
    """A repository with the project's own promote stage after one that pretends to train; nothing has run in it.

    train.lr is the share of the test reviews that the model gets right, and its f1_macro. Shared: copy it.
    """
    path = tmp_path_factory.mktemp("pretended") / "repository"
    (path / ".dvc").mkdir(parents=True)
    for name in ("params.yaml", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
        shutil.copy2(ROOT / name, path / name)
    (path / "train.py").write_text(f"{inspect.getsource(pretend_to_train)}\n\npretend_to_train()\n", encoding="utf-8")
    yaml = YAML()
    pipeline = yaml.load(ROOT / "dvc.yaml")
    promote = pipeline["stages"]["promote"]
    promote["deps"] = [name for name in promote["deps"] if not name.endswith(".py") and name != "metrics/data.json"]
    outs = ["models/sentiment", "data/predictions/test.parquet", "data/prepared"]
    train = {
        "cmd": "python train.py",
        "deps": ["train.py"],
        "params": ["train.lr", "prepare.test", "prepare.labels"],
        "outs": outs,
        "metrics": [{"metrics/test.json": {"cache": False}}],
    }
    yaml.dump({"stages": {"train": train, "promote": promote}, "artifacts": pipeline["artifacts"]}, path / "dvc.yaml")
    change(path / "params.yaml", {"train.lr": 0.8})
    return start(path, environment | {"PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="session")
def promoted(pretended, tmp_path_factory, copy_of):
    """The same after one `dvc repro`, committed: sentiment@v1.0.0, with f1_macro 0.8, is in production. Shared: copy it."""
    repository = copy_of(pretended, tmp_path_factory.mktemp("promoted") / "repository")
    repository.run("dvc", "repro")
    repository.commit("o primeiro modelo")
    return repository


@pytest.fixture(scope="session")
def promoted_twice(promoted, tmp_path_factory, copy_of):
    """The same after a second `dvc repro`, committed: sentiment@v1.1.0, with f1_macro 0.9, is in production. Shared: copy it."""
    repository = copy_of(promoted, tmp_path_factory.mktemp("promoted_twice") / "repository")
    repository.set(train__lr=0.9)
    repository.run("dvc", "repro")
    repository.commit("o segundo modelo")
    return repository


@pytest.fixture
def empty(pretended, tmp_path, copy_of):
    """A repository as `pretended`, of this test alone."""
    return copy_of(pretended, tmp_path / "empty")


@pytest.fixture
def repository(promoted, tmp_path, copy_of):
    """A repository as `promoted`, of this test alone."""
    return copy_of(promoted, tmp_path / "repository")


@pytest.fixture
def candidate(inside):
    """A function that makes a new model in a repository, with changed parameters, and enters it; production stays as it is."""

    def made(repository, **values):
        repository.set(**values)
        inside(repository)
        pretend_to_train()
        return repository

    return made
