"""What Gunicorn's first process does besides Gunicorn's own work: it keeps the model's process running.

The first process starts the HTTP processes, as Gunicorn does, and one process that holds the model (serve/predictor.py), and
starts again whichever dies. The HTTP processes hold no model: they start in no time, and one that dies takes nothing along.
"""

import atexit
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

log = logging.getLogger("serve.supervisor")
RUN_FOLDER = "_SENTIMENT_RUN"  # environment variable: a private folder of this run, with the socket and the metrics' files
HELD_BACK = (signal.SIGHUP, signal.SIGTERM)  # from the model's process until it can handle them
LONGEST_PATH = 107  # bytes of a Unix socket's name
STOP_SECONDS = 30.0
LONGEST_PAUSE = 30.0


def make_run_folder() -> Path:
    """A folder of this run, named in the environment for all processes, and gone with this one.

    Ends the process with a sentence if a socket's name would be too long there.
    """
    folder = Path(tempfile.mkdtemp(prefix="sentiment-"))
    atexit.register(remove, folder, os.getpid())
    os.environ[RUN_FOLDER] = str(folder)
    if len(os.fsencode(socket_path())) > LONGEST_PATH:
        sys.exit(f"the service cannot start: the folder for temporary files, {folder.parent}, has too long a name; set TMPDIR")
    metrics = folder / "metrics"
    metrics.mkdir()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)
    return folder


def remove(folder: Path, owner: int) -> None:
    """Remove a run's folder at the end of the process that made it, and not of those that it forked."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def socket_path() -> Path:
    """Where the model's process listens."""
    if RUN_FOLDER not in os.environ:
        raise SystemExit("the service is more than this application: gunicorn -c serve/gunicorn.conf.py serve.app:app")
    return Path(os.environ[RUN_FOLDER]) / "predictor.sock"


def forget(pid: int) -> None:
    """Take a dead process out of the metrics that count living ones.

    Imported here, since that library looks for PROMETHEUS_MULTIPROC_DIR when it is imported.
    """
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(pid)  # type: ignore[no-untyped-call]


class Supervisor:
    """The model's process, started and kept running."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.pause = 0.0

    def watch(self, arbiter: Any) -> None:
        """Join Gunicorn's main loop: look after the model's process when it looks after its own, hand SIGHUP on to it.

        SIGHUP would restart the HTTP processes, which have nothing to read again. Ctrl-C ends the service as SIGTERM does.
        """
        manage = arbiter.manage_workers

        def manage_all() -> None:
            self.ensure()
            manage()

        arbiter.manage_workers = manage_all
        arbiter.handle_hup = lambda: self.signal(signal.SIGHUP)
        arbiter.handle_int = arbiter.handle_term
        self.ensure()

    def ensure(self) -> None:
        """Start the model's process if it does not run, after a pause if it did not run for long."""
        if self.process and self.process.poll() is None:
            return
        now = time.monotonic()
        if self.process:
            if now < self.started + self.pause:
                return
            forget(self.process.pid)
            end_group(self.process.pid)
            log.error("the model's process (%d) died; it is started again", self.process.pid)
            self.pause = 0.0 if now - self.started > LONGEST_PAUSE else min(LONGEST_PAUSE, 2 * self.pause + 1)
        self.started = now
        command = [sys.executable, "-m", "serve.predictor", str(self.folder)]
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)  # in this process, too, for a moment: none is lost
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            log.error("the model's process cannot be started: %s", error)
            self.pause = min(LONGEST_PAUSE, 2 * self.pause + 1)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)

    def signal(self, number: int) -> None:
        """Send the model's process a signal."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def stop(self) -> None:
        """End the model's process once it has answered what it took, by the end of its standard input."""
        if self.process and self.process.stdin:
            self.process.stdin.close()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
            end_group(self.process.pid)


def end_group(leader: int) -> None:
    """End what a model's process that is no longer there has left running: a preparation, or what fetches a model."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGTERM)
