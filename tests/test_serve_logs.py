"""The service's log: what its lines say, what nobody can write into it, and that none is lost."""

import hashlib
import json
import re
import subprocess
import sys
from urllib.parse import quote

import pytest

import models
from serving import ROOT, Service
from test_serve_contract import served

LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) (serve|sentiment|gunicorn|py)\S* "
    r'[^"=]+( \w+=([\w./:@%+,#-]+|"([^"\\]|\\.)*"))*'
)
FORGERY = "2026-01-31 12:00:00,000 INFO serve.request request id=forjado client=203.0.113.9 status=200"
BREAKS = [
    "\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\x1b[2K\x1b[1G", "\x9b2K",
    "\b" * 80, "\0", '" ', "\u202e",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def service(folder, environment, tmp_path_factory):
    """A service that logs text, with a misspelt setting."""
    settings = served(folder, tmp_path_factory.mktemp("engines")) | {"modle": "production"}
    with Service(tmp_path_factory.mktemp("service"), environment, **settings) as made:
        yield made


@pytest.fixture(scope="module")
def discreet(folder, environment, tmp_path_factory):
    """A service that logs JSON, hashes in place of texts, and keeps three small files."""
    settings = served(folder, tmp_path_factory.mktemp("engines"))
    settings |= {"log_format": "json", "log_text": "hash", "log_bytes": 20_000, "log_files": 2}
    with Service(tmp_path_factory.mktemp("discreet"), environment, **settings) as made:
        yield made


def raw(service):
    """All that is in the log's files, the oldest first."""
    files = [service.log_file.with_name(f"{service.log_file.name}{number}") for number in (".2", ".1", "")]
    return b"".join(file.read_bytes() for file in files if file.is_file()).decode()


def fields(line):
    """The fields of a line of text, their values unquoted."""
    found = re.findall(r' (\w+)=("(?:[^"\\]|\\.)*"|\S+)', line)
    return {name: json.loads(value) if value.startswith('"') else value for name, value in found}


def lines_of(service, event, request_id=None):
    """The fields of an event's lines, of a request if one is named."""
    found = [fields(line) for line in service.log() if re.search(rf" serve(\.\w+)? {event}( |$)", line)]
    return [each for each in found if request_id in (None, each.get("id"))]


def entries_of(service, event, request_id):
    entries = [json.loads(line) for line in raw(service).split("\n")[:-1]]
    return [each for each in entries if each["event"] == event and each.get("id") == request_id]


# Lines of text.


def test_the_start_is_logged_with_the_versions(service):
    (line,) = lines_of(service, "start")
    assert set(line) >= {
        "python",
        "torch",
        "transformers",
        "tokenizers",
        "openvino",
        "onnxruntime",
        "flask",
        "gunicorn",
        "system",
    }
    assert line["python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_model_that_is_loaded_is_logged_with_its_seconds(service):
    (line,) = lines_of(service, "model loaded")
    assert (line["version"], line["device"], line["engine"], line["precision"]) == (
        service.get("/health")[2]["model_version"],
        "cpu",
        "torch",
        "fp32",
    )
    assert line["labels"] == "negativo,positivo"
    assert float(line["seconds"]) > 0


def test_a_request_is_logged_with_who_what_and_how_it_ended(service):
    service.post("/predict", {"text": ""}, **{"X-Request-ID": "um-pedido"})
    (line,) = lines_of(service, "request", "um-pedido")
    assert float(line.pop("ms")) > 0
    assert line == {"id": "um-pedido", "client": "127.0.0.1", "method": "POST", "path": "/predict", "status": "422"}


def test_a_prediction_is_logged_with_its_answer_and_the_texts_beginning(service):
    text = 'Chegou antes do prazo, e a "capa" é boa; só não gostei da cor, que é outra 😍'
    body = service.post("/predict", {"text": text}, **{"X-Request-ID": "uma-resposta"})[2]
    (line,) = lines_of(service, "prediction", "uma-resposta")
    assert (line["label"], line["version"], line["truncated"]) == (
        body["sentiment"],
        body["model_version"],
        json.dumps(body["truncated"]),
    )
    assert float(line["score"]) == pytest.approx(body["score"], abs=1e-5)
    assert float(line["ms"]) > 0
    assert (line["chars"], line["text"]) == (str(len(text)), text[:50])


def test_every_text_of_a_batch_that_was_classified_is_logged(service):
    service.post("/predict/batch", {"texts": ["bom", "", "ruim"]}, **{"X-Request-ID": "um-lote"})
    assert [line["text"] for line in lines_of(service, "prediction", "um-lote")] == ["bom", "ruim"]
    assert len(lines_of(service, "request", "um-lote")) == 1


def test_a_setting_that_nobody_knows_is_reported(service):
    assert any(" WARNING " in line and "SERVE_MODLE is no setting" in line for line in service.log())


def test_the_console_has_the_files_lines(service):
    service.get("/live", **{"X-Request-ID": "no-console"})
    (line,) = [line for line in service.log() if "id=no-console" in line]
    assert line in service.output.read_text(encoding="utf-8").splitlines()


# Forgeries.


def forge(service, end):
    """Send what would write a line of its own, had it the end of a line in it, wherever a client can send something."""
    service.post("/predict", {"text": f"bom{end}{FORGERY}"})
    service.post("/predict/batch", {"texts": [f"{end}{FORGERY}", f"bom {end}"]})
    service.post("/explain", {"text": f"bom{end}{FORGERY}"[:60], f"campo{end}{FORGERY}": 1})
    service.get(f"/{quote(end)}{quote(FORGERY)}")
    service.get(f"/live?a={quote(end)}{quote(FORGERY)}")
    for name in ("X-Request-ID", "X-Forwarded-For", "User-Agent", "X-API-Key"):
        value = f"a{end}{FORGERY}".encode()
        if not re.search(rb"[\r\n]", value):  # which http.client does not send
            service.get("/live", **{name: value})


def written(service, end):
    """The lines that the log's files get while a client tries to forge one, and those of the console."""
    service.get("/live", **{"X-Request-ID": "aqui"})
    forge(service, end)
    service.get("/live", **{"X-Request-ID": "fim"})
    for whole in (raw(service), service.output.read_bytes().decode()):
        text = whole.rpartition("aqui")[2].partition("\n")[2]
        lines = text.splitlines()  # at every sign that any program might take for a line's end
        assert lines == text.split("\n")[:-1]
        assert all(line.isprintable() for line in lines)
        yield lines


@pytest.mark.parametrize("end", BREAKS, ids=lambda end: ascii(end[:8]))
def test_what_clients_send_cannot_forge_a_line(service, end):
    log, console = written(service, end)
    assert all(LINE.fullmatch(line) for line in log)
    assert not [line for line in log + console if line.startswith(FORGERY[:23]) or fields(line).get("id") == "forjado"]


@pytest.mark.parametrize("end", BREAKS, ids=lambda end: ascii(end[:8]))
def test_what_clients_send_cannot_forge_a_line_of_json(discreet, end):
    log, console = written(discreet, end)
    assert not [line for line in log if json.loads(line).get("id") == "forjado"]
    assert not [line for line in console if line.startswith(FORGERY[:23])]


# JSON, hashes.


def test_every_line_of_a_log_in_json_is_an_object_with_time_level_and_event(discreet):
    discreet.predict()
    entries = [json.loads(line) for line in raw(discreet).split("\n")[:-1]]
    assert entries
    for each in entries:
        assert each.keys() >= {"time", "level", "logger", "event"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", each["time"])


def test_the_console_is_json_too(discreet):
    lines = discreet.output.read_text(encoding="utf-8").split("\n")[:-1]
    assert [line for line in lines if not line.startswith("{")] == []


def test_a_prediction_in_json_has_numbers_and_the_texts_hash_alone(discreet):
    text = "Um segredo de família, com acentuação 😍"
    body = discreet.post("/predict", {"text": text}, **{"X-Request-ID": "segredo"})[2]
    (line,) = entries_of(discreet, "prediction", "segredo")
    assert line["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert (line["label"], line["score"], line["chars"]) == (body["sentiment"], body["score"], len(text))
    assert isinstance(line["ms"], float)
    assert "text" not in line
    (line,) = entries_of(discreet, "request", "segredo")
    assert (line["method"], line["path"], line["status"]) == ("POST", "/predict", 200)
    assert "família" not in raw(discreet) + discreet.output.read_text(encoding="utf-8")


# Rotation.


def test_the_log_is_rotated_at_its_size_and_so_many_files_are_kept(discreet):
    path = discreet.log_file
    for _ in range(3):
        first = path.with_name("api.log.1").stat().st_ino if path.with_name("api.log.1").exists() else None
        for _ in range(400):
            discreet.get("/live")
            now = path.with_name("api.log.1").stat().st_ino if path.with_name("api.log.1").exists() else None
            if now != first:
                break
        assert now != first
    kept = {each.name: each.stat().st_size for each in path.parent.glob("api.log*") if not each.name.endswith(".lock")}
    assert set(kept) == {"api.log", "api.log.1", "api.log.2"}
    assert all(20_000 <= kept[name] < 25_000 for name in ("api.log.1", "api.log.2"))


WRITER = """
import logging, sys
from pathlib import Path
from serve.logs import SharedFile
path, most, kept, name, number = sys.argv[1:]
handler = SharedFile(Path(path), int(most), int(kept))
for k in range(int(number)):
    text = f"{name} {k} " + "é" * (20_000 if k == 100 else k % 150) + " fim"
    handler.emit(logging.LogRecord("x", logging.INFO, "", 0, text, None, None))
"""


def write_from_processes(path, most, kept, number, processes=4):
    """Let several processes write so many lines each, at the same time; returns the log's files."""
    command = [sys.executable, "-c", WRITER, path, str(most), str(kept)]
    running = [subprocess.Popen([*command, f"p{k}", str(number)], cwd=ROOT, stderr=subprocess.PIPE) for k in range(processes)]
    for each in running:
        assert each.communicate(timeout=60)[1] == b""
        assert each.returncode == 0
    return [each for each in path.parent.iterdir() if not each.name.endswith(".lock")]


def test_no_line_is_lost_or_torn_where_processes_write_and_rotate(tmp_path):
    files = write_from_processes(tmp_path / "api.log", 10_000, 200, 400)
    assert len(files) > 10
    lines = [line for each in files for line in each.read_text(encoding="utf-8").splitlines()]
    expected = {f"p{p} {k} " + "é" * (20_000 if k == 100 else k % 150) + " fim" for p in range(4) for k in range(400)}
    assert len(lines) == len(expected)
    assert set(lines) == expected


def test_the_oldest_files_are_removed_where_processes_rotate(tmp_path):
    files = write_from_processes(tmp_path / "api.log", 10_000, 3, 400)
    assert {each.name for each in files} == {"api.log", "api.log.1", "api.log.2", "api.log.3"}
    lines = [line for each in files for line in each.read_text(encoding="utf-8").splitlines()]
    assert all(re.fullmatch(r"p\d \d+ é* fim", line) for line in lines)
    assert any(line.startswith(f"p{k} 399 ") for k in range(4) for line in lines)
