"""What requests and answers hold: checked on the way in, and the source of the OpenAPI document."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, create_model

from serve.settings import Settings

EXAMPLE = "Este produto é excelente! Recomendo muito."
OTHER = "Veio quebrado e ninguém responde."


class Body(BaseModel):
    """A request's JSON object."""

    model_config = ConfigDict(strict=True)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **_: Any) -> Self:
        """Refuse a JSON string: the framework would read it as JSON once more."""
        return cls.model_validate(json_data)


class Prediction(BaseModel):
    """The sentiment of a text."""

    sentiment: str = Field(description="the model's label for the text", examples=["positivo"])
    score: float = Field(description="the label's probability", ge=0, le=1, examples=[0.9876])
    probabilities: dict[str, float] = Field(
        description="of each label, in the model's order", examples=[{"negativo": 0.0124, "positivo": 0.9876}]
    )
    truncated: bool = Field(description="whether the text was longer than the model reads, so that its end was left out")


class PredictionOfModel(Prediction):
    """The sentiment of a text, and who says so."""

    model_version: str = Field(description="version of the model that answered", examples=["v1.0.0"])


class Word(BaseModel):
    """A word of a text, and how much it carries."""

    word: str
    start: int = Field(description="where it begins in the text, in characters (code points)", ge=0)
    end: int = Field(description="where it ends", ge=0)
    weight: float = Field(description="how much the label's probability falls without this word; negative where it rises")


class Explanation(PredictionOfModel):
    """The sentiment of a text, and the words that it comes from."""

    method: str = Field(description="occlusion: each word is taken away, one at a time")
    explained: str = Field(description="the label whose probability the weights are about")
    words: list[Word]
    words_left_out: int = Field(description="words at the end that were not examined", ge=0)


class Problem(BaseModel):
    """What went wrong, by RFC 9457."""

    type: str = "about:blank"
    title: str = Field(examples=["Unprocessable Entity"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["text: Field required"])
    request_id: str | None = None


class ItemProblem(BaseModel):
    """What is wrong with one text of a batch."""

    error: Problem


class BatchAnswer(BaseModel):
    """A prediction, or what is wrong, for each text in its order."""

    results: list[Prediction | ItemProblem]
    model_version: str | None = Field(description="version of the model that answered; null if no text could be classified")


class Health(BaseModel):
    """The state of the service."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    status: str = Field(description="ok or unavailable", examples=["ok"])
    model_loaded: bool
    device: str | None = Field(examples=["cpu"])
    model_version: str | None = Field(examples=["v1.0.0"])
    timestamp: str = Field(description="UTC, by ISO 8601")
    engine: str | None = Field(None, examples=["openvino"])
    precision: str | None = Field(None, examples=["int8"])
    choice: dict[str, Any] | None = Field(
        None, description="how the engine was chosen: macro_f1_change against fp32, on how many reviews, each candidate's numbers"
    )
    metrics: dict[str, Any] | None = Field(None, description="the model's metrics on its test split")
    max_length: int | None = Field(None, description="tokens that the model reads of a text")
    text: list[str] | None = Field(
        None, description="the columns that the model was trained on; of several, a text is their values joined by ' - '"
    )


class Status(BaseModel):
    """A probe's answer."""

    status: str


class Root(BaseModel):
    """What this is."""

    name: str
    version: str | None = Field(description="version of the model in service")
    status: str
    routes: dict[str, str]


def bodies(settings: Settings) -> tuple[type[Body], type[Body]]:
    """The bodies of POST /predict (and /explain) and POST /predict/batch, with this service's limits."""
    text = Field(
        description="the review", min_length=1, max_length=settings.max_text_chars, examples=[EXAMPLE]
    )  # fmt: skip
    texts = Field(
        description=f"the reviews; one that is no string, empty, or over {settings.max_text_chars} characters spoils no other",
        min_length=1, max_length=settings.max_texts, examples=[[EXAMPLE, OTHER]],
    )  # fmt: skip
    one = create_model("Text", __base__=Body, __doc__="A text to classify.", text=(str, text))
    many = create_model("Texts", __base__=Body, __doc__="Texts to classify.", texts=(list[Any], texts))
    one.model_config["openapi_extra"] = {"example": {"text": EXAMPLE}}  # type: ignore[typeddict-unknown-key]
    many.model_config["openapi_extra"] = {"example": {"texts": [EXAMPLE, OTHER]}}  # type: ignore[typeddict-unknown-key]
    return one, many
