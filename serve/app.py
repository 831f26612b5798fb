"""The HTTP application: routes, limits, logs and metrics. The model is in another process (serve/predictor.py).

Run: gunicorn -c serve/gunicorn.conf.py serve.app:app
"""

import logging
from typing import Any

import orjson
from flask import Flask, Request, Response, g, request
from flask.json.provider import JSONProvider
from flask_openapi3 import Info, OpenAPI
from gunicorn.http.errors import ChunkMissingTerminator, ParseException
from werkzeug.exceptions import BadRequest, ClientDisconnected, RequestEntityTooLarge, UnprocessableEntity, UnsupportedMediaType

from serve import logs, observation, pages, predictions, problems, schemas, state
from serve.direct import value_of
from serve.settings import Settings, load, unknown
from serve.supervisor import socket_path
from serve.wire import Client
from serve.worker import READ

log = logging.getLogger("serve.request")
CUT_OFF = "the body was cut off"


class JsonRequest(Request):
    """A request whose body is JSON whatever its Content-Type says, as `curl -d` sends it."""

    def get_json(self, *_: Any, **__: Any) -> Any:
        """The body's value; raises UnprocessableEntity where it is no JSON, UnsupportedMediaType where it is compressed."""
        if self.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
            raise UnsupportedMediaType("Content-Encoding is not supported: send the body plain")
        data = self.read_body()
        self.environ.get(READ, lambda: None)()
        try:
            return value_of(data)
        except ValueError as error:
            wrong = f"the body is no JSON ({error})" if is_utf8(data) else "the body is not in UTF-8: send it in UTF-8"
            raise UnprocessableEntity(wrong) from error

    def read_body(self) -> bytes:
        """The body; raises RequestEntityTooLarge over the limit, BadRequest where it is cut off or its chunks are none."""
        try:
            data = self.get_data(cache=False)
        except ClientDisconnected as error:
            raise BadRequest(CUT_OFF) from error
        except ParseException as error:
            ended = isinstance(error, ChunkMissingTerminator) and len(error.term) < 2  # what came in place of CR LF
            raise BadRequest(CUT_OFF if ended else f"the body cannot be read ({type(error).__name__})") from error
        if len(data) == self.max_content_length:
            raise RequestEntityTooLarge
        if len(data) < (self.content_length or 0):
            raise BadRequest(CUT_OFF)
        return data


def is_utf8(data: bytes) -> bool:
    """Whether bytes can be text in UTF-8; with NULs among them, they are of UTF-16 or UTF-32."""
    try:
        return "\0" not in data.decode()
    except UnicodeDecodeError:
        return False


class OrJson(JSONProvider):
    """JSON by orjson."""

    def dumps(self, obj: Any, **_: Any) -> str:
        return orjson.dumps(obj).decode()

    def loads(self, s: str | bytes, **_: Any) -> Any:
        return orjson.loads(s)

    def response(self, *args: Any, **kwargs: Any) -> Response:
        return Response(orjson.dumps(self._prepare_response_obj(args, kwargs)), mimetype="application/json")


def create_app(settings: Settings | None = None, client: Any = None) -> Flask:
    """The application; `client` is asked what the model says (by default the process beside this one).

    Ends the process with a sentence if the settings are wrong, or if the model's process is not run by Gunicorn's settings.
    """
    settings = settings or load()
    client = client or Client(socket_path())
    if not logging.getLogger("serve").handlers:
        logs.setup(settings)
    for name in unknown():
        log.warning("%s is no setting of the service; `python -m serve.settings` lists them", name)
    info = Info(title="Sentiment of Brazilian product reviews", version="1", description="Texts in, sentiment out.")
    app = OpenAPI(
        "serve", info=info, doc_ui=False, validation_error_callback=problems.of_validation,
        validation_error_model=schemas.Problem, security_schemes=security(settings), static_folder=None,
        responses={415: schemas.Problem},
    )  # fmt: skip
    app.request_class, app.json = JsonRequest, OrJson(app)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes + 1  # which is too long; of chunks no more is read
    app.url_map.merge_slashes = False  # or it redirects, to a host that the client named
    problems.register(app)
    observe(app, settings)
    predictions.add(app, settings, client)
    state.add(app, settings, client)
    pages.add(app)
    return app


def security(settings: Settings) -> dict[str, Any]:
    """The OpenAPI document's word on the key, if one is needed."""
    return {"key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}} if settings.api_key else {}


def observe(app: Flask, settings: Settings) -> None:
    """Give each request an id, a line in the log, and a place in the metrics."""

    @app.before_request
    def begin() -> None:
        observation.begin(request.environ)
        g.request_id = request.environ[observation.ID]
        if "HTTP_HOST" not in request.environ and request.environ["SERVER_PROTOCOL"] != "HTTP/1.0":
            raise BadRequest("a request of HTTP/1.1 names its host, in the header Host")  # RFC 9112, 3.2
        if request.method in ("GET", "HEAD", "OPTIONS"):
            request.environ.get(READ, lambda: None)()

    @app.after_request
    def end(response: Response) -> Response:
        observation.begin(request.environ)
        route = request.url_rule.rule if request.url_rule else "none"
        observation.answered(request.environ, settings, route, request.path, str(response.status_code))
        for name, value in observation.headers(request.environ[observation.ID]):
            response.headers.setdefault(name, value)
        return response


def __getattr__(name: str) -> Any:
    """`app`, made when Gunicorn asks for it, so that importing this module for its parts needs no running service."""
    if name == "app":
        made = globals()["app"] = create_app()
        return made
    raise AttributeError(name)
