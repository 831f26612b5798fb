"""Which engine serves a model: measured, kept beside the model's hash, and never below fp32 unless the answers stay."""

import json

import numpy as np
import pandas as pd
import pytest

import models
from sentiment import conversion, engines, selection
from sentiment.classifier import Classifier
from sentiment.engines import Choice
from sentiment.errors import CheckpointError, DataError, RegistryError
from sentiment.registry import Version

SMALL = ("openvino", "onnxruntime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.model_folder(tmp_path_factory.mktemp("model"), temperature=2.0, threshold=0.5)


@pytest.fixture(scope="module")
def classifier(folder):
    return Classifier.load(folder, "cpu")


@pytest.fixture
def labelled(classifier):
    """700 reviews whose labels and fp32 predictions are the model's own answers, and 60 without a label."""
    texts, _ = models.reviews(760)
    answers = [classifier.labels[k] for k in classifier.decide(classifier.probabilities(texts))]
    frame = pd.DataFrame({"text": texts, "label": answers, "prediction": answers})
    frame.loc[700:, ["label", "prediction"]] = None
    return frame


def tokens(classifier, number=40):
    return selection.tokenized(classifier, pd.Series(models.reviews(number, seed=3)[0]))


@pytest.mark.parametrize(("engine", "precision"), [("openvino", "fp32"), ("onnxruntime", "fp32"), ("torch", "fp32")])
def test_every_engine_gives_the_models_own_logits_in_fp32(folder, classifier, tmp_path, engine, precision):
    ids = tokens(classifier)
    conversion.convert(classifier, tmp_path, engine, precision, [])
    loaded = engines.load(folder, tmp_path, Choice(engine, precision, why=""))
    expected = engines.Torch(classifier).logits(ids)
    np.testing.assert_allclose(loaded.logits(ids), expected, atol=1e-4)


@pytest.mark.parametrize("engine", SMALL)
def test_int8_is_near_the_models_own_logits_and_is_not_them(folder, classifier, tmp_path, engine):
    ids = tokens(classifier)
    conversion.convert(classifier, tmp_path, engine, "int8", ids)
    found = engines.load(folder, tmp_path, Choice(engine, "int8", why="")).logits(ids)
    expected = engines.Torch(classifier).logits(ids)
    assert np.abs(found - expected).max() < 0.1
    assert not np.array_equal(found, expected)


def test_dropout_is_off_in_a_converted_model(folder, classifier, tmp_path):
    conversion.convert(classifier, tmp_path, "openvino", "fp32", [])
    loaded = engines.load(folder, tmp_path, Choice("openvino", "fp32", why=""))
    np.testing.assert_array_equal(loaded.logits(tokens(classifier)), loaded.logits(tokens(classifier)))


def test_without_labelled_reviews_fp32_is_chosen(folder, tmp_path):
    choice = selection.choose(folder, tmp_path, "openvino", None)
    assert (choice.precision, choice.macro_f1_change) == ("fp32", None)
    assert "no labelled reviews" in choice.why


def test_too_few_labelled_reviews_are_none(folder, tmp_path, labelled):
    choice = selection.choose(folder, tmp_path, "openvino", labelled[:400])
    assert (choice.precision, choice.labelled) == ("fp32", 400)


def speeds(**values):
    return {selection.Candidate("openvino", precision): speed for precision, speed in values.items()}


class Fixed:
    """An engine whose logits are those of certain classes."""

    def __init__(self, classes):
        self.classes = classes

    def logits(self, reviews):
        return np.eye(2)[self.classes] * 10


def chosen(classifier, wrong, predictions=True):
    """The choice among int8, which gives `wrong` of 1,000 reviews the other class, and fp32, which is slower and right."""
    labels = np.arange(1000) % 2
    int8 = labels.copy()
    int8[:wrong] ^= 1
    answers = {"int8": Fixed(int8), "fp32": Fixed(labels)}
    reviews = selection.Labelled([np.ones(3)] * 1000, labels, labels if predictions else None)
    return selection.fastest_that_keeps(
        speeds(int8=100.0, fp32=30.0), reviews, lambda each: answers[each.precision], classifier, []
    )


@pytest.mark.parametrize("predictions", [True, False])
def test_int8_serves_only_if_macro_f1_changes_by_less_than_0_001(classifier, predictions):
    kept, refused = chosen(classifier, 0, predictions), chosen(classifier, 2, predictions)
    assert (kept.precision, kept.macro_f1_change, kept.labels_changed, kept.reviews) == ("int8", 0, 0, 1000)
    assert refused.precision == "fp32"
    assert next(each for each in refused.measured if each["precision"] == "int8")["macro_f1_change"] == pytest.approx(-0.002)


def test_the_fastest_candidate_is_tried_first(classifier):
    choice = selection.fastest_that_keeps(
        speeds(int8=10.0, fp32=30.0), None, lambda _: pytest.fail("nothing has to be loaded"), classifier, []
    )
    assert (choice.precision, choice.reviews_per_second) == ("fp32", 30.0)


def test_a_choice_is_read_again_and_another_machine_measures_anew(folder, tmp_path, monkeypatch):
    choice = selection.choose(folder, tmp_path, "onnxruntime", None)
    conversion.write_choice(tmp_path, "onnxruntime", choice)
    kept = conversion.read_choice(tmp_path, "onnxruntime")
    assert (kept.engine, kept.precision, kept.why) == (choice.engine, choice.precision, choice.why)
    assert conversion.read_choice(tmp_path, "auto") is None
    monkeypatch.setattr(conversion, "machine", lambda _: {"cpu": "another"})
    assert conversion.read_choice(tmp_path, "onnxruntime") is None


def test_for_another_number_of_threads_an_engine_is_chosen_anew_and_both_choices_stay(classifier, tmp_path):
    others, all_of_them = engines.cores() + 1, engines.cores()
    conversion.convert(classifier, tmp_path, "openvino", "fp32", [])
    conversion.write_choice(tmp_path, "auto", Choice("openvino", "fp32", why="todos"))
    assert selection.known(tmp_path, "auto", threads=others) is None
    conversion.convert(classifier, tmp_path, "onnxruntime", "fp32", [])
    conversion.write_choice(tmp_path, "auto", Choice("onnxruntime", "fp32", why="outros"), others)
    assert selection.known(tmp_path, "auto", threads=others).why == "outros"
    assert selection.known(tmp_path, "auto", threads=all_of_them).why == selection.known(tmp_path, "auto").why == "todos"


def test_a_choice_whose_graph_is_gone_or_whose_file_is_broken_is_none(folder, tmp_path):
    conversion.write_choice(tmp_path, "openvino", selection.choose(folder, tmp_path, "openvino", None))
    (tmp_path / "fp32.bin").unlink()
    assert conversion.read_choice(tmp_path, "openvino") is None
    (tmp_path / "openvino.json").write_text('{"machine": ')
    assert conversion.read_choice(tmp_path, "openvino") is None


def test_graphs_that_no_choice_needs_are_removed(folder, classifier, tmp_path):
    for engine in SMALL:
        conversion.convert(classifier, tmp_path, engine, "fp32", [])
    conversion.write_choice(tmp_path, "auto", Choice("onnxruntime", "fp32", why="assim"))
    assert {path.name for path in tmp_path.iterdir()} == {"auto.json", "fp32.onnx"}


def test_the_folder_of_conversions_changes_with_weights_tokenizer_and_inference(tmp_path):
    model = models.model_folder(tmp_path / "model")
    seen = {conversion.folder_of(tmp_path, model)}
    for name in ("model.safetensors", "tokenizer.json", "inference.json", "config.json"):
        with (model / name).open("ab") as file:
            file.write(b" ")
        seen.add(conversion.folder_of(tmp_path, model))
    assert len(seen) == 5


def test_a_model_that_is_no_bert_is_served_by_torch(tmp_path):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    folder = models.model_folder(tmp_path / "model")
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    labels = {0: "negativo", 1: "positivo"}
    config = DistilBertConfig(vocab_size=vocabulary, dim=32, n_layers=1, n_heads=2, hidden_dim=64, id2label=labels)
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    assert selection.choose(folder, tmp_path, "auto", None).engine == "torch"
    with pytest.raises(CheckpointError, match="openvino serves BERT classifiers, and this is a distilbert; use torch"):
        selection.choose(folder, tmp_path, "openvino", None)


def test_a_broken_graph_is_an_error_that_says_what_to_do(folder, tmp_path):
    (tmp_path / "fp32.xml").write_text("<net")
    with pytest.raises(CheckpointError, match="remove that folder, and it is made anew"):
        engines.load(folder, tmp_path, Choice("openvino", "fp32", why=""))


def test_reviews_without_the_columns_are_refused(tmp_path):
    pd.DataFrame({"texto": ["bom"]}).to_parquet(tmp_path / "reviews.parquet")
    with pytest.raises(DataError, match="has no column label, text"):
        selection.read_reviews(tmp_path / "reviews.parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        selection.read_reviews(tmp_path / "nada.parquet")


class Versions:
    """A registry that has certain test reviews of every version, or none."""

    def __init__(self, reviews=None):
        self.reviews = reviews

    def test_reviews(self, version):
        if self.reviews is None:
            raise RegistryError("they are not in DVC's cache")
        return self.reviews


def test_a_version_is_measured_once_and_on_its_own_test_reviews(folder, tmp_path, labelled):
    version = Version("v1.0.0", "0" * 40)
    made = selection.choose_once(folder, tmp_path, "onnxruntime", Versions(labelled), version)
    assert {each["precision"] for each in made.measured} == {"int8", "fp32"}
    again = selection.choose_once(folder, tmp_path, "onnxruntime", Versions(), version)
    assert (again.engine, again.precision, again.reviews) == (made.engine, made.precision, made.reviews)


def test_a_version_without_its_test_reviews_is_measured_in_fp32(folder, tmp_path, caplog):
    made = selection.choose_once(folder, tmp_path, "onnxruntime", Versions(), Version("v1.0.0", "0" * 40))
    assert {each["precision"] for each in made.measured} == {"fp32"}
    assert "v1.0.0 has no test reviews here" in caplog.text


def test_a_choice_without_labelled_reviews_is_made_again_where_some_are_given(tmp_path):
    conversion.write_choice(tmp_path, "auto", Choice("torch", "fp32", why="assim"))
    assert selection.known(tmp_path, "auto").why == "assim"
    assert selection.known(tmp_path, "auto", tmp_path / "reviews.parquet") is None


def test_a_choice_of_fp32_with_labelled_reviews_is_not_made_again(tmp_path):
    conversion.write_choice(tmp_path, "auto", Choice("torch", "fp32", why="assim", labelled=700))
    assert selection.known(tmp_path, "auto", tmp_path / "reviews.parquet").why == "assim"


def test_no_usage_statistics_are_sent():
    import sys

    assert sys.modules["openvino_telemetry"] is None


def test_the_command_measures_and_keeps_the_choice(folder, tmp_path, labelled):
    labelled.to_parquet(tmp_path / "reviews.parquet")
    selection.main(
        [str(folder), "--reviews", str(tmp_path / "reviews.parquet"), "--cache", str(tmp_path), "--engine", "onnxruntime"]
    )
    kept = conversion.read_choice(conversion.folder_of(tmp_path, folder), "onnxruntime")
    assert {each["precision"] for each in kept.measured} == {"int8", "fp32"}
