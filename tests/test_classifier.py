"""A model folder, ready to classify: the same answer for a text alone and among others, and clear errors."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sentiment.calibration import probabilities
from sentiment.checkpoint import load_model, save_word_piece, word_piece
from sentiment.classifier import Classifier, Inference
from sentiment.errors import CheckpointError, TrainingError
from sentiment.files import read_json, write_json
from sentiment.params import Model
from sentiment.tokens import encode, ragged

TWO, THREE = ["negativo", "positivo"], ["negativo", "neutro", "positivo"]
SIZES = {"vocab_size": 300, "hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64, "dropout": 0.1}
TEXTS = [
    "Ótimo",
    "A panela amassou na primeira semana e a loja não trocou",
    "Comprei para a minha mãe, ela adorou",
    "razoável pelo preço, mas o cabo é curto demais para a tomada da cozinha e esquenta um pouco",
    "não recomendo",
    "Chegou rápido! Muito bem embalado, funcionou de primeira e o som é limpo",
    "Veio errado",
]


def build(folder, labels, **inference):
    """A model folder with random weights, large enough for texts to differ."""
    tokenizer = word_piece(TEXTS * 2, 300)
    torch.manual_seed(1)
    model = load_model(Model(checkpoint=None, revision=None, **SIZES), labels, tokenizer, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    save_word_piece(tokenizer, folder)
    fixed = {"max_length": 64, "case": "as_written", "text": ["review_text"], "temperature": 1.5, "threshold": 0.4}
    Inference(**fixed | inference).save(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("model") / "sentiment", TWO)


@pytest.fixture(scope="module")
def classifier(folder):
    return Classifier.load(folder, "cpu")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the model folder, of this test alone."""
    return shutil.copytree(folder, tmp_path / "sentiment")


def change_inference(folder, **values):
    path = folder / "inference.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_probabilities_do_not_depend_on_order_or_company(classifier):
    together = classifier.probabilities(TEXTS)
    assert together[:, 1].std() > 0.01
    order = np.random.default_rng(4).permutation(len(TEXTS))
    np.testing.assert_allclose(classifier.probabilities([TEXTS[k] for k in order]), together[order], atol=1e-5)
    np.testing.assert_allclose(np.concatenate([classifier.probabilities([text]) for text in TEXTS]), together, atol=1e-5)
    np.testing.assert_allclose(classifier.probabilities(TEXTS, batch_tokens=64), together, atol=1e-5)


def test_probabilities_sum_to_one_and_are_those_of_the_models_own_logits(classifier):
    found = classifier.probabilities(TEXTS)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found.sum(axis=1), 1)
    with torch.inference_mode():
        logits = [classifier.model(torch.tensor([ids])).logits[0].numpy() for ids in encode(classifier.tokenizer, TEXTS)]
    np.testing.assert_allclose(found, probabilities(np.stack(logits), 1.5), atol=1e-5)


def test_tokens_and_their_texts_have_the_same_probabilities(classifier):
    tokens = ragged(encode(classifier.tokenizer, TEXTS), np.zeros(len(TEXTS)), 300)
    np.testing.assert_allclose(classifier.token_probabilities(tokens), classifier.probabilities(TEXTS), atol=1e-5)


def test_no_texts_have_no_probabilities(classifier):
    values = classifier.probabilities([])
    assert values.shape == (0, 2)
    assert classifier.decide(values).tolist() == []


