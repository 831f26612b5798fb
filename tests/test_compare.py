"""The command that compares two models: what it finds, what it prints, and what it says when it cannot."""

import re

import pandas as pd
import pytest

from sentiment import compare

COMMAND = ("python", "-m", "sentiment.compare")


def rows(printed):
    """The printed table: metric to (A, B, A - B)."""
    found = {}
    for line in printed.splitlines():
        cells = re.split(r"  +", line)
        if len(cells) == len(compare.HEADER) and re.fullmatch(r"[-+.\d]+", cells[1]):
            found[cells[0]] = tuple(float(cell) for cell in cells[1:4])
    return found


def test_two_versions_are_compared_by_name_and_by_stage(promoted_twice):
    done = promoted_twice.run(*COMMAND, "v1.1.0", "v1.0.0")
    assert rows(done.stdout)["f1_macro"] == pytest.approx((0.9, 0.8, 0.1), abs=1e-4)
    assert "80 test reviews" in done.stdout
    assert "Only A is right: 8; only B is right: 0; McNemar's exact test: p = 0.0078" in done.stdout
    assert promoted_twice.run(*COMMAND, "production", "v1.0.0").stdout == done.stdout


def test_a_revision_and_the_workspace_are_compared(repository):
    first = repository.git("rev-parse", "HEAD")
    repository.set(train__lr=0.7)
    repository.run("dvc", "repro")
    done = repository.run(*COMMAND, first, "workspace")
    assert rows(done.stdout)["accuracy"] == pytest.approx((0.8, 0.7, 0.1), abs=1e-4)


def test_an_experiment_is_compared_by_its_name(repository):
    repository.run("dvc", "exp", "run", "--name", "pior", "-S", "train.lr=0.6")
    done = repository.run(*COMMAND, "production", "pior", "--html", "page.html", "--most", "3", "--texts")
    assert rows(done.stdout)["accuracy"] == pytest.approx((0.8, 0.6, 0.2), abs=1e-4)
    page = (repository.path / "page.html").read_text(encoding="utf-8")
    assert "production (A) against pior (B)" in page
    assert page.count("<tr") == 1 + 7 + 1 + 3
    assert "http" not in page
    assert "produto" in page


def test_texts_are_shown_only_when_they_are_asked_for(promoted_twice):
    assert "produto" not in promoted_twice.run(*COMMAND, "v1.1.0", "v1.0.0").stdout


def test_several_seeds_a_side_are_compared_by_their_means(tmp_path, monkeypatch, capsys):
    tables = {name: table(right) for name, right in {"a1": 36, "a2": 37, "a3": 38, "b1": 30, "b2": 31, "b3": 29}.items()}
    monkeypatch.setattr(compare, "predictions", tables.__getitem__)
    monkeypatch.setattr("sys.argv", ["compare", "a1,a2,a3", "b1,b2,b3"])
    compare.main()
    printed = capsys.readouterr().out
    assert "3 models against 3" in printed
    assert rows(printed)["accuracy"] == pytest.approx((0.925, 0.75, 0.175), abs=1e-4)
    found = {row.metric: row for row in compare.over_seeds([tables[f"a{k}"] for k in "123"], [tables[f"b{k}"] for k in "123"])}
    half = 2.7764 * (2 * 0.025**2 / 3) ** 0.5  # Welch's interval: t of 4 degrees of freedom, a deviation of 0.025 on each side
    assert (found["accuracy"].low, found["accuracy"].high) == pytest.approx((0.175 - half, 0.175 + half), abs=1e-4)


def table(right):
    """40 reviews of two classes, of which the first `right` are right."""
    labels = ["negativo", "positivo"] * 20
    said = [label if k < right else {"negativo": "positivo", "positivo": "negativo"}[label] for k, label in enumerate(labels)]
    chances = {f"probability_{name}": [0.8 if each == name else 0.2 for each in said] for name in ("negativo", "positivo")}
    return pd.DataFrame({"review_id": [f"r{k}" for k in range(40)], "label": labels, "prediction": said} | chances)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nenhum", "workspace"), "nenhum has no data/predictions/test.parquet.*gto show"),
        (("v9.9.9", "workspace"), "v9.9.9 has no"),
        (("v1.0.0,v1.1.0", "v1.0.0"), "at least two models on each side"),
    ],
)
def test_what_cannot_be_compared_is_said_in_a_sentence(promoted_twice, arguments, words):
    done = promoted_twice.run(*COMMAND, *arguments, check=False)
    assert done.returncode == 1
    assert re.search(words, done.stderr)
    assert "Traceback" not in done.stderr


def test_a_cache_that_lost_the_predictions_is_said(repository):
    for found in (repository.path / ".dvc" / "cache" / "files").rglob("*"):
        if found.is_file():
            found.chmod(0o644)
            found.unlink()
    done = repository.run(*COMMAND, "v1.0.0", "workspace", check=False)
    assert done.returncode == 1
    assert "dvc pull" in done.stderr
