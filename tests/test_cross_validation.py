"""Cross-validation: folds that share neither product nor text, honest numbers of them, and a run that resumes."""

import csv
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

import models
from sentiment import cross_validation, folds, tokens
from sentiment.errors import DataError
from sentiment.files import digest, read_json
from stages import cross_validate

ROOT = Path(__file__).parents[1]
NAMES = ["negativo", "positivo"]
HEAVY = {"torch", "transformers", "sklearn", "scipy", "pandas", "numpy"}


def names(number, products=60):
    """The names that reviews of some products go by; every tenth has no product, but a text."""
    reviews = pd.DataFrame({"review_id": map(str, range(number)), "product_id": [f"p{k % products}" for k in range(number)]})
    reviews.loc[::10, "product_id"] = None
    return folds.names(reviews, "product_id")


def write_params(settings, count):
    values = settings.model_dump()
    values["cross_validation"]["folds"] = count
    YAML().dump(values, Path("params.yaml"))


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Tiny parameters of three folds, in a folder with train and validation reviews prepared and tokenized, and no test split."""
    logging.getLogger("sentiment").setLevel(logging.INFO)
    tiny = models.settings(epochs=2, checkpoint_every=3)
    monkeypatch.chdir(tmp_path)
    write_params(tiny, 3)
    for folder in ("data/prepared", "data/tokens"):
        Path(folder).mkdir(parents=True)
    texts, _ = models.reviews()
    tokenizer = models.tokenizer_in(Path("data/tokens/tokenizer"), texts)
    for seed, (split, number) in enumerate({"train": 120, "validation": 60}.items()):
        texts, labels = models.reviews(number, seed)
        ids, products = [f"{split}-{k}" for k in range(number)], [f"{split}-{k % 40}" for k in range(number)]
        table = pd.DataFrame({"review_id": ids, "text": texts, "label": labels, "product_id": products})
        table.to_parquet(f"data/prepared/{split}.parquet")
        rows = tokens.ragged(tokens.encode(tokenizer, texts), labels, tokenizer.get_vocab_size())
        rows.save(Path(f"data/tokens/{split}.safetensors"))
    return tiny


def test_no_product_and_no_text_stands_in_two_parts_of_a_fold():
    of = names(900)
    parts = [np.select(fold, [0, 1, 2], -1) for fold in folds.cut(of, 4, 0.2)]
    assert all(set(part) == {0, 1, 2} for part in parts)
    assert all(pd.Series(part).groupby(of).nunique().eq(1).all() for part in parts)
    assert (np.sum([part == 2 for part in parts], axis=0) == 1).all()


def test_more_reviews_move_none():
    few, many = folds.cut(names(300), 5, 0.15), folds.cut(names(900), 5, 0.15)
    for before, after in zip(few, many, strict=True):
        assert all((a == b[:300]).all() for a, b in zip(before, after, strict=True))


def test_folds_of_what_the_split_left_are_of_like_size_and_validate_their_share():
    of = pd.Series([f"product:{k}" for k in range(8000)])
    left = of[[int.from_bytes(digest(name)) / 2**64 >= 0.2 for name in of]]
    for fold in folds.cut(left, 5, 0.15):
        assert fold.held_out.mean() == pytest.approx(0.2, abs=0.02)
        assert fold.validation.sum() / (~fold.held_out).sum() == pytest.approx(0.15, abs=0.02)


def test_every_review_is_trained_on_in_some_fold():
    plan = folds.cut(names(900), 3, 0.3)
    assert np.any([fold.train for fold in plan], axis=0).all()


def test_a_review_without_a_product_goes_by_its_text_and_numbers_stay_what_they_are(settings):
    for split, products in {"train": [7, None, 2**53 + 1], "validation": [8, 9, 10]}.items():
        table = pd.DataFrame({"review_id": [f"{split}{k}" for k in range(3)], "product_id": pd.array(products, "Int64")})
        table.to_parquet(f"data/prepared/{split}.parquet")
    found = folds.names(cross_validation.read("product_id"), "product_id")
    products = [f"product:{number}" for number in (8, 9, 10)]
    assert found.tolist() == ["product:7", "text:train1", f"product:{2**53 + 1}", *products]
    assert folds.names(cross_validation.read(None), None).tolist()[:2] == ["text:train0", "text:train1"]


def test_a_part_without_a_class_is_an_error_that_says_what_to_do():
    plan = folds.cut(names(300), 4, 0.2)
    labels = np.where(plan[2].held_out, 0, np.arange(300) % 2)
    with pytest.raises(DataError, match=r"held out of fold 3 has no review of class positivo.*cross_validation\.folds"):
        folds.check(plan, labels, NAMES)
    folds.check(plan, np.arange(300) // 2 % 2, NAMES)


def test_what_is_not_trained_on_is_sampled_to_the_shares_asked_for(settings):
    values = settings.model_dump()
    values["prepare"]["shares"] = {"negativo": 0.25, "positivo": 0.75}
    labels = np.concatenate([pd.read_parquet(f"data/prepared/{name}.parquet")["label"] for name in ("train", "validation")])
    before = cross_validation.planned(settings, 3, labels)
    after = cross_validation.planned(type(settings).model_validate(values), 3, labels)
    for whole, sampled in zip(before, after, strict=True):
        assert (whole.train == sampled.train).all()
        for part in ("validation", "held_out"):
            chosen = getattr(sampled, part)
            assert not (chosen & ~getattr(whole, part)).any()
            assert chosen.sum() >= 4
            assert labels[chosen].mean() == pytest.approx(0.75, abs=0.5 / chosen.sum() + 0.01)


def rows(*values):
    return [dict.fromkeys(folds.METRICS, value) for value in values]


def test_mean_and_deviation_are_numpys():
    values = np.random.default_rng(0).uniform(0.8, 0.95, 7)
    found = folds.summary(rows(*values))
    assert found["folds"] == 7
    assert found["f1_macro_mean"] == pytest.approx(np.mean(values), abs=1e-6)
    assert found["f1_macro_deviation"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)


def test_the_interval_is_the_corrected_resampled_t():
    found = folds.summary(rows(0.90, 0.92, 0.88, 0.91, 0.89))  # s² = 0.00025; t(4) at 0.975 is 2.776445, by the tables
    half = 2.776445 * (0.00025 * (1 / 5 + 1 / 4)) ** 0.5
    assert found["f1_mean_low"] == pytest.approx(0.9 - half, abs=2e-6)
    assert found["f1_mean_high"] == pytest.approx(0.9 + half, abs=2e-6)


def test_an_interval_ends_where_its_metric_does():
    found = folds.summary(rows(0.90, 0.99))
    assert (found["accuracy_mean_low"], found["accuracy_mean_high"]) == (0.0, 1.0)
    assert found["loss_mean_low"] == 0.0
    assert found["loss_mean_high"] > 1


def test_off_it_writes_that_it_is_and_imports_nothing_heavy(tmp_path):
    write = "from stages import cross_validate; cross_validate.main()"
    code = f"import sys; {write}; print(*sorted({HEAVY} & set(sys.modules)))"
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
    assert read_json(tmp_path / "metrics" / "cross_validation.json") == {"folds": 0}
    assert list(csv.DictReader((tmp_path / "metrics" / "plots" / "folds.csv").open())) == []


@pytest.fixture
def trainings(monkeypatch):
    """The reviews that each training of this test was given: (train, validation) as Tokens."""
    found, real = [], cross_validation.training.FineTuning

    def recorded(model, train, validation, *more):
        found.append((train, validation))
        return real(model, train, validation, *more)

    monkeypatch.setattr(cross_validation.training, "FineTuning", recorded)
    return found


def test_a_fold_is_scored_on_what_its_model_never_saw(settings, trainings, monkeypatch):
    for split, number in {"train": 120, "validation": 60}.items():  # every review says its product's number
        products = np.arange(number) % 40 + (5 if split == "train" else 50)
        table = pd.DataFrame({"review_id": [f"{split}-{k}" for k in range(number)], "product_id": products})
        table.to_parquet(f"data/prepared/{split}.parquet")
        rows = tokens.ragged([[2, product, 3] for product in products], np.arange(number) // 40 % 2, 300)
        rows.save(Path(f"data/tokens/{split}.safetensors"))
    scored, real = [], cross_validation.fitting.Classifier.token_probabilities
    monkeypatch.setattr(
        cross_validation.fitting.Classifier,
        "token_probabilities",
        lambda self, held_out, budget: (scored.append(held_out), real(self, held_out, budget))[1],
    )
    found = cross_validation.run(settings, 3)
    for (train, validation), held_out, row in zip(trainings, scored, found, strict=True):
        parts = [set(part.input_ids[1::3].tolist()) for part in (train, validation, held_out)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 80
        assert [len(train), len(validation), len(held_out)] == [row["train"], row["validation"], row["held_out"]]
    assert sum(map(len, scored)) == 180


def run_until(path):
    """Run the stage in a process that is killed as soon as a file of this pattern is there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "stages.cross_validate"], env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(Path().glob(path)):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_killed_run_goes_on_at_its_fold_to_the_same_numbers(settings, trainings, caplog):
    cross_validate.main()
    whole, table = read_json(cross_validate.METRICS), pd.read_csv(cross_validate.TABLE)
    assert not cross_validation.FOLDS.exists()
    assert len(trainings) == whole["folds"] == len(table) == 3
    assert whole["f1_macro_mean"] == pytest.approx(table["f1_macro"].mean(), abs=1e-6)
    assert whole["f1_macro_deviation"] == pytest.approx(table["f1_macro"].std(), abs=1e-6)
    assert table["f1_macro"].min() > 0.5
    cross_validate.METRICS.unlink()
    run_until("models/folds/2/checkpoint/step-*/progress.json")
    trainings.clear()
    with caplog.at_level(logging.INFO, "sentiment"):
        cross_validate.main()
    assert len(trainings) == 2
    assert "resumed at step" in caplog.text
    assert read_json(cross_validate.METRICS) == whole
    pd.testing.assert_frame_equal(pd.read_csv(cross_validate.TABLE), table)


def test_rows_of_other_parameters_are_not_taken_up(settings):
    mark = cross_validation.fingerprint(settings, 3)
    cross_validation.keep_only_rows_of(mark)
    (cross_validation.FOLDS / "1.json").write_text("{}")
    cross_validation.keep_only_rows_of(mark)
    assert (cross_validation.FOLDS / "1.json").is_file()
    others = [cross_validation.fingerprint(settings, 4)]
    changed = settings.model_copy(update={"train": settings.train.model_copy(update={"lr": 0.001})})
    others.append(cross_validation.fingerprint(changed, 3))
    pd.read_parquet("data/prepared/train.parquet").iloc[:-1].to_parquet("data/prepared/train.parquet")
    others.append(cross_validation.fingerprint(settings, 3))
    assert len({mark, *others}) == 4
    cross_validation.keep_only_rows_of(others[0])
    assert not (cross_validation.FOLDS / "1.json").exists()
