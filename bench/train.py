"""Training beside the usual ways: the original recipe, transformers' Trainer, and ours; same model, reviews and machine.

Run: python -m bench.train --model small --reviews FILE
     python -m bench.train --model shape:FOLDER --reviews FILE --device cuda

For each recipe, in a process of its own: reviews/s, tokens/s (padding not counted), padding, memory, share of the device's peak.
With --until-f1, also the seconds of training until that macro-F1 is reached on held-out reviews, from the same first weights.
The table is Markdown. What the recipes are: bench/recipes.py.

--model is `small` (4 layers of 256, a vocabulary of 12,000 learnt from the reviews), a checkpoint's folder, or shape:FOLDER for
random weights by a config.json and a vocabulary.
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sentiment import params, predict, text
from sentiment.errors import DataError, ProjectError
from sentiment.files import atomic, read_json, write_json
from sentiment.logs import run_stage

NAMES = {
    "original": "original",
    "trainer": "Trainer",
    "whole": "ours, the whole last layer",
    "ours": "ours",
    "compiled": "ours, compiled",
}
DEFAULT = {"cpu": ["original", "trainer", "whole", "ours"], "cuda": list(NAMES)}  # compiled is as fast on a CPU
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers")
SHAPE = "shape:"
LONGEST = 512  # tokens of a review, as in bench/recipes.py
BUDGETS = {"cpu": 2048, "cuda": 16_384}  # tokens in a batch of ours
log = logging.getLogger("sentiment.bench")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.run:
        return measure(options)
    with tempfile.TemporaryDirectory(prefix="bench-train-") as name:
        folder = Path(name)
        texts = prepare(options, folder)
        found = {}
        for recipe in options.recipes:
            command = [sys.executable, "-m", "bench.train", *(arguments or sys.argv[1:]), "--run", recipe, "--folder", name]
            found[recipe] = child(command)
            log.info("%s: %s", NAMES[recipe], found[recipe])
            page = heading(options, texts) + table(found, options)
            with atomic(options.output) as part:
                part.write_text(page, encoding="utf-8")
    print(page)
    return None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    description, _, details = (__doc__ or "").partition("\n")
    made = argparse.ArgumentParser(
        prog="python -m bench.train", description=description, epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--model", required=True, help=f"small, a checkpoint's folder, or {SHAPE}FOLDER for random weights")
    made.add_argument("--reviews", required=True, metavar="FILE", help="a .csv, .parquet or .jsonl file with texts and ratings")
    made.add_argument("--text", nargs="+", metavar="COLUMN", help="default: prepare.text of params.yaml")
    made.add_argument("--rating", metavar="COLUMN", help="default: prepare.rating of params.yaml")
    made.add_argument("--train", type=int, default=20_000, metavar="N", help="reviews to train on at most (default: 20000)")
    made.add_argument("--held-out", type=int, default=2_000, metavar="N", help="reviews for --until-f1 (default: 2000)")
    made.add_argument("--device", choices=list(BUDGETS), default="cpu")
    made.add_argument("--batch-tokens", type=int, metavar="N", help="of ours (default: 2048 on a CPU, 16384 on CUDA)")
    made.add_argument("--seconds", type=float, default=30, metavar="N", help="that each recipe is timed (default: 30)")
    made.add_argument("--until-f1", type=float, metavar="F1", help="train each recipe anew until this macro-F1")
    made.add_argument("--limit", type=float, default=600, metavar="S", help="seconds of training for --until-f1 (default: 600)")
    made.add_argument("--epochs", type=int, default=2, metavar="N", help="that the learning rate of --until-f1 is planned for")
    made.add_argument("--recipes", nargs="+", choices=list(NAMES), metavar="NAME", help="default: all; on a CPU all but compiled")
    made.add_argument("--output", type=Path, default=Path("bench/train-new.md"), help="default: bench/train-new.md")
    made.add_argument("--run", help=argparse.SUPPRESS)
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = made.parse_args(arguments)
    options.recipes = options.recipes or DEFAULT[options.device]
    return options


def prepare(options: argparse.Namespace, folder: Path) -> int:
    """Write the reviews and the model that every recipe reads; returns how many reviews are trained on."""
    settings = params.load().prepare
    classes = {rating: k for k, ratings in enumerate(settings.labels.values()) for rating in ratings}
    columns, rating = options.text or settings.text, options.rating or settings.rating
    pairs = []
    for line, row in predict.read(options.reviews).rows:
        if missing := {*columns, rating} - row.keys():
            raise DataError(f"row {line} has no column {', '.join(sorted(missing))}; name those it has with --text and --rating")
        value = text.join([None if row[name] is None else str(row[name]) for name in columns])
        if value and row[rating] is not None and (label := classes.get(float(row[rating]))) is not None:
            pairs.append((value, label))
    order = np.random.default_rng(0).permutation(len(pairs))
    if len(pairs) < 2 * options.held_out:
        raise DataError(f"{options.reviews} holds {len(pairs)} labelled reviews, too few for --held-out {options.held_out}")
    held_out, train = (
        [pairs[k] for k in part] for part in (order[: options.held_out], order[options.held_out :][: options.train])
    )
    write_json(folder / "reviews.json", {"train": train, "held_out": held_out, "names": list(settings.labels)})
    make_model(options.model, [value for value, _ in train], list(settings.labels), folder / "model")
    return len(train)


def make_model(name: str, texts: list[str], labels: list[str], folder: Path) -> None:
    """A model folder with its tokenizer, and the same first weights for every recipe."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from sentiment import checkpoint, tokens

    torch.manual_seed(0)
    classes = {"id2label": dict(enumerate(labels)), "label2id": {label: k for k, label in enumerate(labels)}}
    if name == "small":
        checkpoint.save_word_piece(checkpoint.word_piece(texts, 12_000), folder)
        sizes = {"vocab_size": 12_000, "hidden_size": 256, "layers": 4, "heads": 4, "intermediate_size": 1024, "checkpoint": None}
        settings = params.load().model.model_copy(update=sizes)
        tokenizer = tokens.load_tokenizer(folder, LONGEST)
        checkpoint.load_model(settings, labels, tokenizer, LONGEST).save_pretrained(folder)
        return
    source = Path(name.removeprefix(SHAPE))
    if not (source / "config.json").is_file():
        raise DataError(f"--model {name}: {source} holds no config.json; name a checkpoint's folder")
    longest = read_json(source / "config.json").get("max_position_embeddings", LONGEST)
    if longest < LONGEST:
        raise DataError(
            f"--model {name} takes {longest} tokens, and the original recipe pads to {LONGEST}; name one that takes as many"
        )
    if name.startswith(SHAPE):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(source, **classes))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(source, local_files_only=True, **classes)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)