@pytest.mark.parametrize("text", ["", "   ", "😀😀", "漢字", "x" * 5000, "muito " * 3000])
def test_any_text_has_probabilities(classifier, text):
    values = classifier.probabilities([text])
    assert np.isfinite(values).all()
    assert values.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "written", ["  Comprei para a minha\tmãe,\r\n ela\u200b adorou ", "Comprei para a minha ma\u0303e, ela adorou"]
)
def test_texts_are_cleaned_as_in_training(classifier, written):
    found = classifier.probabilities([written, "Comprei para a minha mãe, ela adorou"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize("case", ["lower", "truecase"])
def test_the_case_is_that_in_which_the_model_was_trained(copy, classifier, case):
    change_inference(copy, case=case)
    written = {
        "lower": ["ÓTIMO, Não recomendo", "ótimo, não recomendo"],
        "truecase": ["ÓTIMO, NÃO RECOMENDO", "Ótimo, não recomendo"],
    }
    found = Classifier.load(copy, "cpu").probabilities(written[case])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    cased = classifier.probabilities(written[case])
    assert abs(cased[0] - cased[1]).max() > 1e-3


def test_emoji_are_read_as_in_training(copy, classifier):
    written = ["Veio errado 😡", "Veio errado rosto furioso"]
    as_they_are = classifier.probabilities(written)
    assert abs(as_they_are[0] - as_they_are[1]).max() > 1e-3
    change_inference(copy, emoji="pt")
    found = Classifier.load(copy, "cpu").probabilities(written)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    values = read_json(copy / "inference.json")
    del values["emoji"]  # of before there was such a key
    write_json(copy / "inference.json", values)
    np.testing.assert_allclose(Classifier.load(copy, "cpu").probabilities(written), as_they_are, atol=1e-5)


@pytest.mark.parametrize(("lowercase", "case"), [(True, "lower"), (False, "as_written")])
def test_a_model_of_before_there_was_a_case_is_read(copy, lowercase, case):
    values = read_json(copy / "inference.json")
    del values["case"]
    write_json(copy / "inference.json", values | {"lowercase": lowercase})
    assert Classifier.load(copy, "cpu").inference.case == case


def test_texts_are_cut_at_the_models_length(copy):
    change_inference(copy, max_length=8)
    short = Classifier.load(copy, "cpu")
    found = short.probabilities([TEXTS[3], TEXTS[3] + " mesmo assim voltaria a comprar"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_the_models_threshold_decides(classifier):
    assert classifier.decide(np.array([[0.65, 0.35], [0.6, 0.4], [0.55, 0.45]])).tolist() == [0, 1, 1]


def test_a_three_class_model_answers_with_its_three_labels(tmp_path):
    three = Classifier.load(build(tmp_path / "sentiment", THREE, threshold=None), "cpu")
    values = three.probabilities(TEXTS)
    assert three.labels == THREE
    assert values.shape == (len(TEXTS), 3)
    np.testing.assert_allclose(values.sum(axis=1), 1)
    assert three.decide(values).tolist() == values.argmax(axis=1).tolist()


def test_what_is_saved_is_loaded_again(folder, classifier, tmp_path):
    assert classifier.inference == Inference(64, "as_written", ["review_text"], 1.5, 0.4)
    assert classifier.labels == TWO
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in classifier.model.state_dict().items() if name in weights)
    classifier.model.save_pretrained(tmp_path)
    shutil.copy(folder / "tokenizer.json", tmp_path)
    classifier.inference.save(tmp_path)
    again = Classifier.load(tmp_path, "cpu")
    np.testing.assert_array_equal(again.probabilities(TEXTS), classifier.probabilities(TEXTS))


def test_a_loaded_model_has_dropout_off(classifier):
    np.testing.assert_array_equal(classifier.probabilities(TEXTS), classifier.probabilities(TEXTS))


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nada holds no model of this project"):
        Classifier.load(tmp_path / "nada", "cpu")


@pytest.mark.parametrize("name", ["inference.json", "config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_broken_folder_is_refused(copy, name, damage):
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if damage == "cut":
        (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError):
        Classifier.load(copy, "cpu")


def test_unknown_keys_of_another_version_are_refused(copy):
    change_inference(copy, idioma="pt")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Classifier.load(copy, "cpu")


def test_a_device_that_is_not_there_is_named(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="no cuda device here"):
        Classifier.load(folder, "cuda")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 100_000), ("max_length", "64"), ("case", "upper"), ("text", "review_text"), ("temperature", 0),
        ("temperature", "1.5"), ("temperature", float("nan")), ("threshold", "0.4"), ("emoji", "xx"), ("bias", [0.1, 0.2, 0.3]),
        ("bias", [0.1, None]), ("bias", 0.1),
    ],
)  # fmt: skip
def test_what_the_model_cannot_be_used_with_is_said(copy, name, value):
    inference = copy / "inference.json"
    inference.write_text(json.dumps(json.loads(inference.read_text()) | {name: value}))
    with pytest.raises(CheckpointError, match=rf"inference\.json: {name} cannot be"):
        Classifier.load(copy, "cpu")


def test_three_classes_have_no_threshold(tmp_path):
    folder = build(tmp_path / "sentiment", THREE, threshold=0.4)
    with pytest.raises(CheckpointError, match=r"inference\.json: threshold cannot be 0\.4"):
        Classifier.load(folder, "cpu")
