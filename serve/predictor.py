"""The process that holds the model: it answers the HTTP processes over a Unix socket, and follows the registry.

Run: python -m serve.predictor FOLDER  (serve/supervisor.py does; FOLDER holds the socket). It ends with its standard input.

Threads: one for each connection reads messages and tokenizes, `inference` computes and sends the answers, `registry` looks at
the tags and loads new models. An idle processor takes its time to wake up, so a message passes through as few as can be.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from serve import logs, metrics, wire
from serve.batcher import Batcher, FullError, Request
from serve.model import Model, most_lanes
from serve.settings import Settings
from serve.settings import load as load_settings
from serve.watcher import Watcher

SOCKET = "predictor.sock"
LAST = "prepared.json"  # what the model was loaded from, for a process that takes over from one that died
SEND_SECONDS = 5.0  # for an HTTP process to take an answer
log = logging.getLogger("serve.predictor")


class Predictor:
    """The model in service, its batcher, and the answers to messages."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.path = settings, folder / SOCKET
        self.batcher = Batcher(
            settings.queue, settings.queue_texts, settings.batch_wait_ms / 1000, self.observe, most_lanes(settings)
        )
        self.watcher = Watcher(settings, folder / LAST)

    def observe(self, texts: int, tokens: int, seconds: float) -> None:
        """Count a batch that was computed."""
        metrics.observe_batch(texts, tokens, seconds)
        metrics.waiting(self.batcher.waiting)

    def start(self) -> None:
        """Begin to load, to listen and to answer."""
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen(1024)
        self.batcher.start()
        self.watcher.start()
        threading.Thread(target=self.accept, args=(listener,), daemon=True).start()

    def accept(self, listener: socket.socket) -> None:
        """Give each connection a thread."""
        while True:
            connection, _ = listener.accept()
            connection.settimeout(None)
            send_limit(connection, SEND_SECONDS)
            threading.Thread(target=self.converse, args=(connection,), daemon=True).start()

    def converse(self, connection: socket.socket) -> None:
        """Answer the messages of a connection, which come one at a time."""
        with connection, contextlib.suppress(OSError):
            while True:
                self.answer(wire.read(connection), connection)

    def answer(self, message: dict[str, Any], connection: socket.socket) -> None:
        """Answer a message: with what the model says, or with an `error` and its `status`."""
        if message["do"] == "describe":
            waiting = {"waiting_requests": len(self.batcher.requests), "waiting_texts": self.batcher.waiting}
            return wire.send(connection, self.watcher.describe() | waiting)
        deadline = time.monotonic() + message["seconds"]
        self.watcher.looked.wait(message["seconds"])
        model = self.watcher.model
        if model is None:
            return wire.send(connection, unavailable("no model is loaded yet", int(self.settings.poll_seconds) + 1))
        try:
            start = time.perf_counter()
            reviews, cut = model.encode(message["texts"])
            done = partial(finish, connection, model, cut, start)
            self.batcher.submit(Request(model, reviews, done, deadline))
        except FullError as error:
            metrics.rejected()
            wire.send(connection, unavailable(str(error), error.retry_after))
        except Exception as error:
            finish(connection, model, [], 0.0, error)
        metrics.waiting(self.batcher.waiting)
        return None

    def close(self) -> None:
        """Answer what was taken."""
        self.batcher.close()


def finish(connection: socket.socket, model: Model, cut: list[bool], start: float, result: np.ndarray | Exception) -> None:
    """Send the answer to a request whose logits, or whose failure, has come; nothing happens if nobody waits for it any more."""
    if isinstance(result, TimeoutError):
        answer: dict[str, Any] = {"error": str(result), "status": 504}
    elif isinstance(result, Exception):
        log.error("a prediction failed", exc_info=result)
        answer = {"error": "the model failed on this text", "status": 500}
    else:
        results = model.answers(result, cut)
        answer = {"results": results, "model_version": model.version, "seconds": time.perf_counter() - start}
    with contextlib.suppress(OSError):
        wire.send(connection, answer)


def unavailable(why: str, retry_after: int) -> dict[str, Any]:
    """An answer that tells to come again."""
    return {"error": why, "status": 503, "retry_after": retry_after}


def send_limit(connection: socket.socket, seconds: float) -> None:
    """Let sending fail after so long, and reading never: a stopped HTTP process must not stop the model."""
    whole = int(seconds)
    timeval = wire.TIMEVAL.pack(whole, int(1e6 * (seconds - whole)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)


def wait_for_end(ending: threading.Event) -> None:
    """Set `ending` when standard input ends, as it does with the process that started this one."""
    with contextlib.suppress(OSError):
        while sys.stdin.buffer.read(1024):
            pass
    ending.set()


def main() -> None:
    settings, folder = load_settings(), Path(sys.argv[1])
    logs.setup(settings)
    logs.describe_machine()
    predictor, ending = Predictor(settings, folder), threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches every process: the first one decides
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    signal.signal(signal.SIGHUP, lambda *_: predictor.watcher.look_now())
    threading.Thread(target=wait_for_end, args=(ending,), daemon=True).start()
    predictor.start()
    ending.wait()
    predictor.close()
    log.info("the model's process ends")
    logging.shutdown()
    os._exit(0)  # threads of the engines have nothing left to do, and some wait for ever


if __name__ == "__main__":
    main()
