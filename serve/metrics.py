"""Prometheus metrics, summed over all processes of the service by the client library's files (PROMETHEUS_MULTIPROC_DIR)."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

if TYPE_CHECKING:
    from serve.model import Model

SECONDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (16, 32, 64, 128, 192, 256, 512, 1024, 4096, 16384)

requests = Counter("sentiment_http_requests", "HTTP requests answered", ["method", "route", "status"])
latency = Histogram("sentiment_http_request_seconds", "Time from a request's arrival to its answer", ["route"], buckets=SECONDS)
predictions = Counter("sentiment_predictions", "Texts classified", ["label", "version"])
truncated = Counter("sentiment_truncated_texts", "Texts longer than the model reads")
batch_texts = Histogram("sentiment_batch_texts", "Texts computed together", buckets=TEXTS)
batch_tokens = Histogram("sentiment_batch_tokens", "Tokens computed together", buckets=TOKENS)
inference = Histogram("sentiment_inference_seconds", "Time to compute a batch", buckets=SECONDS)
queue = Gauge("sentiment_queue_texts", "Texts that wait to be computed", multiprocess_mode="livesum")
full = Counter("sentiment_rejected_requests", "Requests answered 503 because too many were waiting")
model_info = Gauge(
    "sentiment_model_info", "1 for the model in service", ["version", "engine", "precision"], multiprocess_mode="livesum"
)
model_loaded = Gauge("sentiment_model_loaded", "1 if a model is in service", multiprocess_mode="livesum")
model_failing = Gauge(
    "sentiment_model_failing", "1 if the model that the registry names could not be found or loaded", multiprocess_mode="livesum"
)
load_failures = Counter("sentiment_model_load_failures", "Failures to find, load or measure a model")
loads = Counter("sentiment_model_loads", "Models that went into service")
load_seconds = Gauge("sentiment_model_load_seconds", "Time to load the model in service", multiprocess_mode="livesum")


def exposition() -> bytes:
    """All metrics of all processes in Prometheus' text format."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def observe_batch(texts: int, tokens: int, seconds: float) -> None:
    """Count a batch that was computed."""
    batch_texts.observe(texts)
    batch_tokens.observe(tokens)
    inference.observe(seconds)


def waiting(texts: int) -> None:
    """So many texts wait now."""
    queue.set(texts)


def serving(model: "Model", before: "Model | None") -> None:
    """A model went into service in place of the one before."""
    if before:
        model_info.labels(before.version, before.choice.engine, before.choice.precision).set(0)
    model_info.labels(model.version, model.choice.engine, model.choice.precision).set(1)
    model_loaded.set(1)
    load_seconds.set(model.seconds)
    loads.inc()


def failing(whether: bool) -> None:
    """The model that the registry names cannot be served, or is the one in service."""
    model_failing.set(whether)


def failed() -> None:
    """A model could not be found, loaded or measured."""
    load_failures.inc()
