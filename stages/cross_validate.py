"""Train and score a model for each fold of the train and validation splits together, where cross_validation.folds says how many.

From: data/tokens/{train,validation}.safetensors, data/prepared/{train,validation}.parquet; never the test split
To:   metrics/cross_validation.json (mean and deviation of each metric, see sentiment/folds.py), metrics/plots/folds.csv (a row a
      fold); with the folds off {"folds": 0} and a table without rows. models/folds holds what an interrupted run resumes from
Run:  python -m stages.cross_validate, on one device: train.launcher is for the train stage alone
"""

import csv
import logging
from pathlib import Path
from typing import Any

from sentiment import params
from sentiment.files import atomic, remove, write_json
from sentiment.logs import run_stage

METRICS = Path("metrics/cross_validation.json")
TABLE = Path("metrics/plots/folds.csv")
log = logging.getLogger("stages.cross_validate")


def main() -> None:
    settings = params.load()
    count = settings.cross_validation.folds
    if count is None:
        log.info("off: cross_validation.folds is null")
        write(["fold", "f1_macro"], [], {"folds": 0})
        return
    from sentiment import cross_validation, folds  # they take seconds to import

    rows = cross_validation.run(settings, count)
    found = folds.summary(rows)
    write(list(rows[0]), rows, found)
    for name in folds.METRICS:
        mean, deviation, low, high = (found[f"{name}_{key}"] for key in ("mean", "deviation", "mean_low", "mean_high"))
        log.info("%s over %d folds: %.4f ± %.4f, mean in [%.4f, %.4f]", name, count, mean, deviation, low, high)
    remove(cross_validation.FOLDS)


def write(columns: list[str], rows: list[dict[str, Any]], found: dict[str, float]) -> None:
    """Write the table and the metrics."""
    with atomic(TABLE) as part, part.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    write_json(METRICS, found)


if __name__ == "__main__":
    run_stage("cross_validate", main)
