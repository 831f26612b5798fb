"""BentoML with the packed engine: one worker, batches of up to 64 texts, no access log. Run by bench/serve.py.

BentoML learns how long to wait for company. max_latency_ms is the latency from which on it refuses requests, and its
documentation advises to raise it then: 1, 10 and 60 s (its default) gave the same throughput on a small model, and 1 s refused
requests (503) when the machine was busy. Batches of up to 32 did no better.
What is batched must be a list, so a request is {"text": ["…"]}: the wrapper service that its documentation shows for single
texts would be one more process between the two.
"""

from typing import Any

import bentoml  # type: ignore[import-not-found]

from bench.peers import BATCH, Scorer

LATENCY_MS = 60_000


@bentoml.service(workers=1, logging={"access": {"enabled": False}}, traffic={"timeout": 60})
class Sentiment:
    """A batch of texts in, their answers out."""

    def __init__(self) -> None:
        self.scorer = Scorer.from_environment()

    @bentoml.api(batchable=True, max_batch_size=BATCH, max_latency_ms=LATENCY_MS, route="/predict")
    def predict(self, text: list[str]) -> list[dict[str, Any]]:
        """The answers of a batch."""
        return self.scorer(text)
