"""The prepare stage: what is kept, what is left out and why, and which split it goes to."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from sentiment import text
from sentiment.errors import DataError, ParamsError
from stages import prepare

SHIPPED = Path(__file__).parent.parent / "params.yaml"
SPLITS = ("train", "validation", "test")
REASONS = {"empty_text": 0, "no_rating": 0, "unmapped_rating": 0, "conflicting": 0, "duplicate": 0, "over_share": 0}
OPENINGS = ("Adorei", "Comprei", "Recebi ontem", "Já uso", "Devolvi", "Não troco")
ENDINGS = ("chegou cedo", "veio riscada", "a cor é linda", "faz muito barulho", "vale o preço", "durou pouco")


def reviews(count, seed=0):
    """Rows of `count` distinct reviews of count / 4 products, with 1 or 5 stars, as a CSV gives them: strings."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "product_id": [f"p{seed}-{i // 4}" for i in range(count)],
            "review_title": [f"Título {i}" for i in range(count)],
            "review_text": [f"{rng.choice(OPENINGS)} a panela {seed}-{i}: {rng.choice(ENDINGS)}." for i in range(count)],
            "overall_rating": rng.choice(["1", "5"], count),
        }
    )


def review(content, rating="5", product="p0-0", title=None):
    """One row as `reviews` has them."""
    return {"product_id": product, "review_title": title, "review_text": content, "overall_rating": rating}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the stage on a frame in an empty project; gives {train, validation, test, rejected} and metrics/data.json."""
    monkeypatch.chdir(tmp_path)

    def stage(frame, **settings):
        params = YAML(typ="safe", pure=True).load(SHIPPED)
        params["prepare"] |= settings
        Path("params.yaml").write_text(json.dumps(params), encoding="utf-8")  # JSON is YAML, in the order of the keys
        table = pa.Table.from_pandas(frame.assign(source_line=range(2, len(frame) + 2)), preserve_index=False)
        prepare.RAW.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata({"source": json.dumps({"source": "avaliacoes.csv"})}), prepare.RAW)
        prepare.main()
        frames = {name: pd.read_parquet(prepare.PREPARED / f"{name}.parquet") for name in (*SPLITS, "rejected")}
        return frames, json.loads(prepare.METRICS.read_text(encoding="utf-8"))

    return stage


@pytest.fixture
def product(run):
    """A product of `reviews` for each split."""
    frames, _ = run(reviews(200))
    return {name: frames[name]["product_id"].iloc[0] for name in SPLITS}


def with_rows(*rows):
    """The 200 reviews, with these rows before them."""
    return pd.concat([pd.DataFrame(rows), reviews(200)], ignore_index=True)


def kept(frames):
    """The rows of all splits, `split` among their columns."""
    return pd.concat([frames[name].assign(split=name) for name in SPLITS], ignore_index=True)


def test_every_row_is_kept_once_or_left_out_with_a_reason(run):
    frames, metrics = run(with_rows(review("Só ok", "3"), review(" ", "5"), review("Sem nota", None)))
    lines = pd.concat([kept(frames), frames["rejected"]])["source_line"]
    assert sorted(lines) == list(range(2, 205))
    assert metrics["rows"] == 203
    assert metrics["kept"] == 200
    assert metrics["rejected"] == REASONS | {"unmapped_rating": 1, "empty_text": 1, "no_rating": 1}
    assert metrics["source"] == "avaliacoes.csv"


def test_texts_are_cleaned_and_other_columns_kept(run):
    frames, _ = run(with_rows(review("  Na\u0303o\n\ngostei\x00 ", "1")))
    row = kept(frames).set_index("source_line").loc[2]
    assert (row["text"], row["label"], row["rating"], row["product_id"]) == ("Não gostei", 0, 1.0, "p0-0")


@pytest.mark.parametrize(
    ("rows", "reasons"),
    [
        ([review(None)], ["empty_text"]),
        ([review(" \u200b\n")], ["empty_text"]),
        ([review("Bom", None)], ["no_rating"]),
        ([review("Bom", " ")], ["no_rating"]),
        ([review("Bom", "3")], ["unmapped_rating"]),
        ([review("Bom", "4.5")], ["unmapped_rating"]),
        ([review(None, None)], ["empty_text"]),
        ([review("Bom", "5"), review("Bom", "1")], ["conflicting", "conflicting"]),
        ([review("Bom", "5"), review("Bom", "4")], [None, "duplicate"]),
        ([review("Bom", "5"), review("Bom", "3")], [None, "unmapped_rating"]),
        ([review("Bom", "5"), review("bom!!!", "5"), review("  BOM ", "1")], ["conflicting"] * 3),
    ],
)
def test_a_row_is_left_out_for_its_reason(run, rows, reasons):
    frames, _ = run(with_rows(*rows))
    found = frames["rejected"].set_index("source_line")["reason"].to_dict()
    assert found == {line: reason for line, reason in enumerate(reasons, 2) if reason}


@pytest.mark.parametrize("other", ["CHEGOU ANTES DO PRAZO", "chegou, antes do prazo!", " Chegou  antes\ndo prazo... "])
def test_other_case_and_punctuation_make_no_other_text(run, other):
    frames, metrics = run(with_rows(review("Chegou antes do prazo."), review(other)))
    assert frames["rejected"]["source_line"].tolist() == [3]
    assert metrics["rejected"] == REASONS | {"duplicate": 1}


def test_a_title_that_is_not_read_makes_no_other_text(run):
    _, metrics = run(with_rows(review("Muito boa", title="Amei"), review("Muito boa", title="Recomendo")))
    assert metrics["rejected"]["duplicate"] == 1


@pytest.mark.parametrize(("earlier", "held_out"), [("train", "test"), ("train", "validation"), ("validation", "test")])
def test_of_two_copies_the_held_out_one_is_kept(run, product, earlier, held_out):
    copies = [review("Igual em dois produtos", product=product[name]) for name in (earlier, held_out)]
    for rows in (copies, copies[::-1]):
        frames, _ = run(with_rows(*rows))
        assert frames["rejected"]["product_id"].tolist() == [product[earlier]]
        assert "Igual em dois produtos" in set(frames[held_out]["text"])


def messy(seed, count=400):
    """Reviews of which many share their text, some lack their product or rating."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "product_id": [f"p{i}" for i in rng.integers(0, 60, count)],
            "review_title": "x",
            "review_text": [f"{rng.choice(OPENINGS)}, {rng.choice(ENDINGS)} {i}" for i in rng.integers(0, 40, count)],
            "overall_rating": rng.choice(["1", "2", "3", "4", "5"], count, p=[0.04, 0.04, 0.02, 0.45, 0.45]),
        }
    )
    frame.loc[rng.random(count) < 0.1, "product_id"] = None
    return pd.concat([frame, reviews(200)], ignore_index=True)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_text_and_no_product_stands_in_two_splits(run, seed):
    frames, metrics = run(messy(seed))
    rows = kept(frames)
    assert rows["text"].map(text.key).is_unique
    assert rows["review_id"].is_unique
    assert rows.groupby("product_id")["split"].nunique().max() == 1
    assert metrics["rejected"]["duplicate"] > 0
    assert (metrics["texts_in_two_splits"], metrics["groups_in_two_splits"]) == (0, 0)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_more_reviews_move_none_from_test_to_train(run, seed):
    order = {"train": 0, "validation": 1, "test": 2}
    first = messy(seed)
    before = kept(run(first)[0]).set_index("review_id")["split"].map(order)
    more = pd.concat([messy(seed + 100), first]).sample(frac=1, random_state=seed)
    after = kept(run(more)[0]).set_index("review_id")["split"].map(order)
    both = before.index.intersection(after.index)
    assert len(both) > 200
    assert (after[both] >= before[both]).all()


