"""A fine-tuned model folder, ready to classify: weights, tokenizer, and what was fitted for inference.

`inference.json` beside the weights holds: `max_length` in tokens, `case` and `emoji` (see sentiment/text.py), `text` (the columns
it was trained on), `temperature`, `bias` and `threshold` (see sentiment/calibration.py). The labels' names and order are in
config.json.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from sentiment import calibration, text
from sentiment.checkpoint import no_progress_bars
from sentiment.errors import CheckpointError, TrainingError
from sentiment.files import read_json, write_json
from sentiment.logs import first_line
from sentiment.tokens import Tokens, encode, load_tokenizer, ragged

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from sentiment.feed import Feed

BATCH_TOKENS = 8192


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Inference:
    """How texts are read and probabilities turned into labels; kept with the model as inference.json."""

    max_length: int
    case: text.Case
    text: list[str]
    temperature: float
    threshold: float | None
    emoji: str | None = None
    bias: list[float] | None = None

    def read(self, value: str) -> str:
        """A text as the model reads it; of several columns, one that they are joined to with text.SEPARATOR."""
        return text.read(value, len(self.text), self.case, self.emoji)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated probabilities: float64 [reviews, classes]."""
        return calibration.probabilities(logits, self.temperature, self.bias)

    @classmethod
    def load(cls, folder: Path) -> "Inference":
        """Read a model folder's inference.json, an old one's `lowercase`, too; raises OSError, ValueError or TypeError.

        A value that the model in the folder cannot be used with is a ValueError.
        """
        values = read_json(folder / "inference.json")
        if "lowercase" in values:
            values["case"] = "lower" if values.pop("lowercase") else "as_written"
        made = cls(**values)
        made.check(read_json(folder / "config.json"))
        return made

    def check(self, config: dict[str, Any]) -> None:
        """Raise ValueError, naming the value, if it is of a wrong type or range, or does not fit the model's configuration."""
        classes = len(config["id2label"])
        longest = config.get("max_position_embeddings", self.max_length)
        fits = {
            "max_length": isinstance(self.max_length, int) and 2 < self.max_length <= longest,
            "case": self.case in get_args(text.Case),
            "text": isinstance(self.text, list) and all(isinstance(name, str) for name in self.text),
            "temperature": is_number(self.temperature) and self.temperature > 0,
            "threshold": self.threshold is None or (classes == 2 and is_number(self.threshold)),
            "emoji": text.tells_emoji(self.emoji),
            "bias": self.bias is None
            or (isinstance(self.bias, list) and len(self.bias) == classes and all(map(is_number, self.bias))),
        }
        if wrong := [name for name, right in fits.items() if not right]:
            raise ValueError(f"inference.json: {wrong[0]} cannot be {getattr(self, wrong[0])!r} for this model")

    def save(self, folder: Path) -> None:
        """Write inference.json."""
        write_json(folder / "inference.json", asdict(self))


@dataclass(frozen=True)
class Classifier:
    """A model that is loaded. `probabilities` and `decide` are all that its users need."""

    model: Any
    tokenizer: "Tokenizer"
    inference: Inference
    labels: list[str]
    device: "torch.device"

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto") -> "Classifier":
        """Load a model folder; raises CheckpointError if it is missing, broken or not one of ours."""
        folder = Path(folder)
        if not (folder / "inference.json").is_file():
            raise CheckpointError(f"{folder} holds no model of this project (no inference.json); train one: `dvc repro train`")
        no_progress_bars()
        where = pick_device(device)
        try:
            inference = Inference.load(folder)
            model, missing = load_network(folder)
        except Exception as error:
            raise CheckpointError(
                f"{folder} cannot be loaded ({first_line(error)}); fetch it again: `dvc checkout dvc.yaml`"
            ) from error
        if missing:
            raise CheckpointError(f"{folder} lacks the weights {', '.join(missing)}; fetch it again: `dvc checkout dvc.yaml`")
        names = [model.config.id2label[k] for k in range(model.config.num_labels)]
        return cls(model.to(where).eval(), load_tokenizer(folder, inference.max_length), inference, names, where)

    def probabilities(self, texts: Sequence[str], batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
        """Calibrated probabilities of the classes for texts as people write them: float64 [texts, classes]."""
        rows = encode(self.tokenizer, map(self.inference.read, texts))
        return self.token_probabilities(
            ragged(rows, np.zeros(len(texts), np.int16), self.tokenizer.get_vocab_size()), batch_tokens
        )

    def token_probabilities(self, tokens: Tokens, batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
        """The same for reviews that are already tokens."""
        return self.inference.probabilities(self.token_logits(tokens, batch_tokens))

    def token_logits(self, tokens: Tokens, batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
        """What the model itself says of reviews that are already tokens: float32 [reviews, classes]."""
        import torch

        from sentiment.bert import packs, reader
        from sentiment.devices import HALF, native_precision
        from sentiment.feed import Feed

        precision = native_precision(self.device.type)
        packed = packs(self.model, self.device, precision)
        module = reader(self.model, packed).eval()
        feed = Feed(tokens, self.device, self.tokenizer.token_to_id("[PAD]") or 0, packed)
        with torch.autocast(self.device.type, HALF.get(precision), enabled=packed):
            return logits(module, feed, feed.in_order(batch_tokens), len(self.labels)).cpu().numpy()

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """The class index of each row, by the model's own threshold: int64 [texts]."""
        return calibration.decide(probabilities, self.inference.threshold)


def load_network(folder: Path) -> tuple[Any, list[str]]:
    """The classifier or the ensemble in a folder, and the weights that the folder lacks."""
    from transformers import AutoModelForSequenceClassification

    from sentiment import ensemble

    if ensemble.is_ensemble(folder):
        return ensemble.load(folder), []
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    return model, sorted(info["missing_keys"])


def pick_device(name: str) -> "torch.device":
    """The device of that name; auto is CUDA, else Apple MPS, else the CPU. Raises TrainingError if it is not there."""
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in present.items() if there)
    if not present[name]:
        have = ", ".join(device for device, there in present.items() if there)
        raise TrainingError(f"there is no {name} device here (there is: {have}); set train.device to auto")
    return torch.device(name)


def logits(module: Any, feed: "Feed", plan: list[np.ndarray], classes: int) -> "torch.Tensor":
    """The logits for the batches of a plan: float32 [reviews, classes], zeros where no batch holds the review."""
    import torch

    from sentiment.feed import forward

    out = torch.zeros(len(feed.lengths), classes, device=feed.device)
    with torch.inference_mode():
        for rows in plan:
            out[torch.from_numpy(rows).to(feed.device)] = forward(module, feed.batch(rows).inputs).float()
    return out
