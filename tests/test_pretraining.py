"""Pre-training: what is hidden, what is learnt, and what is left to be fine-tuned."""

import json
import logging
import math
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, BertForMaskedLM

import models
from pretrain import corpus, tokenize
from pretrain import train as stage
from sentiment import checkpoint, pretraining, pretraining_models, pretraining_params, text, tokens
from sentiment.errors import CheckpointError, DataError, ParamsError
from sentiment.loop import accelerator_for, seed
from sentiment.params import Model

TINY = {"vocab_size": 300, "hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64}
WORDS = ["adorei", "bom", "excelente", "gostei", "péssimo", "quebrado"]
QUICK = {
    "sentiment_weight": 0.0,
    "dropout": 0.0,
    "device": "cpu",
    "precision": "fp32",
    "epochs": 3,
    "batch_tokens": 256,
    "log_every": 3,
    "checkpoint_every": 4,
    "lr": 0.003,
}


def settings(model=None, **train):
    """The shipped parameters made tiny."""
    values = pretraining_params.load().model_dump()
    values["model"] |= TINY | (model or {})
    values["tokens"]["max_length"] = 32
    values["train"] |= QUICK | train
    return pretraining_params.Params.model_validate(values)


def run_in(folder, model=None, **train):
    """A run that is ready to start in `folder`, its model, its tokenizer and what its points go to."""
    chosen, points = settings(model, **train), []
    texts, _ = models.reviews(300)
    tokenizer = models.tokenizer_in(folder / "tokenizer", texts)
    rows = [list(tokens.encode(tokenizer, part)) for part in (texts[:260], texts[260:])]
    splits = tuple(tokens.ragged(part, np.zeros(len(part)), tokenizer.get_vocab_size()) for part in rows)
    seed(0)
    base, module, packed = pretraining_models.build(chosen, tokenizer)
    ready = accelerator_for(chosen.train)
    loop = pretraining.Pretraining(
        base, module, pretraining.feeds(splits, 0, packed, ready[0].device), chosen.train, ready, folder / "run", "one",
        lambda *point: points.append(point),
    )  # fmt: skip
    return loop, tokenizer, points


@pytest.fixture
def vocabulary():
    """Ten tokens: 0 to 2 special (2 is [MASK]), 8 and 9 continue a word."""
    special, continues = torch.zeros(10, dtype=torch.bool), torch.zeros(10, dtype=torch.bool)
    special[:3], continues[8:] = True, True
    return pretraining.Vocabulary(2, special, continues, torch.zeros(10, dtype=torch.bool))


def test_whole_words_are_hidden_and_no_special_tokens(vocabulary):
    masking = pretraining.Masking(vocabulary)
    input_ids = torch.tensor([0, 3, 8, 9, 4, 5, 8, 1, 0, 6, 7, 1])
    words = [{1, 2, 3}, {4}, {5, 6}, {9}, {10}]
    torch.manual_seed(0)
    chosen = [set(masking.places(input_ids, 4).tolist()) for _ in range(200)]
    assert all(len(each) == 4 and not each & {0, 7, 8, 11} for each in chosen)
    assert all(sum(bool(each & word) and not word <= each for word in words) <= 1 for each in chosen)
    assert set().union(*chosen) == {1, 2, 3, 4, 5, 6, 9, 10}


def test_most_hidden_tokens_are_shown_as_mask_some_as_they_are_some_as_others(vocabulary):
    masking = pretraining.Masking(vocabulary)
    input_ids = torch.full((20_000,), 5)
    torch.manual_seed(0)
    shown = masking.hide_most(input_ids, torch.arange(10_000))
    shares = torch.bincount(shown[:10_000], minlength=10) / 10_000
    assert (shown[10_000:] == 5).all()
    assert shares[2].item() == pytest.approx(0.8 + 0.01, abs=0.02)
    assert shares[5].item() == pytest.approx(0.1 + 0.01, abs=0.02)


def test_tokens_are_drawn_by_their_probabilities():
    torch.manual_seed(0)
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).repeat(20_000, 1)
    shares = torch.bincount(pretraining.draw(logits), minlength=3) / 20_000
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.02)


