"""The download stage: from a file or an address to data/raw/reviews.parquet, whole or not at all."""

import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from sentiment.errors import DataError
from stages import download

ROOT = Path(__file__).parent.parent
CONTENT = b'texto,nota\n"Chegou antes do prazo, adorei",5\nQuebrou na primeira semana,1\n'
ROWS = {"texto": ["Chegou antes do prazo, adorei", "Quebrou na primeira semana"], "nota": ["5", "1"], "source_line": [2, 3]}
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty project to run in, with a source `loja/avaliacoes.csv`."""
    monkeypatch.chdir(tmp_path)
    Path("loja").mkdir()
    Path("loja/avaliacoes.csv").write_bytes(CONTENT)
    return tmp_path


def write_params(**values):
    """The shipped params.yaml in the working directory, with these values of `download`."""
    params = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    params["download"] |= values
    Path("params.yaml").write_text(json.dumps(params), encoding="utf-8")  # JSON is YAML


def run(**values):
    """Run the stage; returns the stored rows and the facts of their source."""
    write_params(**values)
    download.main()
    table = pq.read_table(download.RAW)
    return table.to_pydict(), json.loads(table.schema.metadata[b"source"])


def serve(handler):
    """A server on a free port of this machine; stopped by its `shutdown`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    return server


@pytest.fixture
def web(here):
    """The address under which the project's `loja` is served."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = serve(partial(Quiet, directory=here / "loja"))
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's protocol as one file of one data set takes; the server's `asked` notes the requests."""

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        name, path = "/datasets/loja/avaliacoes", self.path.partition("?")[0]
        if path == f"/api{name}/revision/{REVISION}":
            self.answer(200, json.dumps({"id": "loja/avaliacoes", "sha": REVISION, "siblings": []}).encode())
        elif path in (f"/api{name}/tree/{REVISION}/dados", f"/api{name}/paths-info/{REVISION}"):
            file = {"type": "file", "path": "dados/avaliacoes.csv", "oid": "2" * 40, "size": len(CONTENT)}
            self.answer(200, json.dumps([file]).encode())
        elif path == f"{name}/resolve/{REVISION}/dados/avaliacoes.csv":
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            body = CONTENT[int(first) : int(last or len(CONTENT)) + 1]
            span = f"bytes {first}-{int(first) + len(body) - 1}/{len(CONTENT)}"
            self.answer(206, body, {"Content-Range": span, "ETag": f'"{"2" * 40}"', "X-Repo-Commit": REVISION})
        else:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound" if "/revision/" in path else "EntryNotFound"})

    do_POST = do_HEAD = do_GET  # noqa: N815

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    """The address of a Hub on this machine, and the list of what it is asked for."""
    server = serve(Hub)
    yield f"http://127.0.0.1:{server.server_port}", server.asked
    server.shutdown()
    server.server_close()


def run_with_hub(endpoint, source):
    """Run the stage as DVC does, in a process of its own: the Hub's client reads its address when it is imported."""
    write_params(source=source)
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(Path("hf").resolve()), "PYTHONPATH": str(ROOT), "NO_PROXY": "*"}
    env.pop("HF_HUB_OFFLINE", None)
    return subprocess.run([sys.executable, "-m", "stages.download"], env=env, check=False, capture_output=True, text=True)


def leftovers():
    """What stands in data/raw beside the stage's own output."""
    return [path.name for path in download.RAW.parent.glob("*") if path != download.RAW]


def test_a_local_file_is_stored_with_the_facts_of_its_source(here):
    rows, facts = run(source="loja/avaliacoes.csv", licence="CC-BY-4.0")
    assert rows == ROWS
    assert facts == {
        "source": "loja/avaliacoes.csv",
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "bytes": len(CONTENT),
        "licence": "CC-BY-4.0",
    }
    assert leftovers() == []


def test_a_local_file_is_linked_so_that_dvc_notices_its_changes(here):
    run(source="loja/avaliacoes.csv")
    link = Path("data/source/current")
    assert link.is_symlink()
    assert link.read_bytes() == CONTENT
    Path("loja/avaliacoes.csv").write_bytes(CONTENT + b"Serve,3\n")
    assert link.read_bytes() == CONTENT + b"Serve,3\n"


def test_another_file_takes_the_place_of_the_link_and_an_address_takes_it_away(here, web):
    run(source="loja/avaliacoes.csv")
    Path("outra.csv").write_bytes(b"texto,nota\nBom,4\n")
    run(source="outra.csv")
    assert Path("data/source/current").resolve() == here / "outra.csv"
    run(source=f"{web}/avaliacoes.csv")
    assert not os.path.lexists("data/source/current")


