"""What Gunicorn's first process does besides Gunicorn's own work: it keeps the model's process running.

The first process starts the HTTP processes, as Gunicorn does, and one process that holds the model (serve/predictor.py), and
starts again whichever dies. The HTTP processes hold no model: they start in no time, and one that dies takes nothing along.
"""

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
STOP_SECONDS = 30.0
LONGEST_PAUSE = 30.0


def make_run_folder() -> Path:
    """A folder of this run, named in the environment for all processes."""
    folder = Path(tempfile.mkdtemp(prefix="sentiment-"))
    os.environ[RUN_FOLDER] = str(folder)
    metrics = folder / "metrics"
    metrics.mkdir()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(metrics)
    return folder


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
            log.error("the model's process (%d) died; it is started again", self.process.pid)
            self.pause = 0.0 if now - self.started > LONGEST_PAUSE else min(LONGEST_PAUSE, 2 * self.pause + 1)
        self.started = now
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve.predictor", str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )

    def signal(self, number: int) -> None:
        """Send the model's process a signal."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def stop(self) -> None:
        """End the model's process once it has answered what it took, and remove the run's folder."""
        if self.process:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