@pytest.mark.parametrize("objective", ["mlm", "rtd"])
def test_it_learns_and_an_interrupted_run_ends_with_the_weights_of_a_whole_one(tmp_path, objective):
    whole, _, points = run_in(tmp_path / "whole", objective=objective)
    before = {name: value.clone() for name, value in whole.module.state_dict().items()}
    result = whole.run()
    name = {"mlm": "held_out_loss", "rtd": "held_out_generator_loss"}[objective]  # as it gets better, telling gets harder
    assert result.history[-1][name] < 0.9 * result.history[0][name]
    assert result.tokens == 3 * whole.feed.lengths.sum()
    assert any(not torch.equal(before[name], value) for name, value in whole.module.state_dict().items())
    first, _, _ = run_in(tmp_path / "cut", objective=objective)
    step = first.step

    def interrupting(rows):
        if first.progress.step == 7:  # and two more since the last line of the log
            signal.raise_signal(signal.SIGINT)
        return step(rows)

    first.step = interrupting
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second, _, again = run_in(tmp_path / "cut", objective=objective)
    assert second.run().tokens == result.tokens
    assert [step for step, _ in again] == [step for step, _ in points]
    assert saved(second.module) == saved(whole.module)


@pytest.fixture
def of_sentiment(tmp_path):
    """A run that names words of praise and complaint from [CLS]; its words are of the vocabulary that it has learnt."""
    return run_in(tmp_path, objective="mlm", sentiment_weight=0.5, sentiment_words=WORDS)


def test_words_of_sentiment_are_hidden_before_others(of_sentiment):
    loop, tokenizer, _ = of_sentiment
    masking, ids = loop.module.masking, torch.cat([loop.feed.batch(np.array([k])).inputs["input_ids"][0] for k in range(200)])
    said = masking.of_sentiment(ids)
    assert {tokenizer.id_to_token(number).lower() for number in ids[said].tolist()} == set(WORDS)
    torch.manual_seed(0)
    places = masking.places(ids, round(0.2 * len(ids)))
    assert said[places].sum() > 0.8 * said.sum()  # of all words a fifth
    assert masking.special[ids[places]].sum() == 0


def test_a_word_that_goes_on_is_none_of_sentiment(of_sentiment):
    masking = of_sentiment[0].module.masking
    word, more = masking.sentiment.nonzero()[0].item(), masking.continues.nonzero()[0].item()
    assert masking.of_sentiment(torch.tensor([word, more, word])).tolist() == [False, False, True]


def test_what_is_named_from_the_first_token_is_that_of_its_own_text(of_sentiment):
    loop = of_sentiment[0]
    module, batch = loop.module.eval(), loop.held_out.batch(np.arange(6))
    layout = module.reader.layout(**batch.inputs)
    places = (~module.masking.special[layout.input_ids]).nonzero().squeeze(1)
    counted = module.masking.of_sentiment(layout.input_ids)[places]
    logits = torch.randn(6, len(module.masking.special))
    width = batch.inputs["input_ids"].shape[1]
    expected = [
        -logits[place // width].log_softmax(-1)[layout.input_ids[place]].item() for place in places[counted].tolist()
    ]  # fmt: skip
    assert expected
    assert module.from_first(logits, layout, places, counted).item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert module.from_first(logits, layout, places, torch.zeros_like(counted)).item() == 0


def test_it_learns_to_name_words_of_sentiment_and_says_how_well(of_sentiment):
    loop = of_sentiment[0]
    history = loop.run().history
    assert history[-1]["held_out_sentiment_loss"] < 0.9 * history[0]["held_out_sentiment_loss"]
    assert history[-1]["held_out_loss"] < history[0]["held_out_loss"]


def test_words_that_are_no_tokens_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"train\.sentiment_words"):
        run_in(tmp_path, objective="mlm", sentiment_weight=0.5, sentiment_words=["inconstitucionalissimamente"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objective": "rtd", "sentiment_weight": 0.5}, "needs train.objective mlm"),
        ({"objective": "mlm", "sentiment_weight": 0.5, "sentiment_words": []}, "needs words in train.sentiment_words"),
        ({"objective": "mlm", "sentiment_weight": -0.5}, "sentiment_weight"),
    ],
)
def test_wrong_words_of_sentiment_are_said(change, words):
    with pytest.raises(ValueError, match=words):
        settings(**change)


def saved(module):
    return save({name: value.clone().contiguous() for name, value in module.state_dict().items()})


def test_what_the_model_learns_of_replaced_tokens_does_not_change_the_generators_embeddings(tmp_path):
    loop, _, _ = run_in(tmp_path, objective="rtd")
    losses = loop.losses(loop.module, loop.feed, np.arange(8))
    losses[1].backward()
    table = loop.module.reader.bert.embeddings.word_embeddings
    assert not table.shared[0].weight.grad.any()
    assert table.difference.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("objective", ["mlm", "rtd"])
