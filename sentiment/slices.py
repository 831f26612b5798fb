"""How good a model is for parts of the test reviews: by stars, length, category, state, gender, age group and month.

A part of a single class has no meaningful F1, so that accuracy is what all parts have; macro-F1 is there where every class is.
"""

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from sentiment import metrics

LENGTHS: dict[str, float] = {"up to 5 words": 5, "6 to 10": 10, "11 to 20": 20, "21 to 40": 40, "41 to 80": 80, "over 80": np.inf}
AGES: dict[str, float] = {"under 25": 24, "25 to 34": 34, "35 to 44": 44, "45 to 54": 54, "55 to 64": 64, "65 and over": 120}
REST = "(small groups together)"
MONTH = 7  # characters of 2018-01
COLUMNS = ["slice", "group", "reviews", "accuracy", "accuracy_low", "accuracy_high", "f1_macro", "f1_macro_low", "f1_macro_high"]


def groups(reviews: pd.DataFrame, columns: dict[str, str]) -> dict[str, pd.Series]:
    """The group of each review by slice; missing where the source says nothing. Columns that are not there are left out.

    `columns` maps a slice to its column: `age` to one of birth years, `month` to one of dates, others to one of names.
    """
    found = {"length": ranges(reviews["text"].str.split().str.len(), LENGTHS)}
    for name, column in columns.items():
        if column not in reviews or reviews[column].isna().all():
            continue
        if name == "age":
            found[name] = ages(reviews, column, columns.get("month"))
        elif name == "month":
            found[name] = reviews[column].astype("string").str.slice(0, MONTH)
        else:
            found[name] = named(reviews[column])
    return found


def named(values: pd.Series) -> pd.Series:
    """Values as names of groups, whole numbers without a point; missing where they are missing or blank."""
    names = values.map(lambda value: f"{value:g}" if isinstance(value, float) else value).astype("string").str.strip()
    return names.where(values.notna() & names.ne(""))


def ages(reviews: pd.DataFrame, born: str, dates: str | None) -> pd.Series:
    """Age groups, by the year of birth and that of the review, or of the newest birth where reviews have no dates."""
    year = pd.to_numeric(reviews[born], errors="coerce")
    age = review_year(reviews, dates).fillna(year.max()) - year
    return ranges(age.where((age >= 10) & (age <= 110)), AGES)  # beyond, the year was not meant


def review_year(reviews: pd.DataFrame, dates: str | None) -> pd.Series:
    """The year of each review, the median one where it has no date, missing where none has."""
    if dates not in reviews:
        return pd.Series(np.nan, reviews.index)
    years = pd.to_datetime(reviews[dates], errors="coerce").dt.year
    return years.fillna(years.median())


def ranges(values: pd.Series, bounds: dict[str, float]) -> pd.Series:
    """The first range of each value whose bound is not below it; missing for missing values."""
    edges = [-np.inf, *bounds.values()]
    return pd.cut(values.astype(float), edges, labels=list(bounds)).astype("string")


def merged(of: pd.Series, smallest: int) -> pd.Series:
    """The groups, those with fewer than `smallest` reviews as one."""
    counts = of.value_counts()
    return of.where(of.isna() | of.map(counts).ge(smallest).fillna(value=False), REST)


def table(
    reviews: pd.DataFrame, predictions: pd.DataFrame, names: list[str], columns: dict[str, str], smallest: int, resamples: int
) -> pd.DataFrame:
    """A row for each group of each slice: see COLUMNS; groups that stay smaller than `smallest` even together are left out.

    `predictions` has label and prediction (names) for each of the reviews, in their order. Intervals are of 95%: Wilson's for
    accuracy (Wilson 1927), the bootstrap's for macro-F1.
    """
    index = {name: k for k, name in enumerate(names)}
    labels, said = (predictions[column].map(index).to_numpy() for column in ("label", "prediction"))
    rows = []
    for name, of in groups(reviews, columns).items():
        kinds = merged(of, smallest)
        places = kinds.groupby(kinds).indices
        for group in sorted(places, key=in_order):
            place = places[group]
            if len(place) >= smallest:
                rows.append({"slice": name, "group": group} | scores(labels[place], said[place], len(names), resamples))
    return pd.DataFrame(rows, columns=COLUMNS)


def in_order(group: str) -> tuple[int, str]:
    """What groups are sorted by: ranges as they follow each other, others by name, small ones last."""
    ranged = [*LENGTHS, *AGES]
    return (ranged.index(group) if group in ranged else len(ranged) * (group == REST), group)


def scores(labels: np.ndarray, said: np.ndarray, classes: int, resamples: int) -> dict[str, float]:
    """Accuracy and, where every class is there, macro-F1 of a group, with their intervals."""
    right = int((labels == said).sum())
    interval = binomtest(right, len(labels)).proportion_ci(method="wilson")
    found = {
        "reviews": len(labels),
        "accuracy": right / len(labels),
        "accuracy_low": interval.low,
        "accuracy_high": interval.high,
    }
    if len(np.unique(labels)) == classes:
        bounds = metrics.intervals(said, labels, classes, resamples)
        found["f1_macro"] = metrics.f1_macro(said, labels, classes)
        found |= {name: bounds[name] for name in ("f1_macro_low", "f1_macro_high")}
    return found


def worst(rows: pd.DataFrame, number: int = 3) -> pd.DataFrame:
    """The groups that are worst for sure: of the lowest upper ends of accuracy's interval."""
    return rows.nsmallest(number, "accuracy_high")
