"""Averages of models: what they answer, that every engine answers so, and which models are not averaged."""

import shutil

import numpy as np
import pytest
import torch
from scipy.special import softmax

from models import model_folder, reviews, settings
from sentiment import conversion, engines, members
from sentiment.classifier import Classifier
from sentiment.engines import Choice
from sentiment.errors import CheckpointError, TrainingError
from sentiment.files import read_json, write_json
from sentiment.members import Member

TEMPERATURES = (0.5, 1.5, 3.0)
BIASES = (None, [-0.5, 0.5], [0.3, -0.3])
DATA = {"sha256": "a" * 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three models of the same tokenizer, with random weights large enough that they disagree."""
    made = []
    for seed, (temperature, bias) in enumerate(zip(TEMPERATURES, BIASES, strict=True)):
        chosen = settings()
        fixed = {"temperature": temperature, "bias": bias, "text": chosen.prepare.text}
        folder = model_folder(tmp_path_factory.mktemp("member"), seed=seed, **fixed)
        classifier = Classifier.load(folder, "cpu")
        with torch.no_grad():
            classifier.model.classifier.weight.mul_(200)
        classifier.model.save_pretrained(folder)
        facts = {"labels": ["negativo", "positivo"], "data": DATA, "params": chosen.model_dump(), "training_seconds": 1.0}
        write_json(folder / "metadata.json", facts)
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def averaged(folders, tmp_path_factory):
    """The folder of the average of the three."""
    target = tmp_path_factory.mktemp("average") / "folder"
    model = members.average([Member(str(k), folder) for k, folder in enumerate(folders)], ["negativo", "positivo"])
    model.save_pretrained(target)
    for name in ("tokenizer.json", "inference.json"):
        shutil.copyfile(folders[0] / name, target / name)
    write_json(target / "inference.json", read_json(target / "inference.json") | {"temperature": 1.0, "bias": None})
    return target


@pytest.fixture(scope="module")
def expected(folders):
    """Texts, and the mean of what the three say of them."""
    texts = reviews(60, seed=5)[0]
    each = [Classifier.load(folder, "cpu").probabilities(texts) for folder in folders]
    assert np.abs(each[0] - each[1]).max() > 0.1
    return texts, np.mean(each, axis=0)


def test_it_answers_with_the_mean_of_the_calibrated_probabilities(averaged, expected):
    texts, values = expected
    np.testing.assert_allclose(Classifier.load(averaged, "cpu").probabilities(texts), values, atol=1e-5)


def test_one_of_before_there_was_a_bias_is_read(averaged, expected, tmp_path):
    texts, values = expected
    shutil.copytree(averaged, tmp_path / "old")
    config = read_json(tmp_path / "old/config.json")
    assert config.pop("biases")[1] == [-0.5, 0.5]
    write_json(tmp_path / "old/config.json", config)
    assert np.abs(Classifier.load(tmp_path / "old", "cpu").probabilities(texts) - values).max() > 0.01


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_it_reads_padded_and_packed_batches(averaged, expected, packed):
    from sentiment import bert, classifier
    from sentiment.feed import Feed
    from sentiment.tokens import encode, ragged

    texts, values = expected
    loaded = Classifier.load(averaged, "cpu")
    rows = encode(loaded.tokenizer, texts)
    feed = Feed(ragged(rows, np.zeros(len(texts), np.int16), loaded.tokenizer.get_vocab_size()), loaded.device, 0, packed)
    out = classifier.logits(bert.reader(loaded.model, packed).eval(), feed, feed.in_order(256), 2)
    np.testing.assert_allclose(softmax(out.numpy(), axis=1), values, atol=1e-5)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime", "torch"])
def test_every_engine_answers_so(averaged, expected, engine, tmp_path):
    texts, values = expected
    loaded = Classifier.load(averaged, "cpu")
    conversion.convert(loaded, tmp_path, engine, "fp32", [])
    ready = engines.load(averaged, tmp_path, Choice(engine, "fp32", why=""))
    ids = [np.asarray(loaded.tokenizer.encode(text).ids, np.int64) for text in texts]
    np.testing.assert_allclose(softmax(ready.logits(ids), axis=1), values, atol=1e-4)


def test_transformers_does_not_take_it_for_one_of_its_own(averaged):
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(ValueError, match="sentiment-ensemble"):
        AutoModelForSequenceClassification.from_pretrained(averaged, local_files_only=True)


def test_a_broken_one_is_refused(averaged, tmp_path):
    shutil.copytree(averaged, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot be loaded.*dvc checkout"):
        Classifier.load(tmp_path / "broken", "cpu")


def changed(folder, target, name, **values):
    """A member with other values in one of its files."""
    shutil.copytree(folder, target)
    write_json(target / name, read_json(target / name) | values)
    return target


def test_members_that_belong_together_pass(folders):
    members.check([Member(str(k), each) for k, each in enumerate(folders)], settings(), folders[0] / "tokenizer.json", DATA)


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("metadata.json", {"labels": ["positivo", "negativo"]}, "list of classes"),
        ("metadata.json", {"data": {"sha256": "b" * 64}}, "data"),
        ("metadata.json", {"params": {"prepare": {"test": 0.3}}}, "split of the data"),
        ("inference.json", {"max_length": 16}, "way to read texts"),
        ("inference.json", {"emoji": "en"}, "way to read texts"),
    ],
)
def test_a_member_of_another_kind_is_refused_by_name(folders, tmp_path, name, values, what):
    other = changed(folders[1], tmp_path / "other", name, **values)
    found = [Member("v1.0.0", folders[0]), Member("v1.1.0", other)]
    with pytest.raises(TrainingError, match=f"names v1.1.0, which has another {what}"):
        members.check(found, settings(), folders[0] / "tokenizer.json", DATA)


def test_a_member_with_another_tokenizer_is_refused(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(TrainingError, match="names 0, which has another tokenizer"):
        members.check([Member("0", folders[0])], settings(), tmp_path / "tokenizer.json", DATA)


def test_an_ensemble_is_no_member(averaged, folders):
    with pytest.raises(TrainingError, match="is an ensemble itself"):
        members.check([Member("v2.0.0", averaged)], settings(), folders[0] / "tokenizer.json", DATA)


def test_another_engine_than_torch_can_be_asked_for(averaged):
    from sentiment import predict

    assert predict.can_convert(averaged)
