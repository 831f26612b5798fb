"""A model folder that classifies, and files scored with it."""

import gzip
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import models
from sentiment import conversion, predict, selection, sources
from sentiment.classifier import Classifier
from sentiment.engines import Choice
from sentiment.errors import CheckpointError, DataError, ProjectError

ROOT = Path(__file__).resolve().parent.parent
ADDED = ["sentiment", "score", "probability_negativo", "probability_positivo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.model_folder(tmp_path_factory.mktemp("model"), temperature=2.0, threshold=0.4)


@pytest.fixture(scope="module")
def classifier(folder):
    return Classifier.load(folder, "cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of engines and their choices, of this test alone."""
    monkeypatch.setattr(conversion, "CACHE", tmp_path / "engines")
    return tmp_path / "engines"


@pytest.fixture
def converted(cache, folder, classifier):
    """The model's folder in the cache after OpenVINO in fp32 was chosen for it."""
    converted = conversion.folder_of(cache, folder)
    with conversion.locked(converted):
        conversion.convert(classifier, converted, "openvino", "fp32", [])
        conversion.write_choice(converted, "auto", Choice("openvino", "fp32", why="foi a mais rápida"))
    return converted


@pytest.fixture
def measured(monkeypatch):
    """The calls of selection.choose, which chooses torch at once; from the fifth review on an input is large."""
    calls = []

    def choose(model, converted, engine, reviews, threads=None):
        print("a progress bar")  # noqa: T201
        calls.append((model, engine, reviews))
        return Choice("torch", "fp32", why="foi medido")

    monkeypatch.setattr(selection, "choose", choose)
    monkeypatch.setattr(predict, "LARGE", 5)
    return calls


@pytest.fixture
def table(tmp_path):
    """A file of reviews, one of them without text, in each format."""
    texts, labels = models.reviews(50)
    frame = pd.DataFrame({"id": range(50), "text": texts, "stars": labels.astype(float)})
    frame.loc[7, "text"] = None
    frame.to_csv(tmp_path / "in.csv", index=False, sep=";")
    frame.to_parquet(tmp_path / "in.parquet", index=False)
    frame.to_json(tmp_path / "in.jsonl", orient="records", lines=True, force_ascii=False)
    return frame


def command(folder, source, output, *options):
    predict.main([str(source), "--output", str(output), "--model", str(folder), "--device", "cpu", *options])


def run(folder, tmp_path, source, output, *options):
    command(folder, tmp_path / source, tmp_path / output, *options)
    readers = {"csv": pd.read_csv, "parquet": pd.read_parquet, "jsonl": lambda path: pd.read_json(path, lines=True)}
    return readers[output.split(".")[1]](tmp_path / output)


def test_probabilities_do_not_depend_on_order_or_company(classifier):
    texts, _ = models.reviews(40)
    together = classifier.probabilities(texts)
    assert together.sum(axis=1) == pytest.approx(1)
    assert classifier.probabilities(texts[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    assert classifier.probabilities([texts[3]])[0] == pytest.approx(together[3], abs=1e-5)


def test_texts_are_cleaned_as_in_training(classifier):
    one, same = classifier.probabilities(["veio quebrado", " veio\u0000 \n\tquebrado "])
    assert one == pytest.approx(same)


def test_the_models_own_threshold_decides(classifier):
    assert classifier.decide(np.array([[0.61, 0.39], [0.59, 0.41]])).tolist() == [0, 1]


def test_a_three_class_model_answers_three(tmp_path):
    labels = ["negativo", "neutro", "positivo"]
    three = Classifier.load(models.model_folder(tmp_path, labels), "cpu")
    assert three.labels == labels
    assert three.probabilities(["veio quebrado"]).shape == (1, 3)


@pytest.mark.parametrize("broken", ["inference.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_model_folder_says_so(tmp_path, broken):
    models.model_folder(tmp_path)
    (tmp_path / broken).unlink()
    with pytest.raises(CheckpointError):
        Classifier.load(tmp_path, "cpu")


@pytest.mark.parametrize("output", ["out.csv", "out.parquet", "out.jsonl"])
@pytest.mark.parametrize("source", ["in.csv", "in.parquet", "in.jsonl"])
def test_every_format_keeps_rows_and_order_and_gains_columns(folder, classifier, tmp_path, table, source, output):
    scored = run(folder, tmp_path, source, output)
    assert list(scored) == [*table, *ADDED]
    assert scored["id"].astype(int).tolist() == list(range(50))
    assert scored.loc[7, ADDED].isna().all()
    expected = classifier.probabilities(table["text"].dropna().tolist())
    assert scored["probability_positivo"].dropna().to_numpy(float) == pytest.approx(expected[:, 1], abs=1e-5)
    told = scored["sentiment"].dropna().tolist()
    assert told == [classifier.labels[k] for k in classifier.decide(expected)]


def test_many_chunks_are_scored_as_one(folder, tmp_path, table, monkeypatch):
    whole = run(folder, tmp_path, "in.csv", "whole.csv")
    monkeypatch.setattr(predict, "CHUNK_ROWS", 7)
    pd.testing.assert_frame_equal(run(folder, tmp_path, "in.csv", "chunks.csv"), whole)


def test_a_text_file_is_a_review_a_line_on_standard_output(folder, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("veio quebrado\n\nadorei o produto\n", encoding="utf-8")
    predict.main([str(tmp_path / "in.txt"), "--model", str(folder), "--device", "cpu"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["veio quebrado", "", "adorei o produto"]
    assert rows[1]["sentiment"] is None
    assert rows[0]["score"] == rows[0][f"probability_{rows[0]['sentiment']}"]


@pytest.mark.parametrize("output", ["out.csv.gz", "out.tsv", "out.tsv.gz", "out.jsonl.gz"])
def test_an_output_is_what_its_name_says(folder, tmp_path, table, output):
    command(folder, tmp_path / "in.csv", tmp_path / output)
    command(folder, tmp_path / "in.csv", tmp_path / "plain.csv")
    expected = list(sources.rows(tmp_path / "plain.csv", "csv"))
    if "jsonl" in output:
        found = [
            (line + 1, {name: "" if value is None else str(value) for name, value in row.items()})
            for line, row in sources.rows(tmp_path / output, "jsonl")
        ]
    else:
        found = list(sources.rows(tmp_path / output, "csv"))
        opener = gzip.open if output.endswith("gz") else open
        with opener(tmp_path / output, "rt", encoding="utf-8") as file:
            assert ("\t" in file.readline()) == ("tsv" in output)
    assert [row["id"] for _, row in found] == [row["id"] for _, row in expected]
    assert [row["sentiment"] for _, row in found] == [row["sentiment"] for _, row in expected]


def test_parquet_in_gzip_is_refused(folder, tmp_path, table):
    with pytest.raises(DataError, match=r"name the output \.parquet"):
        command(folder, tmp_path / "in.csv", tmp_path / "o.parquet.gz")


def test_texts_that_parquet_holds_as_bytes_are_read_as_utf_8(folder, tmp_path, table):
    as_bytes = table.assign(text=[value.encode() if isinstance(value, str) else None for value in table["text"]])
    as_bytes.to_parquet(tmp_path / "bytes.parquet")
    table.to_parquet(tmp_path / "strings.parquet")
    for name in ("bytes", "strings"):
        command(folder, tmp_path / f"{name}.parquet", tmp_path / f"{name}.out.parquet")
    found, expected = (pd.read_parquet(tmp_path / f"{name}.out.parquet") for name in ("bytes", "strings"))
    pd.testing.assert_frame_equal(found[ADDED], expected[ADDED])
    assert found["text"].tolist() == as_bytes["text"].tolist()
    as_bytes.assign(text=b"\xe7").to_parquet(tmp_path / "bytes.parquet")
    with pytest.raises(DataError, match="row 1: column text holds bytes that are not UTF-8"):
        command(folder, tmp_path / "bytes.parquet", tmp_path / "o.parquet")


@pytest.mark.parametrize("output", ["o.csv", "o.jsonl", "o.parquet"])
@pytest.mark.parametrize("source", ["none.csv", "none.parquet", "none.jsonl"])
def test_a_file_without_reviews_is_refused_and_leaves_no_output(folder, tmp_path, source, output):
    empty = pd.DataFrame({"id": [], "text": []})
    {"none.csv": lambda path: empty.to_csv(path, index=False), "none.parquet": empty.to_parquet,
     "none.jsonl": lambda path: path.write_text("")}[source](tmp_path / source)  # fmt: skip
    with pytest.raises(DataError, match="holds no reviews"):
        command(folder, tmp_path / source, tmp_path / output)
    assert not (tmp_path / output).exists()


def test_a_missing_column_is_named_and_leaves_no_output(folder, tmp_path, table):
    with pytest.raises(DataError, match="title"):
        predict.main([str(tmp_path / "in.csv"), "--output", str(tmp_path / "o.csv"), "--model", str(folder), "--text", "title"])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".o", "o"))] == []


def test_a_malformed_line_in_the_middle_leaves_no_output(folder, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "veio quebrado"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        run(folder, tmp_path, "in.jsonl", "out.csv")
    assert not (tmp_path / "out.csv").exists()


def values(scored):
    """The probabilities that were written, without the rows that have none."""
    return scored[ADDED[2:]].dropna().to_numpy(float)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino"])
def test_every_engine_gives_the_answers_of_torch_in_fp32(folder, classifier, tmp_path, table, engine, caplog):
    with caplog.at_level(logging.INFO, "sentiment"):
        scored = run(folder, tmp_path, "in.csv", "out.csv", "--engine", engine)
    assert f"{engine} in fp32 on the CPU (nothing was measured" in caplog.text
    expected = classifier.probabilities(table["text"].dropna().tolist())
    assert values(scored) == pytest.approx(expected, abs=1e-4)
    assert scored["sentiment"].dropna().tolist() == [classifier.labels[k] for k in classifier.decide(expected)]


@pytest.mark.parametrize("engine", ["auto", "openvino"])
def test_a_kept_choice_scores_and_loads_no_torch(folder, classifier, converted, tmp_path, table, engine):
    arguments = [str(tmp_path / "in.csv"), "--output", str(tmp_path / "out.csv"), "--model", str(folder)]
    code = f"""
import sys, logging
from pathlib import Path
from sentiment import conversion, predict
logging.basicConfig(level=logging.INFO)
conversion.CACHE = Path({str(converted.parent)!r})
predict.main([*{arguments}, "--device", "cpu", "--engine", {engine!r}])
print(*{{"torch", "transformers", "sklearn"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
    assert "openvino in fp32 on the CPU (foi a mais rápida)" in done.stderr
    expected = classifier.probabilities(table["text"].dropna().tolist())
    assert values(pd.read_csv(tmp_path / "out.csv")) == pytest.approx(expected, abs=1e-4)


def test_a_kept_choice_is_not_measured_again_whatever_the_input(folder, converted, tmp_path, table, measured):
    run(folder, tmp_path, "in.parquet", "out.parquet")
    assert measured == []


def test_a_kept_choice_of_another_engine_is_not_the_one_asked_for(folder, converted):
    choice, where = predict.choose("onnxruntime", str(folder), folder, 1)
    assert (choice.engine, choice.precision, where) == ("onnxruntime", "fp32", converted / "quick")


def test_a_graph_that_cannot_be_read_is_an_error_and_no_reason_for_torch(folder, converted, tmp_path, table):
    (converted / "fp32.xml").write_text("<net")
    with pytest.raises(CheckpointError, match="remove that folder"):
        run(folder, tmp_path, "in.csv", "out.csv")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_an_engine_of_the_cpu_is_refused_on_another_device(folder, tmp_path, table, device):
    with pytest.raises(ProjectError, match="openvino computes on the CPU alone; add --device cpu"):
        run(folder, tmp_path, "in.csv", "out.csv", "--engine", "openvino", "--device", device)


def test_without_a_gpus_files_torch_is_not_asked_for_one(monkeypatch):
    monkeypatch.setattr(predict, "pick_device", lambda _: pytest.fail("torch is imported"))
    monkeypatch.setattr(predict, "GPU_FILES", ())
    monkeypatch.setattr(sys, "platform", "linux")
    assert predict.on_cpu("auto")
    assert not predict.on_cpu("cuda")


@pytest.mark.parametrize("source", ["in.csv", "in.parquet", "in.jsonl"])
def test_engines_are_measured_once_for_a_large_input(folder, tmp_path, table, cache, measured, source, caplog):
    with caplog.at_level(logging.INFO, "sentiment"):
        run(folder, tmp_path, source, "out.csv")
        run(folder, tmp_path, source, "out.csv")
    assert measured == [(folder, "auto", None)]
    assert caplog.text.count("engines are measured first") == 1
    assert conversion.read_choice(conversion.folder_of(cache, folder), "auto").why == "foi medido"


def test_what_measuring_prints_does_not_stand_among_the_rows(folder, tmp_path, table, measured, capsys):
    predict.main([str(tmp_path / "in.jsonl"), "--model", str(folder), "--device", "cpu"])
    told = capsys.readouterr()
    assert len([json.loads(line) for line in told.out.splitlines()]) == 50
    assert "a progress bar" in told.err


def test_nothing_is_measured_for_a_small_input(folder, tmp_path, table, measured, monkeypatch):
    monkeypatch.setattr(predict, "LARGE", 51)
    run(folder, tmp_path, "in.parquet", "out.csv")
    assert measured == []


def test_standard_input_is_not_known_to_be_large():
    assert predict.expected("-", predict.Reviews(iter(()), "text")) == 0


def test_a_version_is_measured_on_its_own_reviews(promoted, inside, monkeypatch, tmp_path):
    inside(promoted)
    monkeypatch.setattr(selection, "choose_once", lambda *arguments: arguments)
    _, _, engine, registry, version = predict.measure("auto", "v1.0.0", tmp_path, tmp_path)
    assert (engine, registry.root, version.name) == ("auto", promoted.path.resolve(), "v1.0.0")
    assert predict.measure("auto", str(tmp_path), tmp_path, tmp_path)[3:] == (None, None)


def test_only_a_bert_is_measured_unless_an_engine_is_asked_for(folder, tmp_path, measured, cache):
    other = models.model_folder(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "distilbert"}))
    choice, _ = predict.choose("auto", str(other), other, 10**6)
    assert (choice.engine, choice.precision, measured) == ("torch", "fp32", [])
    predict.choose("auto", str(folder), folder, 10**6)
    assert len(measured) == 1