def test_the_checkpoint_encodes_as_the_model_in_training_and_fine_tunes(tmp_path, objective):
    loop, tokenizer, _ = run_in(tmp_path, objective=objective, epochs=1)
    loop.run()
    loop.module.eval()
    batch = loop.held_out.batch(np.arange(5))
    with torch.no_grad():
        expected = loop.module.reader.encode(loop.module.reader.layout(**batch.inputs))
    pretraining_models.finished(loop.base, loop.module, 0.1).save_pretrained(tmp_path / "model")
    checkpoint.save_word_piece(tokenizer, tmp_path / "model")
    found = AutoModel.from_pretrained(tmp_path / "model").eval()(**batch.inputs).last_hidden_state.flatten(0, 1)
    seen = batch.inputs["attention_mask"].flatten().bool()
    torch.testing.assert_close(found[seen], expected[seen], atol=1e-5, rtol=1e-4)
    fine = Model.model_validate(models.settings().model.model_dump() | {"checkpoint": str(tmp_path / "model")})
    classifier = checkpoint.load_model(fine, ["a", "b"], tokenizer, 32)
    assert torch.equal(classifier.bert.encoder.layer[0].output.dense.weight, found_weight(tmp_path / "model"))
    assert classifier.config.hidden_dropout_prob == 0.1


def found_weight(folder):
    return AutoModel.from_pretrained(folder).encoder.layer[0].output.dense.weight


def test_pseudo_perplexity_is_that_of_each_token_hidden_alone(tmp_path):
    loop, tokenizer, _ = run_in(tmp_path, objective="mlm", epochs=1)
    model, mask = loop.base.eval(), tokenizer.token_to_id("[MASK]")
    assert isinstance(model, BertForMaskedLM)
    expected, number = 0.0, 0
    for row in np.random.default_rng(0).permutation(len(loop.held_out.lengths))[:3]:
        ids = loop.held_out.batch(np.array([row])).inputs["input_ids"]
        for place in range(1, ids.shape[1] - 1):
            hidden = ids.clone()
            hidden[0, place] = mask
            with torch.no_grad():
                expected -= model(hidden).logits[0, place].log_softmax(-1)[ids[0, place]].item()
            number += 1
    found = pretraining.pseudo_perplexity(*pretraining_models.language_model(loop.module), loop.held_out, mask, 3, 64)
    assert found == pytest.approx(math.exp(expected / number), rel=1e-4)


