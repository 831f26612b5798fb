"""The whole pipeline by `dvc repro` and `dvc exp run`, with a tiny model and a small source."""

import csv
import html
import io
import json

import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from sentiment import ensemble
from sentiment.files import read_json
from sentiment.registry import Registry

STAGES = ["download", "prepare", "audit", "tokenize", "train", "cross_validate", "evaluate", "promote", "report"]
UP_TO_DATE = "Data and pipelines are up to date."


@pytest.fixture
def trained(trained_project, tmp_path, copy_of):
    """The project after one `dvc repro`, for this test alone."""
    return copy_of(trained_project, tmp_path / "project")


def pipeline(repository):
    return YAML(typ="safe").load(repository.path / "dvc.yaml")


def files(folder):
    """The content of all files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_one_command_runs_every_stage_and_promotes_the_model(trained_project):
    places = [trained_project.first_run.find(f"Running stage '{name}'") for name in STAGES]
    assert -1 not in places
    assert places == sorted(places)
    assert trained_project.decision()["verdict"] == "promoted"
    assert trained_project.tags() == {"sentiment@v1.0.0", "sentiment#production#1"}


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do(trained):
    done = trained.run("dvc", "repro")
    assert UP_TO_DATE in done.stdout
    assert "Running stage" not in done.stdout
    assert trained.git("status", "--porcelain") == ""


@pytest.mark.slow
def test_a_run_leaves_no_file_that_git_neither_tracks_nor_ignores(trained_project):
    assert trained_project.git("show", "--diff-filter=A", "--name-only", "--format=", "HEAD") == ""


@pytest.mark.slow
def test_every_metrics_file_is_there_and_metrics_stay_small(trained_project):
    stages = pipeline(trained_project)["stages"].values()
    names = [name for stage in stages for each in stage.get("metrics", []) for name in each]
    assert len(names) == 8
    for name in names:
        assert json.loads((trained_project.path / name).read_text(encoding="utf-8"))
    assert sum(map(len, files(trained_project.path / "metrics").values())) < 200_000


@pytest.mark.slow
def test_every_plot_is_drawn_from_data_that_is_there(trained):
    done = trained.run("dvc", "plots", "show", "--out", "drawn")
    page = (trained.path / "drawn" / "index.html").read_text(encoding="utf-8")
    plots = pipeline(trained)["plots"]
    assert "failed" not in done.stderr.lower()
    assert len(plots) == 10
    for plot in plots:
        (name,) = plot
        assert f'"{name}"' in page
        for path in plot[name]["y"]:
            assert (trained.path / path).stat().st_size


@pytest.mark.slow
def test_a_wrong_parameter_stops_the_run_by_its_name_and_production_stays(trained, tmp_path):
    before = production(trained, tmp_path / "before")
    for setting, says in (
        ("train.lr=abc", "train.lr must be a valid number (it is 'abc')"),
        ("train.lr=-1", "train.lr must be greater than 0 (it is -1)"),
    ):
        done = trained.run("dvc", "exp", "run", "--set-param", setting, check=False)
        assert done.returncode != 0
        assert says in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
    assert production(trained, tmp_path / "after") == before


def production(repository, folder):
    """The files of the production model."""
    repository.run("dvc", "artifacts", "get", ".", "sentiment", "--stage", "production", "--out", str(folder))
    assert "model.safetensors" in files(folder)
    return files(folder)


@pytest.fixture
def prepared(project):
    """The project with its first two stages run."""
    project.run("dvc", "repro", "prepare")
    return project


def test_a_changed_source_runs_the_pipeline_again(prepared):
    source = prepared.path / "data" / "sample" / "reviews.csv"
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    source.write_text("".join(lines[:-5]), encoding="utf-8")
    done = prepared.run("dvc", "repro", "prepare")
    assert "Running stage 'download'" in done.stdout
    assert "Running stage 'prepare'" in done.stdout
    assert json.loads((prepared.path / "metrics" / "data.json").read_text(encoding="utf-8"))["rows"] == len(lines) - 1 - 5


def test_a_repository_that_was_moved_runs_on(prepared, tmp_path):
    prepared.path = prepared.path.rename(tmp_path / "moved")
    assert UP_TO_DATE in prepared.run("dvc", "repro", "prepare").stdout


@pytest.mark.slow
def test_the_report_opens_offline_and_shows_texts_only_when_asked_to(trained):
    page = (trained.path / "metrics" / "report.html").read_text(encoding="utf-8")
    texts = pq.read_table(trained.path / "data" / "prepared" / "test.parquet")["text"].to_pylist()
    shown = [text for text in texts if html.escape(text) in page or text in page]
    decision = trained.decision()
    assert "http" not in page
    assert f"{decision['verdict'].capitalize()}</span>: " in page
    assert all(each["gate"].replace("'", "&#39;") in page for each in decision["gates"])
    assert shown == []
    trained.set(evaluate__show_texts=True)
    trained.run("dvc", "repro", "--single-item", "report")
    page = html.unescape((trained.path / "metrics" / "report.html").read_text(encoding="utf-8"))
    assert any(text in page for text in texts)


@pytest.mark.slow
def test_folds_are_a_row_of_the_experiments_and_a_section_of_the_report(trained):
    settings = [f"--set-param={value}" for value in ("cross_validation.folds=2", "train.epochs=1")]
    trained.run("dvc", "exp", "run", "--name", "two-folds", *settings, "cross_validate")
    shown = trained.run("dvc", "exp", "show", "--csv").stdout
    row = next(row for row in csv.DictReader(io.StringIO(shown)) if row["Experiment"] == "two-folds")
    found = json.loads((trained.path / "metrics" / "cross_validation.json").read_text(encoding="utf-8"))
    assert row["cross_validation.folds"] == "2"
    assert float(row["f1_macro_mean"]) == found["f1_macro_mean"] > 0
    assert float(row["f1_macro_deviation"]) == found["f1_macro_deviation"] > 0
    assert "Cross-validation" not in (trained.path / "metrics" / "report.html").read_text(encoding="utf-8")
    trained.run("dvc", "repro", "--single-item", "report")
    page = (trained.path / "metrics" / "report.html").read_text(encoding="utf-8")
    assert "Cross-validation" in page
    assert f"<td>{found['f1_macro_mean']:.4f}</td>" in page


@pytest.mark.slow
def test_a_versions_test_reviews_come_with_label_and_prediction(trained_project, inside):
    inside(trained_project)
    registry = Registry.open(trained_project.path)
    found = registry.test_reviews(registry.find("production"))
    labelled = found[found["label"].notna()]
    assert set(found) >= {"text", "label", "prediction"}
    assert set(labelled["label"]) == {"negativo", "positivo"}
    assert labelled["prediction"].notna().all()
    assert found["text"].notna().all()
    assert 0 < len(labelled) < len(found)


@pytest.mark.slow
def test_two_experiments_are_averaged_evaluated_and_judged_like_one_model(trained):
    trained.run("dvc", "exp", "run", "--name", "outra", "--set-param", "train.seed=7", "train")
    trained.run("dvc", "exp", "run", "--set-param", "train.ensemble=[v1.0.0,outra]")
    metadata = read_json(trained.path / "models/sentiment/metadata.json")
    assert [each["model"] for each in metadata["members"]] == ["v1.0.0", "outra"]
    assert ensemble.is_ensemble(trained.path / "models/sentiment")
    assert len({each["sha256"] for each in metadata["members"]}) == 2
    assert trained.decision()["verdict"] in ("promoted", "kept")
    done = trained.run(
        "python", "-m", "sentiment.predict", "data/sample/reviews.csv", "--model", "models/sentiment", "--output", "scored.csv"
    )
    assert "Traceback" not in done.stderr
    failed = trained.run("dvc", "exp", "run", "--set-param", "train.ensemble=[v1.0.0,v9.9.9]", "train", check=False)
    assert "names v9.9.9, whose model is not to be had" in failed.stdout + failed.stderr
