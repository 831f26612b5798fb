"""params.yaml: what is shipped loads, and whatever is wrong in it stops with the key's name."""

from copy import deepcopy
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from sentiment import params
from sentiment.errors import ParamsError

SHIPPED = Path(__file__).parent.parent / "params.yaml"


def changed(key, value):
    """The shipped parameters as a dict, one key of them changed or added."""
    values = deepcopy(YAML(typ="safe", pure=True).load(SHIPPED))
    section = values
    *path, name = key.split(".")
    for part in path:
        section = section[part]
    section[name] = value
    return values


def test_the_shipped_file_loads_with_every_section():
    settings = params.load(SHIPPED)
    assert settings.download.source == "data/sample/reviews.csv"
    assert settings.prepare.labels == {"negativo": [1, 2], "positivo": [4, 5]}
    assert settings.train.lr == 3e-4


@pytest.mark.parametrize("written", ["3e-05", "3.0e-5", "0.00003"])
def test_a_number_as_dvc_writes_it_is_a_number(tmp_path, written):
    path = tmp_path / "params.yaml"
    text = SHIPPED.read_text(encoding="utf-8")
    assert "  lr: 3.0e-4 " in text
    path.write_text(text.replace("  lr: 3.0e-4 ", f"  lr: {written} "), encoding="utf-8")
    assert params.load(path).train.lr == 3e-5


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.taxa", 1, ["train.taxa is not a parameter"]),
        ("treino", {}, ["treino is not a parameter"]),
        ("train.lr", "abc", ["train.lr", "number", "'abc'"]),
        ("train.lr", -1, ["train.lr", "greater than 0", "-1"]),
        ("train.lr", float("nan"), ["train.lr", "nan"]),
        ("train.epochs", -1, ["train.epochs", "-1"]),
        ("train.epochs", 2.5, ["train.epochs", "integer", "2.5"]),
        ("train.epochs", True, ["train.epochs", "True"]),
        ("prepare.labels", {"low": [1], "high": [5]}, ["prepare.labels", "class low", "rename it"]),
        ("train.device", "tpu", ["train.device", "'cuda'", "'tpu'"]),
        ("train.batch_tokens", 255, ["train.batch_tokens (255)", "tokenize.max_length (256)"]),
        ("evaluate.batch_tokens", 255, ["evaluate.batch_tokens (255)", "tokenize.max_length (256)"]),
        ("train.class_weights", {"negativo": 2.0}, ["train.class_weights", "negativo, positivo"]),
        ("train.class_weights", {"negativo": -2.0, "positivo": 1.0}, ["train.class_weights.negativo", "-2.0"]),
        ("download.sha256", "a1b2", ["download.sha256", "64 hexadecimal digits", "'a1b2'"]),
        ("download.sha256", "g" * 64, ["download.sha256", "64 hexadecimal digits", "g" * 64]),
        ("download.source", None, ["download.source", "None"]),
        ("prepare.text", "review_text", ["prepare.text", "list", "'review_text'"]),
        ("prepare.text", [], ["prepare.text", "[]"]),
        ("prepare.labels", {"positivo": [4, 5]}, ["prepare.labels", "at least two classes"]),
        ("prepare.labels", {"ruim": [1, 2, 3], "bom": [3, 4]}, ["prepare.labels", "rating 3", "ruim", "bom"]),
        ("prepare.labels", {"ruim": [2], "bom": [2.0, 5]}, ["prepare.labels", "rating 2", "ruim", "bom"]),
        ("prepare.labels", {"ruim": [], "bom": [5]}, ["prepare.labels.ruim", "[]"]),
        ("prepare.labels", {"ruim": ["um"], "bom": [5]}, ["prepare.labels.ruim", "'um'"]),
        ("tokenize.emoji", "br", ["tokenize.emoji", "'pt'", "'br'"]),
        ("prepare.test", 0.85, ["prepare.validation and test together"]),
        ("model.heads", 3, ["model.hidden_size (256)", "heads (3)"]),
        ("cross_validation.folds", 1, ["cross_validation.folds", "greater than or equal to 2", "1"]),
        ("promote.stage", "Produção", ["promote.stage", "'Produção'"]),
    ],
)
def test_a_wrong_value_is_refused_by_its_key_and_value(key, value, words):
    with pytest.raises(ParamsError) as error:
        params.check(changed(key, value))
    assert [word for word in words if word not in str(error.value)] == []
    assert "params.yaml" in str(error.value)


def test_every_wrong_value_is_named_at_once():
    values = changed("train.lr", -1)
    values["prepare"]["validation"] = 2
    with pytest.raises(ParamsError, match=r"(?s)(?=.*train\.lr)(?=.*prepare\.validation)"):
        params.check(values)


def test_a_missing_key_is_named():
    values = changed("train.lr", 1e-4)
    del values["train"]["seed"]
    with pytest.raises(ParamsError, match=r"train\.seed is missing"):
        params.check(values)


def test_a_checksum_counts_in_either_case():
    assert params.check(changed("download.sha256", "AB" * 32)).download.sha256 == "ab" * 32


@pytest.mark.parametrize("weights", [None, "balanced", {"negativo": 2.0, "positivo": 1}])
def test_class_weights_are_none_balanced_or_one_a_class(weights):
    assert params.check(changed("train.class_weights", weights)).train.class_weights == weights


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train: [1, 2", "not valid YAML"),
        (b"train: {lr: 1, lr: 2}", "not valid YAML"),
        ("prepare: avaliação".encode("latin-1"), "not valid YAML"),
        (b"", "holds no sections"),
        (b"- train", "holds no sections"),
    ],
)
def test_a_file_that_holds_no_parameters_is_refused(tmp_path, content, words):
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ParamsError, match=words):
        params.load(path)


def test_a_missing_file_says_where_to_run(tmp_path):
    with pytest.raises(ParamsError, match="run from the repository's root"):
        params.load(tmp_path / "params.yaml")


def test_what_is_averaged_is_not_cross_validated():
    values = changed("train.ensemble", ["v1.0.0", "v1.1.0"])
    values["cross_validation"]["folds"] = 5
    with pytest.raises(ParamsError, match=r"train.ensemble trains no model.*set one of them to null"):
        params.check(values)
