"""Logging of the stages: the console and an appended UTF-8 file, `logs/STAGE.log`, in one format."""

import errno
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sentiment.errors import ProjectError

FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"
log = logging.getLogger("sentiment")


def setup(name: str, folder: Path = Path("logs"), console: bool = True) -> Path:
    """Send the project's log to `folder/name.log`, and to standard error too; returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.log"
    handlers: list[logging.Handler] = [logging.FileHandler(path, encoding="utf-8")]
    if console:
        handlers.append(ConsoleHandler(sys.stderr))
    logging.basicConfig(level=logging.WARNING, format=FORMAT, handlers=handlers, force=True)
    for ours in ("sentiment", "stages"):
        logging.getLogger(ours).setLevel(logging.INFO)
    logging.captureWarnings(True)
    return path


class ConsoleHandler(logging.StreamHandler):
    """Lines above a progress bar, if there is one; traces are left to the file: the console gets one clear sentence."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        trace, record.exc_info, record.exc_text = record.exc_info, None, None
        try:
            return super().format(record)
        finally:
            record.exc_info = trace


def run_stage(name: str, main: Callable[[], None]) -> None:
    """Run a stage's `main` with its log; on failure say why in one sentence and exit with a code other than 0."""
    sys.exit(guarded(name, main, setup(name)))


def guarded(name: str, main: Callable[[], None], log_file: Path) -> int:
    """The exit code of `main()`: 0, 1 after an error (its trace in the log file) or 130 after Ctrl-C."""
    logger = logging.getLogger(f"stages.{name}")
    try:
        with timed(logger, name):
            main()
    except KeyboardInterrupt:
        logger.error("interrupted")
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ProjectError as error:
        logger.error("%s", error, exc_info=True)
        return 1
    except Exception as error:
        if is_disk_full(error):
            logger.error("no space is left on the disk; free some, then run `dvc repro` again", exc_info=True)
        elif missing := missing_output(error):
            logger.error("%s is not there: `dvc repro` makes it, `dvc checkout dvc.yaml` brings it back", missing, exc_info=True)
        else:
            logger.error("%s: %s; the whole trace is in %s", type(error).__name__, first_line(error), log_file, exc_info=True)
        return 1
    return 0


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of Python, Arrow or safetensors says that the disk (or the user's quota) is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("No space left on device", "os error 28", "Disk quota exceeded"))


def missing_output(error: BaseException) -> str | None:
    """The path of a stage's output, if it is what an error of Python, Arrow or safetensors says is not there."""
    found = (
        re.search(r"(?<![\w/.])(?:data|metrics|models)/[^\s'\":]+", str(error)) if isinstance(error, FileNotFoundError) else None
    )
    return found[0] if found else None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut at 300 characters."""
    return (str(error).strip().splitlines() or [""])[0][:300]


@contextmanager
def timed(logger: logging.Logger, what: str) -> Iterator[None]:
    """Log how many seconds a phase took."""
    start = time.perf_counter()
    yield
    logger.info("%s: %.2f s", what, time.perf_counter() - start)