def test_a_product_without_a_number_moves_no_other_product(run):
    """A column of whole numbers comes from Parquet as floats as soon as one is missing."""
    numbered = reviews(200).assign(product_id=pd.array([10**9 + i // 4 for i in range(200)], "Int64"))
    one_without = pd.DataFrame([review("Sem produto", product=pd.NA)]).astype({"product_id": "Int64"})
    before = kept(run(numbered)[0]).set_index("review_id")["split"]
    after = kept(run(pd.concat([numbered, one_without], ignore_index=True))[0]).set_index("review_id")["split"]
    assert after[before.index].equals(before)


def test_an_unnumbered_product_is_split_by_its_text(run):
    frames, _ = run(reviews(200).assign(product_id=None).astype({"product_id": "string"}))
    assert all(len(frames[name]) > 10 for name in SPLITS)


def test_without_a_group_column_reviews_are_split_by_their_text(run):
    frames, metrics = run(reviews(200).drop(columns="product_id"), group=None)
    assert all(len(frames[name]) > 10 for name in SPLITS)
    assert metrics["groups_in_two_splits"] == 0


def test_the_splits_have_about_the_shares_that_are_asked_for(run):
    _, metrics = run(reviews(4000), validation=0.1, test=0.3)
    share = {name: metrics["splits"][name]["reviews"] / 4000 for name in SPLITS}
    assert share == pytest.approx({"train": 0.6, "validation": 0.1, "test": 0.3}, abs=0.05)


def test_the_same_reviews_give_the_same_files(run):
    run(messy(1))
    first = {path.name: path.read_bytes() for path in prepare.PREPARED.iterdir()}
    run(messy(1))
    assert {path.name: path.read_bytes() for path in prepare.PREPARED.iterdir()} == first


def test_three_classes_are_numbered_in_the_order_of_the_labels(run):
    frame = reviews(300)
    frame["overall_rating"] = [str(1 + i % 5) for i in range(300)]
    frames, metrics = run(frame, labels={"positivo": [4, 5], "neutro": [3], "negativo": [1, 2]})
    rows = kept(frames)
    assert dict(zip(rows["rating"], rows["label"], strict=True)) == {4: 0, 5: 0, 3: 1, 1: 2, 2: 2}
    assert metrics["class_share"] == {"positivo": 0.4, "neutro": 0.2, "negativo": 0.4}
    balance = pd.read_csv(prepare.BALANCE)
    assert balance.groupby("label")["reviews"].sum().to_dict() == {"positivo": 120, "neutro": 60, "negativo": 120}
    assert set(balance["split"]) == set(SPLITS)


def test_numeric_ratings_in_any_spelling_are_one_rating(run):
    frame = reviews(200)
    spelled = frame["overall_rating"].where(frame.index % 2 == 0, frame["overall_rating"] + ".0")
    assert run(frame.assign(overall_rating=spelled))[1] == run(frame)[1]
    assert run(frame.assign(overall_rating=frame["overall_rating"].astype(int)))[1] == run(frame)[1]


def test_title_and_text_are_joined(run):
    rows = [review("Chegou  cedo", title="Amei "), review("Sem título", title=None), review(None, title="Só título")]
    frames, _ = run(with_rows(*rows), text=["review_title", "review_text"])
    texts = kept(frames).set_index("source_line")["text"]
    assert texts.loc[[2, 3, 4]].tolist() == ["Amei - Chegou cedo", "Sem título", "Só título"]


def test_lowercase_is_asked_for(run):
    frames, _ = run(with_rows(review("ÓTIMO Celular")), case="lower")
    assert "ótimo celular" in set(kept(frames)["text"])
    frames, _ = run(with_rows(review("ÓTIMO Celular")), case="as_written")
    assert "ÓTIMO Celular" in set(kept(frames)["text"])


def test_columns_named_as_the_stage_names_its_own_are_read(run):
    frame = reviews(200).rename(columns={"review_text": "text", "overall_rating": "label"})
    frames, _ = run(frame, text=["text"], rating="label")
    rows = kept(frames)
    assert dict(zip(rows["rating"], rows["label"], strict=True)) == {1: 0, 5: 1}
    assert set(rows["text"]) == set(frame["text"])


def test_a_column_named_as_the_one_that_says_why_a_row_is_left_out_breaks_nothing(run):
    frames, _ = run(with_rows(review("Mais ou menos", rating="3")).assign(reason="presente"))
    assert set(frames["rejected"]["reason"]) >= {"unmapped_rating"}
    assert "presente" not in set(frames["rejected"]["reason"])


@pytest.mark.parametrize("settings", [{"text": ["comentario"]}, {"rating": "comentario"}, {"group": "comentario"}])
def test_a_missing_column_is_named_with_those_that_are_there(run, settings):
    with pytest.raises(DataError, match=r"no column comentario; it has product_id, review_title, review_text, overall_rating:"):
        run(reviews(200), **settings)


@pytest.mark.parametrize("rating", ["cinco", "4,5", "5 estrelas", "nan"])
def test_a_rating_that_is_no_number_is_named_with_its_line(run, rating):
    frame = reviews(200)
    frame.loc[7, "overall_rating"] = rating
    with pytest.raises(DataError, match=f"line 9 of the source: overall_rating is '{rating}'"):
        run(frame)


def test_a_class_whose_ratings_the_source_lacks_is_named(run):
    with pytest.raises(DataError, match=r"positivo the ratings \[10\].*its ratings are 1, 5"):
        run(reviews(200), labels={"negativo": [1], "positivo": [10]})


def test_a_split_without_a_class_is_named(run, product):
    frame = reviews(200)
    frame.loc[frame["product_id"] != product["train"], "overall_rating"] = "5"
    frame.loc[frame["product_id"] == product["train"], "overall_rating"] = "1"
    with pytest.raises(DataError, match=r"the (test|validation) split has no review of class negativo"):
        run(frame)


def test_a_failure_leaves_nothing_half_written(run, monkeypatch):
    write, written = pd.DataFrame.to_parquet, []

    def fails_at_the_third(frame, path, **options):
        written.append(path)
        if len(written) == 3:
            raise OSError("no space left")
        write(frame, path, **options)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", fails_at_the_third)
    with pytest.raises(OSError, match="no space left"):
        run(reviews(200))
    assert list(prepare.PREPARED.parent.iterdir()) == [prepare.RAW.parent]
    assert not prepare.METRICS.exists()


def test_a_failure_leaves_the_earlier_splits_as_they_were(run):
    run(reviews(200))
    first = {path.name: path.read_bytes() for path in prepare.PREPARED.iterdir()}
    with pytest.raises(DataError):
        run(reviews(200, seed=1).assign(overall_rating="5"))
    assert {path.name: path.read_bytes() for path in prepare.PREPARED.iterdir()} == first


def test_validation_and_test_are_sampled_to_the_shares_that_are_asked_for_and_training_is_not(run):
    frame = reviews(4000)
    plain, _ = run(frame)
    frames, metrics = run(frame, shares={"negativo": 0.2, "positivo": 0.8})
    for name in ("validation", "test"):
        assert (frames[name]["label"] == 0).mean() == pytest.approx(0.2, abs=0.005)
        assert set(frames[name]["review_id"]) < set(plain[name]["review_id"])
        assert (frames[name]["label"] == 1).sum() == (plain[name]["label"] == 1).sum()
    pd.testing.assert_frame_equal(frames["train"], plain["train"])
    left = sum(len(plain[name]) - len(frames[name]) for name in ("validation", "test"))
    assert metrics["rejected"] == REASONS | {"over_share": left}


@pytest.mark.parametrize("shares", [{"negativo": 1.0}, {"negativo": 0.2, "positivo": 0.7}, {"ruim": 0.2, "bom": 0.8}])
def test_shares_that_are_not_of_the_classes_are_refused(run, shares):
    with pytest.raises(ParamsError, match=r"prepare\.shares[. ]"):
        run(reviews(50), shares=shares)
