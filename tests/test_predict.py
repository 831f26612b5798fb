"""A model folder that classifies, and files scored with it."""

import json

import numpy as np
import pandas as pd
import pytest

import models
from sentiment import predict
from sentiment.classifier import Classifier
from sentiment.errors import CheckpointError, DataError

ADDED = ["sentiment", "score", "probability_negativo", "probability_positivo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.model_folder(tmp_path_factory.mktemp("model"), temperature=2.0, threshold=0.4)


@pytest.fixture(scope="module")
def classifier(folder):
    return Classifier.load(folder, "cpu")


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


def run(folder, tmp_path, source, output):
    predict.main([str(tmp_path / source), "--output", str(tmp_path / output), "--model", str(folder), "--device", "cpu"])
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


def test_a_missing_column_is_named_and_leaves_no_output(folder, tmp_path, table):
    with pytest.raises(DataError, match="title"):
        predict.main([str(tmp_path / "in.csv"), "--output", str(tmp_path / "o.csv"), "--model", str(folder), "--text", "title"])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".o", "o"))] == []


def test_a_malformed_line_in_the_middle_leaves_no_output(folder, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "veio quebrado"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        run(folder, tmp_path, "in.jsonl", "out.csv")
    assert not (tmp_path / "out.csv").exists()
