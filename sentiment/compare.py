"""Compare two models on the test reviews that both were scored on.

Run: python -m sentiment.compare v1.1.0 workspace
     python -m sentiment.compare production EXPERIMENT --html comparison.html
     python -m sentiment.compare SEED1,SEED2,SEED3 OTHER1,OTHER2,OTHER3       two ways to train, several seeds each

A model is named by its version (v1.0.0), its stage (production), an experiment, a git revision, or `workspace`. What differs by
chance alone would show a p-value over 0.05 in nineteen of twenty comparisons.
"""

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from sentiment import comparison
from sentiment.comparison import Difference, McNemar
from sentiment.errors import DataError, RegistryError
from sentiment.files import atomic
from sentiment.logs import first_line, guarded, setup
from sentiment.registry import Registry, from_parquet
from sentiment.repository import find_repository

WORKSPACE = "workspace"
PREDICTIONS = Path("data/predictions/test.parquet")
TEXTS = Path("data/prepared/test.parquet")
PAGE = "comparison.html.jinja"
HEADER = ("metric", "A", "B", "A - B", "95% interval", "p", "P(A better)")
log = logging.getLogger("stages.compare")


def main() -> None:
    options = parse(sys.argv[1:])
    a, b = ([predictions(name) for name in names.split(",")] for names in (options.a, options.b))
    if len(a) == len(b) == 1:
        of = comparison.pair(a[0], b[0])
        lost = max(len(a[0]), len(b[0])) - len(of.labels)
        rows, test = comparison.differences(of, options.resamples), comparison.mcnemar(of)
        disagreements = comparison.disagreements(of)
        if options.texts:
            disagreements = with_texts(disagreements, options.a, options.b)
        said = plain(rows, test, len(of.labels), lost, disagreements.head(options.most))
    else:
        rows, test, disagreements = over_seeds(a, b), None, pd.DataFrame()
        said = f"{len(a)} models against {len(b)}: means, and Welch's t over the seeds\n\n{lines(rows)}"
    sys.stdout.write(said + "\n")
    if options.html:
        with atomic(options.html) as part:
            part.write_text(page(options, rows, test, disagreements.head(options.most)), encoding="utf-8")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m sentiment.compare", description=(__doc__ or "").partition("\n")[0])
    for name in ("a", "b"):
        made.add_argument(name, metavar=name.upper(), help="a version, stage, experiment, git revision or `workspace`")
    made.add_argument("--resamples", type=int, default=comparison.RESAMPLES, help="of the bootstrap (default: %(default)s)")
    made.add_argument("--most", type=int, default=20, metavar="N", help="disagreements to show (default: %(default)s)")
    made.add_argument("--texts", action="store_true", help="show the reviews' texts, too")
    made.add_argument("--html", type=Path, metavar="FILE", help="write a page, too")
    options = made.parse_args(arguments)
    if options.resamples < 100:
        made.error("--resamples must be at least 100")
    return options


def predictions(name: str) -> pd.DataFrame:
    """The predictions of a model on its test split; raises RegistryError or DataError, saying what to do."""
    return table(name, PREDICTIONS)


def table(name: str, path: Path) -> pd.DataFrame:
    """A Parquet file as it is in the workspace, or was in a version, a stage, an experiment or a git revision."""
    if name == WORKSPACE:
        if not path.is_file():
            raise DataError(f"there is no {path} in the workspace; run `dvc repro`, or `dvc checkout dvc.yaml`")
        return pd.read_parquet(path)
    registry = Registry(find_repository(Path()))
    try:
        return from_parquet(registry.read(registry.find(name), str(path)))
    except RegistryError:
        if is_version(registry, name):
            raise
    return of_revision(registry.root, name, path)


def is_version(registry: Registry, name: str) -> bool:
    """Whether a name is that of a version or of a stage that holds one."""
    try:
        registry.find(name)
    except RegistryError:
        return False
    return True


