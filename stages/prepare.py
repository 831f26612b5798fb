"""Clean, label, deduplicate and split the reviews.

From: data/raw/reviews.parquet
To:   data/prepared/{train,validation,test}.parquet (review_id, text, label, rating, and the source's other columns),
      data/prepared/rejected.parquet (every row left out, with its reason), metrics/data.json,
      metrics/plots/class_balance.csv
Run:  python -m stages.prepare
"""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from sentiment import params, text
from sentiment.errors import DataError
from sentiment.files import atomic, digest, write_json
from sentiment.logs import run_stage
from sentiment.sources import LINE_COLUMN

RAW = Path("data/raw/reviews.parquet")
PREPARED = Path("data/prepared")
METRICS = Path("metrics/data.json")
BALANCE = Path("metrics/plots/class_balance.csv")
SPLITS = ("test", "validation", "train")  # the order in which copies of one text are kept
ROW_GROUP = 20_000  # rows of a prepared file that are read into memory together
OWN_COLUMNS = ["review_id", "text", "label", "rating", "split", "reason"]
log = logging.getLogger("stages.prepare")


def main() -> None:
    settings = params.load().prepare
    raw, facts = read(RAW, settings)
    reviews = describe(raw, settings)
    reasons = reject(reviews)
    reasons = reasons.fillna(over_share(reviews[reasons.isna()], settings))
    kept = reviews[reasons.isna()]
    check_splits(kept, settings)
    metrics = facts | count(reviews, reasons, kept, settings)
    write(reviews, kept, reasons, PREPARED)
    write_json(METRICS, metrics)
    with atomic(BALANCE) as part:
        balance(kept, list(settings.labels)).to_csv(part, index=False)
    report(metrics)


def read(path: Path, settings: params.Prepare) -> tuple[pd.DataFrame, dict[str, str]]:
    """The raw reviews, and the facts of their source; raises DataError if a column that prepare names is missing."""
    needed = [*settings.text, settings.rating, *([settings.group] if settings.group else [])]
    names = pq.read_schema(path).names
    if missing := [name for name in needed if name not in names]:
        raise DataError(
            f"the source has no column {', '.join(missing)}; it has {', '.join(n for n in names if n != LINE_COLUMN)}: "
            "name the right ones in prepare.text, prepare.rating and prepare.group (null where there is no group)"
        )
    table = pq.read_table(path)
    return table.to_pandas(integer_object_nulls=True), json.loads(table.schema.metadata[b"source"])


def describe(raw: pd.DataFrame, settings: params.Prepare) -> pd.DataFrame:
    """The raw columns but the text's, and: text, key (what duplicates share), rating, label (-1: none), split, review_id."""
    reviews = raw.drop(columns=[*settings.text, *(set(OWN_COLUMNS) & set(raw) - {settings.rating})], errors="ignore")
    parts = [raw[name].astype("string").fillna("") for name in settings.text]
    reviews["text"] = [text.join(row, settings.case) for row in zip(*parts, strict=True)]
    reviews["key"] = [text.key(value) for value in reviews["text"]]
    reviews["rating"] = numbers(raw, settings.rating)
    reviews["label"] = labels(reviews["rating"], settings)
    groups = raw[settings.group].astype("string").replace("", pd.NA) if settings.group else pd.Series(pd.NA, raw.index, "string")
    reviews["split"] = split("product:" + groups, "text:" + reviews["key"], settings)
    reviews["review_id"] = [digest(value).hex() for value in reviews["key"]]
    return reviews


def numbers(raw: pd.DataFrame, column: str) -> pd.Series:
    """The ratings as numbers, missing where empty; raises DataError naming the first that is none."""
    values = pd.to_numeric(raw[column], errors="coerce").astype("Float64")
    wrong = values.isna() & raw[column].notna() & (raw[column].astype("string").str.strip() != "").fillna(False)
    if wrong.any():
        line, value = raw.loc[wrong, [LINE_COLUMN, column]].iloc[0]
        raise DataError(f"line {line} of the source: {column} is {value!r}, which is no number; mend it or leave it empty")
    return values


def labels(ratings: pd.Series, settings: params.Prepare) -> pd.Series:
    """The class of each rating as its index in prepare.labels, -1 for none.

    Raises DataError for a class whose ratings the source does not hold.
    """
    known = set(ratings.dropna().unique())
    for name, named in settings.labels.items():
        if not known & set(map(float, named)):
            raise DataError(
                f"prepare.labels gives {name} the ratings {named}, of which the source holds none: its ratings are "
                f"{', '.join(f'{value:g}' for value in sorted(known)) or 'all empty'}"
            )
    index = {float(rating): k for k, named in enumerate(settings.labels.values()) for rating in named}
    return ratings.map(index).fillna(-1).astype("int8")


def split(groups: pd.Series, keys: pd.Series, settings: params.Prepare) -> pd.Series:
    """train, validation or test for each row, by the hash of its group, or of its text where it has no group.

    A group's split never depends on the other rows: more data moves no product from test to train.
    """
    names = groups.fillna(keys)
    unit = np.array([int.from_bytes(digest(name)) / 2**64 for name in names])
    held_out = np.select([unit < settings.test, unit < settings.test + settings.validation], SPLITS[:2], SPLITS[2])
    return pd.Series(held_out, names.index, dtype="string")


