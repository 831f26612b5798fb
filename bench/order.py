"""Whether the order of the reviews, and attention without dropout, cost F1: five seeds of each way to train.

Run: python -m bench.order --reviews FILE

All ways train the small model of bench/train.py on the same reviews, with the same number of tokens in a batch:
`plain` packs reviews in the order of a shuffle, whatever their lengths; `grouped` is what sentiment.training does on a CPU,
batches of like length; `grouped, attention dropout` the same with transformers' own forward, which has dropout in its attention.
Reported is macro-F1 on held-out reviews, at the best epoch: mean, standard deviation, and the difference to `plain` with its
95% interval by the t distribution, seeds paired.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from bench import train
from sentiment import checkpoint, loop, params, tokens, training
from sentiment.files import atomic, read_json
from sentiment.logs import run_stage

WAYS = {"plain": "packed", "grouped": "padded", "grouped, attention dropout": "padded"}
BATCH_TOKENS = 1024


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m bench.order", description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--reviews", required=True, metavar="FILE", help="a .csv, .parquet or .jsonl file with texts and ratings")
    made.add_argument("--text", nargs="+", metavar="COLUMN", help="default: prepare.text of params.yaml")
    made.add_argument("--rating", metavar="COLUMN", help="default: prepare.rating of params.yaml")
    made.add_argument("--train", type=int, default=4000, metavar="N", help="reviews to train on (default: 4000)")
    made.add_argument("--held-out", type=int, default=4000, metavar="N", help="default: 4000")
    made.add_argument("--epochs", type=int, default=3)
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--output", type=Path, default=Path("bench/order-new.md"))
    options = made.parse_args()
    options.model = "small"
    with tempfile.TemporaryDirectory(prefix="bench-order-") as name:
        folder = Path(name)
        train.prepare(options, folder)
        scores: dict[str, list[float]] = {way: [] for way in WAYS}
        for seed in range(options.seeds):
            for way in WAYS:
                scores[way].append(best_f1(way, seed, options.epochs, folder))
                page = table(scores, options)
                with atomic(options.output) as part:
                    part.write_text(page, encoding="utf-8")
    print(page)


def best_f1(way: str, seed: int, epochs: int, folder: Path) -> float:
    """Macro-F1 on the held-out reviews, of the best epoch."""
    found = read_json(folder / "reviews.json")
    tokenizer = tokens.load_tokenizer(folder / "model", 512)
    splits = {}
    for name in ("train", "held_out"):
        texts, labels = zip(*found[name], strict=True)
        splits[name] = tokens.ragged(tokens.encode(tokenizer, texts), np.array(labels), tokenizer.get_vocab_size())
    values = params.load().model_dump()
    values["model"] |= {
        "checkpoint": None,
        "vocab_size": 12_000,
        "hidden_size": 256,
        "layers": 4,
        "heads": 4,
        "intermediate_size": 1024,
    }
    values["train"] |= {
        "device": "cpu", "seed": seed, "epochs": epochs, "patience": None, "batch_tokens": BATCH_TOKENS, "batching": WAYS[way],
        "lr": 5e-4, "layer_decay": 1.0, "adversarial": 0.0, "checkpoint_every": 10**9, "log_every": 50,
    }  # fmt: skip
    settings: params.Params = params.check(values)
    loop.seed(seed)
    model: Any = checkpoint.load_model(settings.model, found["names"], tokenizer, 512)
    run = training.FineTuning(
        model, splits["train"], splits["held_out"], 0, found["names"], settings.train, folder / f"{way}-{seed}",
        json.dumps([way, seed]), lambda *_: None,
    )  # fmt: skip
    if way.endswith("dropout"):
        run.module = model
        run.model = run.accelerator.prepare(model)
    result = run.run()
    return max(row["validation_f1_macro"] for row in result.history)


def table(scores: dict[str, list[float]], options: argparse.Namespace) -> str:
    """The scores as Markdown."""
    plain = np.array(scores["plain"])
    lines = [
        "# The order of the reviews, and dropout in attention",
        "",
        (
            f"4 layers of 256 from scratch, {options.train} reviews, {options.epochs} epochs, {options.held_out} held-out "
            f"reviews, {len(plain)} seeds, batches of up to {BATCH_TOKENS} tokens. By `python -m bench.order`."
        ),
        "",
        "| way | macro-F1 | standard deviation | to plain | 95% interval |",
        "|---|---|---|---|---|",
    ]
    for way, found in scores.items():
        if len(found) < 2:
            continue
        values, change = np.array(found), np.array(found) - plain[: len(found)]
        half = stats.t.ppf(0.975, len(change) - 1) * change.std(ddof=1) / len(change) ** 0.5
        interval = f"{change.mean() - half:+.4f} to {change.mean() + half:+.4f}" if way != "plain" else ""
        lines.append(f"| {way} | {values.mean():.4f} | {values.std(ddof=1):.4f} | {change.mean():+.4f} | {interval} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_stage("bench-order", main)
