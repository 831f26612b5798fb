"""Compare the model with the one in production on the same test reviews, and promote it if it is better.

From: models/sentiment, metrics/test.json, data/predictions/test.parquet, data/prepared/test.parquet, git's tags
To:   metrics/promotion.json; with a promotion also a snapshot commit and two git tags (see sentiment/registry.py)
Run:  dvc repro promote (by hand it would tag what dvc.lock last recorded, not what lies in the folders)
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sentiment import metrics, params, slices, text
from sentiment.classifier import Inference
from sentiment.errors import ParamsError, RegistryError
from sentiment.files import read_json, write_json
from sentiment.gates import judge
from sentiment.logs import first_line, run_stage
from sentiment.registry import ARTIFACT, Registry, Version, from_parquet
from sentiment.repository import find_repository

SCORES = Path("metrics/test.json")
PREDICTIONS = Path("data/predictions/test.parquet")
PREPARED = Path("data/prepared/test.parquet")
DATA = Path("metrics/data.json")
MODEL = Path("models/sentiment")
DECISION = Path("metrics/promotion.json")
NOT_FOR_PROMOTION = ("reviews", "loss")
log = logging.getLogger("stages.promote")


def main() -> None:
    settings = params.load()
    candidate = pd.read_parquet(PREDICTIONS)
    names = list(settings.prepare.labels)
    scores = read_json(SCORES)
    check_metric(settings.promote.metric, metrics.rescore(candidate, names))
    try:
        registry = Registry(find_repository(Path()))
        with registry.lock():
            decision = decide(registry, candidate, scores, names, settings)
            if decision["verdict"] == "promoted":
                decision = promote(registry, decision, settings.promote.stage)
    except RegistryError as error:
        decision = {"verdict": "blocked", "reason": str(error), "retry": "dvc repro --force --single-item promote"}
        log.warning("no promotion: %s; then: %s", error, decision["retry"], exc_info=True)
    write_json(DECISION, decision)
    log.info("%s: %s", decision["verdict"], decision["reason"])


def check_metric(metric: str, known: dict[str, float]) -> None:
    """Raise ParamsError unless promote.metric is one that grows as the model gets better."""
    allowed = [name for name in known if name not in NOT_FOR_PROMOTION]
    if metric not in allowed:
        raise ParamsError(f"promote.metric is {metric}, which is none of: {', '.join(allowed)}")


def decide(
    registry: Registry, candidate: pd.DataFrame, scores: dict[str, Any], names: list[str], settings: params.Params
) -> dict[str, Any]:
    """What metrics/promotion.json says: the verdict (promoted or kept), the reason, and each gate with value and bound."""
    metric, rules = settings.promote.metric, settings.promote
    version = registry.in_stage(rules.stage)
    columns = settings.prepare.text
    production, compared_on = production_answers(registry, version, candidate, names, columns) if version else (None, None)
    rival = None if production is None else metrics.rescore(production, names)[metric]
    compared = candidate if production is None else candidate[candidate["review_id"].isin(production["review_id"])]
    value = metrics.rescore(compared, names)[metric]
    data = read_json(DATA) if rules.known_data else {}
    gates = judge(candidate, production, kinds(candidate, settings), scores, data, MODEL, names, rules)
    promoted = all(each["passed"] for each in gates)
    return {
        "verdict": "promoted" if promoted else "kept",
        "reason": reason(gates, metric, value, rival, version, promoted) + same(candidate, production, version),
        "metric": metric,
        "candidate": round(value, 6),
        "production": None if rival is None else round(rival, 6),
        "production_version": version.name if version else None,
        "compared_on": compared_on,
        "test_reviews": len(compared),
        "gates": gates,
        "version": registry.next_version() if promoted else None,
    }


def kinds(candidate: pd.DataFrame, settings: params.Params) -> dict[str, pd.Series]:
    """The groups of the candidate's test reviews by slice."""
    reviews = pd.read_parquet(PREPARED).set_index("review_id").loc[candidate["review_id"]].reset_index()
    found = slices.groups(reviews, settings.evaluate.slices)
    return {name: slices.merged(of, settings.evaluate.min_slice) for name, of in found.items()}


