"""The service's log: one line an event, on the console and in a rotating file that all processes write to.

As text, `TIME LEVEL LOGGER EVENT name=value …`, or as JSON, an object a line; strings are quoted as JSON quotes them, so that
a newline in a text makes no second line.
"""

import fcntl
import hashlib
import json
import logging
import logging.handlers
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gunicorn import glogging

from serve.settings import Settings, load

PREVIEW = 50  # characters
PLAIN = re.compile(r"[\w./:@%+,#-]+")
SHOWN_VERSIONS = ("torch", "transformers", "tokenizers", "openvino", "onnxruntime", "flask", "gunicorn")
log = logging.getLogger("serve")
held = threading.local()  # `lines` that wait for the end of `together`
for unused in ("logThreads", "logProcesses", "logMultiprocessing", "logAsyncioTasks", "_srcfile"):  # what no line shows is not
    setattr(logging, unused, None)  # looked up for each, as Python's logging HOWTO advises under "Optimization"


def setup(settings: Settings) -> None:
    """Send the log to standard error and to settings.log_file; ends the process if that cannot be written."""
    targets: list[logging.StreamHandler[Any]] = [logging.StreamHandler(sys.stderr)]
    if settings.log_file:
        try:
            settings.log_file.parent.mkdir(parents=True, exist_ok=True)
            targets.append(SharedFile(settings.log_file, settings.log_bytes, settings.log_files))
        except OSError as error:
            sys.exit(f"the service cannot start:\n  SERVE_LOG_FILE: {error.strerror}: {settings.log_file}")
    handler = Lines(targets)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for ours in ("serve", "sentiment", "gunicorn"):
        logging.getLogger(ours).setLevel(settings.log_level)
    logging.captureWarnings(True)


def event(logger: logging.Logger, level: int, what: str, exc_info: BaseException | None = None, **fields: Any) -> None:
    """Log an event with its fields."""
    if logger.isEnabledFor(level):
        logger.log(level, what, exc_info=exc_info, extra={"fields": fields})


@contextmanager
def together() -> Iterator[None]:
    """Write what this thread logs meanwhile at once, at the end."""
    lines: list[str] = []
    held.lines = lines
    try:
        yield
    finally:
        del held.lines
        for handler in logging.getLogger().handlers if lines else ():
            if isinstance(handler, Lines):
                handler.write(lines)


class Lines(logging.Handler):
    """Writes each record's line to all targets."""

    def __init__(self, targets: Sequence["logging.StreamHandler[Any]"]) -> None:
        super().__init__()
        self.targets = targets

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or keep it for the end of `together`."""
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        if (lines := getattr(held, "lines", None)) is not None:
            lines.append(line)
        else:
            self.write([line])

    def write(self, lines: Sequence[str]) -> None:
        """Write lines, in one go to each target."""
        record = logging.makeLogRecord({"msg": "\n".join(lines)})
        with self.lock or nullcontext():
            for target in self.targets:
                target.emit(record)


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,123 INFO serve.request request id=… status=200`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        stamp = f"{clock(int(record.created))},{int(record.msecs):03d} {record.levelname} {record.name} "
        message = record.getMessage() if hasattr(record, "fields") else one_line(record.getMessage())
        text = " ".join([stamp + message, *(f"{name}={shown(value)}" for name, value in getattr(record, "fields", {}).items())])
        return text + (f" trace={shown(self.formatException(record.exc_info))}" if record.exc_info else "")


class JsonFormatter(logging.Formatter):
    """`{"time": "2026-01-31T12:00:00.123Z", "level": "INFO", "logger": "serve.request", "event": "request", …}`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        entry = {"time": stamp, "level": record.levelname, "logger": record.name, "event": record.getMessage()}
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        text = json.dumps(entry, ensure_ascii=False, default=str)
        return text if text.isprintable() else json.dumps(entry, default=str)


@lru_cache(maxsize=4)
def clock(second: int) -> str:
    """A time in seconds since the epoch as the local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


def one_line(message: str) -> str:
    """A message of another library with its control characters escaped."""
    return message if message.isprintable() else json.dumps(message, ensure_ascii=False)[1:-1]


def shown(value: Any) -> str:
    """A field's value: as it is where nothing in it can be mistaken, else quoted as JSON."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return str(value).lower()  # true and false, as JSON has them
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if PLAIN.fullmatch(text):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted if quoted.isprintable() else json.dumps(text)


def text_fields(text: str, how: str) -> dict[str, Any]:
    """What the log holds of a text: its first 50 characters, its SHA-256, or nothing but the length; by SERVE_LOG_TEXT."""
    fields: dict[str, Any] = {"chars": len(text)}
    if how == "preview":
        fields["text"] = text[:PREVIEW]
    elif how == "hash":
        fields["sha256"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return fields


def describe_machine() -> None:
    """Log versions, the processor and CUDA, at start."""
    from sentiment.engines import cores

    versions: dict[str, Any] = {name: version(name) for name in SHOWN_VERSIONS}
    versions["cuda"] = "there" if Path("/dev/nvidiactl").exists() else "none"
    event(
        log, logging.INFO, "start", python=platform.python_version(), **versions, system=platform.platform(), cores=cores()
    )  # fmt: skip


class GunicornLogger(glogging.Logger):  # type: ignore[misc]
    """Gunicorn's own lines, in the form and the places of the service's."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        setup(load())
        self.error_log.handlers.clear()
        self.error_log.propagate = True


class SharedFile(logging.handlers.WatchedFileHandler):
    """A file that several processes append to, rotated at a size: FILE, FILE.1, FILE.2, … the oldest removed.

    Each record is one write to a file opened for appending. Whoever finds the file too large renames it under a lock; the
    others see that the name stands for another file, and open that.
    """

    def __init__(self, path: Path, max_bytes: int, kept: int) -> None:
        super().__init__(path, mode="a", encoding="utf-8", errors="backslashreplace", delay=False)
        self.max_bytes, self.kept = max_bytes, kept

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.reopenIfNeeded()
            if self.stream and os.fstat(self.stream.fileno()).st_size >= self.max_bytes:
                self.rotate()
        except OSError:
            self.handleError(record)
            return
        logging.FileHandler.emit(self, record)

    def rotate(self) -> None:
        """Rename the files, unless another process did it while this one waited for the lock."""
        with Path(f"{self.baseFilename}.lock").open("w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = Path(self.baseFilename)
            if path.exists() and path.stat().st_size >= self.max_bytes:
                for number in range(self.kept - 1, 0, -1):
                    older = Path(f"{path}.{number}")
                    if older.exists():
                        older.replace(f"{path}.{number + 1}")
                path.replace(f"{path}.1")
        self.reopenIfNeeded()
