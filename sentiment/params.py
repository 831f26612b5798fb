"""params.yaml, read as YAML 1.2 and checked: every key known, every type right, every value in its range.

YAML 1.2, since DVC writes `3e-05` for `-S train.lr=3e-5`, which a YAML 1.1 reader takes for a string.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML, YAMLError

from sentiment.errors import ParamsError

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Slice = Annotated[str, Field(pattern=r"^(stars|category|state|gender|age|month)$")]
Floor = Annotated[float, Field(ge=0, le=1)] | None
Text = Annotated[str, Field(min_length=1)]
Kind = TypeVar("Kind", bound="Section")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Download(Section):
    source: Text
    sha256: str | None
    licence: Text | None

    @field_validator("sha256")
    @classmethod
    def is_sha256(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise ValueError("must be 64 hexadecimal digits, or null")
        return value.lower() if value else None


class Prepare(Section):
    text: Annotated[list[Text], Field(min_length=1)]
    rating: Text
    labels: dict[Text, Annotated[list[int | float], Field(min_length=1)]]
    group: Text | None
    validation: Share
    test: Share
    shares: dict[Text, Annotated[float, Field(gt=0, lt=1)]] | None
    case: Literal["as_written", "lower", "truecase"]  # sentiment.text.Case

    @field_validator("labels")
    @classmethod
    def are_classes(cls, labels: dict[str, list[float]]) -> dict[str, list[float]]:
        if len(labels) < 2:
            raise ValueError("must name at least two classes, each with its ratings")
        seen: dict[float, str] = {}
        for label, ratings in labels.items():
            if label in ("low", "high", "macro"):
                raise ValueError(f"names a class {label}, as f1_{label} of the metrics is something else; rename it")
            for rating in ratings:
                if rating in seen:
                    raise ValueError(f"gives rating {rating:g} both to {seen[rating]} and to {label}")
                seen[rating] = label
        return labels

    @model_validator(mode="after")
    def shares_are_of_the_classes(self) -> "Prepare":
        if self.shares is not None and (set(self.shares) != set(self.labels) or abs(sum(self.shares.values()) - 1) > 1e-6):
            raise ValueError(f"shares must give a share to each of {', '.join(self.labels)}, 1 in all; or be null")
        return self

    @model_validator(mode="after")
    def leaves_training_data(self) -> "Prepare":
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must be under 1, or nothing is left to train on")
        return self


class Audit(Section):
    language: Annotated[str, Field(pattern=r"^[a-z]{2}$")]
    likeness: Annotated[float, Field(ge=0.3, lt=1)]
    min_class_share: Floor
    max_foreign: Floor
    max_near_duplicates: Floor
    max_doubtful_labels: Floor
    max_drift: Floor


class Tokenize(Section):
    max_length: Annotated[int, Field(ge=3, le=8192)]
    emoji: Literal["ar", "de", "en", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh"] | None  # emoji.LANGUAGES


class Model(Section):
    checkpoint: Text | None
    revision: Text | None
    vocab_size: Annotated[int, Field(ge=100)]
    hidden_size: Count
    layers: Count
    heads: Count
    intermediate_size: Count
    dropout: Annotated[float, Field(ge=0, lt=1)]

    @model_validator(mode="after")
    def heads_divide_hidden_size(self) -> "Model":
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of heads ({self.heads})")
        return self


class Steps(Section):
    """What every training loop is told."""

    launcher: Text
    device: Literal["auto", "cuda", "mps", "cpu"]
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    epochs: Count
    batch_tokens: Count
    batching: Literal["auto", "packed", "padded"]
    compile: bool
    cuda_graphs: bool
    accumulation: Count
    lr: Annotated[float, Field(gt=0, le=1)]
    warmup: Annotated[float, Field(ge=0, lt=1)]
    decay: Literal["linear", "cosine", "constant"]
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    log_every: Count
    checkpoint_every: Count


class Train(Steps):
    ensemble: Annotated[list[Text], Field(min_length=2)] | None
    patience: Count | None
    ties: Annotated[float, Field(ge=0)]
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    adversarial: Annotated[float, Field(ge=0)]


class CrossValidation(Section):
    folds: Annotated[int, Field(ge=2)] | None


class Evaluate(Section):
    batch_tokens: Count
    curve_points: Annotated[int, Field(ge=2, le=2000)]
    calibration_bins: Annotated[int, Field(ge=2, le=100)]
    bootstrap: Annotated[int, Field(ge=100, le=1_000_000)]
    slices: dict[Slice, Text]
    min_slice: Annotated[int, Field(ge=10)]
    checks: Text | None
    show_texts: bool


class Promote(Section):
    stage: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
    metric: Text
    min_delta: Annotated[float, Field(ge=0, lt=1)]
    confidence: Annotated[float, Field(gt=0.5, lt=1)] | None
    min_f1: Floor
    min_class_f1: Floor
    min_slice_accuracy: Floor
    max_slice_loss: Floor
    max_check_failure_rate: Floor
    max_calibration_error: Floor
    min_reviews_per_second: Annotated[float, Field(gt=0)] | None
    max_megabytes: Annotated[float, Field(gt=0)] | None
    known_data: list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] | None


class Range(Section):
    """Values from `low` to `high`, whole numbers if both are; `log`: as likely between 1e-5 and 1e-4 as between 1e-4 and 1e-3."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def goes_up(self) -> "Range":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("must go from low up to high, from above 0 if log is true")
        return self


