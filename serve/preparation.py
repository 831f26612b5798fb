"""Run serve.prepare, which finds a model and chooses its engine: to its end, or beside other work."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentiment.errors import CheckpointError, RegistryError
from sentiment.files import read_json
from serve.settings import Settings

NICE = 10  # measuring engines gives way to serving
END_SECONDS = 5.0  # for one that is no longer wanted


class Preparation:
    """A process of serve.prepare, which writes to a folder in `parent`; `done`, if given, is called in a thread after it."""

    def __init__(self, settings: Settings, parent: Path, quick: bool, done: Callable[[], None] | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="prepare-", dir=parent, ignore_cleanup_errors=True)
        self.output, self.words = (Path(self.folder.name) / name for name in ("prepared.json", "words.txt"))
        command = [sys.executable, "-m", "serve.prepare", "--output", str(self.output), "--model", settings.model]
        command += ["--repo", settings.repo, "--engine", settings.engine, "--device", settings.device]
        command += ["--cache", str(settings.cache), "--copies", str(settings.copies), *(["--quick"] if quick else [])]
        command += ["--reviews", str(settings.reviews)] if settings.reviews else []
        command += ["--threads", str(settings.threads)] if settings.threads else []
        nice = [] if quick else ["nice", "-n", str(NICE)]
        inside = os.environ | {"TMPDIR": self.folder.name}  # where what libraries leave (torch, its cache) goes with the folder
        with self.words.open("wb") as words:
            self.process = subprocess.Popen([*nice, *command], stdin=subprocess.DEVNULL, stdout=words, stderr=words, env=inside)
        if done:
            threading.Thread(target=self.tell, args=(done,), daemon=True).start()

    def tell(self, done: Callable[[], None]) -> None:
        """Wait for the end, and say that it has come."""
        self.process.wait()
        done()

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def result(self) -> dict[str, Any]:
        """What it found, once it has ended; raises CheckpointError or RegistryError with its words."""
        status = self.process.wait()
        with self.folder:
            if not self.output.is_file():
                words = self.words.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
                raise CheckpointError(f"serve.prepare ended with {status}: {words}")
            prepared: dict[str, Any] = read_json(self.output)
        if "error" in prepared:
            raise RegistryError(prepared["error"])
        return prepared

    def stop(self) -> None:
        """End it; what it found, if anything, is not wanted any more."""
        self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.folder.cleanup()
