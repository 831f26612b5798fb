"""A training loop: batches of a token budget over accelerate, on one device or many, resumed where it was interrupted.

All that the loop draws at random comes from the seed and from torch's generator, whose state is in every checkpoint: a run
that was interrupted ends with the same weights as one that was not. What is learnt is for its two kinds to say:
sentiment.training fine-tunes a classifier, sentiment.pretraining a language model.
"""

import contextlib
import logging
import math
import re
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, set_seed
from tqdm import tqdm

from sentiment.classifier import pick_device
from sentiment.devices import keep_freed_memory, native_precision, peak_flops
from sentiment.errors import TrainingError
from sentiment.feed import Feed, Inputs, Shape
from sentiment.files import read_json, remove, write_json
from sentiment.params import Steps
from sentiment.replay import Replay

log = logging.getLogger(__name__)
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # it warns of tied weights, which it saves once, as it should
LAYER = re.compile(r"\blayers?\.(\d+)\.")  # in a parameter's name
PROCESSES = re.compile(r"--num[-_]processes[= ](\d+)")
LogMetrics = Callable[[int, dict[str, float]], None]


@dataclass
class Progress:
    """Where a run is; kept beside every checkpoint. `points` are the logged values, to be shown again after a resume."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    window_loss: float = 0.0
    window_steps: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    tokens: int = 0
    finished: bool = False
    history: list[dict[str, float]] = field(default_factory=list)
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)


def accelerator_for(settings: Steps) -> tuple[Accelerator, str]:
    """The accelerator of the wanted device, and the precision it computes in.

    Raises TrainingError where the device or the precision is not had.
    """
    device = pick_device(settings.device)
    precision = settings.precision if settings.precision != "auto" else native_precision(device.type)
    if precision == "fp16" and device.type == "cpu":
        raise TrainingError("train.precision fp16 is not computed on a CPU; set it to auto, bf16 or fp32")
    try:
        mixed = "no" if precision == "fp32" else precision
        accelerator = Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")
    except ValueError as error:
        raise TrainingError(f"train.precision {precision} is not had on this device ({error}); set it to auto") from error
    return accelerator, precision


def state_of(settings: Steps) -> PartialState:
    """What processes train, on the wanted device; raises TrainingError if they are not as many as train.launcher asks for."""
    state = PartialState(cpu=pick_device(settings.device).type == "cpu")
    asked = PROCESSES.search(settings.launcher)
    if asked and int(asked[1]) != state.num_processes:
        raise TrainingError(
            f"train.launcher asks for {asked[1]} processes, and {state.num_processes} runs; add --multi_gpu to `accelerate "
            "launch`, which starts them on a CPU, too"
        )
    return state


def rate(step: int, total: int, settings: Steps) -> float:
    """The learning rate's factor at a step, between 0 and 1: linear warm-up, then the decay of `train.decay` to 0."""
    warm = max(1, round(settings.warmup * total)) if settings.warmup else 0
    if step < warm:
        return (step + 1) / warm
    left = (total - step) / max(1, total - warm)
    if settings.decay == "linear":
        return left
    return 0.5 * (1 - math.cos(math.pi * left)) if settings.decay == "cosine" else 1.0


