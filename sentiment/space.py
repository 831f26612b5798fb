"""What a search for parameters draws from, and what has to stay as it is meanwhile."""

import hashlib
import json
from copy import deepcopy
from itertools import takewhile
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ruamel.yaml import YAML

from sentiment import params
from sentiment.errors import ParamsError, TuneError
from sentiment.experiments import command
from sentiment.files import sha256

PARAMS = "params.yaml"
TARGET = "train"  # the stage that a trial ends with: the test split is not looked at
SEARCHABLE = ("train", "model", "tokenize")  # sections that leave the validation reviews as they are


def read(path: str) -> dict[str, Any]:
    """A YAML file as plain values."""
    return YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))


def distributions(space: dict[str, Any], values: dict[str, Any]) -> dict[str, BaseDistribution]:
    """What Optuna draws from, for each key of `tune.space`; `values` is all of params.yaml.

    Raises ParamsError where a key is no parameter, decides which reviews are scored, or is given a value that it cannot have.
    """
    for key, searched in space.items():
        if key.partition(".")[0] not in SEARCHABLE:
            raise ParamsError(
                f"{PARAMS}: tune.space.{key} changes the reviews that trials are compared on, or nothing of the training; "
                f"name keys of {', '.join(SEARCHABLE)}"
            )
        for value in searched if isinstance(searched, list) else (searched.low, searched.high):
            params.check(changed(values, {key: value}), f"{PARAMS}: tune.space.{key}")
    return {key: distribution(searched) for key, searched in space.items()}


def distribution(searched: list[Any] | params.Range) -> BaseDistribution:
    """What Optuna draws from, for a list of values or a range."""
    if isinstance(searched, list):
        return CategoricalDistribution(searched)
    if isinstance(searched.low, int) and isinstance(searched.high, int):
        return IntDistribution(searched.low, searched.high, log=searched.log)
    return FloatDistribution(searched.low, searched.high, log=searched.log)


def contains(drawn: BaseDistribution, value: Any) -> bool:
    """Whether a value of params.yaml is one that could be drawn."""
    if isinstance(drawn, CategoricalDistribution):
        return value in drawn.choices
    return isinstance(drawn, IntDistribution | FloatDistribution) and drawn.low <= value <= drawn.high


def value_of(values: dict[str, Any], key: str) -> Any:
    """A parameter or a section, by dotted key."""
    found: Any = values
    for part in key.split("."):
        found = found[part]
    return found


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The parameters with some of them changed, by dotted key; raises ParamsError for a key that is none."""
    made = deepcopy(values)
    for key, value in changes.items():
        *path, name = key.split(".")
        section = made
        for part in path:
            inner = section.get(part)
            section = inner if isinstance(inner, dict) else {}
        if name not in section:
            raise ParamsError(f"{PARAMS}: tune.space.{key}: there is no parameter {key}; correct it there")
        section[name] = value
    return made


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Drawn values as they are set: fractions to four digits."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}


def basis() -> dict[str, str]:
    """What has to be the same for the scores of trials to be comparable, in words, each with a hash of what it is now.

    Raises TuneError for a file that the stages depend on and git does not know. Changes to files that git knows are taken along
    into a queued experiment by DVC, committed or not; other files are left behind.
    """
    values, stages = read(PARAMS), stages_up_to(TARGET, read("dvc.yaml")["stages"])
    space = values["tune"]["space"]
    paths = sorted({path for stage in stages.values() for path in stage.get("deps", ())})
    new = command("git", "ls-files", "--others", "--exclude-standard", "--", *paths).splitlines()
    if new:
        raise TuneError(f"git does not know {new[0]}, so that a queued experiment would be without it; `git add` and commit it")
    files = command("git", "ls-files", "-z", "--", *paths).rstrip("\0").split("\0")
    fixed = changed(values, dict.fromkeys(space))
    source = values["download"]["source"]
    return {
        "tune.space": digest(space),
        "parameters": digest({key: value_of(fixed, key) for stage in stages.values() for key in stage.get("params", ())}),
        "code": digest([stages, {name: sha256(name) for name in files if Path(name).is_file()}]),
        "reviews": sha256(source) if Path(source).is_file() else source,
    }


def stages_up_to(target: str, stages: dict[str, Any]) -> dict[str, Any]:
    """The stages of dvc.yaml to `target`; they stand there in the order in which they run."""
    return {name: stages[name] for name in [*takewhile(lambda name: name != target, stages), target]}


def digest(value: Any) -> str:
    """A hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
