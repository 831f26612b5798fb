"""Choose by measurement what a model is served by on this machine.

Run: python -m sentiment.selection models/sentiment --reviews labelled.parquet

Every engine is timed on packed rows of B2W's lengths. A candidate that computes in less than fp32 counts only if its macro-F1
on the labelled reviews differs from that of fp32 by less than 0.001: without labelled reviews, fp32 is all there is.
"""

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sentiment import conversion, engines
from sentiment.classifier import Classifier
from sentiment.conversion import convert
from sentiment.engines import Choice, Engine, bf16_on_openvino
from sentiment.errors import CheckpointError, DataError, ProjectError
from sentiment.logs import first_line, run_stage
from sentiment.tokens import encode

if TYPE_CHECKING:
    import pandas as pd

    from sentiment.registry import Registry, Version

MAX_CHANGE = 0.001  # of macro-F1, for a precision below fp32
FEWEST_REVIEWS = 500  # labelled ones that such a change is measured on
MOST_REVIEWS = 10_000
TIMED_REVIEWS = 96
MEDIAN_TOKENS, SPREAD = 26, 0.75  # log-normal lengths, as B2W's reviews have with BERTimbau's vocabulary: 36 on average
log = logging.getLogger("sentiment.selection")


class Candidate(NamedTuple):
    """An engine at a precision."""

    engine: str
    precision: str


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sentiment.selection", description=__doc__)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--reviews", type=Path, help="Parquet: text, label (its name), and prediction (of fp32) where known")
    parser.add_argument("--engine", default="auto", choices=["auto", *engines.ENGINES])
    parser.add_argument("--cache", type=Path, default=conversion.CACHE, help=f"default: {conversion.CACHE}")
    parser.add_argument("--threads", type=int, default=None, help="default: the processors of this machine")
    options = parser.parse_args(arguments)
    converted = conversion.folder_of(options.cache, options.model)
    with conversion.locked(converted):
        choice = choose(options.model, converted, options.engine, read_reviews(options.reviews), options.threads)
        conversion.write_choice(converted, options.engine, choice, options.threads)
    log.info("%s in %s: %s", choice.engine, choice.precision, choice.why)


def read_reviews(path: Path | None) -> "pd.DataFrame | None":
    """The labelled reviews to measure on: columns text, label, and prediction where it is known."""
    if path is None:
        return None
    import pandas as pd

    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({first_line(error)}); give columns text and label") from error
    if missing := {"text", "label"} - set(table):
        raise DataError(f"{path} has no column {', '.join(sorted(missing))}; give columns text and label")
    return table


def known(converted: Path, engine: str, reviews: Path | None = None, threads: int | None = None) -> Choice | None:
    """The choice made before for so many threads, unless there are labelled reviews now and were none then."""
    kept = conversion.read_choice(converted, engine, threads)
    return kept if kept and (kept.labelled or not reviews) else None


def choose_once(
    model: Path,
    converted: Path,
    engine: str,
    registry: "Registry | None" = None,
    version: "Version | None" = None,
    reviews: Path | None = None,
    threads: int | None = None,
) -> Choice:
    """The choice made before, else one by measurement, on the labelled reviews of a file or of the version, which is kept."""
    with conversion.locked(converted):
        if kept := known(converted, engine, reviews, threads):
            return kept
        labelled = read_reviews(reviews) if reviews else reviews_of(registry, version)
        choice = choose(model, converted, engine, labelled, threads)
        conversion.write_choice(converted, engine, choice, threads)
        return choice


def reviews_of(registry: "Registry | None", version: "Version | None") -> "pd.DataFrame | None":
    """The version's own test reviews, or None, with a line in the log, where they are not to be had."""
    if not registry or not version:
        return None
    try:
        return registry.test_reviews(version)
    except ProjectError as error:
        log.warning("%s has no test reviews here, so fp32 serves it: %s", version.name, first_line(error))
        return None


def quick(model: Path, converted: Path, engine: str) -> tuple[Choice, Path]:
    """fp32 on OpenVINO (or on the engine asked for), ready in seconds, and its folder: another process may be measuring."""
    converted /= conversion.QUICK
    with conversion.locked(converted):
        classifier = Classifier.load(model, "cpu")
        first = candidates(classifier, engine)[-1]
        convert(classifier, converted, *first, [])
        return Choice(*first, why="nothing was measured yet"), converted


def candidates(classifier: Classifier, engine: str) -> list[Candidate]:
    """What can serve a model on this CPU, the one to begin with at the end; raises CheckpointError if nothing can."""
    from sentiment.bert import can_pack

    packs = can_pack(classifier.model)
    if engine not in ("auto", "torch") and not packs:
        raise CheckpointError(f"{engine} serves BERT classifiers, and this is a {classifier.model.config.model_type}; use torch")
    low = ("bf16",) if bf16_on_openvino() else ()
    known = {"openvino": ("int8", *low, "fp32"), "onnxruntime": ("int8", "fp32"), "torch": (*low, "fp32")}
    chosen = (engine,) if engine != "auto" else ("torch", "onnxruntime", "openvino") if packs else ("torch",)
    return [Candidate(name, precision) for name in chosen for precision in known[name]]


