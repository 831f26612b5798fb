"""A service as users run it: a real Gunicorn on a real socket, and clients for it."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from sentiment import conversion, selection

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def choose_engine(folder, cache):
    """Make the choice of a model's engine beforehand, so that services with this cache start in a moment."""
    converted = conversion.folder_of(cache, folder)
    with conversion.locked(converted):
        conversion.write_choice(converted, "openvino", selection.choose(folder, converted, "openvino", None))
    return cache


class Service:
    """`gunicorn -c serve/gunicorn.conf.py serve.app:app` with settings (model="v1.0.0" is SERVE_MODEL); a context manager."""

    def __init__(self, folder, environment, **settings):
        folder.mkdir(parents=True, exist_ok=True)
        self.port, self.log_file, self.output = free_port(), folder / "api.log", folder / "output.txt"
        given = {
            "host": "127.0.0.1",
            "port": self.port,
            "log_file": self.log_file,
            "cache": folder / "engines",
            "poll_seconds": 0.2,
            "engine": "openvino",
        }
        kept = {name: value for name, value in environment.items() if not name.startswith("SERVE_")}
        self.environment = kept | {f"SERVE_{name.upper()}": str(value) for name, value in (given | settings).items()}
        self.process = None

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self, wait_for_model=True):
        """Start it and wait until it answers, with a model unless told not to."""
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "-c", "serve/gunicorn.conf.py", "serve.app:app"],
                cwd=ROOT, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        path = "/health" if wait_for_model else "/live"
        self.wait(lambda: self.get(path)[0] == 200, START_SECONDS)

    def wait(self, reached, seconds=30):
        """Wait until something is so; fails with the service's output if it takes longer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the service ended with {self.process.returncode}\n{self.tail()}")
            try:
                if reached():
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"it did not come to pass in {seconds} s\n{self.tail()}")

    def tail(self):
        """The end of what the service printed."""
        return self.output.read_text(encoding="utf-8", errors="replace")[-6000:]

    def log(self):
        """The lines of its log file."""
        return self.log_file.read_text(encoding="utf-8").splitlines()

    def stop(self, number=signal.SIGTERM, seconds=40):
        """End it; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"the service did not end\n{self.tail()}") from None

    def request(self, method, path, body=None, headers=None, seconds=40):
        """A request over a new connection: status, headers, and the body, read as JSON if it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, parsed(response)
        finally:
            connection.close()

    def get(self, path, **headers):
        """GET: status, headers, body."""
        return self.request("GET", path, headers=headers)

    def post(self, path, value, **headers):
        """POST of a value as JSON: status, headers, body."""
        body = json.dumps(value).encode()
        return self.request("POST", path, body, {"Content-Type": "application/json", **headers})

    def predict(self, text="adorei o produto"):
        """The answer for a text, which must be 200."""
        status, _, body = self.post("/predict", {"text": text})
        assert status == 200, body
        return body

    def total(self, name):
        """The sum of a metric over its labels."""
        families = text_string_to_metric_families(self.get("/metrics")[2].decode())
        return sum(each.value for family in families for each in family.samples if each.name == name)

    def children(self):
        """Process ids by kind: the HTTP workers', and the model's process's."""
        import psutil

        found = {"workers": [], "predictor": []}
        for child in psutil.Process(self.process.pid).children():
            try:
                kind = "predictor" if "serve.predictor" in " ".join(child.cmdline()) else "workers"
                found[kind].append(child.pid)
            except psutil.Error:  # it has just died
                continue
        return found


def preparations(service):
    """The processes of serve.prepare that a service has started."""
    import psutil

    predictor = psutil.Process(service.children()["predictor"][0])
    return [each for each in predictor.children(recursive=True) if "serve.prepare" in " ".join(each.cmdline())]


def parsed(response):
    """A response's body: JSON as a value, anything else as bytes."""
    data = response.read()
    return json.loads(data) if "json" in response.headers.get("Content-Type", "") else data


class Load:
    """Clients that ask again and again, each over a connection that it keeps, until told to stop; a context manager.

    `answers` holds (status, model version) of every answer, `errors` what else happened.
    """

    def __init__(self, service, clients=3, text="adorei o produto", pause=0.05):
        self.service, self.text, self.pause = service, text, pause
        self.answers, self.errors, self.stopped = [], [], threading.Event()
        self.threads = [threading.Thread(target=self.ask) for _ in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def ask(self):
        body = json.dumps({"text": self.text}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=40)
        while not self.stopped.wait(self.pause):
            try:
                connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = parsed(response)
                self.answers.append((response.status, answer.get("model_version")))
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(error)
                connection.close()
                connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=40)
        connection.close()

    def wait_for(self, more, seconds=30):
        """Wait until so many more answers have come."""
        target = len(self.answers) + more
        self.service.wait(lambda: len(self.answers) >= target, seconds)
