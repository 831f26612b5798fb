"""POST /predict the short way: read, asked, answered and logged in a worker's main loop, without a thread and without Flask.

Only the plainest request goes this way: whole, over a kept connection, short, its head in the form that every usual client sends,
its body as the OpenAPI document says. Anything else, and all that has to be refused, is Gunicorn's and Flask's to judge.
"""

import re
import time
from codecs import BOM_UTF8
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NamedTuple

import orjson
from pydantic_core import from_json

from serve import observation, predictions, problems, schemas
from serve.problems import RefusedError
from serve.settings import Settings

PATH = "/predict"
LONGEST = 16_384  # bytes of a request
START_LINE = f"POST {PATH} HTTP/1.1\r\n".encode()
FIELDS = re.compile(rb"(?:[A-Za-z0-9-]{1,64}:[ \t]*[\x21-\x7e](?:[\x20-\x7e]{0,4096})\r\n)+")
LENGTH = re.compile(r"[0-9]{1,5}")
OTHERS = {  # fields by which a request is more than its own bytes, or asks for more than an answer
    "connection", "expect", "upgrade", "transfer-encoding", "te", "trailer", "http2-settings", "proxy-connection",
    "content-encoding",
}  # fmt: skip
HOST = re.compile(r"(?:[^.]{1,63}\.)*[^.]{1,63}\.?")  # no label longer than DNS has them, which Flask would refuse
KEPT = {"keep-alive", "Keep-Alive"}


class Head(NamedTuple):
    """The head of a plain request: its WSGI environ, and where its body begins and ends."""

    environ: dict[str, Any]
    begins: int
    ends: int


@dataclass
class Asked:
    """A request that the model's process works on."""

    connection: Any
    data: bytes  # all of it, to be read again by Gunicorn if that process goes away
    environ: dict[str, Any]
    text: str
    deadline: float


def head_of(data: bytes, address: str) -> Head | None:
    """The head of a plain request of at most LONGEST bytes, its body perhaps not all there yet; None for any other one."""
    end = data.find(b"\r\n\r\n", 0, LONGEST)
    if end < 0 or not data.startswith(START_LINE) or not FIELDS.fullmatch(data, len(START_LINE), end + 2):
        return None
    environ: dict[str, Any] = {"REQUEST_METHOD": "POST", "PATH_INFO": PATH, "REMOTE_ADDR": address}
    lines = data[len(START_LINE) : end].decode("ascii").split("\r\n")
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        key = "HTTP_" + name.upper().replace("-", "_")
        if key in environ or (name in OTHERS and not (name == "connection" and value in KEPT)):
            return None
        environ[key] = value
    length = environ.get("HTTP_CONTENT_LENGTH", "")
    if (
        not HOST.fullmatch(environ.get("HTTP_HOST", ""))
        or not LENGTH.fullmatch(length)
        or end + 4 + int(length) > LONGEST
        or len(lines) > 100
    ):
        return None
    return Head(environ, end + 4, end + 4 + int(length))


def value_of(body: bytes) -> Any:
    """The JSON value of a body, a byte order mark before it ignored (RFC 8259, 8.1); raises ValueError."""
    return from_json(body.removeprefix(BOM_UTF8), allow_inf_nan=False)


class Direct:
    """What the short way takes in and gives out."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.body, _ = schemas.bodies(settings)

    def asked(self, connection: Any, data: bytes, head: Head) -> Asked | None:
        """A request for the model, if it is a good one, from who may ask."""
        if head.ends - head.begins > self.settings.max_body_bytes or not predictions.has_key(head.environ, self.settings):
            return None
        try:
            value = value_of(data[head.begins :])
            if not isinstance(value, dict):
                return None
            text = predictions.not_blank(self.body.model_validate(value).text)  # type: ignore[attr-defined]
        except (ValueError, RefusedError):
            return None
        observation.begin(head.environ)
        return Asked(connection, data, head.environ, text, time.monotonic() + self.settings.timeout_seconds)

    def response(self, asked: Asked, answer: dict[str, Any], keep: bool) -> bytes:
        """The whole answer to a request; `keep` says whether the connection stays."""
        request_id: str = asked.environ[observation.ID]
        status, kind, more = 200, "application/json", ""
        if "error" in answer:
            status, kind = answer["status"], problems.TYPE
            body = orjson.dumps(problems.problem(status, answer["error"], request_id))
            if answer.get("retry_after") is not None:
                more = f"Retry-After: {answer['retry_after']}\r\n"
        else:
            body = orjson.dumps(answer["results"][0] | {"model_version": answer["model_version"]})
        fields = "".join(f"{name}: {value}\r\n" for name, value in observation.headers(request_id))
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nServer: gunicorn\r\nDate: {observation.date(int(time.time()))}\r\n"
            f"Connection: {'keep-alive' if keep else 'close'}\r\n{fields}{more}Content-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode("ascii") + body

    def note(self, asked: Asked, answer: dict[str, Any]) -> None:
        """Log and count an answer."""
        if "error" not in answer:
            predictions.note(self.settings, asked.environ[observation.ID], [asked.text], answer)
        observation.answered(asked.environ, self.settings, PATH, PATH, str(answer.get("status", 200)))