def test_a_checkpoint_that_lacks_weights_is_refused_and_one_without_a_head_is_said(tmp_path, caplog):
    first, tokenizer, _ = run_in(tmp_path / "first", objective="mlm", epochs=1)
    checkpoint.save_word_piece(tokenizer, tmp_path / "model")
    first.base.bert.save_pretrained(tmp_path / "model")
    wanted = settings({"checkpoint": str(tmp_path / "model")}, objective="mlm")
    with caplog.at_level(logging.WARNING, "sentiment.pretraining_models"):
        pretraining_models.build(wanted, tokenizer)
    assert "has no cls." in caplog.text
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({f"x.{name}": value for name, value in weights.items()}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks \d+ of the weights"):
        pretraining_models.build(wanted, tokenizer)


@pytest.mark.parametrize("objective", ["mlm", "rtd"])
def test_it_goes_on_from_a_checkpoint(tmp_path, objective):
    first, tokenizer, _ = run_in(tmp_path / "first", objective="mlm", epochs=1)
    first.run()
    pretraining_models.finished(first.base, first.module, 0.1).save_pretrained(tmp_path / "model")
    checkpoint.save_word_piece(tokenizer, tmp_path / "model")
    base, _, _ = pretraining_models.build(settings({"checkpoint": str(tmp_path / "model")}, objective=objective), tokenizer)
    encoder = base.bert.encoder if objective == "mlm" else base.encoder
    assert torch.equal(encoder.layer[1].output.dense.weight, first.base.bert.encoder.layer[1].output.dense.weight)


def test_a_checkpoint_that_cannot_be_loaded_is_said(tmp_path):
    _, tokenizer, _ = run_in(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.checkpoint"):
        pretraining_models.build(settings({"checkpoint": str(tmp_path)}), tokenizer)


def test_a_checkpoint_that_takes_no_texts_as_long_as_those_is_said(tmp_path):
    first, tokenizer, _ = run_in(tmp_path)
    first.base.save_pretrained(tmp_path / "model")
    values = settings({"checkpoint": str(tmp_path / "model")}).model_dump() | {"tokens": {"max_length": 64}}
    asked = pretraining_params.Params.model_validate(values)
    with pytest.raises(CheckpointError, match=r"tokens\.max_length is 64, but .* takes at most 32 tokens"):
        pretraining_models.build(asked, tokenizer)


@pytest.mark.parametrize(
    "train", [{"sentiment_weight": 0.0}, {"sentiment_weight": 0.5, "sentiment_words": WORDS}, {"objective": "rtd"}]
)
def test_the_operations_of_a_step_are_those_that_torch_counts(tmp_path, train):
    """A backward pass has twice the operations of the forward pass."""
    loop, _, _ = run_in(tmp_path, **{"objective": "mlm"} | train)
    rows = np.flatnonzero(loop.feed.lengths == 12)[:6]
    assert len(rows) == 6
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loop.losses(loop.module.eval(), loop.feed, rows)
    assert loop.flops(loop.feed.lengths[rows]) == pytest.approx(3 * counter.get_total_flops())


def test_texts_are_cut_between_sentences_and_inside_one_only_if_it_is_too_long():
    value = "um dois três. quatro cinco! seis sete oito nove dez onze doze treze"
    assert list(corpus.pieces(value, 6)) == ["um dois três. quatro cinco!", "seis sete oito nove dez onze", "doze treze"]
    assert " ".join(corpus.pieces(value, 6)) == value


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the parameters of a tiny run and its texts."""
    texts, _ = models.reviews(400)
    values = settings(objective="rtd", epochs=1).model_dump()
    values["corpus"] |= {
        "files": [{"path": "texts.txt", "column": None, "repeat": 2}],
        "exclude": ["test.parquet"],
        "held_out": 0.1,
    }
    (tmp_path / "texts.txt").write_text("\n".join([*texts, "uma", texts[0].upper() + "!"]))
    pq.write_table(pa.table({"text": texts[:50]}), tmp_path / "test.parquet")
    pq.write_table(pa.table({"n": [1, 2], "b": [b"bom", b"\xe7"]}), tmp_path / "numbers.parquet")
    monkeypatch.chdir(tmp_path)
    write(values)
    return values, texts


def write(values):
    from ruamel.yaml import YAML

    pretraining_params.PATH.parent.mkdir(exist_ok=True)
    with pretraining_params.PATH.open("w") as file:
        YAML().dump(values, file)


def read(name):
    return pq.read_table(corpus.CORPUS / f"{name}.parquet").to_pylist()


def test_no_text_to_be_tested_on_is_learnt_from_and_none_twice(project):
    _, texts = project
    corpus.main()
    train, held_out = read("train"), read("held_out")
    found = [row["text"] for row in train + held_out]
    assert {text.key(value) for value in found} == {text.key(value) for value in texts} - {text.key(v) for v in texts[:50]}
    assert len(found) == len(set(found))
    assert {row["repeat"] for row in train} == {2}
    assert {row["repeat"] for row in held_out} == {1}
    left_out = {text.key(value) for value in texts[:50]}
    counted = {"excluded": sum(text.key(value) in left_out for value in [*texts, texts[0]]), "too_short": 1, "read": 402}
    written = json.loads(corpus.METRICS.read_text())
    assert {name: written[name] for name in (*counted, "to_exclude")} == counted | {"to_exclude": len(left_out)}


def test_a_long_text_is_held_out_whole_or_not_at_all_and_leaves_no_piece_that_is_too_short(project):
    values, _ = project
    values["corpus"] |= {"max_words": 10, "min_words": 3, "held_out": 0.5}
    write(values)
    long = [f"{' '.join(f'a{k}' for k in range(9))} b{n}. c{n}. {' '.join(f'd{k}' for k in range(9))} b{n}" for n in range(40)]
    Path("texts.txt").write_text("\n".join(long))
    corpus.main()
    found = {name: [row["text"].split()[-1].strip(".") for row in read(name)] for name in ("train", "held_out")}
    assert all(len(row["text"].split()) == 10 for name in found for row in read(name))
    assert sorted(found["train"] + found["held_out"]) == sorted(2 * [f"b{n}" for n in range(40)])
    assert set(found["train"]).isdisjoint(found["held_out"])


def test_a_short_text_to_be_tested_on_counts_as_one_that_the_files_have(project):
    pq.write_table(pa.table({"text": ["Uma!"]}), "test.parquet")
    corpus.main()
    assert {name: json.loads(corpus.METRICS.read_text())[name] for name in ("to_exclude", "excluded")} == {
        "to_exclude": 1,
        "excluded": 1,
    }


def test_a_text_to_be_tested_on_is_not_learnt_without_its_title_either(project):
    _, texts = project
    pq.write_table(pa.table({"text": [f"Oi - {value}" for value in texts[:50]]}), "test.parquet")
    corpus.main()
    found = {text.key(row["text"]) for row in read("train") + read("held_out")}
    assert found == {text.key(value) for value in texts} - {text.key(value) for value in texts[:50]}
    assert json.loads(corpus.METRICS.read_text())["to_exclude"] == len({text.key(value) for value in texts[:50]})


def test_a_text_to_be_tested_on_is_not_learnt_where_it_stands_beside_its_title(project):
    _, texts = project
    with Path("texts.txt").open("a") as file:
        file.writelines(f"\nOi - {value}" for value in texts[:60])
    corpus.main()
    found = [text.key(row["text"]) for row in read("train") + read("held_out")]
    left_out = {text.key(value) for value in texts[:50]}
    assert not [key for key in found if key.removeprefix("oi ") in left_out]
    assert any(key.startswith("oi ") for key in found)
    counted = json.loads(corpus.METRICS.read_text())
    assert counted["excluded"] >= 100


def test_texts_that_parquet_holds_as_bytes_are_learnt_from_too(project):
    values, texts = project
    for name, kind in (("strings", pa.string()), ("bytes", pa.binary()), ("repeated", pa.dictionary(pa.int32(), pa.string()))):
        column = pa.array(texts) if name != "bytes" else pa.array([value.encode() for value in texts])
        pq.write_table(pa.table({"text": column.cast(kind) if name != "repeated" else column.dictionary_encode()}), "a.parquet")
        values["corpus"]["files"] = [{"path": "a.parquet", "column": "text", "repeat": 1}]
        write(values)
        corpus.main()
        found = {text.key(row["text"]) for row in read("train") + read("held_out")}
        assert found == {text.key(value) for value in texts} - {text.key(value) for value in texts[:50]}


@pytest.mark.parametrize(
    ("train", "loss"),
    [
        ({"objective": "rtd", "sentiment_weight": 0.0}, "held_out_generator_loss"),
        ({"objective": "mlm", "sentiment_weight": 0.5, "sentiment_words": WORDS, "dropout": 0.1}, "held_out_sentiment_loss"),
    ],
)
def test_the_three_stages_leave_a_checkpoint_and_their_numbers(project, train, loss):
    values, _ = project
    values["train"] |= train
    write(values)
    for each in (corpus.main, tokenize.main, stage.main):
        each()
    assert {path.name for path in stage.MODEL.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "metadata.json",
    }
    found = stage.METRICS.read_text()
    assert all(name in found for name in ("tokens_seen", "held_out_loss", loss, "pseudo_perplexity", "share_of_peak"))
    assert AutoModel.from_pretrained(stage.MODEL).dtype == torch.float16
    assert not stage.CHECKPOINT.exists()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"files": [{"path": "none.txt"}]}, DataError, "none.txt.*data/text"),
        ({"files": [{"path": "texts.txt", "column": "a"}]}, DataError, "column"),
        ({"files": [{"path": "test.parquet", "column": "a"}]}, DataError, "no column a"),
        ({"files": [{"path": "numbers.parquet", "column": "n"}]}, DataError, "column n is of type int64, which is no text"),
        ({"files": [{"path": "numbers.parquet", "column": "b"}]}, DataError, "column b holds bytes that are not UTF-8"),
        ({"exclude": ["none.parquet"]}, DataError, "dvc repro prepare"),
        ({"files": [{"path": "texts.txt", "repeat": 40_000}]}, ParamsError, "repeat.*32767"),
        ({"min_words": 0}, ParamsError, r"corpus\.min_words.*-S pretrain/params.yaml:KEY=VALUE"),
    ],
)
def test_what_is_wrong_with_the_corpus_is_said(project, change, error, words):
    values, _ = project
    values["corpus"] |= change
    write(values)
    with pytest.raises(error, match=words):
        corpus.main()
