"""Check the prepared reviews before a model is trained on them; a finding beyond its bound stops the run.

From: data/prepared; data/prepared/train.parquet of the version in production, if there is one
To:   metrics/audit.json, data/doubtful/{labels,near_duplicates}.csv (for a person to look through)
Run:  python -m stages.audit
"""

import logging
from pathlib import Path
from typing import Any

import pandas as pd

from sentiment import audit, params
from sentiment.errors import DataError, RegistryError
from sentiment.files import atomic, write_json
from sentiment.logs import run_stage
from sentiment.registry import Registry, from_parquet
from sentiment.repository import find_repository

PREPARED = Path("data/prepared")
DOUBTFUL = Path("data/doubtful")
METRICS = Path("metrics/audit.json")
SPLITS = ("train", "validation", "test")
ENOUGH = (
    2000  # reviews: of 400 clean ones up to 0.08 are found doubtful, of 2,000 at most 0.03; with a tenth shuffled 0.07 and more
)
log = logging.getLogger("stages.audit")


def main() -> None:
    settings = params.load()
    splits = {name: pd.read_parquet(PREPARED / f"{name}.parquet") for name in SPLITS}
    reviews = pd.concat(splits.values(), ignore_index=True)
    names, rules = list(settings.prepare.labels), settings.audit
    noise, doubtful = audit.doubtful_labels(reviews)
    copies = audit.near_duplicates(splits["train"], pd.concat([splits["validation"], splits["test"]]), rules.likeness)
    found: dict[str, Any] = {
        "schema_errors": len(errors := audit.schema_errors(reviews, settings.prepare.labels)),
        "smallest_class_share": audit.smallest_class(reviews, len(names)),
        "foreign_share": audit.foreign_share(reviews["text"], rules.language),
        "near_duplicate_share": len(copies) / (len(splits["validation"]) + len(splits["test"])),
        "doubtful_label_share": noise,
    }
    before = production_reviews(settings.promote.stage)
    moved = audit.drift(splits["train"], before, len(names)) if before is not None else {}
    found |= {f"drift_{name}": value for name, value in moved.items()}
    found = {name: round(value, 6) for name, value in found.items()}
    write(doubtful.assign(**{column: doubtful[column].map(dict(enumerate(names))) for column in ("label", "suggested")}), copies)
    write_json(METRICS, found)
    log.info("%s", ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in found.items()))
    if rules.max_doubtful_labels is not None and len(reviews) < ENOUGH:
        log.warning("audit.max_doubtful_labels bounds nothing here: of fewer than %d reviews that share is mostly chance", ENOUGH)
        rules = rules.model_copy(update={"max_doubtful_labels": None})
    if problems := [*errors, *beyond(found, rules)]:
        raise DataError(f"the reviews are not as audit in params.yaml asks: {'; '.join(problems)}")


def production_reviews(stage: str) -> pd.DataFrame | None:
    """The training reviews of the version in production, or None where there is none or it cannot be read."""
    try:
        registry = Registry(find_repository(Path()))
        version = registry.in_stage(stage)
        if version is None:
            return None
        return from_parquet(registry.read(version, str(PREPARED / "train.parquet")))
    except RegistryError as error:
        log.warning("drift is not measured: %s", error)
        return None


def write(doubtful: pd.DataFrame, copies: pd.DataFrame) -> None:
    """Write what a person is to look through: ids and labels, no texts."""
    with atomic(DOUBTFUL) as part:
        part.mkdir()
        doubtful.to_csv(part / "labels.csv", index=False)
        copies.to_csv(part / "near_duplicates.csv", index=False)


def beyond(found: dict[str, float], rules: params.Audit) -> list[str]:
    """The findings that are beyond their bounds, each as a sentence that says what to do."""
    drift = {name: value for name, value in found.items() if name.startswith("drift_")}
    moved, most = max(drift.items(), key=lambda item: item[1]) if drift else ("drift", 0.0)
    advice = [
        ("smallest_class_share", "min_class_share", -1, "collect more reviews of the rarest class"),
        ("foreign_share", "max_foreign", 1, f"take out what is not in {rules.language}, or set audit.language"),
        ("near_duplicate_share", "max_near_duplicates", 1, f"see {DOUBTFUL}/near_duplicates.csv"),
        ("doubtful_label_share", "max_doubtful_labels", 1, f"see {DOUBTFUL}/labels.csv"),
    ]
    told = []
    for name, bound, sign, what in advice:
        limit = getattr(rules, bound)
        if limit is not None and sign * found[name] > sign * limit:
            told.append(f"{name} is {found[name]:.4f} (audit.{bound} {limit:g}): {what}")
    if rules.max_drift is not None and most > rules.max_drift:
        told.append(f"{moved} is {most:.4f} against the data of the model in production (audit.max_drift {rules.max_drift:g})")
    return told


if __name__ == "__main__":
    run_stage("audit", main)
