"""The pages for people: /docs (Swagger UI) and /demo, with all their files from here, so that they work offline."""

from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

from flask import Response, send_from_directory
from flask_openapi3 import OpenAPI

from serve.problems import TYPE

OURS = Path(__file__).resolve().parent / "static"
SWAGGER = Path(str(files("flask_openapi3_swagger"))) / "templates" / "swagger"
STRICT = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
FOR_SWAGGER = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"


def add(app: OpenAPI) -> None:
    """Add the pages, the OpenAPI document of all routes so far, and the files that they need."""
    document = corrected(deepcopy(app.api_doc))

    @app.route("/openapi.json")
    def openapi_json() -> Any:
        return app.json.response(document)

    @app.route("/docs")
    def docs() -> Response:
        return page("docs.html", FOR_SWAGGER)

    @app.route("/demo")
    def demo() -> Response:
        return page("demo.html", STRICT)

    @app.route("/static/<path:name>")
    def static_file(name: str) -> Response:
        return send_from_directory(OURS, name)

    @app.route("/static/swagger/<path:name>")
    def swagger_file(name: str) -> Response:
        return send_from_directory(SWAGGER, name, max_age=86400)


def page(name: str, policy: str) -> Response:
    """A page that loads nothing from another host."""
    response = send_from_directory(OURS, name)
    response.headers["Content-Security-Policy"] = policy
    return response


def corrected(document: dict[str, Any]) -> dict[str, Any]:
    """The framework's OpenAPI document with the errors as they are sent: of their own media type, and none of a body to a GET."""
    for methods in document["paths"].values():
        for method, operation in methods.items():
            if method == "get":
                for status in ("415", "422"):
                    operation["responses"].pop(status, None)
            for response in operation["responses"].values():
                for media in list(response.get("content", {})):
                    if "/Problem" in str(response["content"][media]):
                        response["content"] = {TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return document