def reject(reviews: pd.DataFrame) -> pd.Series:
    """Why each row is left out: empty_text, no_rating, unmapped_rating, conflicting or duplicate; missing if it is kept.

    Of several copies of a text the one of a test product stays, then one of a validation product, then the first:
    so a text that once was tested on is never trained on, however much data comes after.
    """
    reasons = pd.Series(pd.NA, reviews.index, dtype="string")
    reasons[reviews["label"] < 0] = "unmapped_rating"
    reasons[reviews["rating"].isna()] = "no_rating"
    reasons[reviews["text"] == ""] = "empty_text"
    rest = reviews[reasons.isna()]
    conflicting = rest.groupby("key")["label"].transform("nunique").gt(1)
    reasons[conflicting[conflicting].index] = "conflicting"
    rest = rest[~conflicting]
    order = rest["split"].map({name: k for k, name in enumerate(SPLITS)}).sort_values(kind="stable").index
    duplicate = rest.loc[order, "key"].duplicated()
    reasons[duplicate[duplicate].index] = "duplicate"
    return reasons


def over_share(kept: pd.DataFrame, settings: params.Prepare) -> pd.Series:
    """over_share for the rows of validation and test that are too many of their class for prepare.shares.

    Which ones stay is decided by the hash of their text.
    """
    reasons = pd.Series(pd.NA, kept.index, dtype="string")
    for name in SPLITS[:2] if settings.shares else ():
        part = kept[kept["split"] == name]
        groups = [part[part["label"] == k] for k in range(len(settings.labels))]
        shares = [settings.shares[label] for label in settings.labels]  # type: ignore[index]
        total = min(len(group) / share for group, share in zip(groups, shares, strict=True))
        for group, share in zip(groups, shares, strict=True):
            order = group["key"].map(lambda key: digest("share:" + key)).sort_values(kind="stable").index
            reasons[order[round(total * share) :]] = "over_share"
    return reasons


def check_splits(kept: pd.DataFrame, settings: params.Prepare) -> None:
    """Raise DataError unless every split holds every class, and no text and no group stands in two splits."""
    for column in ["key", *([settings.group] if settings.group else [])]:
        if shared(kept, column):
            raise DataError(f"{shared(kept, column)} values of {column} stand in two splits; this is a defect, please report it")
    for name in SPLITS:
        present = set(kept.loc[kept["split"] == name, "label"])
        for index, label in enumerate(settings.labels):
            if index not in present:
                raise DataError(
                    f"the {name} split has no review of class {label}; use more reviews, or change prepare.validation "
                    "and prepare.test"
                )


def shared(kept: pd.DataFrame, column: str) -> int:
    """How many values of a column stand in more than one split."""
    return int(kept.dropna(subset=[column]).groupby(column)["split"].nunique().gt(1).sum())


def count(reviews: pd.DataFrame, reasons: pd.Series, kept: pd.DataFrame, settings: params.Prepare) -> dict:
    """What metrics/data.json says beside the source's facts: rows, rejected by reason, reviews by split and class, words."""
    names = list(settings.labels)
    words = kept["text"].str.split().str.len()
    return {
        "rows": len(reviews),
        "kept": len(kept),
        "rejected": {
            reason: int((reasons == reason).sum())
            for reason in ("empty_text", "no_rating", "unmapped_rating", "conflicting", "duplicate", "over_share")
        },
        "splits": {
            name: {"reviews": len(part)} | {label: int((part["label"] == k).sum()) for k, label in enumerate(names)}
            for name, part in ((name, kept[kept["split"] == name]) for name in reversed(SPLITS))
        },
        "class_share": {label: round(float((kept["label"] == k).mean()), 4) for k, label in enumerate(names)},
        "words_median": float(words.median()),
        "words_p95": float(words.quantile(0.95)),
        "texts_in_two_splits": shared(kept, "key"),
        "groups_in_two_splits": shared(kept, settings.group) if settings.group else 0,
    }


def write(reviews: pd.DataFrame, kept: pd.DataFrame, reasons: pd.Series, folder: Path) -> None:
    """Write the three splits and the rejected rows, all of them or none."""
    with atomic(folder) as part:
        part.mkdir()
        order = ["review_id", "text", "label", "rating"]
        columns = order + [name for name in reviews if name not in (*order, "split", "key")]
        frames = {name: kept.loc[kept["split"] == name, columns] for name in SPLITS}
        frames["rejected"] = reviews.assign(reason=reasons).loc[reasons.notna(), ["reason", *columns]]
        for name, frame in frames.items():
            frame.to_parquet(part / f"{name}.parquet", index=False, compression="zstd", row_group_size=ROW_GROUP)


def balance(kept: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Reviews by split and class: columns split, label, reviews."""
    counts = kept.groupby(["split", "label"], as_index=False).size().rename(columns={"size": "reviews"})
    return counts.assign(label=counts["label"].map(dict(enumerate(names)))).sort_values(["split", "label"])


def report(metrics: dict) -> None:
    """Log what metrics/data.json says."""
    rejected = ", ".join(f"{reason} {number}" for reason, number in metrics["rejected"].items() if number) or "none"
    log.info("%d rows, %d kept; rejected: %s", metrics["rows"], metrics["kept"], rejected)
    for name, numbers_ in metrics["splits"].items():
        log.info("%s: %s", name, ", ".join(f"{key} {value}" for key, value in numbers_.items()))


if __name__ == "__main__":
    run_stage("prepare", main)