def production_answers(
    registry: Registry, version: Version, candidate: pd.DataFrame, names: list[str], columns: list[str]
) -> tuple[pd.DataFrame, str]:
    """The production model's predictions for the candidate's test reviews, read from `columns`, and how they were had.

    By the predictions stored with it if they are of the same reviews, else by scoring the production model on them. Raises
    RegistryError if it tells other classes, or if neither is to be had.
    """
    stored = from_parquet(registry.read(version, str(PREDICTIONS)))
    told = [name.removeprefix("probability_") for name in stored if name.startswith("probability_")]
    if set(told) != set(names):
        raise RegistryError(
            f"{version.tag} in production tells {', '.join(told)}, and this model {', '.join(names)}: they cannot be compared; "
            f"give this model another promote.stage, or take the turn back from that version: "
            f"gto deprecate {ARTIFACT} {version.name} STAGE"
        )
    same = [frame.sort_values("review_id")[["review_id", "label"]].to_numpy() for frame in (stored, candidate)]
    if same[0].shape == same[1].shape and (same[0] == same[1]).all():
        return stored, "predictions stored with the production model"
    log.info("%s was tested on other reviews: it is scored on this test split", version.tag)
    folder = registry.folder(version)
    unseen = candidate[~has_learnt(registry, version, folder, candidate["review_id"], columns)]
    if unseen.empty:
        raise RegistryError(
            f"{version.tag} in production has learnt from all of these test reviews, so that nothing fair is left to compare on; "
            f"take back the change of prepare.test or prepare.group, or give this model another promote.stage"
        )
    answered = predict(folder, unseen, names)
    if left_out := len(candidate) - len(unseen):
        log.warning("%d of %d test reviews are left out: %s has learnt from them", left_out, len(candidate), version.tag)
        return answered, f"production model scored on {len(unseen)} reviews of this test; it has learnt from the other {left_out}"
    return answered, "production model scored on this test"


def has_learnt(
    registry: Registry, version: Version, folder: Path, review_ids: "pd.Series[Any]", columns: list[str]
) -> "pd.Series[Any]":
    """Which of the test reviews, read from `columns`, a version was trained or fitted on; raises RegistryError if it has no data.

    Where it read other columns, a title more, say, the longest part of a text tells.
    """
    parts = [registry.read(version, f"data/prepared/{split}.parquet") for split in ("train", "validation")]
    known = pd.concat(from_parquet(part, columns=["review_id", "text"]) for part in parts)
    found = review_ids.isin(known["review_id"])
    try:
        read = Inference.load(folder).text
    except (OSError, ValueError, TypeError) as error:
        raise RegistryError(
            f"{version.tag} in production has no inference.json that can be read ({first_line(error)})"
        ) from error
    if read == columns:
        return found
    log.warning(
        "%s reads %s and this model %s: it is scored on what this one reads", version.tag, ", ".join(read), ", ".join(columns)
    )
    texts = pd.read_parquet(PREPARED, columns=["review_id", "text"]).set_index("review_id")["text"].loc[review_ids]
    alike = texts.map(longest_key).isin(set(known["text"].map(longest_key)))
    return found | alike.to_numpy()


def longest_key(value: str) -> str:
    """What stands for the longest column of a text."""
    return text.key(text.longest_part(value))


def predict(folder: Path, candidate: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """A table of predictions of the model in `folder` for the candidate's test reviews."""
    from sentiment.classifier import Classifier

    classifier = Classifier.load(folder)
    texts = pd.read_parquet(PREPARED, columns=["review_id", "text"]).set_index("review_id")["text"]
    values = classifier.probabilities(texts.loc[candidate["review_id"]].tolist())
    columns = {f"probability_{name}": values[:, classifier.labels.index(name)] for name in names}
    chosen = np.array(classifier.labels, dtype=object)[classifier.decide(values)]
    return pd.DataFrame({"review_id": candidate["review_id"], "label": candidate["label"], "prediction": chosen, **columns})


def reason(
    gates: list[dict[str, Any]], metric: str, value: float, rival: float | None, version: Version | None, promoted: bool
) -> str:
    """The verdict in one sentence."""
    if not promoted:
        failed = next(each for each in gates if not each["passed"])
        against = f" ({metric} {value:.4f} against {rival:.4f} of {version.name})" if version and rival is not None else ""
        return f"{failed['gate']}: {failed['value']:.4f} (bound {failed['bound']:.4f}){against}"
    if version is None or rival is None:
        return f"nothing was in production, and {metric} is {value:.4f}"
    return f"{metric} {value:.4f} is better than {rival:.4f} of {version.name}"


def same(candidate: pd.DataFrame, production: pd.DataFrame | None, version: Version | None) -> str:
    """What is added to the reason where the candidate is the model in production: a promotion that ran again, for instance."""
    if version is None or production is None or not answers(candidate).equals(answers(production)):
        return ""
    return f"; all its answers are those of {version.name}, which is in production"


def answers(predictions: pd.DataFrame) -> pd.DataFrame:
    """A table of predictions in the order of its reviews."""
    return predictions.sort_values("review_id", ignore_index=True)


def promote(registry: Registry, decision: dict[str, Any], stage: str) -> dict[str, Any]:
    """Write the decision, so that the snapshot holds it, then make the tags; returns the decision with the stage's tag."""
    registry.check_writable()
    write_json(DECISION, decision)
    tag = registry.promote(Path(), decision["version"], stage, message(decision))
    return decision | {"tag": tag}


def message(decision: dict[str, Any]) -> str:
    """The tags' message: the reason, and each gate with its value, bound and verdict."""
    lines = [
        f"- {each['gate']}: {each['value']:.4f} (bound {each['bound']:.4f}), {'passed' if each['passed'] else 'failed'}"
        for each in decision["gates"]
    ]
    return "\n".join([f"{ARTIFACT} {decision['version']}: {decision['reason']}", "", *lines])


if __name__ == "__main__":
    run_stage("promote", main)
