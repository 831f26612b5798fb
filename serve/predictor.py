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
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from serve import logs, metrics, wire
from serve.batcher import Batcher, FullError, Request
from serve.model import most_lanes
from serve.settings import Settings
from serve.settings import load as load_settings
from serve.supervisor import HELD_BACK
from serve.watcher import Watcher

SOCKET = "predictor.sock"
LAST = "prepared.json"  # what the model was loaded from, for a process that takes over from one that died
FULL_SECONDS = 0.5  # until connections are taken again, where there were no descriptors for them
SEND_SECONDS = 5.0  # for an HTTP process to take an answer
WAIT_SHARE = 0.25  # of the time that a batch took, for the next one to wait for company
TOGETHER_SECONDS = 0.04  # what takes all of the engine no longer is computed by it at once
log = logging.getLogger("serve.predictor")


class Predictor:
    """The model in service, its batcher, and the answers to messages."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.path = settings, folder / SOCKET
        self.batcher = Batcher(
            settings.places, settings.queue_texts, settings.batch_wait_ms / 1000, self.observe, most_lanes(settings), deliver,
            WAIT_SHARE, TOGETHER_SECONDS,
        )  # fmt: skip
        self.watcher = Watcher(settings, folder / LAST)

    def observe(self, texts: int, tokens: int, seconds: float) -> None:
        """Count a batch that was computed."""
        metrics.observe_batch(texts, tokens, seconds)
        self.count_waiting()

    def count_waiting(self) -> None:
        """Say in the metrics how many texts wait."""
        with self.batcher.changed:
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
        """Give each connection a thread; where there is none to be had, or no descriptor, try again in a moment."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                log.error("no connection of the HTTP processes can be taken: %s", error.strerror)
                time.sleep(FULL_SECONDS)
                continue
            connection.settimeout(None)
            send_limit(connection, SEND_SECONDS)
            try:
                threading.Thread(target=self.converse, args=(connection,), daemon=True).start()
            except RuntimeError as error:
                log.error("a connection of the HTTP processes cannot be answered: %s", error)
                connection.close()
                time.sleep(FULL_SECONDS)

    def converse(self, connection: socket.socket) -> None:
        """Answer the messages of a connection; at its end, or after a defect here, it is closed, and who asked asks again."""
        peer = wire.Peer(connection)
        with connection:
            try:
                for messages in peer.messages():
                    for message in messages:
                        if message["do"] == "describe":
                            peer.send(self.describe())
                    if predictions := [message for message in messages if message["do"] == "predict"]:
                        self.predict(predictions, peer)
            except OSError:
                pass
            except Exception as error:
                log.error("messages could not be answered", exc_info=error)

    def describe(self) -> dict[str, Any]:
        """The model in service, and what waits."""
        waiting = {"waiting_requests": len(self.batcher.requests), "waiting_texts": self.batcher.waiting}
        return self.watcher.describe() | waiting

    def predict(self, messages: list[dict[str, Any]], peer: wire.Peer) -> None:
        """Answer messages that came together: with what the model says, or with an `error` and its `status`; raises OSError."""
        start = time.perf_counter()
        if not self.watcher.looked.is_set():
            self.watcher.looked.wait(max(0.0, messages[0]["deadline"] - time.monotonic()))
        model = self.watcher.model
        if model is None:
            answer = unavailable("no model is loaded yet", int(self.settings.poll_seconds) + 1)
            peer.send(*(answer | {"id": message.get("id")} for message in messages))
            return
        try:
            reviews, cut = model.encode([text for message in messages for text in message["texts"]])
        except Exception as error:
            if len(messages) > 1:  # the fault of one of them
                for message in messages:
                    self.predict([message], peer)
            else:
                self.fail(peer, messages[0].get("id"), error)
            return
        begins, questions = 0, []
        for message in messages:
            part = slice(begins, begins := begins + len(message["texts"]))
            number = message.get("id")
            failed = partial(self.fail, peer, number)
            end = message["deadline"]
            questions.append(Question(model, reviews[part], failed, end, peer=peer, number=number, cut=cut[part], start=start))
        with self.batcher.changed:  # so that they can be computed together
            full = [(question, why) for question in questions if (why := self.submit(question))]
        if full:
            metrics.full.inc(len(full))
            peer.send(*(unavailable(str(why), why.retry_after) | {"id": question.number} for question, why in full))
        self.count_waiting()

    def submit(self, question: "Question") -> FullError | None:
        """Put a question in the line, or say that there is no place."""
        try:
            self.batcher.submit(question)
        except FullError as error:
            return error
        return None

    def fail(self, peer: wire.Peer, number: int | None, error: Exception) -> None:
        """Say that a question has no answer."""
        answer: dict[str, Any] = {"error": str(error), "status": 504}
        if not isinstance(error, TimeoutError):
            log.error("a prediction failed", exc_info=error)
            answer = {"error": "the model failed on this text", "status": 500}
        self.count_waiting()
        with contextlib.suppress(OSError):
            peer.send(answer | {"id": number})

    def close(self) -> None:
        """Answer what was taken."""
        self.batcher.close()
        self.watcher.close()


@dataclass(eq=False)
class Question(Request):
    """A message, and where its answer goes."""

    peer: wire.Peer = field(kw_only=True)
    number: int | None = field(kw_only=True)  # the message's `id`
    cut: list[bool] = field(kw_only=True)  # which of its texts were longer than the model reads
    start: float = field(kw_only=True)


def deliver(questions: Sequence[Any]) -> None:
    """Send the answers to questions whose logits have come; nothing happens if nobody waits for them any more."""
    answers: dict[wire.Peer, list[dict[str, Any]]] = {}
    for model in {id(question.model): question.model for question in questions}.values():
        own: list[Question] = [question for question in questions if question.model is model]
        logits = np.stack([values for question in own for values in question.logits])
        results = iter(model.answers(logits, [cut for question in own for cut in question.cut]))
        for question in own:
            answer = {
                "results": list(islice(results, len(question.reviews))),
                "model_version": model.version,
                "seconds": time.perf_counter() - question.start,
                "id": question.number,
            }
            answers.setdefault(question.peer, []).append(answer)
    for peer, found in answers.items():
        with contextlib.suppress(OSError):
            peer.send(*found)


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


def end(dead: threading.ExceptHookArgs) -> None:
    """End this process, to be started again: without one of its threads it would look alive and answer nothing."""
    log.critical("a thread of the model's process died: %s", dead.thread and dead.thread.name, exc_info=dead.exc_value)
    logging.shutdown()
    os._exit(1)


def main() -> None:
    settings, folder = load_settings(), Path(sys.argv[1])
    logs.setup(settings)
    logs.describe_machine()
    threading.excepthook = end
    predictor, ending = Predictor(settings, folder), threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)  # it may have been sent to every process: the first one decides
    signal.signal(signal.SIGHUP, lambda *_: predictor.watcher.look_now())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
    threading.Thread(target=wait_for_end, args=(ending,), daemon=True).start()
    predictor.start()
    ending.wait()
    predictor.close()
    log.info("the model's process ends")
    logging.shutdown()
    os.killpg(0, signal.SIGTERM)  # what is still fetched by git, say, for nobody
    os._exit(0)  # threads of the engines have nothing left to do, and some wait for ever


if __name__ == "__main__":
    main()
