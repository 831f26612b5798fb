"""Starting and ending the servers, ours and the others, each on a port of its own and in a process group of its own."""

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from bench.workload import Workload
from sentiment.errors import ProjectError

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
REQUIREMENTS = ROOT / "bench/requirements-peers.txt"
PEERS = ROOT / ".venv/peers"
STARTING = 180.0  # seconds that a server may take
ENDING = 10.0  # ... and may take to end
NAMES = {"ours": "ours", "naive": "naive", "litserve": "LitServe", "mosec": "mosec", "bentoml": "BentoML"}
PEER_NAMES = ("litserve", "mosec", "bentoml")
log = logging.getLogger("sentiment.bench")


class ServerError(ProjectError):
    """A server does not start, or does not answer as the engine alone does."""


class Spec(NamedTuple):
    """How a server is started."""

    command: list[str]
    environment: dict[str, str]
    health: str  # GET gives 200 once it answers
    listed: bool = False  # it takes {"text": ["…"]} and answers a list: what BentoML batches
    bounded: bool = False  # so slow that a number of answers bounds its measurement


class Running(NamedTuple):
    """A server that answers."""

    spec: Spec
    port: int
    process: psutil.Popen

    def post(self, text: str) -> dict[str, Any]:
        """The answer to a text; raises ServerError if that is no answer."""
        try:
            status, body = fetch(self.port, "POST", "/predict", json.dumps({"text": [text] if self.spec.listed else text}))
            if status != 200:
                raise ServerError(f"POST /predict gave status {status}")
            found = json.loads(body)
            answer = found[0] if self.spec.listed else found
            return {"sentiment": str(answer["sentiment"]), "score": float(answer["score"])}
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"POST /predict gave no answer ({error})") from error
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError("POST /predict gave no sentiment with its score") from error

    def check(self) -> None:
        """Raises ServerError if the server has ended."""
        if self.process.poll() is not None:
            raise ServerError(f"it ended with code {self.process.returncode}")

    def megabytes(self) -> float:
        """The memory of all its processes, shared pages in equal parts (PSS)."""
        total = 0
        for each in family(self.process, self.port):
            with suppress(psutil.NoSuchProcess):
                total += each.memory_full_info().pss
        return total / 1e6

    def cpu_seconds(self) -> float:
        """What all its processes have computed."""
        total = 0.0
        for each in family(self.process, self.port):
            with suppress(psutil.NoSuchProcess):
                total += sum(each.cpu_times()[:2])
        return total


def specification(name: str, work: Workload, port: int) -> Spec:
    """How the server of that name is started on a port; all but ours are told by the environment what bench/peers describes."""
    environment = work.environment | {"PYTHONPATH": str(ROOT)}
    place = ["--port", str(port)]
    if name == "ours":
        return ours(work, port)
    if name == "naive":
        command = ["gunicorn", "--workers", "1", "--timeout", "300", "--bind", f"{HOST}:{port}", "bench.peers.naive:app"]
        return Spec([sys.executable, "-m", *command], environment, "/health", bounded=True)
    there = [str(PEERS / "bin/python"), "-m"]
    if name == "litserve":
        return Spec([*there, "bench.peers.litserve_app"], environment, "/health")
    if name == "mosec":
        patient = ["--timeout", "60000"]  # ms for a request, as long as the others wait; its default is 3000
        return Spec([*there, "bench.peers.mosec_app", "--address", HOST, *place, *patient], environment, "/")
    environment |= {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(work.reviews.parent / "bentoml")}
    command = ["bentoml", "serve", "bench.peers.bentoml_app:Sentiment", "--host", HOST, *place]
    return Spec([*there, *command], environment, "/readyz", listed=True)


def ours(work: Workload, port: int) -> Spec:
    """Our service, as users start it; its log is kept from holding pieces of reviews."""
    settings = {
        "SERVE_MODEL": str(work.model),
        "SERVE_ENGINE": work.engine,
        "SERVE_CACHE": str(work.converted.parent),
        "SERVE_HOST": HOST,
        "SERVE_PORT": str(port),
        "SERVE_LOG_FILE": str(work.reviews.parent / "api.log"),
        "SERVE_LOG_TEXT": "hash",
    }
    return Spec([sys.executable, "-m", "gunicorn", "-c", "serve/gunicorn.conf.py", "serve.app:app"], settings, "/health")


@contextmanager
def running(name: str, work: Workload, log_file: Path) -> Iterator[Running]:
    """The server while it is needed; raises ServerError if it does not start."""
    port = free_port()
    spec = specification(name, work, port)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SERVE_")}
    with log_file.open("wb") as output:
        process = psutil.Popen(
            spec.command,
            env=inherited | spec.environment | {"BENCH_PORT": str(port), "TMPDIR": str(work.reviews.parent)},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for(process, port, spec.health)
            yield Running(spec, port, process)
        finally:
            end(process, port)


def wait_for(process: psutil.Popen, port: int, health: str) -> None:
    """Return once the server is healthy; raises ServerError if it ends before, or is not in 180 seconds."""
    deadline = time.monotonic() + STARTING
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"it ended with code {process.returncode} before it answered")
        with suppress(OSError, http.client.HTTPException):
            if fetch(port, "GET", health, timeout=5)[0] == 200:
                return
        time.sleep(0.2)
    raise ServerError(f"it did not answer GET {health} within {STARTING:g} s")


def end(process: psutil.Popen, port: int) -> None:
    """End a server and all that it started: SIGTERM, and SIGKILL to what is left."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave it behind
    started = family(process, port)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    for each in psutil.wait_procs(started, timeout=ENDING)[1] + family(process, port):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(started, timeout=ENDING)
    signal.signal(signal.SIGINT, before)


def family(process: psutil.Process, port: int) -> list[psutil.Process]:
    """A server's processes: the first, its descendants, and those that outlived it, which are known by their BENCH_PORT."""
    found: dict[int, psutil.Process] = {}
    with suppress(psutil.NoSuchProcess):
        found = {each.pid: each for each in (process, *process.children(recursive=True))}
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            if each.environ().get("BENCH_PORT") == str(port):
                found[each.pid] = each
    return list(found.values())


def fetch(port: int, method: str, path: str, body: str | None = None, timeout: float = 300) -> tuple[int, bytes]:
    """Status and body of one request."""
    connection = http.client.HTTPConnection(HOST, port, timeout=timeout)
    try:
        connection.request(method, path, body and body.encode(), {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as place:
        place.bind((HOST, 0))
        return int(place.getsockname()[1])


def install_peers() -> None:
    """Make .venv/peers as bench/requirements-peers.txt says, unless it is there; raises ServerError if pip cannot."""
    wanted, marker = REQUIREMENTS.read_text(encoding="utf-8"), PEERS / "installed"
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return
    log.info("installing the other servers into %s", PEERS.relative_to(ROOT))
    install = [str(PEERS / "bin/python"), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS)]
    for command in ([sys.executable, "-m", "venv", str(PEERS)], install):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ServerError(f"`{' '.join(command)}` failed ({reason}); run it by hand, or leave those servers out by --servers")
    marker.write_text(wanted, encoding="utf-8")
