"""Turn the prepared reviews into cached token ids, ragged and unpadded; memory does not grow with the reviews.

From: data/prepared/{train,validation,test}.parquet, and the tokenizer of `model.checkpoint` (learnt here if there is none)
To:   data/tokens/{train,validation,test}.safetensors, data/tokens/tokenizer/, metrics/tokens.json,
      metrics/plots/token_lengths.csv
      data/checkpoint (links to the files of a checkpoint's folder: DVC follows them, so that a changed one runs this again)
Run:  python -m stages.tokenize
"""

import logging
import time
from collections.abc import Iterator
from itertools import tee
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from sentiment import checkpoint, files, params, text, tokens
from sentiment.errors import CheckpointError
from sentiment.files import atomic, write_json
from sentiment.logs import run_stage

LINKS = Path("data/checkpoint")
TRAINED = Path("models/sentiment")
SHIPPED = Path("models/base")  # which is in git, and in dvc.yaml
PREPARED = Path("data/prepared")
TOKENS = Path("data/tokens")
METRICS = Path("metrics/tokens.json")
LENGTHS = Path("metrics/plots/token_lengths.csv")
SPLITS = ("train", "validation", "test")
BIN = 8  # tokens a bar of the plot of lengths
log = logging.getLogger("stages.tokenize")


def link_checkpoint(settings: params.Model, folder: Path) -> None:
    """Link the files of a checkpoint on disk into `folder`, in place of those of the one before; none of a Hub name's.

    Raises CheckpointError for the model that the training is to leave.
    """
    if settings.checkpoint and Path(settings.checkpoint).resolve().is_relative_to(TRAINED.resolve()):
        raise CheckpointError(
            f"model.checkpoint is {settings.checkpoint}, which is removed before a training begins; copy it to another "
            "folder, and name that"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_symlink():
            path.unlink()
    if settings.checkpoint and Path(settings.checkpoint).resolve() != SHIPPED.resolve():
        for name, *_ in checkpoint.files(settings):
            files.link(folder / name, Path(settings.checkpoint) / name)


class Counts(NamedTuple):
    """What is counted of a split: reviews by their length in tokens int64 [max_length + 1], unknown tokens, reviews cut short."""

    reviews: np.ndarray
    unknown: int
    cut: int


class Texts:
    """The texts of a prepared file, read anew each time they are gone through."""

    def __init__(self, path: Path, emoji: str | None) -> None:
        self.path, self.emoji = path, emoji

    def __iter__(self) -> Iterator[str]:
        for texts, _ in read(self.path, self.emoji):
            yield from texts


def main() -> None:
    settings = params.load()
    emoji = settings.tokenize.emoji
    link_checkpoint(settings.model, LINKS)
    with atomic(TOKENS) as part:
        checkpoint.save_tokenizer(settings.model, Texts(PREPARED / "train.parquet", emoji), part / "tokenizer")
        tokenizer = tokens.load_tokenizer(part / "tokenizer", settings.tokenize.max_length)
        counts = {}
        for name in SPLITS:
            start = time.perf_counter()
            counts[name] = write(PREPARED / f"{name}.parquet", part / f"{name}.safetensors", tokenizer, emoji)
            reviews, seconds = int(counts[name].reviews.sum()), time.perf_counter() - start
            log.info("%s: %d reviews, %.0f reviews/s", name, reviews, reviews / seconds)
    metrics = {"vocabulary": tokenizer.get_vocab_size()} | {name: summary(each) for name, each in counts.items()}
    write_json(METRICS, metrics)
    with atomic(LENGTHS) as part:
        part.write_text(histogram(counts["train"].reviews))
    log.info("vocabulary %d; train: %s", metrics["vocabulary"], metrics["train"])


def read(path: Path, emoji: str | None = None) -> Iterator[tuple[list[str], np.ndarray]]:
    """The texts, as sentiment.text.tell_emoji tells them, and the labels of a prepared file, some thousands at a time."""
    with pq.ParquetFile(path, pre_buffer=False) as file:  # or it keeps all that it has read
        for batch in file.iter_batches(tokens.CHUNK, columns=["text", "label"]):
            texts = batch.column("text").to_pylist()
            yield [text.tell_emoji(value, emoji) for value in texts] if emoji else texts, batch.column("label").to_numpy()


def write(source: Path, target: Path, tokenizer: Tokenizer, emoji: str | None = None) -> Counts:
    """Encode a prepared file into a split's file, and count."""
    unknown_id, longest = tokens.unknown_id(tokenizer), (tokenizer.truncation or {})["max_length"]
    reviews, unknown, cut = np.zeros(longest + 1, np.int64), 0, 0
    chunks, again = tee(read(source, emoji))  # as far apart as one chunk is being encoded
    encoded = tokens.encode_chunks(tokenizer, (texts for texts, _ in chunks))
    with tokens.Writer(target, tokens.id_type(tokenizer.get_vocab_size())) as file:
        for made, (_, labels) in zip(encoded, again, strict=True):
            file.add(made.input_ids, made.lengths, labels)
            reviews += np.bincount(made.lengths, minlength=longest + 1)
            unknown += int((made.input_ids == unknown_id).sum()) if unknown_id is not None else 0
            cut += int(made.cut.sum())
    return Counts(reviews, unknown, cut)


def summary(counts: Counts) -> dict[str, float]:
    """What metrics/tokens.json says of a split; shares are between 0 and 1."""
    number = int(counts.reviews.sum())
    total = int((counts.reviews * np.arange(len(counts.reviews))).sum())
    return {
        "reviews": number,
        "tokens": total,
        "tokens_median": percentile(counts.reviews, 50),
        "tokens_p95": percentile(counts.reviews, 95),
        "unknown_share": round(counts.unknown / total, 6) if total else 0.0,
        "truncated_share": round(counts.cut / number, 6) if number else 0.0,
        "padding_share_at_512": round(1 - total / number / 512, 4) if number else 0.0,
    }


def percentile(reviews: np.ndarray, share: float) -> float:
    """Numpy's percentile (linear between the two nearest) of lengths that are counted: reviews[n] reviews have n tokens."""
    number = int(reviews.sum())
    if not number:
        return 0.0
    place = (number - 1) * share / 100
    below, above = np.searchsorted(np.cumsum(reviews), [np.floor(place), np.ceil(place)], side="right").tolist()
    return float(below + (above - below) * (place - np.floor(place)))


def histogram(reviews: np.ndarray) -> str:
    """CSV of how many reviews have how many tokens, in bars of 8: columns tokens (the bar's upper end), reviews."""
    filled = np.append(reviews[1:], np.zeros(-(len(reviews) - 1) % BIN, np.int64)).reshape(-1, BIN).sum(axis=1)
    return "tokens,reviews\n" + "".join(f"{BIN * (k + 1)},{number}\n" for k, number in enumerate(filled))


if __name__ == "__main__":
    run_stage("tokenize", main)
