"""Learn a tokenizer from the corpus, or take the checkpoint's, and turn the texts into cached token ids.

From: data/pretraining/corpus
To:   data/pretraining/tokens/{train,held_out}.safetensors, data/pretraining/tokens/tokenizer, metrics/pretraining/tokens.json
Run:  python -m pretrain.tokenize
"""

import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from sentiment import checkpoint, pretraining_params, tokens
from sentiment.files import atomic, write_json
from sentiment.logs import run_stage

CORPUS = Path("data/pretraining/corpus")
TOKENS = Path("data/pretraining/tokens")
METRICS = Path("metrics/pretraining/tokens.json")
log = logging.getLogger("stages.pretrain_tokenize")


class Texts:
    """The texts of a corpus file, as often as an epoch sees each, read anew each time they are gone through."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[str]:
        for texts, repeats in self.chunks():
            for text, repeat in zip(texts, repeats.tolist(), strict=True):
                yield from [text] * repeat

    def chunks(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """The texts once, some thousands at a time, and how often each is seen."""
        with pq.ParquetFile(self.path, pre_buffer=False) as file:
            for batch in file.iter_batches(tokens.CHUNK):
                yield batch.column("text").to_pylist(), batch.column("repeat").to_numpy()


def main() -> None:
    settings = pretraining_params.load()
    with atomic(TOKENS) as part:
        checkpoint.save_tokenizer(settings.model, Texts(CORPUS / "train.parquet"), part / "tokenizer")
        tokenizer = tokens.load_tokenizer(part / "tokenizer", settings.tokens.max_length)
        names = ("train", "held_out")
        counts = {name: write(Texts(CORPUS / f"{name}.parquet"), part / f"{name}.safetensors", tokenizer) for name in names}
    write_json(METRICS, {"vocabulary": tokenizer.get_vocab_size()} | counts)
    log.info("vocabulary %d; %s", tokenizer.get_vocab_size(), counts)


def write(texts: Texts, target: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """Encode texts into a file of tokens (its labels are all 0); returns what there is in it."""
    number = total = cut = unknown = 0
    repeats = deque[np.ndarray]()

    def once() -> Iterator[list[str]]:
        for chunk, often in texts.chunks():
            repeats.append(often)
            yield chunk

    unknown_id = tokens.unknown_id(tokenizer)
    with tokens.Writer(target, tokens.id_type(tokenizer.get_vocab_size())) as file:
        for encoded in tokens.encode_chunks(tokenizer, once()):
            often = repeats.popleft()
            input_ids, lengths = repeated(encoded.input_ids, encoded.lengths, often)
            file.add(input_ids, lengths, np.zeros(len(lengths), np.int16))
            number, total = number + len(lengths), total + len(input_ids)
            cut, unknown = cut + int(often[encoded.cut].sum()), unknown + int((input_ids == unknown_id).sum())
    return {
        "texts": number,
        "tokens": total,
        "truncated_share": round(cut / max(1, number), 6),
        "unknown_share": round(unknown / max(1, total), 6),
    }


def repeated(input_ids: np.ndarray, lengths: np.ndarray, repeats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The token ids of texts that lie one behind the other, each text as often as it says, and the lengths of all."""
    starts, sizes = np.repeat(lengths.cumsum() - lengths, repeats), np.repeat(lengths, repeats)
    place = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
    return input_ids[np.repeat(starts, sizes) + place], sizes


if __name__ == "__main__":
    run_stage("pretrain_tokenize", main)
