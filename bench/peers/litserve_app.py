"""LitServe with the packed engine: one worker, batches of up to 64 texts, the ZeroMQ queue. Run by bench/serve.py.

LitServe's documentation advises fast_queue from some hundred requests/s on (a tenth more here at least), and to fit
max_batch_size and batch_timeout to the model. batch_timeout is spent in full unless the batch is full: of 1, 2, 3 and 5 ms, on
a small model, 2 ms cost one connection little (5 ms halve it) and leave 64 connections most of what 5 ms give them.
"""

from typing import Any

import litserve  # type: ignore[import-not-found]

from bench.peers import BATCH, HOST, Scorer, port

WAIT = 0.002  # seconds


class Sentiment(litserve.LitAPI):  # type: ignore[misc]
    """A batch of texts in, their answers out."""

    def setup(self, _device: str) -> None:
        """Load the engine, in the worker."""
        self.scorer = Scorer.from_environment()

    def decode_request(self, request: dict[str, Any]) -> str:
        """The text of a request."""
        return str(request["text"])

    def batch(self, inputs: list[str]) -> list[str]:
        """Texts need no stacking."""
        return inputs

    def predict(self, x: list[str]) -> list[dict[str, Any]]:
        """The answers of a batch."""
        return self.scorer(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers are a list already."""
        return output


if __name__ == "__main__":
    api = Sentiment(max_batch_size=BATCH, batch_timeout=WAIT, api_path="/predict")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False, fast_queue=True)
    server.run(host=HOST, port=port(), num_api_servers=1, generate_client_file=False, log_level="warning")
