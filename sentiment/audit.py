"""What can be wrong with labelled reviews before a model is trained on them: each finding is a number, for a bound to be set."""

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import ks_2samp

SHINGLE = 3  # words that are taken together when texts are compared
PERMUTATIONS = 128
LONG_ENOUGH = 6  # words, from which on a text's language and its likeness to another are told
FOLDS = 5
SHOWN_AT_MOST = 500


def schema_errors(reviews: pd.DataFrame, labels: dict[str, list[float]]) -> list[str]:
    """What in prepared reviews is not as it has to be: types, missing or empty values, ratings of another class, ids twice."""
    import pandera.pandas as pa

    rating = dict(enumerate(map(set, labels.values())))
    schema = pa.DataFrameSchema(
        {
            "review_id": pa.Column(str, unique=True),
            "text": pa.Column(str, pa.Check(lambda values: values.str.strip() != "", error="empty")),
            "label": pa.Column("int8", pa.Check.isin(range(len(labels)))),
            "rating": pa.Column("Float64"),
        },
        checks=pa.Check(lambda frame: ratings_belong(frame, rating), error="rating of another class"),
    )
    try:
        schema.validate(reviews, lazy=True)
    except pa.errors.SchemaErrors as errors:
        found = errors.failure_cases.groupby(["column", "check"], dropna=False).size()
        return [f"{column}: {check} ({number} rows)" for (column, check), number in found.items()]
    return []


def ratings_belong(reviews: pd.DataFrame, ratings: dict[int, set[float]]) -> pd.Series:
    """Whether each review's rating is one of its class's."""
    known = pd.Series(False, reviews.index)
    for label, allowed in ratings.items():
        known |= (reviews["label"] == label) & reviews["rating"].isin(allowed)
    return known


def smallest_class(reviews: pd.DataFrame, classes: int) -> float:
    """The share of the rarest class."""
    return float(np.bincount(reviews["label"], minlength=classes).min() / max(1, len(reviews)))


def foreign_share(texts: pd.Series, language: str) -> float:
    """The share of the texts of six words and more that are in another language than `language` (ISO 639-1), by langid."""
    import py3langid

    long = texts[texts.str.split().str.len() >= LONG_ENOUGH]
    told = [py3langid.classify(text)[0] for text in long]
    return float(np.mean([each != language for each in told])) if told else 0.0


def near_duplicates(train: pd.DataFrame, others: pd.DataFrame, likeness: float) -> pd.DataFrame:
    """The reviews of `others` that share about `likeness` of their word triples, or more, with one of `train`.

    By MinHash (Broder 1997). Columns: review_id, train_review_id. Texts under six words are not compared: alike by nature.
    """
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=likeness, num_perm=PERMUTATIONS)
    hashes = {review_id: minhash(text) for review_id, text in long_ones(train)}
    for review_id, each in hashes.items():
        index.insert(review_id, each)
    rows = []
    for review_id, text in long_ones(others):
        mine = minhash(text)
        like = [(mine.jaccard(hashes[other]), other) for other in index.query(mine)]
        if like and max(like)[0] >= likeness:
            rows.append({"review_id": review_id, "train_review_id": max(like)[1]})
    return pd.DataFrame(rows, columns=["review_id", "train_review_id"])


def long_ones(reviews: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Id and words of the reviews of six words and more."""
    words = reviews["text"].str.casefold().str.findall(r"\w+")
    return [(review_id, each) for review_id, each in zip(reviews["review_id"], words, strict=True) if len(each) >= LONG_ENOUGH]


def minhash(words: list[str]) -> Any:
    """The MinHash of a text's word triples."""
    from datasketch import MinHash

    made = MinHash(num_perm=PERMUTATIONS)
    made.update_batch([" ".join(words[k : k + SHINGLE]).encode() for k in range(len(words) - SHINGLE + 1)])
    return made


def doubtful_labels(reviews: pd.DataFrame, seed: int = 0) -> tuple[float, pd.DataFrame]:
    """The share of labels that are likely wrong, and these reviews, the most doubtful first.

    By confident learning (Northcutt et al. 2021) with the probabilities of TF-IDF and logistic regression, each fold scored
    by the others. Columns: review_id, label, suggested (classes as numbers), confidence (in the suggested one).
    """
    from cleanlab.filter import find_label_issues
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), LogisticRegression(C=5, max_iter=1000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    labels = reviews["label"].to_numpy().astype(int)
    values = cross_val_predict(model, reviews["text"], labels, cv=folds, method="predict_proba")
    rows = find_label_issues(labels, values, return_indices_ranked_by="self_confidence", n_jobs=1)
    found = pd.DataFrame(
        {
            "review_id": reviews["review_id"].to_numpy()[rows],
            "label": labels[rows],
            "suggested": values[rows].argmax(axis=1),
            "confidence": values[rows].max(axis=1).round(4),
        }
    )
    return len(rows) / max(1, len(labels)), found.head(SHOWN_AT_MOST)


def drift(reviews: pd.DataFrame, before: pd.DataFrame, classes: int) -> dict[str, float]:
    """How far reviews have moved from those of before, each from 0 (not at all) to 1.

    class_share: the most that a class's share has changed; length: the Kolmogorov-Smirnov statistic of the number of words;
    vocabulary: the share of the words that do not occur in the texts of before, less that between two halves of those.
    """
    shares = [np.bincount(part["label"], minlength=classes) / max(1, len(part)) for part in (reviews, before)]
    lengths = [part["text"].str.split().str.len() for part in (reviews, before)]
    halves = before["text"].iloc[::2], before["text"].iloc[1::2]
    new = unknown_share(reviews["text"], halves[0]) - unknown_share(halves[1], halves[0])
    return {
        "class_share": float(np.abs(shares[0] - shares[1]).max()),
        "length": float(ks_2samp(*lengths).statistic),
        "vocabulary": max(0.0, new),
    }


def unknown_share(texts: pd.Series, known: pd.Series) -> float:
    """The share of the words of texts that stand in none of the known texts."""
    vocabulary = set(known.str.casefold().str.findall(r"\w+").explode().dropna())
    words = texts.str.casefold().str.findall(r"\w+").explode().dropna()
    return float((~words.isin(vocabulary)).mean()) if len(words) else 0.0
