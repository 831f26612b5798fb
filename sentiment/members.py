"""The models that are averaged to one: where they come from, and whether they belong together."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sentiment import ensemble
from sentiment.classifier import Classifier, Inference
from sentiment.errors import TrainingError
from sentiment.files import read_json, sha256
from sentiment.logs import first_line
from sentiment.params import Params
from sentiment.repository import find_repository

MODEL = "models/sentiment"
VERSION = re.compile(r"v\d+\.\d+\.\d+")


class Member(NamedTuple):
    """A model to be averaged: what it is called, and its folder."""

    name: str
    folder: Path

    def describe(self) -> dict[str, str]:
        """What metadata.json says of it."""
        return {"model": self.name, "sha256": sha256(self.folder / "model.safetensors")}


@contextmanager
def fetched(names: Sequence[str]) -> Iterator[list[Member]]:
    """The models of versions (v1.0.0), experiments or git revisions, from DVC's cache or remote, in a folder that goes.

    Raises TrainingError where one is not to be had.
    """
    from dvc.api import DVCFileSystem

    root = str(find_repository(Path()))
    with tempfile.TemporaryDirectory() as place:
        members = []
        for number, name in enumerate(names):
            folder = Path(place) / str(number)
            try:
                revision = f"sentiment@{name}" if VERSION.fullmatch(name) else name
                DVCFileSystem(root, rev=revision).get(MODEL, str(folder), recursive=True)
            except Exception as error:
                raise TrainingError(
                    f"train.ensemble names {name}, whose model is not to be had ({type(error).__name__}: {first_line(error)}); "
                    "name versions (gto show), experiments (dvc exp show) or git revisions; `dvc fetch` brings what is not here"
                ) from error
            members.append(Member(name, folder))
        yield members


def check(members: Sequence[Member], settings: Params, tokenizer: Path, data: dict[str, Any]) -> None:
    """Raise TrainingError unless all members read and answer as `settings` say, and learnt from this split of this data.

    `tokenizer` is the tokenizer.json of the tokens at hand. A model of another split may have learnt from test reviews.
    """
    wanted = {
        "list of classes": list(settings.prepare.labels),
        "tokenizer": sha256(tokenizer),
        "way to read texts": [settings.tokenize.model_dump(), settings.prepare.case, settings.prepare.text],
        "data (its sha256)": data["sha256"],
        "split of the data (params.yaml: prepare)": settings.prepare.model_dump(mode="json"),
    }
    for member in members:
        if ensemble.is_ensemble(member.folder):
            raise TrainingError(f"train.ensemble names {member.name}, which is an ensemble itself: name its members")
        for what, value in facts(member.folder).items():
            if value != wanted[what]:
                raise TrainingError(
                    f"train.ensemble names {member.name}, which has another {what} than this run; name models that were trained "
                    "on the same reviews in the same way, or set the parameters to theirs"
                )


def facts(folder: Path) -> dict[str, Any]:
    """What has to be the same for all members."""
    metadata, inference = read_json(folder / "metadata.json"), Inference.load(folder)
    return {
        "list of classes": metadata["labels"],
        "tokenizer": sha256(folder / "tokenizer.json"),
        "way to read texts": [{"max_length": inference.max_length, "emoji": inference.emoji}, inference.case, inference.text],
        "data (its sha256)": metadata["data"]["sha256"],
        "split of the data (params.yaml: prepare)": metadata["params"]["prepare"],
    }


def average(members: Sequence[Member], names: list[str]) -> ensemble.Ensemble:
    """The members as one model, each with the temperature and the bias that were fitted for it."""
    found = [Classifier.load(member.folder, "cpu") for member in members]
    return ensemble.Ensemble(
        [each.model for each in found],
        [each.inference.temperature for each in found],
        [each.inference.bias or [0.0] * len(names) for each in found],
        ensemble.Config(names),
    )
