"""The servers that ours is compared with: bench/serve.py starts them and says by the environment what they serve.

BENCH_MODEL is a model folder, BENCH_CONVERTED its conversions, BENCH_ENGINE and BENCH_PRECISION what computes, BENCH_PORT where.
LitServe, mosec and BentoML run in .venv/peers, so that this imports only what bench/requirements-peers.txt holds.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from sentiment import engines, text, tokens
from sentiment.files import read_json

BATCH = 64  # texts at most: what the most connections of the benchmark can have waiting
HOST = "127.0.0.1"


def port() -> int:
    """Where to listen."""
    return int(os.environ["BENCH_PORT"])


class Reader(NamedTuple):
    """What reads texts and names answers: all of a model folder but its weights."""

    tokenizer: Any
    inference: dict[str, Any]
    labels: list[str]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The tokenizer, inference.json and the names of the classes of a model folder."""
        inference, config = (read_json(folder / name) for name in ("inference.json", "config.json"))
        labels = [config["id2label"][str(k)] for k in range(len(config["id2label"]))]
        return cls(tokens.load_tokenizer(folder, inference["max_length"]), inference, labels)

    def token_ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of texts as people write them."""
        cleaned = (text.clean(value, self.inference["case"], self.inference.get("emoji")) for value in texts)
        return [np.asarray(ids, np.int64) for ids in tokens.encode(self.tokenizer, cleaned)]

    def answers(self, logits: np.ndarray) -> list[dict[str, Any]]:
        """What /predict says for each row of logits: the label by the model's threshold, and its probability.

        As sentiment.calibration, which needs scipy and scikit-learn.
        """
        scaled = np.asarray(logits, np.float64) / self.inference["temperature"] + np.asarray(self.inference.get("bias") or 0.0)
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        values, threshold = powers / powers.sum(axis=1, keepdims=True), self.inference["threshold"]
        chosen = values.argmax(axis=1) if threshold is None else (values[:, 1] >= threshold).astype(int)
        return [{"sentiment": self.labels[k], "score": float(row[k])} for k, row in zip(chosen, values, strict=True)]


class Scorer:
    """The packed engine, warm, behind one call."""

    def __init__(self, model: Path, converted: Path, engine: str, precision: str) -> None:
        self.reader = Reader.load(model)
        self.engine = engines.load(model, converted, engines.Choice(engine, precision, why="set by the benchmark"))
        if isinstance(self.engine, engines.Packed):
            self.engine.warm_up(self.reader.inference["max_length"])

    @classmethod
    def from_environment(cls) -> Self:
        """The one that bench/serve.py asks for."""
        model, converted, engine, precision = (
            os.environ[f"BENCH_{name}"] for name in ("MODEL", "CONVERTED", "ENGINE", "PRECISION")
        )
        return cls(Path(model), Path(converted), engine, precision)

    def __call__(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """What /predict says for each text; the whole batch is tokenised and computed at once."""
        return self.reader.answers(self.engine.logits(self.reader.token_ids(texts)))
