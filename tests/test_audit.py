"""The checks of the data before training: planted faults are found, sound data passes."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

import models
from sentiment import audit
from sentiment.errors import DataError
from stages import audit as stage

LABELS = {"negativo": [1, 2], "positivo": [4, 5]}
SHIPPED = Path(__file__).parents[1] / "params.yaml"


def reviews(number=600, seed=0, start=0):
    """Prepared reviews put together at random, each with a word of its own."""
    texts, labels = models.reviews(number, seed)
    return pd.DataFrame(
        {
            "review_id": [f"r{start + k}" for k in range(number)],
            "text": [f"{text} número {start + k} comprado na loja da rua {start + k}" for k, text in enumerate(texts)],
            "label": labels.astype("int8"),
            "rating": pd.array(np.where(labels == 1, 5.0, 1.0), "Float64"),
        }
    )


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [("text", " ", "text: empty"), ("label", 7, "label"), ("rating", 5.0, "another class"), ("review_id", "r1", "review_id")],
)
def test_a_row_that_is_not_as_it_has_to_be_is_named(column, value, words):
    frame = reviews(50)
    assert audit.schema_errors(frame, LABELS) == []
    frame.loc[frame.index[frame["label"] == 0][0], column] = value
    found = audit.schema_errors(frame, LABELS)
    assert found
    assert any(words in each for each in found)


def test_shuffled_labels_are_found_and_the_wrong_ones_are_listed():
    frame = reviews(1000)
    before, _ = audit.doubtful_labels(frame)
    rng = np.random.default_rng(0)
    wrong = rng.choice(frame.index, 100, replace=False)
    frame.loc[wrong, "label"] = 1 - frame.loc[wrong, "label"]
    share, rows = audit.doubtful_labels(frame)
    assert before < 0.02
    assert 0.07 < share < 0.13
    planted = set(frame.loc[wrong, "review_id"])
    assert len(planted & set(rows["review_id"])) > 80
    assert (rows["label"] != rows["suggested"]).mean() > 0.9


def test_test_reviews_put_into_training_with_a_word_changed_are_found():
    train, test = reviews(300), reviews(200, seed=1, start=1000)
    assert len(audit.near_duplicates(train, test, 0.8)) == 0
    copied = test.iloc[:40].assign(
        review_id=[f"copy{k}" for k in range(40)], text=test["text"].iloc[:40].str.repeat(2) + " aliás"
    )
    originals = test.assign(text=test["text"].str.repeat(2))
    found = audit.near_duplicates(pd.concat([train, copied]), originals, 0.8)
    assert set(found["review_id"]) >= set(test["review_id"].iloc[:36])
    assert set(found["train_review_id"]) <= set(copied["review_id"])


def test_texts_of_another_language_are_counted_and_short_ones_are_not():
    ours = ["O produto chegou antes do prazo e funciona muito bem, recomendo a todos."] * 8
    theirs = ["The product arrived late and it does not work at all, I want my money back."] * 2
    assert audit.foreign_share(pd.Series([*ours, *theirs, "Great product", "ok"]), "pt") == pytest.approx(0.2)
    assert audit.foreign_share(pd.Series(["ok"]), "pt") == 0.0


def test_drift_is_near_zero_for_like_data_and_large_for_other_data():
    before = reviews(800)
    alike = audit.drift(reviews(800, seed=3), before, 2)
    assert max(alike["class_share"], alike["length"]) < 0.1
    other = reviews(800, seed=4)
    other = other[(other["label"] == 1) | (np.arange(800) % 4 == 0)].assign(text=lambda frame: frame["text"] + " frete" * 20)
    moved = audit.drift(other, before, 2)
    assert moved["class_share"] > 0.2
    assert moved["length"] > 0.9
    words = audit.drift(before.assign(text="outro assunto inteiramente novo por aqui"), before, 2)
    assert words["vocabulary"] > 0.5


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the stage on three splits in an empty project; gives metrics/audit.json."""
    monkeypatch.chdir(tmp_path)

    def ran(train, **rules):
        values = YAML(typ="safe", pure=True).load(SHIPPED)
        values["audit"] |= rules
        Path("params.yaml").write_text(json.dumps(values), encoding="utf-8")
        stage.PREPARED.mkdir(parents=True, exist_ok=True)
        for name, frame in {"train": train, "validation": reviews(100, 5, 5000), "test": reviews(100, 6, 6000)}.items():
            frame.to_parquet(stage.PREPARED / f"{name}.parquet")
        stage.main()
        return json.loads(stage.METRICS.read_text())

    return ran


def test_sound_reviews_pass_and_leave_their_numbers(run):
    found = run(reviews(400))
    assert found["schema_errors"] == 0
    assert found["near_duplicate_share"] == 0
    assert found["smallest_class_share"] > 0.4
    assert {path.name for path in stage.DOUBTFUL.iterdir()} == {"labels.csv", "near_duplicates.csv"}


def with_wrong_labels(number):
    """Reviews of which every fourth has the wrong label, and the rating that belongs to it."""
    train = reviews(number)
    wrong = train.index[::4]
    train.loc[wrong, "label"] = 1 - train.loc[wrong, "label"]
    train["rating"] = pd.array(np.where(train["label"] == 1, 5.0, 1.0), "Float64")
    return train


def test_few_reviews_are_not_stopped_by_a_share_that_is_mostly_chance(run, caplog):
    assert run(with_wrong_labels(400))["doubtful_label_share"] > 0.04
    assert "audit.max_doubtful_labels bounds nothing here" in caplog.text


def test_a_finding_beyond_its_bound_stops_the_run_and_its_numbers_are_kept(run):
    train = with_wrong_labels(1900)
    with pytest.raises(
        DataError, match=r"doubtful_label_share is 0\.\d+ \(audit\.max_doubtful_labels 0\.04\): see data/doubtful/labels"
    ):
        run(train)
    assert json.loads(stage.METRICS.read_text())["doubtful_label_share"] > 0.04
    assert run(train, max_doubtful_labels=None)["doubtful_label_share"] > 0.04


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"min_class_share": 0.6}, "rarest class"),
        ({"language": "en"}, "not in en"),
        ({}, r"near_duplicate_share.*near_duplicates\.csv"),
    ],
)
def test_each_bound_is_looked_at(run, rules, words):
    train = reviews(200)
    if not rules:  # a tenth of the test split with a word more
        copied = reviews(100, 6, 6000).iloc[:20].assign(review_id=[f"copy{k}" for k in range(20)])
        train = pd.concat([train, copied.assign(text=copied["text"] + " aliás")], ignore_index=True)
    with pytest.raises(DataError, match=words):
        run(train, **rules)
