"""The service against its own OpenAPI document: Schemathesis makes requests that the document allows, and others."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import models
from serving import Service
from test_serve_contract import served

EXAMPLES = 60  # an operation
# positive_data_acceptance is left out: a text of blanks alone is 400, which JSON Schema cannot say.
CHECKS = [
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "unsupported_method", "allow_header_conformance",
]  # fmt: skip
OPERATIONS = ["POST /predict", "POST /predict/batch", "POST /explain", "GET /", "GET /health", "GET /live", "GET /ready",
              "GET /metrics"]  # fmt: skip


@pytest.fixture(scope="module")
def service(environment, tmp_path_factory):
    settings = served(models.model_folder(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("engines"))
    with Service(tmp_path_factory.mktemp("service"), environment, max_text_chars=300, max_texts=8, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def failures(service, environment, tmp_path_factory):
    """What Schemathesis found, by operation: nothing where all is as the document says."""
    folder = tmp_path_factory.mktemp("schemathesis")
    command = [
        Path(sys.executable).parent / "st", "run", f"http://127.0.0.1:{service.port}/openapi.json", "--mode", "all",
        "--seed", "1", "--max-examples", str(EXAMPLES), "--phases", "examples,coverage,fuzzing", "--checks", ",".join(CHECKS),
        "--no-color", "--continue-on-failure", "--generation-database", "none", "--report", "junit",
        "--report-junit-path", folder / "found.xml",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert (folder / "found.xml").is_file(), done.stdout + done.stderr
    found = {}
    for case in ET.parse(folder / "found.xml").iter("testcase"):
        said = [each.get("message") or each.text or each.tag for each in case if each.tag in ("failure", "error")]
        found.setdefault(case.get("name"), []).extend(said)
    return found


def test_every_operation_of_the_document_is_tried_with_good_and_bad_data(service, failures):
    assert set(failures) == set(OPERATIONS)
    for operation in OPERATIONS:
        method, path = operation.split()
        asked = [line for line in service.log() if f" method={method} path={path} " in line]
        assert len([line for line in asked if " status=200 " in line]) > (EXAMPLES // 4 if method == "POST" else 1)
        assert len([line for line in asked if " status=422 " in line]) > (EXAMPLES // 4 if method == "POST" else -1)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_answers_as_its_document_says(failures, operation):
    assert not failures[operation], "\n".join(failures[operation])


def test_nothing_failed_in_all_of_this(service, failures):
    assert [line for line in service.log() if " ERROR " in line or "trace=" in line] == []
    assert service.get("/health")[0] == 200
