"""Turn the prepared reviews into cached token ids, ragged and unpadded.

From: data/prepared/{train,validation,test}.parquet, and the tokenizer of `model.checkpoint` (learnt here if there is none)
To:   data/tokens/{train,validation,test}.safetensors, data/tokens/tokenizer/, metrics/tokens.json,
      metrics/plots/token_lengths.csv
Run:  python -m stages.tokenize
"""

import logging
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from sentiment import checkpoint, params, tokens
from sentiment.files import atomic, write_json
from sentiment.logs import run_stage
from sentiment.tokens import Tokens

PREPARED = Path("data/prepared")
TOKENS = Path("data/tokens")
METRICS = Path("metrics/tokens.json")
LENGTHS = Path("metrics/plots/token_lengths.csv")
SPLITS = ("train", "validation", "test")
BIN = 8  # tokens a bar of the plot of lengths
log = logging.getLogger("stages.tokenize")


def main() -> None:
    settings = params.load()
    texts, labels = read(PREPARED)
    with atomic(TOKENS) as part:
        checkpoint.save_tokenizer(settings.model, texts["train"], part / "tokenizer")
        tokenizer = tokens.load_tokenizer(part / "tokenizer", settings.tokenize.max_length)
        splits = {}
        for name in SPLITS:
            start = time.perf_counter()
            rows = tokens.encode(tokenizer, texts[name])
            splits[name] = tokens.ragged(rows, labels[name], tokenizer.get_vocab_size())
            splits[name].save(part / f"{name}.safetensors")
            log.info("%s: %d reviews, %.0f reviews/s", name, len(labels[name]), len(labels[name]) / (time.perf_counter() - start))
    unknown = tokenizer.token_to_id("[UNK]")
    metrics = {"vocabulary": tokenizer.get_vocab_size()} | {
        name: count(split, unknown, settings.tokenize.max_length) for name, split in splits.items()
    }
    write_json(METRICS, metrics)
    with atomic(LENGTHS) as part:
        part.write_text(histogram(splits["train"].lengths, settings.tokenize.max_length))
    log.info("vocabulary %d; train: %s", metrics["vocabulary"], metrics["train"])


def read(folder: Path) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """The texts and the labels of every split."""
    tables = {name: pq.read_table(folder / f"{name}.parquet", columns=["text", "label"]) for name in SPLITS}
    texts = {name: table.column("text").to_pylist() for name, table in tables.items()}
    return texts, {name: table.column("label").to_numpy() for name, table in tables.items()}


def count(split: Tokens, unknown: int | None, max_length: int) -> dict[str, float]:
    """What metrics/tokens.json says of a split; shares are between 0 and 1."""
    lengths = split.lengths
    return {
        "reviews": len(split),
        "tokens": int(lengths.sum()),
        "tokens_median": float(np.median(lengths)),
        "tokens_p95": float(np.percentile(lengths, 95)),
        "unknown_share": round(float((split.input_ids == unknown).mean()), 6) if unknown is not None else 0.0,
        "truncated_share": round(float((lengths == max_length).mean()), 6),
        "padding_share_at_512": round(1 - float(lengths.mean()) / 512, 4),
    }


def histogram(lengths: np.ndarray, max_length: int) -> str:
    """CSV of how many reviews have how many tokens, in bars of 8: columns tokens (the bar's upper end), reviews."""
    edges = np.arange(0, max_length + BIN, BIN)
    reviews, _ = np.histogram(lengths, bins=edges + 0.5)
    return "tokens,reviews\n" + "".join(f"{edge},{number}\n" for edge, number in zip(edges[1:], reviews, strict=True))


if __name__ == "__main__":
    run_stage("tokenize", main)
