"""Packed rows, and that a packed forward gives each review's own logits."""

import numpy as np
import pytest
import torch

import models
from sentiment import engines
from sentiment.bert import PackedBert, can_pack
from sentiment.classifier import Classifier
from sentiment.packing import bins, capacity, pack, row_width


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return Classifier.load(models.model_folder(tmp_path_factory.mktemp("model")), "cpu")


def reviews(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 40, n) for n in lengths]


def alone(classifier, ids):
    with torch.inference_mode():
        return classifier.model(torch.from_numpy(ids)[None]).logits[0].numpy()


@pytest.mark.parametrize("seed", range(5))
def test_packed_logits_equal_those_of_each_review_alone(classifier, seed):
    lengths = [*np.random.default_rng(seed).integers(1, 33, 12).tolist(), 1, 32]
    texts = reviews(lengths, seed)
    with torch.inference_mode():
        found = PackedBert(classifier.model).eval()(*(torch.from_numpy(part) for part in pack(texts)))[: len(texts)].numpy()
    np.testing.assert_allclose(found, [alone(classifier, ids) for ids in texts], atol=2e-5)


def test_every_review_is_in_one_bin_and_no_bin_is_over_budget():
    lengths = np.random.default_rng(0).integers(1, 300, 500).tolist()
    found = bins(lengths, 256)
    assert sorted(index for row in found for index in row) == list(range(500))
    for row in found:
        assert len(row) == 1 or sum(lengths[k] for k in row) <= 256
        assert len(row) <= capacity(256)


def test_little_of_the_rows_is_padding():
    lengths = np.clip(np.random.default_rng(0).lognormal(3.3, 0.75, 2000), 3, 256).astype(int).tolist()
    found = bins(lengths, 256)
    assert sum(lengths) / sum(row_width(sum(lengths[k] for k in row)) for row in found) > 0.97


def test_rows_have_few_widths():
    assert {row_width(n) for n in range(1, 385)} == set(range(32, 385, 32))
    assert row_width(385) == 512


def test_a_row_of_shortest_reviews_has_a_place_for_each():
    row = pack(reviews([1] * 64))
    assert len(row.first) == 64
    assert len(row.input_ids) == 256


def test_only_bert_classifiers_can_be_packed(classifier):
    assert can_pack(classifier.model)
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=50, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    assert not can_pack(DistilBertForSequenceClassification(config))


@pytest.mark.parametrize("text", ["4 2", "max", "3 100000", ""])
def test_the_containers_quota_limits_the_threads(tmp_path, monkeypatch, text):
    quota = tmp_path / "cpu.max"
    quota.write_text({"4 2": "200000 100000", "max": "max 100000", "3 100000": "50000 100000", "": ""}[text])
    monkeypatch.setattr(engines, "CGROUP_QUOTA", quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert engines.cores() == {"4 2": 2, "max": 8, "3 100000": 1, "": 8}[text]
