"""The process that holds the model: it answers the HTTP processes over a Unix socket, and follows the registry.

Run: python -m serve.predictor FOLDER  (serve/supervisor.py does; FOLDER holds the socket). It ends with its standard input.

Threads: the main one reads messages and tokenizes, `inference` computes, `registry` looks at the tags and loads new models.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from serve import logs, metrics, wire
from serve.batcher import Batcher, FullError, Request
from serve.model import Model
from serve.settings import Settings
from serve.settings import load as load_settings
from serve.watcher import Watcher

SOCKET = "predictor.sock"
LAST = "prepared.json"  # what the model was loaded from, for a process that takes over from one that died
log = logging.getLogger("serve.predictor")


class Predictor:
    """The model in service, its batcher, and the answers to messages."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.batcher = Batcher(settings.queue, settings.queue_texts, settings.batch_wait_ms / 1000, self.observe)
        self.watcher = Watcher(settings, folder / LAST)

    def observe(self, texts: int, tokens: int, seconds: float) -> None:
        """Count a batch that was computed."""
        metrics.observe_batch(texts, tokens, seconds)
        metrics.waiting(self.batcher.waiting)

    async def serve(self) -> None:
        """Answer until standard input ends or SIGTERM comes; then answer what was taken."""
        loop, ending = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, ending.set)
        loop.add_signal_handler(signal.SIGHUP, self.watcher.look_now)
        threading.Thread(target=wait_for_end, args=(lambda: loop.call_soon_threadsafe(ending.set),), daemon=True).start()
        self.batcher.start()
        self.watcher.start()
        server = await asyncio.start_unix_server(self.connection, self.folder / SOCKET, backlog=1024)
        async with server:
            await ending.wait()
        await asyncio.to_thread(self.batcher.close)
        log.info("the model's process ends")

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the messages of a connection, one after the other."""
        try:
            while True:
                message = await wire.read(reader)
                writer.write(wire.packed(await self.answer(message)))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message: of the model, or an `error` with its `status`."""
        if message["do"] == "describe":
            return self.watcher.describe() | {
                "waiting_requests": len(self.batcher.requests),
                "waiting_texts": self.batcher.waiting,
            }
        deadline = time.monotonic() + message["seconds"]
        while not self.watcher.looked and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        model = self.watcher.model
        if model is None:
            return {"error": "no model is loaded yet", "status": 503, "retry_after": int(self.settings.poll_seconds) + 1}
        try:
            return await self.predict(model, message["texts"], deadline)
        except FullError as error:
            metrics.rejected()
            return {"error": str(error), "status": 503, "retry_after": error.retry_after}
        except TimeoutError as error:
            return {"error": str(error), "status": 504}
        except Exception:
            log.exception("a prediction failed")
            return {"error": "the model failed on this text", "status": 500}

    async def predict(self, model: Model, texts: list[str], deadline: float) -> dict[str, Any]:
        """The model's answers to texts; raises FullError or TimeoutError."""
        start = time.perf_counter()
        reviews, cut = model.encode(texts)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[np.ndarray] = loop.create_future()

        def done(result: np.ndarray | Exception) -> None:
            loop.call_soon_threadsafe(settle, future, result)

        self.batcher.submit(Request(model, reviews, done, deadline=deadline))
        metrics.waiting(self.batcher.waiting)
        logits = await future
        results = model.answers(logits, cut)
        return {"results": results, "model_version": model.version, "seconds": time.perf_counter() - start}


def settle(future: "asyncio.Future[np.ndarray]", result: np.ndarray | Exception) -> None:
    """Give a future its result or its exception, unless nobody waits for it."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def wait_for_end(ended: Any) -> None:
    """Call `ended` when standard input ends, as it does with the process that started this one."""
    with contextlib.suppress(OSError):
        while sys.stdin.buffer.read(1024):
            pass
    ended()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches every process: the first one decides
    settings, folder = load_settings(), Path(sys.argv[1])
    logs.setup(settings)
    logs.describe_machine()
    with contextlib.suppress(FileNotFoundError):
        (folder / SOCKET).unlink()
    asyncio.run(Predictor(settings, folder).serve())
    os._exit(0)  # threads of the engines have nothing left to do, and some wait for ever


if __name__ == "__main__":
    main()