def of_revision(root: Path, name: str, path: Path) -> pd.DataFrame:
    """A Parquet file of an experiment or of a git revision, from DVC's cache or remote."""
    from dvc.api import DVCFileSystem

    try:
        return from_parquet(DVCFileSystem(str(root), rev=name).read_bytes(str(path)))
    except Exception as error:
        raise DataError(
            f"{name} has no {path} to compare ({type(error).__name__}: {first_line(error)}); name a version or a stage "
            "(gto show), an experiment (dvc exp show) or a revision whose predictions are in the cache (or `dvc fetch` them); "
            "before the first promotion there is no production: `dvc repro`"
        ) from error


def with_texts(rows: pd.DataFrame, a: str, b: str) -> pd.DataFrame:
    """The disagreements with a column text, from A's or B's prepared test split."""
    texts = pd.concat([table(name, TEXTS)[["review_id", "text"]] for name in (a, b)]).drop_duplicates("review_id")
    return rows.merge(texts, on="review_id", how="left")


def over_seeds(a: list[pd.DataFrame], b: list[pd.DataFrame]) -> list[Difference]:
    """The means of each metric over several models of two kinds, and Welch's t test and interval of their difference.

    What is counted here is the chance of training; all models have to be scored on the same reviews. Raises DataError if a
    side has a single model, whose spread is not known.
    """
    if min(len(a), len(b)) < 2:
        raise DataError("name at least two models on each side, or one on each side")
    pairs = [comparison.pair(a[0], each) for each in a + b]
    if {len(each.labels) for each in pairs} != {len(a[0])} or {len(each) for each in a + b} != {len(a[0])}:
        raise DataError("the models were tested on different reviews; evaluate all of them on the same test split")
    scores = [{row.metric: row.b for row in comparison.differences(each, 100)} for each in pairs]
    found = []
    for metric in scores[0]:
        first, second = (np.array([each[metric] for each in part]) for part in (scores[: len(a)], scores[len(a) :]))
        test = stats.ttest_ind(first, second, equal_var=False)
        low, high = test.confidence_interval()
        same = np.ptp(first) == np.ptp(second) == 0
        p = float(test.pvalue) if not same else 1.0
        better = float(stats.t.cdf(test.statistic, test.df)) if not same else 0.5
        better = 1 - better if metric == "loss" else better
        found.append(Difference(metric, first.mean(), second.mean(), first.mean() - second.mean(), low, high, p, better))
    return found


def lines(rows: list[Difference]) -> str:
    """The differences as a table of text."""
    cells = [HEADER, *(cells_of(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def cells_of(row: Difference) -> tuple[str, ...]:
    """A difference as text."""
    p = f"{row.p:.4f}" if row.p >= 0.0001 else "< 0.0001"
    interval = f"{row.low:+.4f} to {row.high:+.4f}"
    return (row.metric, f"{row.a:.4f}", f"{row.b:.4f}", f"{row.difference:+.4f}", interval, p, f"{row.a_better:.3f}")


def plain(rows: list[Difference], test: McNemar, number: int, lost: int, disagreements: pd.DataFrame) -> str:
    """What is printed."""
    shared = f"{number} test reviews" + (f" (of which both were scored; {lost} others are left out)" if lost else "")
    parts = [shared, lines(rows), mcnemar_line(test)]
    if len(disagreements):
        parts.append("The surest disagreements:\n" + disagreements.to_string(index=False, float_format="%.3f", max_colwidth=80))
    return "\n\n".join(parts)


def mcnemar_line(test: McNemar) -> str:
    """McNemar's test in a sentence."""
    return f"Only A is right: {test.only_a}; only B is right: {test.only_b}; McNemar's exact test: p = {test.p:.4f}"


def page(options: argparse.Namespace, rows: list[Difference], test: McNemar | None, disagreements: pd.DataFrame) -> str:
    """The page, which needs nothing beside itself."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("sentiment", "."), autoescape=True)
    return environment.get_template(PAGE).render(
        a=options.a, b=options.b, header=HEADER, rows=[cells_of(row) for row in rows], differences=rows,
        mcnemar=mcnemar_line(test) if test else None, columns=list(disagreements),
        disagreements=disagreements.to_numpy().tolist(),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(guarded("compare", main, setup("compare")))
