"""The baseline to beat: TF-IDF of words and word pairs with logistic regression.

Run: python -m bench.baseline                  on the pipeline's own splits
     python -m bench.baseline TRAIN TEST       on two files of reviews, labelled by prepare.labels and cleaned as the stage does
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sentiment import metrics, params, sources
from sentiment.errors import DataError
from sentiment.logs import run_stage
from stages import prepare

PREPARED = Path("data/prepared")
SHOWN = ("accuracy", "f1_macro", "roc_auc", "expected_calibration_error")
BINS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="TRAIN TEST", default=[])
    files = parser.parse_args().files
    if len(files) not in (0, 2):
        parser.error("name both files, or none")
    settings = params.load().prepare
    train, test = (read(Path(name), settings) for name in files) if files else (split("train"), split("test"))
    scores = score(train, test, list(settings.labels))
    print(f"| trained on | tested on | {' | '.join(SHOWN)} |")
    print(f"|---|---|{'---|' * len(SHOWN)}")
    print(f"| {len(train)} | {len(test)} | {' | '.join(f'{scores[name]:.4f}' for name in SHOWN)} |")


def split(name: str) -> pd.DataFrame:
    """One of the pipeline's splits: columns text and label."""
    return pd.read_parquet(PREPARED / f"{name}.parquet", columns=["text", "label"])


def read(path: Path, settings: params.Prepare) -> pd.DataFrame:
    """All labelled reviews of a file, cleaned and without duplicates as the prepare stage does it."""
    kind = sources.file_format(str(path))
    raw = pd.concat([table.to_pandas() for table in sources.tables(path, kind)], ignore_index=True)
    if missing := [name for name in (*settings.text, settings.rating) if name not in raw]:
        raise DataError(f"{path} has no column {', '.join(missing)}; prepare.text and prepare.rating of params.yaml name them")
    reviews = prepare.describe(raw, settings.model_copy(update={"group": None}))
    return reviews.loc[prepare.reject(reviews).isna(), ["text", "label"]]


def score(train: pd.DataFrame, test: pd.DataFrame, names: list[str]) -> dict[str, float]:
    """The baseline's metrics on `test` after fitting on `train`."""
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=2000))
    model.fit(train["text"], train["label"])
    values, labels = model.predict_proba(test["text"]), test["label"].to_numpy().astype(int)
    scores = metrics.score(values, np.argmax(values, axis=1), labels, names)
    return scores | {"expected_calibration_error": metrics.expected_calibration_error(values, labels, BINS)}


if __name__ == "__main__":
    run_stage("bench-baseline", main)
