"""POST /predict, /predict/batch and /explain."""

import hmac
import logging
import time
from typing import Any

from flask import g, request
from flask_openapi3 import OpenAPI, Tag

from sentiment.text import clean
from serve import explain, logs, metrics, problems, schemas
from serve.problems import RefusedError
from serve.settings import Settings
from serve.wire import UnreachableError

log = logging.getLogger("serve.prediction")


def has_key(environ: dict[str, Any], settings: Settings) -> bool:
    """Whether a request has the key, if one is needed; takes the same time for every wrong key."""
    if settings.api_key is None:
        return True
    scheme, _, bearer = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    given: str = environ.get("HTTP_X_API_KEY") or (bearer if scheme.lower() == "bearer" else "")
    return hmac.compare_digest(given.encode("utf-8", "replace"), settings.api_key.get_secret_value().encode())


def add(app: OpenAPI, settings: Settings, client: Any) -> None:
    """POST /predict, /predict/batch and /explain."""
    text_body, texts_body = schemas.bodies(settings)
    refusals: dict[str | int, Any] = dict.fromkeys((400, 401, 413, 422, 500, 503, 504), schemas.Problem)
    keyed: Any = {"security": [{"key": []}]} if settings.api_key else {}
    shared: Any = {"tags": [Tag(name="predictions")], **keyed}

    @app.before_request
    def check() -> None:
        if request.method == "POST" and request.url_rule and not has_key(request.environ, settings):
            raise RefusedError(401, "an API key is needed, in the header X-API-Key")

    @app.post("/predict", summary="The sentiment of a text", responses={200: schemas.PredictionOfModel, **refusals}, **shared)
    def predict(body: text_body) -> Any:  # type: ignore[valid-type]
        answer = classify(client, settings, g.request_id, [not_blank(body.text)])  # type: ignore[attr-defined]
        return app.json.response(answer["results"][0] | {"model_version": answer["model_version"]})

    @app.post(
        "/predict/batch", summary="The sentiment of several texts", responses={200: schemas.BatchAnswer, **refusals}, **shared
    )
    def predict_batch(body: texts_body) -> Any:  # type: ignore[valid-type]
        texts: list[Any] = body.texts  # type: ignore[attr-defined]
        results: list[Any] = [wrong_with(text, settings.max_text_chars) for text in texts]
        good = [k for k, wrong in enumerate(results) if wrong is None]
        answer = (
            classify(client, settings, g.request_id, [texts[k] for k in good]) if good else {"results": [], "model_version": None}
        )
        for k, result in zip(good, answer["results"], strict=True):
            results[k] = result
        return app.json.response(results=results, model_version=answer["model_version"])

    @app.post(
        "/explain",
        summary="The sentiment of a text and the words it comes from",
        responses={200: schemas.Explanation, **refusals},
        **shared,
    )
    def explain_text(body: text_body) -> Any:  # type: ignore[valid-type]
        text: str = not_blank(body.text)  # type: ignore[attr-defined]
        spans = explain.words(text)
        most = min(explain.MOST_WORDS, settings.max_texts - 1)
        answer = ask(client, [text, *explain.without(text, spans[:most])], settings)  # together, so that one model answers
        whole, *parts = answer["results"]
        note(settings, g.request_id, [text], answer | {"results": [whole]})
        whole |= {"model_version": answer["model_version"]}
        return app.json.response(explain.explanation(text, spans[:most], whole, parts, len(spans[most:])))


def classify(client: Any, settings: Settings, request_id: str, texts: list[str]) -> dict[str, Any]:
    """The model's answer to texts, logged and counted; raises RefusedError."""
    answer = ask(client, texts, settings)
    note(settings, request_id, texts, answer)
    return answer


def note(settings: Settings, request_id: str, texts: list[str], answer: dict[str, Any]) -> None:
    """Log and count the model's answer to texts."""
    for text, result in zip(texts, answer["results"], strict=True):
        metrics.predictions.labels(result["sentiment"], answer["model_version"]).inc()
        if result["truncated"]:
            metrics.truncated.inc()
        logs.event(
            log, logging.INFO, "prediction", id=request_id, version=answer["model_version"],
            label=result["sentiment"], score=result["score"], ms=round(1000 * answer["seconds"], 2),
            truncated=result["truncated"], **logs.text_fields(text, settings.log_text),
        )  # fmt: skip


def ask(client: Any, texts: list[str], settings: Settings) -> dict[str, Any]:
    """The model's answer to texts: `results`, `model_version`, `seconds`; raises RefusedError."""
    seconds = settings.timeout_seconds
    try:
        answer: dict[str, Any] = client.ask({"do": "predict", "texts": texts, "deadline": time.monotonic() + seconds}, seconds)
    except TimeoutError:
        raise RefusedError(504, f"no answer within {seconds:g} s") from None
    except UnreachableError:
        raise RefusedError(503, "the model is being started", retry_after=2) from None
    if "error" in answer:
        raise RefusedError(answer["status"], answer["error"], answer.get("retry_after"))
    return answer


def not_blank(text: str) -> str:
    """The text; raises RefusedError where there is nothing to read in it."""
    if not text[:1].isalnum() and not clean(text):
        raise RefusedError(400, "text: holds nothing but blanks")
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def wrong_with(text: Any, longest: int) -> dict[str, Any] | None:
    """What is wrong with a text of a batch, or None."""
    if not isinstance(text, str):
        return {"error": item(422, "Input should be a valid string")}
    if not text:
        return {"error": item(422, "String should have at least 1 character")}
    if len(text) > longest:
        return {"error": item(422, f"String should have at most {longest} characters")}
    if not clean(text):
        return {"error": item(400, "holds nothing but blanks")}
    return None


def item(status: int, detail: str) -> dict[str, Any]:
    """A problem with one text of a batch."""
    return problems.problem(status, detail, g.get("request_id"))
