"""The conditions of a promotion: each with its value, its bound and whether it is passed. `promote` in params.yaml sets bounds.

A bound of null turns a gate off. A gate that compares with the model in production is not there while nothing is.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from sentiment import comparison, metrics
from sentiment.params import Promote

MEGABYTE = 1e6  # bytes
SURE = 0.05


def judge(
    candidate: pd.DataFrame, production: pd.DataFrame | None, kinds: dict[str, pd.Series], scores: dict[str, Any],
    data: dict[str, Any], model: Path, names: list[str], rules: Promote,
) -> list[dict[str, Any]]:  # fmt: skip
    """All gates that are on, in the order in which a reason is looked for.

    `candidate` and `production` are predictions (see sentiment/comparison.py), those of production for the same reviews, or for
    those of them that are to be compared on; `kinds` the groups of the candidate's reviews by slice, in its order; `scores` is
    what metrics/test.json says, `data` what metrics/data.json says, `model` the model's folder.
    """
    return [
        *of_quality(candidate, scores, names, rules),
        *(against(candidate, production, kinds, names, rules) if production is not None else ()),
        *of_running(scores, data, model, rules),
    ]


def of_quality(candidate: pd.DataFrame, scores: dict[str, Any], names: list[str], rules: Promote) -> Iterator[dict[str, Any]]:
    """Floors for F1, for that of each class, and the most that confidence may be off."""
    if rules.min_f1 is not None:
        yield above("f1_macro above promote.min_f1", scores["f1_macro"], rules.min_f1)
    if rules.min_class_f1 is not None:
        found = metrics.rescore(candidate, names)
        worst = min(names, key=lambda name: found[f"f1_{name}"])
        yield above(f"f1_{worst}, the lowest of a class, above promote.min_class_f1", found[f"f1_{worst}"], rules.min_class_f1)
    if rules.min_slice_accuracy is not None and "worst_slice_accuracy_high" in scores:
        name = "upper end of the weakest slice's accuracy above promote.min_slice_accuracy"
        yield above(name, scores["worst_slice_accuracy_high"], rules.min_slice_accuracy)
    if rules.max_check_failure_rate is not None and "check_failure_rate" in scores:
        name = "share of behavioural checks that fail, at most promote.max_check_failure_rate"
        yield below(name, scores["check_failure_rate"], rules.max_check_failure_rate)
    if rules.max_calibration_error is not None:
        error = scores["expected_calibration_error"]
        yield below("expected calibration error at most promote.max_calibration_error", error, rules.max_calibration_error)


def against(
    candidate: pd.DataFrame, production: pd.DataFrame, kinds: dict[str, pd.Series], names: list[str], rules: Promote
) -> Iterator[dict[str, Any]]:
    """The gain over production, how sure it is that there is one, and whether it is paid for by a part of the reviews."""
    chosen = candidate["review_id"].isin(production["review_id"]).to_numpy()
    candidate, kinds = candidate[chosen], {name: of[chosen] for name, of in kinds.items()}
    gain = metrics.rescore(candidate, names)[rules.metric] - metrics.rescore(production, names)[rules.metric]
    yield above(f"{rules.metric} gained over production, above promote.min_delta", gain, rules.min_delta)
    if rules.confidence is not None:
        measured, sure = probability_of_gain(candidate, production, rules.metric)
        name = f"probability that {measured} is better than production's, at least promote.confidence"
        yield gate(name, sure, rules.confidence, passed=sure >= rules.confidence)
    if rules.max_slice_loss is not None:
        loss, where = largest_sure_loss(candidate, production, kinds)
        name = f"accuracy lost for sure by a slice{where}, at most promote.max_slice_loss"
        yield below(name, loss, rules.max_slice_loss)


def largest_sure_loss(candidate: pd.DataFrame, production: pd.DataFrame, kinds: dict[str, pd.Series]) -> tuple[float, str]:
    """The most accuracy that a group loses against production, and which one it is; 0 and nothing if none does for sure.

    Sure is what McNemar's exact test, one-sided, says at 5% over all groups together (Bonferroni).
    """
    answers = candidate.merge(production, on="review_id", how="left", suffixes=("", "_before"))
    right, before = (answers[name].eq(answers["label"]).to_numpy() for name in ("prediction", "prediction_before"))
    places = [(name, group, place) for name, of in kinds.items() for group, place in of.groupby(of.to_numpy()).indices.items()]
    worst, where = 0.0, ""
    for name, group, place in places:
        lost, won = int((before & ~right)[place].sum()), int((right & ~before)[place].sum())
        loss = (lost - won) / len(place)
        if loss > worst and binomtest(lost, lost + won, alternative="greater").pvalue * len(places) < SURE:
            worst, where = loss, f" ({name} {group})"
    return worst, where


def probability_of_gain(candidate: pd.DataFrame, production: pd.DataFrame, metric: str) -> tuple[str, float]:
    """The share of paired resamples of the test reviews in which the candidate's metric is better, and which metric it is.

    That is accuracy where sentiment.comparison does not resample the one that is asked for.
    """
    rows = {row.metric: row for row in comparison.differences(comparison.pair(candidate, production))}
    measured = metric if metric in rows else "accuracy"
    return measured, rows[measured].a_better


def of_running(scores: dict[str, Any], data: dict[str, Any], model: Path, rules: Promote) -> Iterator[dict[str, Any]]:
    """What the model costs, and whether its data is known."""
    if rules.min_reviews_per_second is not None:
        name = "reviews a second in evaluation, above promote.min_reviews_per_second"
        yield above(name, scores["reviews_per_second"], rules.min_reviews_per_second)
    if rules.max_megabytes is not None:
        size = sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) / MEGABYTE
        yield below("megabytes of the model's folder, at most promote.max_megabytes", size, rules.max_megabytes)
    if rules.known_data:
        known = data["sha256"] in rules.known_data
        name = f"the data's sha256 ({data['sha256'][:12]}…) is one of promote.known_data"
        yield gate(name, float(known), 1.0, passed=known)


def above(name: str, value: float, bound: float) -> dict[str, Any]:
    """A gate that values above its bound pass."""
    return gate(name, value, bound, passed=value > bound)


def below(name: str, value: float, bound: float) -> dict[str, Any]:
    """A gate that values up to its bound pass."""
    return gate(name, value, bound, passed=value <= bound)


def gate(name: str, value: float, bound: float, *, passed: bool) -> dict[str, Any]:
    """One condition of a promotion."""
    return {"gate": name, "value": round(float(value), 6), "bound": bound, "passed": bool(passed)}
