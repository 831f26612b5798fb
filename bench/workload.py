"""What every server is measured on: a model, its engine, and reviews in one random order that never changes."""

import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.peers import Reader, Scorer
from sentiment import conversion, engines, predict, text
from sentiment.classifier import Classifier, Inference
from sentiment.errors import CheckpointError, DataError
from sentiment.files import write_json
from sentiment.logs import first_line

SHAPE = "bertimbau-shape:"
SEED = 0
SAMPLE = 2000
EXAMPLES = 400  # of the sample, that int8 is fitted to
PROBES = 50


class Workload(NamedTuple):
    """The files that the servers and the load client read, and what the table's heading says of them."""

    model: Path
    converted: Path  # its folder in a cache of conversions
    engine: str
    precision: str
    reviews: Path  # a JSON list of texts
    labels: list[str]
    expected: list[dict[str, Any]]  # the engine's answers to the first texts, which every server must give
    facts: list[str]  # for the table's heading

    @property
    def environment(self) -> dict[str, str]:
        """What bench/peers reads."""
        return {
            "BENCH_MODEL": str(self.model),
            "BENCH_CONVERTED": str(self.converted),
            "BENCH_ENGINE": self.engine,
            "BENCH_PRECISION": self.precision,
        }


def prepare(model: str, reviews: str, columns: list[str] | None, engine: str, precision: str, folder: Path) -> Workload:
    """Model, conversion and sampled reviews, as files in `folder` (the model stays where it is if it has weights).

    Raises DataError or CheckpointError where one of them cannot be had.
    """
    random_weights = model.startswith(SHAPE)
    path = random_model(Path(model.removeprefix(SHAPE)), folder / "model") if random_weights else Path(model).resolve()
    classifier = Classifier.load(path, "cpu")
    texts = sample(reviews, columns or classifier.inference.text)
    write_json(folder / "reviews.json", texts)
    ids = Reader.load(path).token_ids(texts)
    converted = converted_to(classifier, path, folder / "engines", engine, precision, ids[:EXAMPLES])
    facts = [
        f"model: {described(classifier, path)}{', random weights' * random_weights}",
        f"engine: {engine} {precision}, a graph of {megabytes(converted):.0f} MB",
        f"reviews: {len(texts)} of {Path(reviews).name}, {sum(map(len, ids)) / len(ids):.1f} tokens each on average",
    ]
    expected = Scorer(path, converted, engine, precision)(texts[:PROBES])
    return Workload(path, converted, engine, precision, folder / "reviews.json", classifier.labels, expected, facts)


def converted_to(
    classifier: Classifier, model: Path, cache: Path, engine: str, precision: str, examples: list[np.ndarray]
) -> Path:
    """The folder of a model's conversions, where its graph is, and the choice of it that no measurement made.

    With random weights int8 would not be chosen: it changes answers that are close to a toss-up.
    """
    converted = conversion.folder_of(cache, model)
    converted.mkdir(parents=True)
    conversion.convert(classifier, converted, engine, precision, examples)
    conversion.write_choice(converted, engine, engines.Choice(engine, precision, why="set by the benchmark"))
    return converted


def random_model(shape: Path, folder: Path) -> Path:
    """A model folder with random weights, of a folder that has a configuration and a vocabulary alone."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    if not (shape / "config.json").is_file():
        raise CheckpointError(f"{shape} holds no config.json; name a folder that holds one, and a vocabulary")
    labels = ["negativo", "positivo"]
    torch.manual_seed(SEED)
    try:
        config = AutoConfig.from_pretrained(shape, local_files_only=True, id2label=dict(enumerate(labels)))
        config.label2id = {label: k for k, label in enumerate(labels)}
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(shape, local_files_only=True).save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{shape} describes no model with a vocabulary ({first_line(error)}); name a folder that does"
        ) from error
    Inference(config.max_position_embeddings, case="as_written", text=["review_text"], temperature=1.0, threshold=0.5).save(
        folder
    )
    return folder


def sample(name: str, columns: list[str]) -> list[str]:
    """Up to 2000 of a file's texts, the empty ones left out, in a random order that is the same every time."""
    reviews = predict.read(name)
    columns = ["text"] if reviews.format == "text" else columns
    texts = list(filter(None, (joined(line, row, columns) for line, row in reviews.rows)))
    if not texts:
        raise DataError(f"{name} holds no reviews; check that the file is the one you mean")
    return random.Random(SEED).sample(texts, min(SAMPLE, len(texts)))  # noqa: S311 (no secret)


def joined(line: int, row: dict[str, Any], columns: list[str]) -> str:
    """The text of a row; raises DataError if a column is not there."""
    if missing := [name for name in columns if name not in row]:
        raise DataError(f"row {line} has no column {', '.join(missing)}; it has {', '.join(row)}: name one with --text")
    return text.join([None if row[name] is None else str(row[name]) for name in columns])


def described(classifier: Classifier, folder: Path) -> str:
    """The size of a model, in words."""
    config = classifier.model.config
    return (
        f"{config.model_type}, {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{classifier.model.num_parameters() / 1e6:.1f} million parameters ({megabytes(folder):.0f} MB)"
    )


def megabytes(folder: Path) -> float:
    """The size of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) / 1e6
