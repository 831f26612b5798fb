"""Follow the registry: load the model that it names, and another when it names another; a broken one changes nothing."""

import gc
import logging
import subprocess
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sentiment.conversion import QUICK
from sentiment.errors import CheckpointError, ProjectError, RegistryError
from sentiment.files import read_json, remove, write_json
from sentiment.registry import Registry
from serve import metrics
from serve.logs import event
from serve.model import Model, most_lanes
from serve.preparation import Preparation
from serve.settings import Settings

RETRY_SECONDS = 60.0  # until a model that failed is tried again, if the tags have not changed
log = logging.getLogger("serve.registry")


class Watcher:
    """The model in service, in `model` (None until one is loaded), and the thread that keeps it the one that should be."""

    def __init__(self, settings: Settings, last: Path) -> None:
        self.settings, self.last = settings, last
        self.model: Model | None = None
        self.failure: dict[str, str] | None = None  # why the model that the registry names does not serve
        self.looked = threading.Event()  # set once there was time to load a model
        self.final = False  # whether the engine in use was measured
        self.preparing: Preparation | None = None  # of a model, in a hurry
        self.measuring: Preparation | None = None  # of the engines of the model in service
        self.unmeasurable: Path | None = None  # the conversions of a model whose measuring failed: not again and again
        self.unmeasured: dict[str, str] | None = None  # ... and why
        self.seen: str | None = None  # the tags that the model was found by
        self.failed_at = float("-inf")
        self.forced = self.ended = False
        self.ending = threading.Lock()
        self.wake = threading.Event()
        self.registry: Registry | None = None
        self.thread = threading.Thread(target=self.run, name="registry", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self.thread.start()

    def look_now(self) -> None:
        """Look at the registry at once, and try a model that failed again."""
        self.forced = True
        self.wake.set()

    def run(self) -> None:
        """Look at the tags again and again."""
        self.resume()
        while not self.ended:
            try:
                self.look()
            except Exception as error:
                self.fail("the registry cannot be read", error)
            self.looked.set()
            self.wake.wait(self.settings.poll_seconds)
            self.wake.clear()

    def resume(self) -> None:
        """Load at once what a process before this one served, if there was one: it died, and clients wait.

        Once: if this process dies of it before it has looked at the tags, the next one looks at them first.
        """
        if not self.last.is_file():
            return
        try:
            prepared = read_json(self.last)
            remove(self.last)
            self.take_over(self.loaded(prepared))
        except Exception as error:
            self.fail("the model served before cannot be loaded again", error)

    def look(self) -> None:
        """Load the model that the tags name, if they have changed; measure the engines of one that is served in fp32.

        Measuring takes minutes, and a promotion does not wait for it.
        """
        forced, self.forced = self.forced, False
        state = self.state()
        retry = self.failure and time.monotonic() - self.failed_at > RETRY_SECONDS
        if forced or state != self.seen:
            self.unmeasurable = self.unmeasured = None
        if forced or retry or state != self.seen:
            self.seen = state
            before = self.model
            self.bring()
            if self.model is not before:
                self.stop_measuring()
        if (measuring := self.measuring) and not measuring.runs:
            self.measuring = None
            self.use(measuring)
        if self.model and not self.final and not self.measuring and converted(self.model) != self.unmeasurable:
            self.measure(self.model)

    def measure(self, model: Model) -> None:
        """Begin to measure the engines of the model in service, unless the service ends."""
        with self.ending:
            if self.ended:
                return
            try:
                self.measuring = Preparation(self.settings, self.last.parent, quick=False, done=self.wake.set)
            except OSError as error:
                self.give_up_measuring(model, error)

    def give_up_measuring(self, model: Model, error: Exception) -> None:
        """Leave the model on the engine that it has, until the tags change or someone asks."""
        self.unmeasurable = converted(model)
        self.unmeasured = self.failed("the engines cannot be measured", error)

    def stop_measuring(self) -> None:
        """Stop measuring, if engines are being measured."""
        if measuring := self.measuring:
            self.measuring = None
            measuring.stop()

    def close(self) -> None:
        """Follow no longer."""
        with self.ending:
            self.ended = True
        self.stop_measuring()
        if self.preparing:
            self.preparing.stop()

    def state(self) -> str:
        """What the tags are now; nothing changes for a plain folder."""
        if Path(self.settings.model).is_dir():
            return self.settings.model
        if self.registry is None:
            self.registry = Registry.open(self.settings.repo, self.settings.copies)
        return self.registry.state()

    def bring(self) -> None:
        """Find the model that the registry names, and let it take over if it is another one than serves, or on another engine."""
        try:
            self.serve(self.prepared())
        except Exception as error:
            self.fail("the model cannot be loaded", error)
            return
        self.failure = None
        metrics.failing(False)

    def prepared(self) -> dict[str, Any]:
        """The model that the registry names, prepared in a hurry; raises CheckpointError or RegistryError."""
        with self.ending:
            if self.ended:
                raise RegistryError("the service ends")
            self.preparing = Preparation(self.settings, self.last.parent, quick=True)
        return self.preparing.result()

    def use(self, measuring: Preparation) -> None:
        """Let the model in service go on on the engine that was measured to be the best."""
        try:
            self.serve(measuring.result())
        except Exception as error:
            if self.model:
                self.give_up_measuring(self.model, error)

    def serve(self, prepared: dict[str, Any]) -> None:
        """Serve what was prepared, unless it serves already."""
        if self.model and self.is_served(prepared):
            self.final = prepared["final"]
            write_json(self.last, self.model.prepared)
            return
        model = self.load(prepared)
        self.take_over(model)
        write_json(self.last, model.prepared)

    def load(self, prepared: dict[str, Any]) -> Model:
        """Load a model that was prepared; raises CheckpointError.

        Another service may have finished measuring this model's engines in between, and so removed the graph that was made in
        a hurry: then its choice is there to be loaded.
        """
        event(log, logging.INFO, "loading", version=prepared["version"], engine=prepared["choice"]["engine"])
        try:
            return self.loaded(prepared)
        except CheckpointError:
            again = self.prepared()
            if again["converted"] == prepared["converted"]:
                raise
            return self.loaded(again)

    def loaded(self, prepared: dict[str, Any]) -> Model:
        """A model that was prepared, loaded; for the time until its engines are measured, without lanes."""
        lanes = most_lanes(self.settings) if prepared["final"] else 0
        return Model.load(prepared, self.settings.threads, self.settings.batch_tokens, lanes)

    def is_served(self, prepared: dict[str, Any]) -> bool:
        """Whether what was prepared is what serves already."""
        same = ("version", "commit", "converted", "choice")
        return bool(self.model and all(self.model.prepared[name] == prepared[name] for name in same))

    def take_over(self, model: Model) -> None:
        """Serve this model from now on; requests that were tokenized for the one before are still computed by it."""
        before, self.model = self.model, model
        self.final = model.prepared["final"]
        self.looked.set()
        metrics.serving(model, before)
        event(
            log, logging.INFO, "model loaded", version=model.version, commit=model.commit, device=model.choice.device,
            engine=model.choice.engine, precision=model.choice.precision, why=model.choice.why, final=self.final,
            macro_f1_change=model.choice.macro_f1_change, labels=",".join(model.labels), seconds=round(model.seconds, 2),
            before=before.version if before else None,
        )  # fmt: skip
        del before
        gc.collect()

    def fail(self, what: str, error: Exception) -> None:
        """The model that the registry names cannot be served; what serves goes on serving."""
        self.failed_at = time.monotonic()
        self.failure = self.failed(what, error)
        metrics.failing(True)

    def failed(self, what: str, error: Exception) -> dict[str, str]:
        """Log and count a failure, unless the service ends; returns what /health says of it."""
        if not self.ended:
            metrics.failed()
            known = isinstance(error, ProjectError | subprocess.SubprocessError)
            event(
                log, logging.ERROR, what, error=f"{type(error).__name__}: {error}",
                still=self.model.version if self.model else None, exc_info=None if known else error,
            )  # fmt: skip
        return {"what": what, "at": datetime.now(UTC).isoformat(timespec="seconds")}

    def describe(self) -> dict[str, Any]:
        """What /health says."""
        model = self.model.describe() if self.model else {"model_version": None, "device": None}
        return model | {
            "model_loaded": self.model is not None,
            "engine_measured": self.final,
            "failure": self.failure or self.unmeasured,
        }


def converted(model: Model) -> Path:
    """The folder of a model's conversions, also of those made in a hurry."""
    folder = Path(model.prepared["converted"])
    return folder.parent if folder.name == QUICK else folder
