"""Three ways to train the same classifier on the same reviews: bench/train.py runs each in a process of its own.

`original`: what tutorials show. Each text is tokenized when it is asked for and padded to 512 tokens; batches of 16, fp32, a
Python loop that reads the loss at each step.
`trainer`: transformers' Trainer as its users would set it well: tokenized beforehand, batches of 32 (128 on CUDA) of like length
padded to a multiple of 8, bf16, fused AdamW; on CUDA other processes make the batches. A large model on a CPU takes them in two
halves: 32 reviews of 512 tokens, which it begins with, are more than 24 GB in fp32.
`ours`: sentiment.training, with its line in the log every 20 steps.
`whole`: ours, but with the last layer computed for all tokens, of which the classifier reads the first of each review.
`compiled`: ours with train.compile.

A recipe is a generator: it yields after every step the reviews, the tokens and the tokens with padding of that step.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Semaphore, Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from sentiment import params, tokens, training
from sentiment.bert import reader
from sentiment.classifier import logits
from sentiment.devices import native_precision, peak_flops, step_flops
from sentiment.feed import Feed
from sentiment.loop import epoch_batches, seed
from sentiment.metrics import score

LONGEST = 512
SORTED = 1600  # reviews: fifty batches of 32
WORKERS = 4  # processes that make the Trainer's batches, where a GPU computes them
EPOCHS = 100  # of a timed run, which ends before
LR = {"small": 5e-4, "large": 3e-5}  # by whether the model has fewer or more than 30 million parameters
log = logging.getLogger("sentiment.bench")


class Data(NamedTuple):
    """Reviews as texts and labels, for training and for validation, and the folder of the model to begin with."""

    model: Path
    texts: list[str]
    labels: np.ndarray
    held_out: list[str]
    held_out_labels: np.ndarray
    names: list[str]


class Step(NamedTuple):
    """What one step of training was computed on."""

    lengths: np.ndarray
    computed: int


class Run:
    """A model in training; `steps` begins it, and the first few of them are not counted."""

    warm_up = 3
    first_only = False  # whether the last layer is computed for the first token of each review alone

    compiled = False

    def __init__(self, data: Data, device: torch.device, batch_tokens: int) -> None:
        self.data, self.device, self.batch_tokens = data, device, batch_tokens
        self.tokenizer = tokens.load_tokenizer(data.model, LONGEST)
        seed(0)
        self.model = AutoModelForSequenceClassification.from_pretrained(data.model, local_files_only=True).to(device)
        self.large = self.model.num_parameters() > 30e6
        self.lr = LR["large" if self.large else "small"]

    def steps(self, epochs: int) -> Iterator[Step]:
        """Train; see the module."""
        raise NotImplementedError

    def ragged(self, texts: list[str], labels: np.ndarray) -> tokens.Tokens:
        """Texts as Tokens."""
        return tokens.ragged(tokens.encode(self.tokenizer, texts), labels, self.tokenizer.get_vocab_size())

    def f1(self) -> float:
        """Macro-F1 on the held-out reviews, in fp32 on every recipe alike."""
        feed = Feed(self.ragged(self.data.held_out, self.data.held_out_labels), self.device, 0)
        self.model.eval()
        values = torch.softmax(logits(reader(self.model, False).eval(), feed, feed.in_order(8192), len(self.data.names)), 1)
        self.model.train()
        found = values.cpu().double().numpy()
        return score(found, found.argmax(1), self.data.held_out_labels.astype(int), self.data.names)["f1_macro"]


class Original(Run):
    """What tutorials show."""

    warm_up = 1  # a step of it can take a minute on a CPU

    def steps(self, epochs: int) -> Iterator[Step]:
        """Train; see the module."""
        from transformers import AutoTokenizer, get_linear_schedule_with_warmup

        tokenizer = AutoTokenizer.from_pretrained(self.data.model, local_files_only=True)
        data = self.data

        class Reviews(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
            def __len__(self) -> int:
                return len(data.texts)

            def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
                text = data.texts[index]
                found = tokenizer(text, padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt")
                label = torch.tensor(int(data.labels[index]))
                return {"input_ids": found["input_ids"][0], "attention_mask": found["attention_mask"][0], "labels": label}

        loader = torch.utils.data.DataLoader(Reviews(), batch_size=16, shuffle=True)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr)
        total = epochs * len(loader)
        schedule = get_linear_schedule_with_warmup(optimizer, total // 10, total)
        self.model.train()
        for _ in range(epochs):
            running = 0.0
            for batch in loader:
                moved = {name: value.to(self.device) for name, value in batch.items()}
                optimizer.zero_grad()
                loss = self.model(**moved).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                running += loss.item()
                yield Step(batch["attention_mask"].sum(1).numpy(), batch["input_ids"].numel())


class Trainer(Run):
    """transformers' Trainer, well set; it runs in a thread of its own that waits at each step until it is asked to go on."""

    def steps(self, epochs: int) -> Iterator[Step]:
        """Train; see the module."""
        from queue import Queue
        from tempfile import mkdtemp

        import transformers

        made, on_cuda = Queue[Step | BaseException | None](1), self.device.type == "cuda"
        halves = 2 if not on_cuda and self.large else 1
        go_on = Semaphore(0)
        rows = list(tokens.encode(self.tokenizer, self.data.texts))
        reviews = [{"input_ids": ids, "labels": int(label)} for ids, label in zip(rows, self.data.labels, strict=True)]
        collate = transformers.DataCollatorWithPadding(
            transformers.AutoTokenizer.from_pretrained(self.data.model, local_files_only=True), pad_to_multiple_of=8
        )
        seen: list[Step] = []

        def counted(batch: list[dict[str, Any]]) -> Any:
            found = collate([{"input_ids": each["input_ids"], "labels": each["labels"]} for each in batch])
            return {**found, "counts": (found["attention_mask"].sum(1).tolist(), found["input_ids"].numel())}

        class Counting(transformers.Trainer):  # type: ignore[misc]
            def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
                lengths, computed = inputs.pop("counts")
                seen.append(Step(np.array(lengths), computed))
                return super().training_step(model, inputs, *rest)

        class Report(transformers.TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                parts = [seen.pop(0) for _ in range(min(halves, len(seen)))]  # an epoch may end with one half
                made.put(Step(np.concatenate([part.lengths for part in parts]), sum(part.computed for part in parts)))
                go_on.acquire()

        arguments = transformers.TrainingArguments(
            output_dir=mkdtemp(prefix="bench-trainer-"), num_train_epochs=epochs, learning_rate=self.lr, warmup_steps=0.1,
            per_device_train_batch_size=128 if on_cuda else 32 // halves, gradient_accumulation_steps=halves,
            train_sampling_strategy="group_by_length",
            bf16=native_precision(self.device.type) == "bf16", optim="adamw_torch_fused", max_grad_norm=1.0, logging_steps=50,
            save_strategy="no", report_to="none", use_cpu=not on_cuda, disable_tqdm=True,
            dataloader_num_workers=WORKERS if on_cuda else 0,
        )  # fmt: skip
        trainer = Counting(model=self.model, args=arguments, train_dataset=reviews, data_collator=counted, callbacks=[Report()])

        def train() -> None:
            try:
                trainer.train()
                made.put(None)
            except BaseException as error:  # the one who waits for steps must hear of it
                made.put(error)

        Thread(target=train, daemon=True).start()
        while (step := made.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            yield step
            go_on.release()


class Ours(Run):
    """sentiment.training."""

    first_only = True

    def steps(self, epochs: int) -> Iterator[Step]:
        """Train; see the module."""
        from tempfile import mkdtemp

        values = params.load().model_dump()
        values["train"] |= {
            "device": self.device.type, "precision": "auto", "epochs": epochs, "batch_tokens": self.batch_tokens, "lr": self.lr,
            "warmup": 0.1, "decay": "linear", "accumulation": 1, "log_every": 20, "checkpoint_every": 10**9, "seed": 0,
            "batching": "auto", "compile": self.compiled, "class_weights": None, "label_smoothing": 0.0, "max_grad_norm": 1.0,
            "layer_decay": 1.0, "adversarial": 0.0,
        }  # fmt: skip
        split, held_out = (self.ragged(*each) for each in (self.data[1:3], self.data[3:5]))
        loop = training.FineTuning(
            self.model, split, held_out, 0, self.data.names, params.check(values).train, Path(mkdtemp()) / "checkpoint", "bench",
            lambda *_: None,
        )  # fmt: skip
        self.change(loop.module)
        loop.model.train()
        try:
            for epoch in range(epochs):
                for micro_batches in epoch_batches(loop.feed, epoch, loop.settings):
                    loop.train_step(micro_batches)
                    yield Step(loop.feed.lengths[np.concatenate(micro_batches)], loop.computed(micro_batches))
                loop.model.train()
        finally:
            loop.forget_recording()

    def change(self, module: Any) -> None:
        """What is other than in the project."""


class Compiled(Ours):
    """Ours, with train.compile."""

    compiled, warm_up = True, 20


class Whole(Ours):
    """Ours, with the last layer for all tokens."""

    first_only = False

    def change(self, module: Any) -> None:
        """Let the forward pick the first tokens after the last layer."""
        encode = module.encode
        module.encode = lambda layout, wanted, _: encode(layout)[wanted]


RECIPES: dict[str, type[Run]] = {
    "original": Original,
    "trainer": Trainer,
    "whole": Whole,
    "ours": Ours,
    "compiled": Compiled,
}


def timed(run: Run, seconds: float) -> dict[str, Any]:
    """The speed of a recipe over at least so many seconds, after some steps of warming up.

    And over as many reviews as the Trainer sorts by length together, if there are so many: it begins with the long ones, which
    are more tokens and fewer reviews a second. The original recipe pads all of them to the same length, so that it makes no
    difference there.
    """
    counted: list[Step] = []
    start, reviews = 0.0, 0
    fewest = 0 if isinstance(run, Original) else min(len(run.data.texts), SORTED)
    for number, step in enumerate(run.steps(epochs=EPOCHS)):
        if number < run.warm_up:
            start = now(run.device)
            continue
        counted.append(step)
        reviews += len(step.lengths)
        if reviews < fewest:
            continue
        if len(counted) % 10 == 0 or run.device.type == "cpu":
            took = now(run.device) - start
            if took >= seconds:
                break
    else:
        took = now(run.device) - start
    lengths = np.concatenate([step.lengths for step in counted])
    peak = peak_flops(run.device, "fp32" if isinstance(run, Original) else native_precision(run.device.type))
    return {
        "reviews_per_second": len(lengths) / took,
        "tokens_per_second": float(lengths.sum()) / took,
        "padding": 1 - float(lengths.sum()) / sum(step.computed for step in counted),
        "share_of_peak": step_flops(run.model, lengths, len(lengths) if run.first_only else None) / took / peak if peak else None,
        "memory_mb": memory(run.device),
        "steps": len(counted),
        "seconds": took,
    }


def until(run: Run, f1: float, every: int, limit: float, epochs: int) -> dict[str, Any]:
    """The seconds of training until macro-F1 on the held-out reviews is reached, looked at after `every` reviews (not timed)."""
    took, reviews, looked, best, start = 0.0, 0, 0, 0.0, now(run.device)
    for step in run.steps(epochs):
        reviews += len(step.lengths)
        if reviews - looked >= every or now(run.device) - start + took > limit:
            took, looked = took + now(run.device) - start, reviews
            best = max(best, run.f1())
            log.info("%s: %d reviews, %.1f s, macro-F1 %.4f", type(run).__name__, reviews, took, best)
            if best >= f1 or took > limit:
                break
            start = now(run.device)
    else:
        if reviews > looked:
            took, best = took + now(run.device) - start, max(best, run.f1())
            log.info("%s: %d reviews, %.1f s, macro-F1 %.4f", type(run).__name__, reviews, took, best)
    return {"reached": best >= f1, "f1_seconds": took, "f1_reviews": reviews, "best_f1": best}


def now(device: torch.device) -> float:
    """The time, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(device: torch.device) -> float:
    """The most memory that was taken, in MB: the GPU's, or this process' on a CPU."""
    import resource

    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
