"""The load: connections that each send the next review once they have their answer. One JSON object on standard output.

Run: python -m bench.load REVIEWS.json --port 8000 --connections 8 --seconds 20 --labels negativo positivo

Requests are built beforehand and of an answer only status, length and JSON are read, since server and load share the cores.
"""

import argparse
import gc
import json
import selectors
import socket
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sentiment.files import read_json

HOST = "127.0.0.1"
WARM_UP = 3.0  # seconds before anything is counted
DRAIN = 120.0  # seconds at most for what is under way at the end


class Answer(NamedTuple):
    """A whole HTTP answer."""

    status: int
    body: bytes
    closes: bool  # the server closes the connection after it


class Counted(NamedTuple):
    """One answer in the window that is measured."""

    at: float  # seconds, by time.perf_counter
    latency: float  # seconds
    error: str  # empty for a good one


def main() -> None:
    options = parser().parse_args()
    requests = [request(text, options.list) for text in read_json(options.reviews)]
    load = Load(options.port, requests, set(options.labels))
    gc.disable()
    cpu = time.process_time()
    start = time.perf_counter() + options.warm_up
    counted = load.run(options.connections, start, start + options.seconds, options.answers)
    found = summary(counted, start, start + options.seconds, options.answers)
    print(json.dumps({**found, "client_cpu": (time.process_time() - cpu) / (time.perf_counter() - start + options.warm_up)}))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    made.add_argument("reviews", type=Path, help="a JSON list of texts")
    made.add_argument("--port", type=int, required=True)
    made.add_argument("--connections", type=int, default=8)
    made.add_argument("--seconds", type=float, default=20, help="how long answers are counted (default: 20)")
    made.add_argument("--answers", type=int, default=None, help="... or until there are so many")
    made.add_argument("--warm-up", type=float, default=WARM_UP, help=f"seconds before that (default: {WARM_UP:g})")
    made.add_argument("--labels", nargs="+", required=True, help="what a good answer's sentiment may be")
    made.add_argument("--list", action="store_true", help='send {"text": ["…"]}, for BentoML')
    return made


def request(text: str, as_list: bool = False) -> bytes:
    """The bytes of a POST to /predict."""
    body = json.dumps({"text": [text] if as_list else text}, ensure_ascii=False).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode("ascii") + body


class Connection:
    """A connection that is kept open as long as the server does."""

    def __init__(self, port: int, selector: selectors.BaseSelector) -> None:
        self.port, self.selector = port, selector
        self.socket: socket.socket | None = None
        self.received, self.sent_at = b"", 0.0

    def send(self, data: bytes) -> None:
        """Send a request, on a new connection if the old one is closed."""
        self.received, self.sent_at = b"", time.perf_counter()
        if self.socket is None:
            self.socket = socket.create_connection((HOST, self.port))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(self.socket, selectors.EVENT_READ, self)
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):  # closed by the server after its last answer
            self.close()
            self.send(data)

    def receive(self) -> Answer | None:
        """The answer if it is whole by now; raises ConnectionError if the server gave up."""
        assert self.socket is not None  # noqa: S101
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("closed before the answer")
        self.received += data
        answer = parse(self.received)
        if answer and answer.closes:
            self.close()
        return answer

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self.socket:
            self.selector.unregister(self.socket)
            self.socket.close()
            self.socket = None


def parse(received: bytes) -> Answer | None:
    """The answer if all of its bytes are there; raises ConnectionError if it does not say how many these are."""
    head, end, body = received.partition(b"\r\n\r\n")
    if not end:
        return None
    fields = head.lower()
    _, named, rest = fields.partition(b"\r\ncontent-length:")
    if not named:
        raise ConnectionError("an answer without Content-Length")
    if len(body) < int(rest.partition(b"\r\n")[0]):
        return None
    return Answer(int(head[9:12]), body, b"\r\nconnection: close" in fields)


class Load:
    """A closed loop over the same requests in the same order, for every server."""

    def __init__(self, port: int, requests: list[bytes], labels: set[str]) -> None:
        self.port, self.requests, self.labels = port, cycle(requests), labels
        self.selector = selectors.DefaultSelector()

    def run(self, connections: int, start: float, end: float, answers: int | None) -> list[Counted]:
        """What comes back from `start` to `end`, or until there are `answers`."""
        for _ in range(connections):
            Connection(self.port, self.selector).send(next(self.requests))
        counted: list[Counted] = []
        for connection, each in self.answered(end):
            connection.send(next(self.requests))
            if each.at >= start:
                counted.append(each)
            if answers and len(counted) >= answers:
                break
        for _ in islice(self.answered(time.perf_counter() + DRAIN), connections):  # or they would burden the next measurement
            pass
        return counted

    def answered(self, end: float) -> Iterator[tuple[Connection, Counted]]:
        """Each answer as it comes, and the connection that is free then."""
        while (now := time.perf_counter()) < end:
            for key, _ in self.selector.select(end - now):
                connection: Connection = key.data
                try:
                    answer = connection.receive()
                    fault = self.fault(answer) if answer else None
                except ConnectionError as error:
                    connection.close()
                    fault = str(error)
                if fault is not None:
                    at = time.perf_counter()
                    yield connection, Counted(at, at - connection.sent_at, fault)

    def fault(self, answer: Answer) -> str:
        """What is wrong with an answer; empty if nothing is."""
        if answer.status != 200:
            return f"status {answer.status}"
        try:
            found = json.loads(answer.body)
            found = found[0] if isinstance(found, list) else found
            return "" if found["sentiment"] in self.labels and 0 <= found["score"] <= 1 else "an unknown sentiment or score"
        except (ValueError, TypeError, LookupError):
            return "not the JSON of an answer"


def summary(counted: list[Counted], start: float, end: float, answers: int | None) -> dict[str, Any]:
    """Requests/s, p50 and p99 in ms (of good answers, None if there is none), the count of errors and what the first one was."""
    latencies = [each.latency for each in counted if not each.error]
    errors = [each.error for each in counted if each.error]
    if answers and len(counted) >= answers:
        end = counted[-1].at
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000 if latencies else (None, None)
    return {
        "rate": len(latencies) / (end - start),
        "p50": p50,
        "p99": p99,
        "errors": len(errors),
        "error": next(iter(errors), ""),
    }


if __name__ == "__main__":
    main()