def test_a_pinned_checksum_that_holds_lets_the_source_through(here):
    rows, _ = run(source="loja/avaliacoes.csv", sha256=hashlib.sha256(CONTENT).hexdigest().upper())
    assert rows == ROWS


@pytest.mark.parametrize("remote", [False, True])
def test_a_wrong_checksum_stops_and_leaves_nothing(here, web, remote):
    source = f"{web}/avaliacoes.csv" if remote else "loja/avaliacoes.csv"
    with pytest.raises(DataError, match=f"(?=.*{hashlib.sha256(CONTENT).hexdigest()})(?=.*{'0' * 64})"):
        run(source=source, sha256="0" * 64)
    assert not download.RAW.exists()
    assert leftovers() == []


@pytest.mark.parametrize("name", ["avaliacoes.csv", "avaliacoes.csv.gz", "avaliacoes.csv?versao=2"])
def test_an_address_is_downloaded(here, web, name):
    Path("loja/avaliacoes.csv.gz").write_bytes(gzip.compress(CONTENT, mtime=0))
    rows, facts = run(source=f"{web}/{name}")
    content = CONTENT if "gz" not in name else gzip.compress(CONTENT, mtime=0)
    assert rows == ROWS
    assert facts["sha256"] == hashlib.sha256(content).hexdigest()
    assert facts["bytes"] == len(content)
    assert facts["licence"] == "unknown"
    assert leftovers() == []


def test_an_address_that_answers_nothing_is_named(here, web):
    source = f"{web}/falta.csv"
    with pytest.raises(DataError, match=r"cannot be read.*check the address and the network") as error:
        run(source=source)
    assert source in str(error.value)
    assert leftovers() == []


def test_a_hub_data_set_is_downloaded_at_its_revision(here, hub):
    endpoint, asked = hub
    source = f"hf://datasets/loja/avaliacoes@{REVISION}/dados/avaliacoes.csv"
    result = run_with_hub(endpoint, source)
    assert result.returncode == 0, result.stderr
    assert pq.read_table(download.RAW).to_pydict() == ROWS
    assert any(line.startswith(f"GET /datasets/loja/avaliacoes/resolve/{REVISION}/") for line in asked)
    assert all(f"/{REVISION}" in line for line in asked)


def test_a_hub_revision_that_is_none_stops_the_stage_in_one_sentence(here, hub):
    endpoint, _ = hub
    result = run_with_hub(endpoint, "hf://datasets/loja/avaliacoes@nenhuma/dados/avaliacoes.csv")
    assert result.returncode == 1
    assert "hf://datasets/loja/avaliacoes@nenhuma/dados/avaliacoes.csv cannot be read" in result.stderr
    assert "Traceback" not in result.stderr
    assert not download.RAW.exists()


@pytest.mark.parametrize(
    ("stated", "given", "licence"),
    [
        ("SPDX-License-Identifier: CC0-1.0\n\nFeito para este teste.\n", None, "CC0-1.0"),
        ("SPDX-License-Identifier: CC0-1.0\n", "CC-BY-NC-SA-4.0", "CC-BY-NC-SA-4.0"),
        ("Pode usar.\n", None, "unknown"),
        (None, None, "unknown"),
    ],
)
def test_the_licence_is_the_given_one_or_what_stands_beside_the_source(here, stated, given, licence):
    if stated:
        Path("loja/LICENSE").write_text(stated, encoding="utf-8")
    _, facts = run(source="loja/avaliacoes.csv", licence=given)
    assert facts["licence"] == licence


@pytest.mark.parametrize("content", [b"texto,nota\n", b""])
def test_a_source_without_reviews_is_refused(here, content):
    Path("loja/avaliacoes.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"loja/avaliacoes\.csv"):
        run(source="loja/avaliacoes.csv")
    assert not download.RAW.exists()


def test_a_malformed_line_leaves_the_earlier_reviews_as_they_were(here):
    run(source="loja/avaliacoes.csv")
    Path("loja/ruim.csv").write_bytes(CONTENT + b"sem nota\n")
    with pytest.raises(DataError, match="line 4"):
        run(source="loja/ruim.csv")
    assert pq.read_table(download.RAW).to_pydict() == ROWS
    assert leftovers() == []


def test_an_unknown_suffix_stops_before_anything_is_fetched(here, web):
    with pytest.raises(DataError, match="no known format"):
        run(source=f"{web}/falta.xlsx")
    assert not download.RAW.exists()
