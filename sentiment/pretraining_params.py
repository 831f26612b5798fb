"""pretrain/params.yaml, read and checked as params.yaml is."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sentiment.params import Count, Model, Section, Share, Steps, Text, validated

PATH = Path("pretrain/params.yaml")


class File(Section):
    path: Text
    column: Text | None = None
    repeat: Annotated[int, Field(ge=1, le=32_767)] = 1


class Corpus(Section):
    files: Annotated[list[File], Field(min_length=1)]
    exclude: list[Text]
    min_words: Count
    max_words: Annotated[int, Field(ge=10)]
    held_out: Share


class Tokens(Section):
    max_length: Annotated[int, Field(ge=8, le=8192)]


class Train(Steps):
    objective: Literal["mlm", "rtd"]
    generator_layers: Count
    mask: Share
    sentiment_words: list[Text]
    sentiment_weight: Annotated[float, Field(ge=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    perplexity_texts: Count


class Params(Section):
    """All of pretrain/params.yaml; one attribute a section."""

    corpus: Corpus
    tokens: Tokens
    model: Model
    train: Train

    @model_validator(mode="after")
    def words_of_sentiment_are_for_mlm(self) -> "Params":
        if self.train.sentiment_weight and self.train.objective != "mlm":
            raise ValueError("train.sentiment_weight needs train.objective mlm; set it to 0 for rtd")
        if self.train.sentiment_weight and not self.train.sentiment_words:
            raise ValueError("train.sentiment_weight needs words in train.sentiment_words; name some, or set it to 0")
        return self

    @model_validator(mode="after")
    def a_batch_holds_a_text(self) -> "Params":
        if self.train.batch_tokens < self.tokens.max_length:
            raise ValueError(
                f"train.batch_tokens ({self.train.batch_tokens}) must be at least tokens.max_length ({self.tokens.max_length})"
            )
        return self


def load(path: Path = PATH) -> Params:
    """Read and check the parameters; raises ParamsError, naming the key, where anything is wrong."""
    return validated(Params, path)
