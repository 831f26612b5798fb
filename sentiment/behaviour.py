"""Behavioural checks of a classifier, in the manner of CheckList (Ribeiro et al. 2020): what has to hold whatever the test split.

data/checks/portugues.yaml says what the cases are and explains its format.
"""

import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML, YAMLError

from sentiment.errors import DataError

PLACE = re.compile(r"\{(\w+)\}")
TOLERANCE = 0.02  # by which a probability may go the wrong way
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class Case(NamedTuple):
    """One thing to hold: of one text its label, or of two texts how they compare."""

    check: str
    kind: str
    texts: tuple[str, ...]
    label: str | None


class Check(BaseModel):
    """Templates of one capability."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    kind: Literal["minimum", "invariance", "direction"]
    fill: dict[str, list[str]] = {}
    pairs: list[Pair] = []

    @property
    def labelled(self) -> dict[str, list[str]]:
        """The templates of each label, for the kind `minimum`."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def has_what_its_kind_needs(self) -> Self:
        if (self.kind == "minimum") == bool(self.pairs) or (self.kind != "minimum" and self.labelled):
            raise ValueError(f"{self.name}: `minimum` has templates by label, the other kinds have pairs")
        return self


class Checks(BaseModel):
    """A file of checks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    better: str
    fill: dict[str, list[str]] = {}
    checks: Annotated[list[Check], Field(min_length=1)]

    def cases(self) -> list[Case]:
        """All cases; raises DataError for a {name} that nothing fills."""
        return [case for check in self.checks for case in cases(check, self.fill | check.fill)]


def load(path: Path) -> Checks:
    """Read a file of checks; raises DataError saying what is wrong."""
    try:
        return Checks.model_validate(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"evaluate.checks names {path}, which is no file; correct it, or set it to null") from None
    except (YAMLError, ValidationError, UnicodeDecodeError) as error:
        found = " ".join(str(error).split())[:300]
        raise DataError(f"{path} holds no checks as data/checks/portugues.yaml does: {found}") from error


def cases(check: Check, fill: dict[str, list[str]]) -> Iterator[Case]:
    """The cases of a check."""
    for label, templates in check.labelled.items():
        for template in templates:
            for texts in filled((template,), fill, check.name):
                yield Case(check.name, check.kind, texts, label)
    for pair in check.pairs:
        for texts in filled(tuple(pair), fill, check.name):
            yield Case(check.name, check.kind, texts, None)


def filled(templates: tuple[str, ...], fill: dict[str, list[str]], check: str) -> Iterator[tuple[str, ...]]:
    """The templates with every combination of the words that their places stand for, the same in all of them."""
    names = sorted({name for template in templates for name in PLACE.findall(template)})
    if missing := [name for name in names if name not in fill]:
        raise DataError(f"check {check}: nothing fills {{{missing[0]}}}; add it to fill")
    for words in product(*(fill[name] for name in names)):
        chosen = dict(zip(names, words, strict=True))
        yield tuple(template.format_map(chosen) for template in templates)


def run(
    checks: Checks, names: list[str], probabilities: Callable[[list[str]], np.ndarray], decide: Callable[[np.ndarray], np.ndarray]
) -> pd.DataFrame:
    """Each case with what the model says: check, kind, text, other (of a pair), label, said, probability, failed.

    `probabilities` gives [texts, classes], `decide` the classes of such rows. `probability` is that of `better` for the first
    text. Raises DataError if the checks speak of labels that the model does not tell.
    """
    all_cases = checks.cases()
    if unknown := {checks.better, *(case.label for case in all_cases if case.label)} - set(names):
        spoken = ", ".join(sorted(unknown))
        raise DataError(f"the checks speak of {spoken}, and the model tells {', '.join(names)}; set evaluate.checks to null")
    texts = list(dict.fromkeys(text for case in all_cases for text in case.texts))
    values = probabilities(texts)
    said = dict(zip(texts, decide(values), strict=True))
    chance = dict(zip(texts, values[:, names.index(checks.better)], strict=True))
    rows = [
        {
            "check": case.check, "kind": case.kind, "text": case.texts[0], "other": case.texts[1] if case.texts[1:] else None,
            "label": case.label, "said": names[said[case.texts[0]]], "probability": float(chance[case.texts[0]]),
            "failed": failed(case, names, said, chance),
        }
        for case in all_cases
    ]  # fmt: skip
    return pd.DataFrame(rows)


def failed(case: Case, names: list[str], said: dict[str, int], chance: dict[str, float]) -> bool:
    """Whether a case does not hold."""
    if case.kind == "minimum":
        return names[said[case.texts[0]]] != case.label
    first, second = case.texts
    if case.kind == "invariance":
        return bool(said[first] != said[second])
    return bool(chance[second] < chance[first] - TOLERANCE)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Cases, failures and the rate of failure of each check, in the file's order: check, kind, cases, failures, failure_rate."""
    counts = rows.groupby(["check", "kind"], sort=False)["failed"].agg(cases="size", failures="sum").reset_index()
    return counts.assign(failure_rate=(counts["failures"] / counts["cases"]).round(6))