def measure(options: argparse.Namespace) -> None:
    """Time one recipe in this process; its numbers are one line of JSON on standard output."""
    import torch

    from bench import recipes

    found = read_json(options.folder / "reviews.json")
    (texts, labels), (held_out, truth) = (zip(*found[name], strict=True) for name in ("train", "held_out"))
    data = recipes.Data(options.folder / "model", list(texts), np.array(labels), list(held_out), np.array(truth), found["names"])
    device, budget = torch.device(options.device), options.batch_tokens or BUDGETS[options.device]
    recipe = recipes.RECIPES[options.run]
    numbers = recipes.timed(recipe(data, device, budget), options.seconds)
    if options.until_f1:
        run = recipe(data, device, budget)
        numbers |= recipes.until(run, options.until_f1, len(texts) // 10, options.limit, options.epochs)
    print(json.dumps(numbers), flush=True)
    os._exit(0)  # the Trainer's thread waits for ever


def child(command: list[str]) -> dict[str, Any]:
    """What a recipe's process prints; raises ProjectError if it fails."""
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ProjectError(f"`{' '.join(command[1:])}` failed with {done.returncode}; its words are above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def heading(options: argparse.Namespace, reviews: int) -> str:
    """What was measured, on what."""
    name = options.model.split(":")[0] if options.model.startswith(SHAPE) else options.model
    config = {"small": "4 layers of 256"}.get(name, Path(options.model.removeprefix(SHAPE)).name)
    lines = [
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, by `python -m bench.train`",
        f"- machine: {machine(options.device)}",
        f"- versions: Python {platform.python_version()}, " + ", ".join(f"{each} {version(each)}" for each in PACKAGES),
        f"- model: {name} ({config}); {reviews} reviews of {Path(options.reviews).name}",
        (
            f"- each recipe timed for at least {options.seconds:g} s after some steps of warming up, Trainer and ours over 1600 "
            "reviews or all; memory: the most that was taken"
        ),
        f"- ours: batches of up to {options.batch_tokens or BUDGETS[options.device]} tokens",
    ]
    return "# Training beside the usual ways\n\n" + "\n".join(lines) + "\n\n"


def machine(device: str) -> str:
    """The device in words."""
    import torch

    from sentiment.devices import describe
    from sentiment.engines import cores

    if device == "cuda":
        return describe(torch.device("cuda"))
    names = [line.split(":")[1].strip() for line in cpu_info() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {cores()} cores used of {os.cpu_count()}"


def cpu_info() -> list[str]:
    """The lines of /proc/cpuinfo, if there is one."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def table(found: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    """The numbers as Markdown, each recipe with its ratio to the others."""
    columns = ["recipe", "reviews/s", "tokens/s", "padding", "memory MB", "share of peak", "to original", "to Trainer"]
    if options.until_f1:
        columns += [f"seconds to macro-F1 {options.until_f1:g}", "reviews seen"]
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, each in found.items():
        cells = [NAMES[name], f"{each['reviews_per_second']:.2f}", f"{each['tokens_per_second']:.0f}", f"{each['padding']:.1%}"]
        share = each["share_of_peak"]
        cells += [f"{each['memory_mb']:.0f}", f"{share:.1%}" if share else "peak unknown"]
        for other in ("original", "trainer"):
            ratio = each["reviews_per_second"] / found[other]["reviews_per_second"] if other in found else None
            cells.append(f"{ratio:.1f}" if ratio else "")
        if options.until_f1:
            reached = (
                f"{each['f1_seconds']:.0f}" if each["reached"] else f"not in {each['f1_seconds']:.0f} ({each['best_f1']:.3f})"
            )
            cells += [reached, str(each["f1_reviews"])]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    run_stage("bench-train", main)
