"""mosec with the packed engine: one worker, batches of up to 64 texts. Run by bench/serve.py.

mosec waits max_wait_time for a batch to fill: with 1 ms, its least, one connection gets three times and 8 connections twice what
its default of 10 ms gives, on a small model, and 64 as many; batches of up to 32 do no better. HTTP is Rust's, in a process
of its own.
"""

from typing import Any

from mosec import Server, Worker  # type: ignore[import-not-found]

from bench.peers import BATCH, Scorer

WAIT = 1  # ms
TIMEOUT = 60  # seconds for a batch


class Sentiment(Worker):  # type: ignore[misc]
    """A batch of requests in, their answers out."""

    def __init__(self) -> None:
        super().__init__()
        self.scorer = Scorer.from_environment()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers of a batch."""
        return self.scorer([str(each["text"]) for each in data])


if __name__ == "__main__":
    server = Server()
    server.append_worker(Sentiment, num=1, max_batch_size=BATCH, max_wait_time=WAIT, timeout=TIMEOUT, route="/predict")
    server.run()
