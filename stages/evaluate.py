"""Score the model on the test split: metrics with intervals, curves, and every review's prediction.

From: models/sentiment, data/tokens/test.safetensors, data/prepared/test.parquet
To:   metrics/{test,checks}.json, metrics/plots/{confusion,roc,precision_recall,calibration,slices}.csv,
      data/predictions/{test,checks}.parquet
Run:  python -m stages.evaluate
"""

import logging
import time
from pathlib import Path

import numpy as np
import pandas as pd

from sentiment import behaviour, calibration, metrics, params, slices
from sentiment.classifier import Classifier
from sentiment.files import atomic, write_json
from sentiment.logs import run_stage
from sentiment.tokens import Tokens

MODEL = Path("models/sentiment")
TOKENS = Path("data/tokens/test.safetensors")
PREPARED = Path("data/prepared/test.parquet")
METRICS = Path("metrics/test.json")
PLOTS = Path("metrics/plots")
CHECKS = Path("data/predictions/checks.parquet")
CHECK_METRICS = Path("metrics/checks.json")
PREDICTIONS = Path("data/predictions/test.parquet")
log = logging.getLogger("stages.evaluate")


def main() -> None:
    settings = params.load()
    classifier = Classifier.load(MODEL, settings.train.device)
    tokens = Tokens.load(TOKENS)
    start = time.perf_counter()
    logits = classifier.token_logits(tokens, settings.evaluate.batch_tokens)
    speed = len(tokens) / (time.perf_counter() - start)
    values = classifier.inference.probabilities(logits)
    before = calibration.probabilities(logits, 1.0)
    predictions, labels = classifier.decide(values), tokens.labels.astype(int)
    scores = score(values, before, predictions, labels, classifier.labels, settings.evaluate)
    reviews = pd.read_parquet(PREPARED)
    answers = table(reviews["review_id"], values, predictions, labels, classifier.labels)
    with atomic(PREDICTIONS) as part:
        answers.to_parquet(part, index=False)
    rules = settings.evaluate
    parts = slices.table(reviews, answers, classifier.labels, rules.slices, rules.min_slice, rules.bootstrap)
    scores |= {"worst_slice_accuracy_high": round(float(parts["accuracy_high"].min()), 6)} if len(parts) else {}
    scores |= check(classifier, rules.checks)
    for name, frame in {"slices": parts, **curves(values, before, predictions, labels, classifier.labels, rules)}.items():
        with atomic(PLOTS / f"{name}.csv") as part:
            frame.to_csv(part, index=False, float_format="%.6g")
    write_json(METRICS, scores | {"reviews_per_second": round(speed, 1)})
    report(scores, speed)
    for row in slices.worst(parts).itertuples():
        log.info("weakest by %s: %s, accuracy %.4f [%.4f, %.4f] of %d", *row[1:3], *row[4:7], row.reviews)


def score(
    values: np.ndarray, before: np.ndarray, predictions: np.ndarray, labels: np.ndarray, names: list[str],
    settings: params.Evaluate,
) -> dict:  # fmt: skip
    """What metrics/test.json says: see sentiment/metrics.py for what each key means."""
    scores: dict = metrics.score(values, predictions, labels, names)
    scores |= metrics.intervals(predictions, labels, len(names), settings.bootstrap)
    scores |= metrics.probability_intervals(values, labels, settings.calibration_bins, settings.bootstrap)
    error = metrics.expected_calibration_error
    scores["expected_calibration_error"] = error(values, labels, settings.calibration_bins)
    scores["expected_calibration_error_uncalibrated"] = error(before, labels, settings.calibration_bins)
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in scores.items()}
    return rounded | {"band": metrics.band(scores["f1"])}


def table(ids: pd.Series, values: np.ndarray, predictions: np.ndarray, labels: np.ndarray, names: list[str]) -> pd.DataFrame:
    """One row a test review: review_id, label, prediction (both by name), and probability_CLASS for each class."""
    by_name = np.array(names, dtype=object)
    columns = {f"probability_{name}": values[:, k] for k, name in enumerate(names)}
    return pd.DataFrame({"review_id": ids, "label": by_name[labels], "prediction": by_name[predictions], **columns})


def curves(
    values: np.ndarray, before: np.ndarray, predictions: np.ndarray, labels: np.ndarray, names: list[str],
    settings: params.Evaluate,
) -> dict[str, pd.DataFrame]:  # fmt: skip
    """The plots' tables, thinned: one ROC and one precision-recall curve a class; reliability `before` calibration, too."""
    counts = pd.crosstab(labels, predictions).reindex(range(len(names)), fill_value=0)
    counts = counts.reindex(columns=range(len(names)), fill_value=0)
    confusion = [(names[i], names[k], int(counts.iloc[i, k])) for i in range(len(names)) for k in range(len(names))]
    roc, precision_recall = [], []
    for k, name in enumerate(names):
        points = metrics.roc_points(values, labels, k, settings.curve_points)
        roc.append(pd.DataFrame(points, columns=["false_positive_rate", "true_positive_rate"]).assign(label=name))
        points = metrics.precision_recall_points(values, labels, k, settings.curve_points)
        precision_recall.append(pd.DataFrame(points, columns=["recall", "precision"]).assign(label=name))
    return {
        "confusion": pd.DataFrame(confusion, columns=["actual", "predicted", "reviews"]),
        "roc": pd.concat(roc),
        "precision_recall": pd.concat(precision_recall),
        "calibration": pd.concat(
            pd.DataFrame(metrics.reliability(found, labels, settings.calibration_bins)).assign(probabilities=name)
            for name, found in (("before calibration", before), ("calibrated", values))
        ),
    }


def check(classifier: Classifier, path: str | None) -> dict[str, float]:
    """Run the behavioural checks and write what they found; returns the share of cases that fail, nothing if they are off."""
    if path is None:
        write_json(CHECK_METRICS, {})
        pd.DataFrame({"check": []}).to_parquet(CHECKS)
        return {}
    rows = behaviour.run(behaviour.load(Path(path)), classifier.labels, classifier.probabilities, classifier.decide)
    with atomic(CHECKS) as part:
        rows.to_parquet(part, index=False)
    found = behaviour.summary(rows)
    write_json(CHECK_METRICS, {row.pop("check"): row for row in found.to_dict("records")})
    for row in found.nlargest(3, "failure_rate").itertuples():
        log.info("behaviour: %s fails %d of %d", row.check, row.failures, row.cases)
    return {"check_failure_rate": round(float(rows["failed"].mean()), 6)}


def report(scores: dict, speed: float) -> None:
    """Log the headline and the band of F1."""
    log.info(
        "accuracy %.4f  F1 %.4f [%.4f, %.4f]  macro-F1 %.4f [%.4f, %.4f]  AUC %.4f  calibration error %.4f",
        *(scores[name] for name in ("accuracy", "f1", "f1_low", "f1_high", "f1_macro", "f1_macro_low", "f1_macro_high")),
        scores["roc_auc"], scores["expected_calibration_error"],
    )  # fmt: skip
    log.info("%d reviews, %.0f a second; F1 is %s", scores["reviews"], speed, scores["band"])


if __name__ == "__main__":
    run_stage("evaluate", main)
