"""Fine-tuning a classifier: weighted cross-entropy, validated each epoch, the best epoch by validation F1 kept.

A few thousand reviews tell two epochs apart by a percent or so of F1. Of epochs that are within `train.ties` standard errors of
the best one, the last is kept, whose learning rate was the lowest (the other way round than Breiman et al. 1984, who keep the
simplest tree of those).
"""

import hashlib
import importlib.metadata
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from sentiment import checkpoint, metrics
from sentiment.bert import can_pack, kernel_takes, packs, reader
from sentiment.calibration import probabilities
from sentiment.classifier import logits
from sentiment.devices import describe, step_flops
from sentiment.errors import TrainingError
from sentiment.feed import Feed, Inputs, Shape, forward
from sentiment.files import atomic, sha256
from sentiment.loop import LogMetrics, Loop, Progress, accelerator_for, parameter_groups
from sentiment.params import Params, Train
from sentiment.tokens import Tokens

VALIDATION_TOKENS = 8192
SHOWN = ("loss", "accuracy", "f1", "f1_macro", "roc_auc")
PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "numpy")
log = logging.getLogger(__name__)


def fingerprint(settings: Params, files: Iterable[Path], *more: Any) -> str:
    """What decides a run's result: parameters, files (data and the stage's code), our code, versions, devices; and what else."""
    parts: list[Any] = [settings.model.model_dump(), settings.train.model_dump(), list(settings.prepare.labels), *more]
    parts += [sha256(path) for path in sorted([*files, *Path(__file__).parent.glob("*.py")])]
    parts += [settings.tokenize.max_length, *checkpoint.files(settings.model)]
    parts += [versions(), PartialState().device.type, PartialState().num_processes, torch.get_num_threads()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of the packages that the result depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


class Result(NamedTuple):
    """The best epoch's model (in place), the history by epoch, and what it ran on."""

    history: list[dict[str, float]]
    best_epoch: int
    device: str
    precision: str
    seconds: float


@dataclass
class BestSoFar(Progress):
    """Where a run is, the highest F1, and which epoch was kept; `worse` epochs have come since the highest F1."""

    best_f1: float = -1.0
    best_epoch: int = 0
    worse: int = 0


def standard_error(share: float, number: int) -> float:
    """Of a share of so many reviews: sqrt(p (1 - p) / n)."""
    return math.sqrt(share * (1 - share) / number)


def class_weights(counts: np.ndarray, settings: Train, names: list[str]) -> np.ndarray:
    """A weight for each class: 1, given by name, or balanced: reviews / (classes * reviews of the class)."""
    if isinstance(settings.class_weights, dict):
        return np.array([settings.class_weights[name] for name in names], np.float32)
    if settings.class_weights == "balanced":
        return (counts.sum() / (len(counts) * counts)).astype(np.float32)
    return np.ones(len(counts), np.float32)


def check_packing(model: Any, device: torch.device, precision: str) -> None:
    """Raise TrainingError where packed batches cannot be computed."""
    if not can_pack(model):
        raise TrainingError(f"train.batching packed is for BERT, and this is a {model.config.model_type}; set it to auto")
    if device.type == "cuda" and precision == "fp32":
        raise TrainingError("train.batching packed needs train.precision bf16 or fp16 on CUDA; set one of the two to auto")
    if device.type == "cuda" and not kernel_takes(model, device):
        raise TrainingError("train.batching packed: this GPU has no attention kernel for such a model; set it to auto")


class FineTuning(Loop):
    """One run of fine-tuning. `run` is what its users call."""

    kind_of_progress = BestSoFar
    progress: BestSoFar
    settings: Train

    def __init__(
        self, model: Any, train: Tokens, validation: Tokens, pad_id: int, names: list[str], settings: Train,
        folder: Path, fingerprint: str, log_metrics: LogMetrics,
    ) -> None:  # fmt: skip
        ready = accelerator, precision = accelerator_for(settings)
        device = accelerator.device
        packed = settings.batching == "packed" or (settings.batching == "auto" and packs(model, device, precision))
        if packed:
            check_packing(model, device, precision)
        feed, self.validation = (Feed(tokens, device, pad_id, packed) for tokens in (train, validation))
        super().__init__(model, reader(model, packed), feed, settings, ready, folder, fingerprint, log_metrics)
        self.names, self.validation_labels = names, validation.labels.astype(int)
        weights = class_weights(np.bincount(train.labels, minlength=len(names)), settings, names)
        self.review_weights = weights[train.labels]
        self.weights = torch.from_numpy(weights).to(self.device)

    def run(self) -> Result:
        """Train to the end, or to the last epoch worth it; leaves the best epoch's weights in the model."""
        self.train()
        self.base.load_state_dict(load_file(self.folder / "best.safetensors"))
        self.accelerator.wait_for_everyone()
        done = self.progress
        return Result(done.history, done.best_epoch, describe(self.device), self.precision, done.seconds)

    def parameter_groups(self, module: torch.nn.Module) -> list[dict[str, Any]]:
        """What the optimizer is told of the parameters: train.layer_decay, too."""
        return parameter_groups(module, self.settings.weight_decay, self.settings.layer_decay)

    def weight(self, rows: np.ndarray) -> float:
        """The sum of the weights of some reviews."""
        return float(self.review_weights[rows].sum())

    def flops(self, lengths: np.ndarray) -> float:
        """Operations that learning from reviews of these lengths takes, twice as many if each is learnt once more.

        The last layer is computed for one token a review, if the forward is this project's.
        """
        wanted = float(len(lengths)) if can_pack(self.base) else None
        return (2 if self.settings.adversarial else 1) * step_flops(self.base, lengths, wanted)

    def inputs(self, rows: np.ndarray, shape: Shape | None = None) -> Inputs:
        """Some reviews and their labels."""
        batch = self.feed.batch(rows, shape)
        return batch.inputs | {"labels": batch.labels}

    def loss_of(self, inputs: Inputs) -> torch.Tensor:
        """The weighted sum of the cross-entropies of some reviews."""
        reviews = {name: value for name, value in inputs.items() if name != "labels"}
        outputs, labels = forward(self.model, reviews).float(), inputs["labels"]
        return cross_entropy(outputs, labels, self.weights, reduction="sum", label_smoothing=self.settings.label_smoothing)

    def add_more_gradients(self, micro_batches: list[np.ndarray]) -> None:
        """Add the gradients at token embeddings that are `train.adversarial` away, where the loss rises fastest.

        That is the fast gradient method (Miyato et al. 2017) for the table of embeddings: their gradient, in that norm, on top of
        them. Where the gradient is no number, nothing is added to them.
        """
        if not self.settings.adversarial:
            return
        table = self.base.get_input_embeddings().weight
        kept = table.detach().clone()
        with torch.no_grad():
            table += torch.nan_to_num(table.grad * (self.settings.adversarial / table.grad.norm()), 0.0, 0.0, 0.0)
        self.add_gradients(micro_batches)
        with torch.no_grad():
            table.copy_(kept)

    def validate(self, steps: int) -> None:
        """Score the epoch on validation, log it, and keep the weights if they are the best so far."""
        progress = self.progress
        self.model.eval()
        budget = self.settings.batch_tokens if self.feed.packed else VALIDATION_TOKENS
        plan = self.validation.in_order(max(budget, int(self.validation.lengths.max())))
        share = plan[self.accelerator.process_index :: self.accelerator.num_processes]
        with self.accelerator.autocast():
            outputs = logits(self.module, self.validation, share, len(self.names))
        values = probabilities(self.accelerator.reduce(outputs, "sum").cpu().numpy(), 1.0)
        scores = metrics.score(values, values.argmax(axis=1), self.validation_labels, self.names)
        row = {"epoch": progress.epoch + 1, "step": progress.step, "train_loss": progress.loss_sum / steps}
        row |= {f"validation_{key}": scores[key] for key in SHOWN}
        progress.history.append(row)
        self.point({f"validation/{key}": scores[key] for key in SHOWN})
        tie = self.settings.ties * standard_error(scores["accuracy"], len(self.validation_labels))
        better = scores["f1_macro"] > progress.best_f1
        progress.worse = 0 if better else progress.worse + 1
        if better or scores["f1_macro"] > progress.best_f1 - tie:
            progress.best_f1, progress.best_epoch = max(progress.best_f1, scores["f1_macro"]), progress.epoch + 1
            if self.accelerator.is_main_process:
                with atomic(self.folder / "best.safetensors") as part:
                    save_file({name: value.contiguous().clone() for name, value in self.base.state_dict().items()}, part)
        log.info(
            "epoch %d/%d  train loss %.4f  validation loss %.4f  accuracy %.4f  F1 %.4f  macro-F1 %.4f  AUC %.4f",
            row["epoch"], self.settings.epochs, row["train_loss"], row["validation_loss"], row["validation_accuracy"],
            row["validation_f1"], row["validation_f1_macro"], row["validation_roc_auc"],
        )  # fmt: skip
        self.warn_of_overfitting()

    def warn_of_overfitting(self) -> None:
        """Say so where validation gets worse while training gets better."""
        if len(self.progress.history) > 1:
            before, row = self.progress.history[-2:]
            if row["validation_loss"] > before["validation_loss"] and row["train_loss"] < before["train_loss"]:
                log.warning("validation loss rises while training loss falls: the model begins to overfit")

    def is_last(self) -> bool:
        """Whether the epochs are over, or `train.patience` of them brought nothing."""
        progress, patience = self.progress, self.settings.patience
        if super().is_last():
            return True
        if patience is not None and progress.worse >= patience:
            log.info("stopped: %d epochs without a better validation F1", progress.worse)
            return True
        return False