Choices = Annotated[list[bool | int | float | str | None], Field(min_length=2)]
Searched = Annotated[
    Annotated[Choices, Tag("list")] | Annotated[Range, Tag("dict")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "dict"),
]


class Tune(Section):
    trials: Count
    jobs: Count
    seed: Annotated[int, Field(ge=0, lt=2**31)]
    prune_after: Count | None
    space: Annotated[dict[Text, Searched], Field(min_length=1)]


class Params(Section):
    """All of params.yaml; one attribute a section."""

    download: Download
    prepare: Prepare
    audit: Audit
    tokenize: Tokenize
    model: Model
    train: Train
    cross_validation: CrossValidation
    evaluate: Evaluate
    promote: Promote
    tune: Tune

    @model_validator(mode="after")
    def class_weights_name_the_classes(self) -> "Params":
        weights = self.train.class_weights
        if isinstance(weights, dict) and set(weights) != set(self.prepare.labels):
            raise ValueError(f"train.class_weights must give a number to each of {', '.join(self.prepare.labels)}")
        return self

    @model_validator(mode="after")
    def what_is_averaged_is_not_cross_validated(self) -> "Params":
        if self.train.ensemble and self.cross_validation.folds:
            raise ValueError(
                "train.ensemble trains no model that cross_validation.folds could train anew; set one of them to null"
            )
        return self

    @model_validator(mode="after")
    def a_batch_holds_a_review(self) -> "Params":
        for section in ("train", "evaluate"):
            budget = getattr(self, section).batch_tokens
            if budget < self.tokenize.max_length:
                raise ValueError(
                    f"{section}.batch_tokens ({budget}) must be at least tokenize.max_length ({self.tokenize.max_length})"
                )
        return self


def load(path: str | Path = "params.yaml") -> Params:
    """Read and check the parameters.

    Raises ParamsError, naming the key, its value and what it may be, where anything is wrong.
    """
    return validated(Params, path)


def validated(kind: type[Kind], path: str | Path) -> Kind:
    """The parameters of a file as `kind`; raises ParamsError as `load` does."""
    try:
        values = YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"there is no {path} here; run from the repository's root") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{path} holds no sections; `git checkout {path}` brings the original back")
    return check(values, str(path), kind)


def check(values: dict[str, Any], path: str = "params.yaml", kind: type[Kind] = Params) -> Kind:  # type: ignore[assignment]
    """The parameters from a plain dict; raises ParamsError as `load` does."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(dict.fromkeys(sentence(dict(problem)) for problem in error.errors()))
        file = "" if path == "params.yaml" else f"{path}:"
        raise ParamsError(f"{path}: {problems}; correct it there, or with -S {file}KEY=VALUE") from None


def sentence(problem: dict[str, Any]) -> str:
    """One of pydantic's findings in the words of a user of params.yaml: `train.lr must be greater than 0 (it is -1)`."""
    names = [str(part) for part in problem["loc"] if not re.search(r"[\[(]|^(str|dict|list|float|int|literal)$", str(part))]
    key, message = ".".join(names), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{key} is not a parameter"
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = re.sub(r"^Input should be", "must be", message)
    if isinstance(problem["input"], dict):  # of a section, whose key the message may begin with
        return f"{key}{'.' if message.split(' ')[0] in problem['input'] else ' '}{message}".strip()
    return f"{key} {message} (it is {problem['input']!r})"
