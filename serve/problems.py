"""Errors as clients see them: one JSON shape (RFC 9457), never a trace or a path of this machine."""

import logging
from http import HTTPStatus
from typing import Any

from flask import Flask, Response, g, jsonify
from pydantic import ValidationError
from werkzeug.exceptions import HTTPException

log = logging.getLogger("serve.request")
TYPE = "application/problem+json"


class RefusedError(Exception):
    """A request that is answered with a problem."""

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after


def problem(status: int, detail: str, request_id: str | None) -> dict[str, Any]:
    """A problem's JSON object."""
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "request_id": request_id,
    }


def answer(status: int, detail: str, retry_after: int | None = None) -> Response:
    """A problem as a response."""
    response = jsonify(problem(status, detail, g.get("request_id")))
    response.status_code, response.content_type = status, TYPE
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if retry_after is not None:
        response.headers["Retry-After"] = str(retry_after)
    return response


def of_validation(error: ValidationError) -> Response:
    """422 for a body that is not as the OpenAPI document says; the values sent are not repeated."""
    found = [": ".join(filter(None, (".".join(map(str, each["loc"])), each["msg"]))) for each in error.errors()[:3]]
    return answer(422, "; ".join(found))


def register(app: Flask) -> None:
    """Answer every error of the application with a problem."""

    @app.errorhandler(RefusedError)
    def refused(error: RefusedError) -> Response:
        return answer(error.status, error.detail, error.retry_after)

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> Response:
        response = answer(error.code or 500, (error.description or "").strip())
        allowed = getattr(error, "valid_methods", None)
        if allowed:
            response.headers["Allow"] = ", ".join(sorted(allowed))
        return response

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> Response:
        log.error("a request failed", exc_info=error, extra={"fields": {"id": g.get("request_id")}})
        return answer(500, "something failed here; the log has it under this request_id")
