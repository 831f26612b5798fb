"""A model that is loaded: from texts to token ids, from logits to answers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sentiment import calibration, engines
from sentiment.classifier import Inference
from sentiment.engines import Choice, Engine
from sentiment.errors import CheckpointError
from sentiment.files import read_json
from sentiment.logs import first_line
from sentiment.tokens import load_tokenizer
from serve.settings import Settings

TRIAL = "Este produto é excelente! Recomendo muito. 😍"


def most_lanes(settings: Settings) -> int:
    """How many batches may be computed side by side."""
    return settings.lanes or settings.threads or engines.cores()


@dataclass(frozen=True, eq=False)
class Model:
    """What serves; `load` makes one."""

    version: str
    commit: str | None
    labels: list[str]
    choice: Choice
    metrics: dict[str, Any] | None
    inference: Inference
    tokenizer: Any
    engine: Engine
    batch_tokens: int
    seconds: float  # that loading took
    prepared: dict[str, Any]  # what serve.prepare found

    @classmethod
    def load(cls, prepared: dict[str, Any], threads: int | None, batch_tokens: int | None, lanes: int = 0) -> "Model":
        """Load what serve.prepare found, and try it on a sentence; raises CheckpointError if it cannot serve."""
        start = time.perf_counter()
        folder, choice = Path(prepared["folder"]), Choice(**prepared["choice"])
        try:
            inference = Inference.load(folder)
            names = read_json(folder / "config.json")["id2label"]
        except Exception as error:
            raise CheckpointError(f"{folder} is no model of this project ({first_line(error)})") from error
        engine = engines.load(folder, Path(prepared["converted"]), choice, threads, lanes)
        if batch_tokens:
            for each in (engine, *engine.lanes):
                each.batch_tokens = batch_tokens
        if isinstance(engine, engines.Packed):
            engine.warm_up(inference.max_length)
        made = cls(
            version=prepared["version"],
            commit=prepared["commit"],
            labels=[names[str(k)] for k in range(len(names))],
            choice=choice,
            metrics=prepared["metrics"],
            inference=inference,
            tokenizer=load_tokenizer(folder, inference.max_length),
            engine=engine,
            batch_tokens=engine.batch_tokens,
            seconds=time.perf_counter() - start,
            prepared=prepared,
        )
        made.try_out()
        return made

    def try_out(self) -> None:
        """Answer for a sentence, and for a text that is too long; raises CheckpointError if that is no answer."""
        try:
            reviews, cut = self.encode([TRIAL, f"{TRIAL} " * self.inference.max_length])
            logits = self.logits(reviews)
            answers = self.answers(logits, cut)
        except Exception as error:
            raise CheckpointError(f"{self.version} cannot answer for a sentence ({first_line(error)})") from error
        sums = [sum(answer["probabilities"].values()) for answer in answers]
        if logits.shape != (2, len(self.labels)) or not np.allclose(sums, 1.0, atol=1e-4):
            raise CheckpointError(f"{self.version} gives no probabilities for {len(self.labels)} classes to a sentence")

    def encode(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """Token ids of texts as people write them, and whether each was cut at the model's length."""
        cleaned = [self.inference.read(value) for value in texts]
        found = self.tokenizer.encode_batch_fast(cleaned) if len(texts) > 1 else [self.tokenizer.encode(cleaned[0])]
        return [np.asarray(each.ids, np.int64) for each in found], [bool(each.overflowing) for each in found]

    @property
    def lanes(self) -> Sequence[Engine]:
        """Engines that compute side by side, if there are any."""
        return self.engine.lanes

    def logits(self, reviews: Sequence[np.ndarray]) -> np.ndarray:
        """The engine's logits: float32 [reviews, classes]."""
        return self.engine.logits(reviews)

    def answers(self, logits: np.ndarray, cut: Sequence[bool]) -> list[dict[str, Any]]:
        """What each text is answered: sentiment, score (its probability), all probabilities, truncated."""
        values = self.inference.probabilities(logits)
        chosen = calibration.decide(values, self.inference.threshold)
        rounded = np.round(values, 6).tolist()
        return [
            {
                "sentiment": self.labels[k],
                "score": row[k],
                "probabilities": dict(zip(self.labels, row, strict=True)),
                "truncated": truncated,
            }
            for k, row, truncated in zip(chosen.tolist(), rounded, cut, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """What /health says of the model."""
        return {
            "model_version": self.version,
            "commit": self.commit,
            "labels": self.labels,
            "device": self.choice.device,
            "engine": self.choice.engine,
            "precision": self.choice.precision,
            "choice": {
                name: value for name, value in self.choice.as_dict().items() if name not in ("engine", "precision", "device")
            }
            | {"measured": [without_words(each) for each in self.choice.measured]},
            "metrics": self.metrics,
            "max_length": self.inference.max_length,
            "text": self.inference.text,
        }


def without_words(measured: dict[str, Any]) -> dict[str, Any]:
    """A candidate's numbers; of its error, which may name a path of this machine, the kind alone: the log has the words."""
    return measured | ({"error": measured["error"].partition(":")[0]} if "error" in measured else {})
