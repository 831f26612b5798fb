"""Write one page on the run: verdict, metrics against production, plots, slices, checks, hardest errors. It opens offline.

From: models/sentiment/metadata.json, metrics/*.json, metrics/plots, data/predictions, the production that promote compared with
To:   metrics/report.html, with texts of reviews only if evaluate.show_texts says so
Run:  python -m stages.report
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader

from sentiment import compare, comparison, folds, params
from sentiment.errors import ProjectError
from sentiment.files import atomic, read_json
from sentiment.logs import run_stage

METADATA = Path("models/sentiment/metadata.json")
METRICS = Path("metrics")
PLOTS = Path("metrics/plots")
CHECKS = Path("data/predictions/checks.parquet")
REPORT = Path("metrics/report.html")
TEMPLATE = "report.html.jinja"
HEADLINE = ("accuracy", "f1", "f1_macro", "roc_auc", "loss", "expected_calibration_error")
ALONE = ("expected_calibration_error_uncalibrated", "pr_auc", "matthews")
MOST_ERRORS, MOST_FAILURES = 20, 30
SIZE = 240  # of a plot's square, in its own units
log = logging.getLogger("stages.report")


def main() -> None:
    settings = params.load()
    answers = pd.read_parquet(compare.PREDICTIONS)
    decision = read_json(METRICS / "promotion.json")
    page = render(
        metadata=read_json(METADATA),
        data=read_json(METRICS / "data.json"),
        scores=scores(read_json(METRICS / "test.json")),
        decision=decision,
        against=against(answers, decision.get("production_version")),
        folds=of_folds(),
        slices=pd.read_csv(PLOTS / "slices.csv").to_dict("records"),
        checks=read_json(METRICS / "checks.json"),
        failures=failures(pd.read_parquet(CHECKS)),
        confusion=pd.read_csv(PLOTS / "confusion.csv").pivot_table("reviews", "actual", "predicted", sort=False),
        curves={"ROC": roc(), "Calibration": calibration()},
        errors=errors(answers, show_texts=settings.evaluate.show_texts).to_dict("records"),
    )
    with atomic(REPORT) as part:
        part.write_text(page, encoding="utf-8")
    log.info("%s: %d KB", REPORT, len(page.encode()) // 1000)


def render(**values: Any) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("stages", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template(TEMPLATE).render(size=SIZE, **values)


def scores(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The headline metrics with their intervals, then the others that a reader looks for."""
    rows = [{"name": name, "value": found[name], "low": found[f"{name}_low"], "high": found[f"{name}_high"]} for name in HEADLINE]
    return rows + [{"name": name, "value": found[name]} for name in ALONE if name in found]


def against(answers: pd.DataFrame, version: str | None) -> dict[str, Any] | None:
    """The differences to the version that was in production, or why there are none to show; None if nothing was."""
    if version is None:
        return None
    try:
        of = comparison.pair(answers, compare.predictions(version))
    except ProjectError as error:
        return {"version": version, "problem": str(error)}
    test = compare.mcnemar_line(comparison.mcnemar(of))
    rows = comparison.differences(of)
    cells = [compare.cells_of(row) for row in rows]
    sure = [row.low > 0 or row.high < 0 for row in rows]
    facts = {"version": version, "header": compare.HEADER, "reviews": len(of.labels), "mcnemar": test}
    return facts | {"rows": list(zip(cells, sure, strict=True))}


def of_folds() -> dict[str, Any]:
    """The scores of cross-validation, by fold and together; no rows where it was off."""
    rows = pd.read_csv(PLOTS / "folds.csv").to_dict("records")
    return {"names": folds.METRICS, "rows": rows, "together": read_json(METRICS / "cross_validation.json")}


def failures(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """The first failing cases of each behavioural check, which are texts of this project and no reviews."""
    if "failed" not in rows:
        return []
    found = rows[rows["failed"]].groupby("check", sort=False).head(2).head(MOST_FAILURES)
    return found.replace({np.nan: None}).to_dict("records")


def roc() -> dict[str, Any]:
    """The ROC curve of the last class, as the places of a plot."""
    points = pd.read_csv(PLOTS / "roc.csv")
    last = points["label"].iloc[-1]
    of = points[points["label"] == last]
    line = places(of["false_positive_rate"], of["true_positive_rate"])
    return {"x": "false positive rate", "y": "true positive rate", "line": line, "title": f"ROC of {last}"}


def calibration() -> dict[str, Any]:
    """Accuracy by confidence as the places of a plot: bins as large as their share of the reviews, hollow before calibration."""
    bins = pd.read_csv(PLOTS / "calibration.csv")
    share = bins["reviews"] / bins.groupby("probabilities")["reviews"].transform("sum")
    radius, before = (3 + 9 * share**0.5).round(1), bins["probabilities"] != "calibrated"
    dots = zip(places(bins["confidence"], bins["accuracy"]), radius, before, strict=True)
    facts = {"x": "confidence", "y": "accuracy", "title": "Reliability (hollow: before calibration)"}
    return facts | {"dots": [(x, y, size, hollow) for (x, y), size, hollow in dots]}


def places(x: pd.Series, y: pd.Series) -> list[tuple[float, float]]:
    """Points of the unit square as they stand in a plot, whose y grows downwards."""
    return [(round(a * SIZE, 1), round((1 - b) * SIZE, 1)) for a, b in zip(x, y, strict=True)]


def errors(answers: pd.DataFrame, *, show_texts: bool) -> pd.DataFrame:
    """The wrong answers that the model was surest of: review_id, label, prediction, confidence, and text if it is to be shown."""
    chances = [f"probability_{name}" for name in answers["label"].unique() if f"probability_{name}" in answers]
    wrong = answers[answers["prediction"] != answers["label"]]
    found = wrong.assign(confidence=wrong[chances].max(axis=1)).nlargest(MOST_ERRORS, "confidence")
    found = found[["review_id", "label", "prediction", "confidence"]]
    if show_texts:
        found = found.merge(pd.read_parquet(compare.TEXTS, columns=["review_id", "text"]), on="review_id", how="left")
    return found


if __name__ == "__main__":
    run_stage("report", main)
