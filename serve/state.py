"""GET /, /health, /live, /ready and /metrics: what the service says of itself."""

from datetime import UTC, datetime
from typing import Any

from flask import Response
from flask_openapi3 import OpenAPI, Tag

from serve import metrics, schemas
from serve.problems import RefusedError
from serve.settings import Settings
from serve.wire import UnreachableError

PROBE_SECONDS = 2.0
ROUTES = {
    "POST /predict": "the sentiment of a text",
    "POST /predict/batch": "the sentiment of several texts",
    "POST /explain": "the sentiment of a text and the words it comes from",
    "GET /health": "the model in service",
    "GET /live": "whether the service runs",
    "GET /ready": "whether it takes requests",
    "GET /metrics": "Prometheus metrics",
    "GET /docs": "the documentation, to try out",
    "GET /openapi.json": "the documentation for machines",
    "GET /demo": "a page to type a review into",
}


def add(app: OpenAPI, settings: Settings, client: Any) -> None:
    """GET /, /health, /live, /ready and /metrics."""
    shared: Any = {"tags": [Tag(name="state")]}

    def state() -> dict[str, Any]:
        """What the model's process says of itself, or that it does not answer."""
        try:
            found: dict[str, Any] = client.ask({"do": "describe"}, PROBE_SECONDS)
        except (TimeoutError, UnreachableError):
            found = {"model_loaded": False, "model_version": None, "device": None, "waiting_requests": 0}
        return found

    @app.get("/", summary="What this is", responses={200: schemas.Root}, **shared)
    def root() -> Any:
        found = state()
        status = "ok" if found["model_loaded"] else "unavailable"
        return app.json.response(name="sentiment", version=found["model_version"], status=status, routes=ROUTES)

    @app.get("/health", summary="The model in service", responses={200: schemas.Health, 503: schemas.Health}, **shared)
    def health() -> Any:
        found = state()
        status = "ok" if found["model_loaded"] else "unavailable"
        response = app.json.response({"status": status, "timestamp": datetime.now(UTC).isoformat(), **found})
        response.status_code = 200 if found["model_loaded"] else 503
        return response

    @app.get("/live", summary="Whether the service runs", responses={200: schemas.Status}, **shared)
    def live() -> Any:
        return app.json.response(status="alive")

    @app.get("/ready", summary="Whether it takes requests", responses={200: schemas.Status, 503: schemas.Problem}, **shared)
    def ready() -> Any:
        found = state()
        if not found["model_loaded"]:
            raise RefusedError(503, "no model is loaded", retry_after=2)
        if found["waiting_requests"] >= settings.places:
            raise RefusedError(503, "too many requests are waiting", retry_after=1)
        return app.json.response(status="ready")

    @app.get(
        "/metrics",
        summary="Prometheus metrics",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        **shared,
    )
    def prometheus() -> Any:
        return Response(metrics.exposition(), content_type="text/plain; version=0.0.4; charset=utf-8")