def parameter_groups(module: torch.nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Matrices with weight decay; norms and biases (all that has one dimension) without. `scale` multiplies the learning rate.

    It is 1 for the head, and falls by `layer_decay` with each layer below, to the embeddings (Clark et al. 2020, ELECTRA). Raises
    TrainingError where it is to fall and the module has no numbered layers.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    found = [LAYER.search(name) for name, _ in named]
    layers = 1 + max((int(match[1]) for match in found if match), default=-1)
    if layer_decay < 1 and not layers:
        raise TrainingError("train.layer_decay needs a model of numbered layers, and this one has none; set it to 1.0")
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for (name, parameter), match in zip(named, found, strict=True):
        below = layers - int(match[1]) if match else (layers + 1) * ("embeddings" in name)
        groups.setdefault((below if layer_decay < 1 else 0, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay * decays, "scale": layer_decay**below}
        for (below, decays), parameters in groups.items()
    ]


def epoch_batches(feed: Feed, epoch: int, settings: Steps) -> list[list[np.ndarray]]:
    """The batches of an epoch in order, those of one optimizer step together; the same for the same seed and epoch."""
    plan = feed.in_random_order(settings.batch_tokens, np.random.default_rng([settings.seed, epoch]))
    return [plan[start : start + settings.accumulation] for start in range(0, len(plan), settings.accumulation)]


class Window:
    """The steps since the last line of the log."""

    def __init__(self, device: torch.device, loss: float = 0.0, steps: int = 0) -> None:
        self.loss, self.steps = torch.full((), loss, device=device), steps
        self.lengths: list[np.ndarray] = []
        self.computed, self.start = 0, time.perf_counter()

    def add(self, loss: torch.Tensor, lengths: list[np.ndarray], computed: int) -> None:
        """Count a step: its loss, the lengths in tokens of the reviews of each of its batches, and the tokens computed."""
        self.loss += loss
        self.steps += 1
        self.lengths += lengths
        self.computed += computed


class Loop(ABC):
    """One run of training: `train` goes through with it. What is learnt is said by weight, loss and validate.

    `module` is what computes a batch of the feed, over the parameters of `base`.
    """

    kind_of_progress = Progress

    def __init__(
        self, base: Any, module: torch.nn.Module, train: Feed, settings: Steps, ready: tuple[Accelerator, str],
        folder: Path, fingerprint: str, log_metrics: LogMetrics,
    ) -> None:  # fmt: skip
        self.base, self.module, self.feed, self.settings = base, module, train, settings
        self.folder, self.fingerprint, self.log_metrics = folder, fingerprint, log_metrics
        self.accelerator, self.precision = ready
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            keep_freed_memory()
        if settings.compile:
            module.compile()
        optimizer = torch.optim.AdamW(self.parameter_groups(module), lr=settings.lr, fused=self.device.type in ("cpu", "cuda"))
        self.model, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.total = sum(len(epoch_batches(self.feed, epoch, settings)) for epoch in range(settings.epochs))
        self.progress = self.kind_of_progress()
        self.interrupted = False
        self.window = Window(self.device)
        self.peak = peak_flops(self.device, self.precision)

    @cached_property
    def step_weight(self) -> float:
        """What the rows of a step weigh on average."""
        steps = epoch_batches(self.feed, 0, self.settings)
        return sum(self.weight(rows) for micro_batches in steps for rows in micro_batches) / len(steps)

    @abstractmethod
    def weight(self, rows: np.ndarray) -> float:
        """What some rows count in the mean that is the loss of a step."""

    @abstractmethod
    def inputs(self, rows: np.ndarray, shape: Shape | None = None) -> Inputs:
        """What the loss of some rows is computed from, in a shape if one is given."""

    @abstractmethod
    def loss_of(self, inputs: Inputs) -> torch.Tensor:
        """The loss of some rows times their weight, in nats; nothing in it waits for the device."""

    def loss(self, rows: np.ndarray) -> torch.Tensor:
        """The loss of some rows times their weight, in nats."""
        return self.loss_of(self.inputs(rows))

    @cached_property
    def shape(self) -> Shape | None:
        """The shape in which batches are replayed; None: they are not."""
        replays = self.settings.cuda_graphs and self.device.type == "cuda" and self.feed.packed and self.precision == "bf16"
        if not replays or self.accelerator.num_processes > 1:
            return None
        shape = self.feed.shape(self.settings.batch_tokens, self.first_plan)
        return shape if any(self.fits(rows, shape) for rows in self.first_plan) else None

    @property
    def first_plan(self) -> list[np.ndarray]:
        """The batches of the first epoch."""
        return [rows for micro_batches in epoch_batches(self.feed, 0, self.settings) for rows in micro_batches]

    @cached_property
    def replay(self) -> Replay:
        """Forward and backward of a batch of that shape, recorded with the first one; raises TrainingError if that fails."""
        inputs = self.inputs(next(rows for rows in self.first_plan if self.replays(rows)), self.shape)
        replay = Replay(self.loss_of, self.accelerator.backward, list(self.module.parameters()), inputs)
        replay.warm_up()
        try:
            return replay.record()
        except RuntimeError as error:
            raise TrainingError(f"a step could not be recorded ({error}); set train.cuda_graphs to false") from error

    def forget_recording(self) -> None:
        """Give back the memory of what was recorded, and the gradients, which lie in it."""
        if replay := vars(self).pop("replay", None):
            replay.drop_gradients()
            del replay
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def fits(self, rows: np.ndarray, shape: Shape) -> bool:
        """Whether rows can be computed in a shape."""
        return self.feed.has_shape(rows, shape)

    def replays(self, rows: np.ndarray) -> bool:
        """Whether the gradients of these rows come from a recording."""
        return self.shape is not None and self.fits(rows, self.shape)

    @abstractmethod
    def flops(self, lengths: np.ndarray) -> float:
        """Operations that learning from rows of these lengths in tokens takes, padding not counted; see step_flops."""

    @abstractmethod
    def validate(self, steps: int) -> None:
        """Score the epoch of `steps` steps that ends, and add it to the history."""

    def parameter_groups(self, module: torch.nn.Module) -> list[dict[str, Any]]:
        """What the optimizer is told of the parameters."""
        return parameter_groups(module, self.settings.weight_decay)

    def not_compiled(self) -> AbstractContextManager[None]:
        """What is done so few times that compiling it anew, without gradients, would take longer."""
        return torch.compiler.set_stance("force_eager") if self.settings.compile else contextlib.nullcontext()

    def is_last(self) -> bool:
        """Whether the epoch that ended is the last one."""
        return self.progress.epoch == self.settings.epochs

    def train(self) -> None:
        """Take up where a run was interrupted, if one was, and train to the end, or to the last epoch worth it."""
        self.resume()
        with self.stop_at_a_step(), self.bar() as bar:
            try:
                while not self.progress.finished:
                    self.epoch(bar)
            finally:
                self.forget_recording()

    def epoch(self, bar: tqdm) -> None:
        """Train on what is left of the current epoch, then validate."""
        progress, start = self.progress, time.perf_counter()
        self.model.train()
        steps = epoch_batches(self.feed, progress.epoch, self.settings)
        self.window.start = time.perf_counter()
        for micro_batches in steps[progress.batch :]:
            self.train_step(micro_batches)
            bar.update()
            if progress.batch == len(steps) and self.window.steps:
                self.report()
            stopped = self.is_told_to_stop(progress.batch == len(steps))
            if stopped or progress.step % self.settings.checkpoint_every == 0:
                start, before = self.count_time(start), time.perf_counter()
                self.save()
                self.window.start += time.perf_counter() - before
            if stopped:
                log.warning("stopped with a checkpoint at step %d; `dvc repro` goes on from there", progress.step)
                raise KeyboardInterrupt
        start = self.count_time(start)
        with self.not_compiled():
            self.validate(len(steps))
        self.count_time(start)
        progress.history[-1]["seconds"] = progress.epoch_seconds
        log.info("epoch %d: %.1f s", progress.epoch + 1, progress.epoch_seconds)
        progress.epoch, progress.batch, progress.loss_sum, progress.epoch_seconds = progress.epoch + 1, 0, 0.0, 0.0
        progress.finished = self.is_last()
        self.save()

    def is_told_to_stop(self, ends: bool) -> bool:
        """Whether this process was told to stop or, where there are several, one of them: the same to all.

        Several are asked only at a line of the log, where they exchange numbers anyway, or where an epoch `ends`.
        """
        if self.accelerator.num_processes == 1:
            return self.interrupted
        if not ends and self.progress.step % self.settings.log_every:
            return False
        return self.reduce(torch.tensor(float(self.interrupted), device=self.device)) > 0

    def train_step(self, micro_batches: list[np.ndarray]) -> None:
        """One optimizer step, counted, with a line in the log where one is due."""
        loss = self.step(micro_batches)
        lengths = [self.feed.lengths[rows] for rows in micro_batches]
        self.progress.step, self.progress.batch = self.progress.step + 1, self.progress.batch + 1
        self.progress.tokens += int(sum(each.sum() for each in lengths))
        self.window.add(loss, lengths, self.computed(micro_batches))
        if self.progress.step % self.settings.log_every == 0:
            self.report()

    def step(self, micro_batches: list[np.ndarray]) -> torch.Tensor:
        """One optimizer step; returns its loss on this device: the sum over its rows, by the weight of a step on average.

        Divided by its own weight, a batch of many short texts would count no more than one of a few long ones.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * self.settings.lr * rate(self.progress.step, self.total, self.settings)
        loss = self.add_gradients(micro_batches)
        self.add_more_gradients(micro_batches)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def add_gradients(self, micro_batches: list[np.ndarray]) -> torch.Tensor:
        """Add the gradients of a step's loss to what is there; returns the loss of the rows of this process."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        total = self.step_weight
        loss = torch.zeros((), device=self.device)
        replay = self.replay if self.shape else None  # recorded before there are gradients
        for index, rows in enumerate(micro_batches):
            if replay and self.replays(rows):
                loss += replay(self.inputs(rows, self.shape), 1 / total)
                continue
            if replay:
                replay.begin()
            mine = rows[rank::world]
            last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                part = self.loss(mine if len(mine) else rows[:1]) / total * (len(mine) > 0)
                self.accelerator.backward(part * world)
            loss += part.detach()
        return loss

    def add_more_gradients(self, micro_batches: list[np.ndarray]) -> None:  # noqa: B027  most loops have no more
        """Add what else a step is to learn from its batches."""

    def computed(self, micro_batches: list[np.ndarray]) -> int:
        """Tokens that a step is computed on by all processes, padding included."""
        world = self.accelerator.num_processes
        recorded = sum(self.replays(rows) for rows in micro_batches)
        others = [rows for rows in micro_batches if not self.replays(rows)]
        return recorded * (self.shape.tokens if self.shape else 0) + sum(
            self.feed.computed(rows[k::world]) for rows in others for k in range(min(world, len(rows)))
        )

    def report(self) -> None:
        """Log the last steps: loss, learning rate, tokens/s, share of padding and of the device's peak."""
        window, progress = self.window, self.progress
        loss = self.reduce(window.loss) / window.steps
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {progress.step}; lower train.lr, or set train.precision to fp32")
        progress.loss_sum += loss * window.steps
        seconds = time.perf_counter() - window.start
        learning_rate = self.settings.lr * rate(progress.step - 1, self.total, self.settings)
        lengths = np.concatenate(window.lengths)
        flops = self.flops(lengths) / seconds / self.accelerator.num_processes
        share = f"{flops / self.peak:.1%} of peak" if self.peak else f"peak of this {self.device.type} unknown"
        padding = 100 * (1 - lengths.sum() / window.computed)
        log.info(
            "step %d/%d  loss %.4f  lr %.2e  %.0f tokens/s  padding %.1f%%  %s",
            progress.step, self.total, loss, learning_rate, lengths.sum() / seconds, padding, share,
        )  # fmt: skip
        self.point({"train/loss": loss, "train/lr": learning_rate})
        self.window = Window(self.device)

    def point(self, values: dict[str, float]) -> None:
        """Record values at the current step."""
        self.progress.points.append((self.progress.step, values))
        if self.accelerator.is_main_process:
            self.log_metrics(self.progress.step, values)

    def reduce(self, value: torch.Tensor) -> float:
        """The sum of a scalar over all processes."""
        return float(self.accelerator.reduce(value, "sum"))

    def count_time(self, start: float) -> float:
        """Add the time since `start` to the run's and the epoch's; returns now."""
        now = time.perf_counter()
        self.progress.seconds += now - start
        self.progress.epoch_seconds += now - start
        return now

    def save(self) -> None:
        """Write a checkpoint to resume from, whole or not at all, in place of the one before."""
        target = self.folder / f"step-{self.progress.step}-{self.progress.epoch}"
        part = target.with_name(f".{target.name}.part")
        if self.accelerator.is_main_process:
            remove(part)
        self.accelerator.wait_for_everyone()
        self.progress.window_loss, self.progress.window_steps = self.reduce(self.window.loss), self.window.steps
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(part / "progress.json", asdict(self.progress))
            remove(target)
            part.rename(target)
            for old in self.folder.glob("step-*"):
                if old != target:
                    remove(old)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Take up the last checkpoint of the same fingerprint, or start afresh and clear what another one left.

        The first process says which. Raises TrainingError where another one does not see the folder.
        """
        last = self.last_checkpoint() if self.accelerator.is_main_process else None
        name = broadcast_object_list([last.name if last else None])[0]
        if name is None and self.accelerator.is_main_process:
            remove(self.folder)
            self.folder.mkdir(parents=True)
            (self.folder / "fingerprint").write_text(self.fingerprint)
        self.accelerator.wait_for_everyone()
        if not (self.folder / (name or "fingerprint")).exists():
            raise TrainingError(
                f"process {self.accelerator.process_index} does not see {self.folder} of the first one; run all of them in one "
                "folder, on several machines in one that they share, over NFS for example"
            )
        if name:
            self.accelerator.load_state(str(self.folder / name))
            self.progress = self.kind_of_progress(**read_json(self.folder / name / "progress.json"))
            self.resume_log()

    def last_checkpoint(self) -> Path | None:
        """The last checkpoint, if there is one of the same fingerprint."""
        mark = self.folder / "fingerprint"
        found = sorted(self.folder.glob("step-*"), key=lambda path: path.stat().st_mtime)
        if found and mark.is_file() and mark.read_text() == self.fingerprint:
            return found[-1]
        if found:
            log.info("parameters, data, code or versions are not those of the last checkpoint: training starts afresh")
        return None

    def resume_log(self) -> None:
        """Show again what was logged before the interruption."""
        main, progress = self.accelerator.is_main_process, self.progress
        log.info("resumed at step %d of %d, epoch %d", progress.step, self.total, progress.epoch + 1)
        self.window = Window(self.device, progress.window_loss * main, progress.window_steps)
        for step, values in progress.points if main else ():
            self.log_metrics(step, values)

    @contextlib.contextmanager
    def stop_at_a_step(self) -> Iterator[None]:
        """Let Ctrl-C and a polite kill take effect after the current step, with a checkpoint written."""

        def interrupt(*_: Any) -> None:
            self.interrupted = True

        before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def bar(self) -> tqdm:
        """A progress bar on a terminal, nothing elsewhere."""
        hidden = not (self.accelerator.is_main_process and sys.stderr.isatty())
        return tqdm(total=self.total, initial=self.progress.step, unit="step", disable=hidden, leave=False)


def seed(value: int) -> None:
    """Seed python, numpy and torch, and let torch choose no operation whose result varies."""
    set_seed(value)
    torch.backends.cudnn.benchmark = False