def choose(model: Path, converted: Path, engine: str, reviews: "pd.DataFrame | None", threads: int | None = None) -> Choice:
    """The fastest candidate that keeps the answers; conversions are left in `converted`."""
    classifier = Classifier.load(model, "cpu")
    examples, labelled = split_reviews(classifier, reviews)
    speeds: dict[Candidate, float] = {}
    failed: list[dict[str, Any]] = []
    for each in candidates(classifier, engine):
        if each.precision != "fp32" and labelled is None:
            continue
        try:
            convert(classifier, converted, *each, examples)
            speeds[each] = reviews_per_second(load(each, model, converted, threads), classifier)
            log.info("%s %s: %.0f reviews a second", *each, speeds[each])
        except Exception as error:
            failed.append({**each._asdict(), "error": f"{type(error).__name__}: {first_line(error)}"})
            log.warning("%s %s cannot be used: %s", *each, first_line(error), exc_info=True)
    if not speeds:
        raise CheckpointError(f"no engine can serve {model}: {failed}")
    choice = fastest_that_keeps(speeds, labelled, lambda each: load(each, model, converted, threads), classifier, failed)
    return replace(choice, labelled=0 if reviews is None else len(reviews))


def load(each: Candidate, model: Path, converted: Path, threads: int | None) -> Engine:
    """The candidate, loaded."""
    return engines.load(model, converted, Choice(*each, why=""), threads)


class Labelled(NamedTuple):
    """Reviews with their true class and the one that the model in fp32 gives."""

    ids: list[np.ndarray]
    labels: np.ndarray
    predictions: np.ndarray | None


def split_reviews(classifier: Classifier, reviews: "pd.DataFrame | None") -> tuple[list[np.ndarray], Labelled | None]:
    """Token ids for the fitting of int8 (of rows without a label, else of the first ones), and the labelled rest.

    None in place of the labelled ones if there are fewer than 500.
    """
    if reviews is None:
        return [], None
    index = {label: k for k, label in enumerate(classifier.labels)}
    known = reviews["label"].isin(index)
    reserved = reviews.index[~known] if (~known).any() else reviews.index[: len(reviews) // 4]
    rest = reviews[known & ~reviews.index.isin(reserved)].head(MOST_REVIEWS)
    if len(rest) < FEWEST_REVIEWS:
        log.warning(
            "only %d labelled reviews: at least %d are needed to measure a precision below fp32", len(rest), FEWEST_REVIEWS
        )
        return [], None
    predictions = rest["prediction"].map(index).to_numpy(int) if "prediction" in rest else None
    return tokenized(classifier, reviews.loc[reserved, "text"]), Labelled(
        tokenized(classifier, rest["text"]), rest["label"].map(index).to_numpy(int), predictions
    )


def tokenized(classifier: Classifier, texts: "pd.Series") -> list[np.ndarray]:
    """Token ids of texts, as the model reads them."""
    inference = classifier.inference
    cleaned = (inference.read(str(value)) for value in texts)
    return [np.asarray(ids, np.int64) for ids in encode(classifier.tokenizer, cleaned)]


def fastest_that_keeps(
    speeds: dict[Candidate, float],
    labelled: Labelled | None,
    loaded: Callable[[Candidate], Engine],
    classifier: Classifier,
    failed: list[dict[str, Any]],
) -> Choice:
    """Go through the candidates from the fastest on; the first whose answers keep macro-F1 is the choice."""
    measured: list[dict[str, Any]] = [{**each._asdict(), "reviews_per_second": round(speeds[each], 1)} for each in speeds]
    rows = dict(zip(speeds, measured, strict=True))
    reference = labelled.predictions if labelled else None
    names = classifier.labels
    for each in sorted(speeds, key=lambda candidate: -speeds[candidate]):
        found: dict[str, Any] = {}
        if each.precision != "fp32" and labelled:
            if reference is None:
                exact = next((one for one in sorted(speeds, key=lambda one: -speeds[one]) if one.precision == "fp32"), None)
                if exact is None:
                    continue
                reference = decide(loaded(exact), classifier, labelled.ids)
            given = decide(loaded(each), classifier, labelled.ids)
            value, exact_value = (macro_f1(labelled.labels, answers, len(names)) for answers in (given, reference))
            change = value - exact_value
            found = {
                "macro_f1": round(value, 6),
                "macro_f1_change": round(change, 6),
                "labels_changed": int((given != reference).sum()),
                "reviews": len(given),
            }
            rows[each] |= found
            log.info("%s %s: macro-F1 changes by %+.5f on %d reviews", *each, change, len(given))
            if abs(change) >= MAX_CHANGE:
                continue
        why = "the fastest whose macro-F1 stays" if found else "the fastest in fp32"
        why += "" if labelled else "; no labelled reviews to measure int8 or bf16 on"
        choice = Choice(*each, why=why, reviews_per_second=round(speeds[each], 1), measured=(*measured, *failed))
        return replace(choice, **found)
    raise CheckpointError("no engine gives the model's answers in fp32; see the log for each one's error")


def macro_f1(labels: np.ndarray, predictions: np.ndarray, classes: int) -> float:
    """The unweighted mean of the classes' F1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, labels=np.arange(classes), average="macro", zero_division=0))


def decide(engine: Engine, classifier: Classifier, reviews: Sequence[np.ndarray]) -> np.ndarray:
    """The classes that an engine gives to reviews: int [reviews]."""
    return classifier.decide(classifier.inference.probabilities(engine.logits(reviews)))


def reviews_per_second(engine: Engine, classifier: Classifier) -> float:
    """How many reviews of B2W's lengths an engine classifies in a second, at its best of three times."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(MEDIAN_TOKENS), SPREAD, TIMED_REVIEWS).astype(int), 3, classifier.inference.max_length)
    reviews = [rng.integers(0, classifier.tokenizer.get_vocab_size(), length) for length in lengths]
    engine.logits(reviews)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        engine.logits(reviews)
        seconds.append(time.perf_counter() - start)
    return len(reviews) / min(seconds)


if __name__ == "__main__":
    run_stage("selection", main)
