"""Ragged tokens: what is written is what is read, in the smallest type, cut at max_length."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from sentiment import params, tokens
from sentiment.checkpoint import save_word_piece, word_piece
from sentiment.errors import CheckpointError, DataError
from sentiment.text import clean
from sentiment.tokens import Tokens, Writer, encode, encode_chunks, joined, load_tokenizer, ragged, unknown_id
from stages import tokenize as stage
from stages.tokenize import Texts, histogram, percentile, summary, write

ROOT = Path(__file__).parents[1]
TEXTS = [
    "Chegou antes do prazo e funciona muito bem",
    "A tampa veio quebrada e ninguém responde",
    "Ótimo",
    "Não recomendo, a bateria dura uma hora e a tela risca com qualquer coisa",
    "Produto bom, entrega rápida, preço justo",
]
ROWS = [[2, 17, 3], [2, 3], [2, 40, 41, 42, 43, 3]]
LABELS = np.array([1, 0, 1])


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_word_piece(word_piece(TEXTS * 3, 300), folder)
    return folder


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_what_is_saved_is_loaded_again(tmp_path, vocab_size):
    before = ragged(ROWS, LABELS, vocab_size)
    before.save(tmp_path / "train.safetensors")
    after = Tokens.load(tmp_path / "train.safetensors")
    for name in ("input_ids", "lengths", "offsets", "labels"):
        assert getattr(after, name).dtype == getattr(before, name).dtype
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    rows = [after.input_ids[start:stop].tolist() for start, stop in zip(after.offsets, after.offsets[1:], strict=False)]
    assert rows == ROWS
    assert after.labels.tolist() == LABELS.tolist()
    assert after.lengths.tolist() == [3, 2, 6]
    assert len(after) == 3


def test_splits_are_joined_and_reviews_are_chosen_in_their_order():
    whole = joined([ragged(ROWS[:1], LABELS[:1], 300), ragged(ROWS[1:], LABELS[1:], 300)])
    some = whole.where(np.array([True, False, True]))
    for made, kept in ((whole, [0, 1, 2]), (some, [0, 2])):
        expected = ragged([ROWS[k] for k in kept], LABELS[kept], 300)
        for name in ("input_ids", "lengths", "labels"):
            assert getattr(made, name).dtype == getattr(expected, name).dtype
            assert getattr(made, name).tolist() == getattr(expected, name).tolist()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, np.uint16), (65_536, np.uint16), (65_537, np.uint32)])
def test_ids_take_two_bytes_where_the_vocabulary_allows_and_none_is_altered(vocab_size, dtype):
    made = ragged([[0, vocab_size - 1]], LABELS[:1], vocab_size)
    assert made.input_ids.dtype == dtype
    assert made.input_ids.tolist() == [0, vocab_size - 1]


def test_no_reviews_are_a_file_without_reviews(tmp_path):
    ragged([], np.array([]), 300).save(tmp_path / "test.safetensors")
    loaded = Tokens.load(tmp_path / "test.safetensors")
    assert len(loaded) == 0
    assert loaded.offsets.tolist() == [0]
    assert loaded.lengths.tolist() == []


def test_a_missing_file_is_a_data_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"nada\.safetensors.*dvc repro tokenize"):
        Tokens.load(tmp_path / "nada.safetensors")


@pytest.mark.parametrize("damage", ["empty", "cut", "no safetensors", "no lengths"])
def test_a_broken_file_is_a_data_error_that_names_it(tmp_path, damage):
    path = tmp_path / "train.safetensors"
    ragged(ROWS, LABELS, 300).save(path)
    whole = path.read_bytes()
    if damage == "no lengths":
        save_file({"input_ids": np.zeros(3, np.uint16), "labels": np.zeros(1, np.int16)}, path)
    else:
        path.write_bytes({"empty": b"", "cut": whole[:-4], "no safetensors": b"isto nao sao fichas" * 9}[damage])
    with pytest.raises(DataError, match=r"train\.safetensors cannot be read"):
        Tokens.load(path)


def test_a_long_review_is_cut_at_max_length_and_keeps_its_end_mark(tokenizer_folder):
    whole = load_tokenizer(tokenizer_folder, 256)
    long = next(encode(whole, [TEXTS[3]]))
    assert len(long) > 8
    assert next(encode(load_tokenizer(tokenizer_folder, 8), [TEXTS[3]])) == [*long[:7], whole.token_to_id("[SEP]")]
    assert next(encode(load_tokenizer(tokenizer_folder, len(long)), [TEXTS[3]])) == long


def test_reviews_are_encoded_in_order_with_their_marks_and_without_padding(tokenizer_folder, monkeypatch):
    tokenizer = load_tokenizer(tokenizer_folder, 256)
    alone = [tokenizer.encode(text).ids for text in TEXTS]
    monkeypatch.setattr(tokens, "CHUNK", 2)
    rows = list(encode(tokenizer, (text for text in TEXTS)))
    assert rows == alone
    assert len({len(row) for row in rows}) > 1
    assert {(row[0], row[-1]) for row in rows} == {(tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"))}


def test_padding_and_cutting_in_a_tokenizers_file_do_not_count(tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder, 256)
    expected = list(encode(tokenizer, TEXTS))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert list(encode(load_tokenizer(tmp_path, 256), TEXTS)) == expected


@pytest.mark.parametrize("content", [None, "", "{}", '{"model": 1}'])
def test_a_missing_or_broken_tokenizer_is_a_checkpoint_error(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path, 256)


def test_chunks_are_encoded_as_the_texts_one_by_one(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder, 256)
    chunks = [TEXTS[:2], [], TEXTS[2:]]
    made = list(encode_chunks(tokenizer, chunks))
    assert [len(chunk.lengths) for chunk in made] == [2, 0, 3]
    rows = [row.tolist() for ids, lengths, _ in made for row in np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths)]
    assert rows == [tokenizer.encode(text).ids for text in TEXTS]
    assert {chunk.input_ids.dtype for chunk in made} == {np.dtype(np.uint16)}


def test_a_text_that_just_fits_is_not_cut(tokenizer_folder):
    texts = ["bom", *("bom " * words for words in range(5, 9)), "bom"]
    full = [len(load_tokenizer(tokenizer_folder, 256).encode(text).ids) for text in texts]
    (made,) = encode_chunks(load_tokenizer(tokenizer_folder, full[2]), [texts])
    assert made.cut.tolist() == [False, False, False, True, True, False]
    assert made.lengths.tolist() == [full[0], full[1], full[2], full[2], full[2], full[0]]


def test_what_is_written_bit_by_bit_is_what_is_written_at_once_and_any_reader_reads_it(tmp_path):
    whole = ragged(ROWS, LABELS, 300)
    whole.save(tmp_path / "whole.safetensors")
    with Writer(tmp_path / "parts.safetensors", np.uint16) as file:
        for start, stop in ((0, 1), (1, 1), (1, 3)):
            span = slice(whole.offsets[start], whole.offsets[stop])
            file.add(whole.input_ids[span], whole.lengths[start:stop], whole.labels[start:stop])
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert {name: values.tolist() for name, values in load_file(tmp_path / "whole.safetensors").items()} == {
        "input_ids": [id_ for row in ROWS for id_ in row],
        "lengths": [3, 2, 6],
        "labels": LABELS.tolist(),
    }


def test_a_failed_writing_leaves_no_file_that_could_be_read(tmp_path):
    file = Writer(tmp_path / "train.safetensors", np.uint16)
    file.__enter__()
    file.add(np.ones(3), np.array([3]), np.array([0]))
    file.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with pytest.raises(DataError):
        Tokens.load(tmp_path / "train.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["train.safetensors"]


def test_the_cache_is_small_and_mapped_into_memory(tmp_path):
    lengths = np.random.default_rng(0).integers(3, 80, 5000)
    ragged([np.ones(n) for n in lengths], np.zeros(5000), 30_000).save(tmp_path / "train.safetensors")
    loaded = Tokens.load(tmp_path / "train.safetensors")
    assert isinstance(loaded.input_ids, np.memmap)
    assert (tmp_path / "train.safetensors").stat().st_size < 2.3 * lengths.sum()


@pytest.mark.parametrize("lengths", [[5], [3, 3, 9], [4, 8, 8, 31, 200, 7, 3]])
def test_percentiles_of_counted_lengths_are_numpys(lengths):
    counted = np.bincount(lengths, minlength=257)
    for share in (0, 50, 95, 100):
        assert percentile(counted, share) == pytest.approx(np.percentile(lengths, share))


def test_the_histogram_counts_every_review_also_those_cut_at_an_odd_length():
    text = histogram(np.bincount([1, 8, 9, 19, 19], minlength=20))
    assert text == "tokens,reviews\n8,2\n16,1\n24,2\n"


def test_the_split_written_by_the_stage_is_the_prepared_one(tokenizer_folder, tmp_path):
    table = pa.table({"text": TEXTS * 3000, "label": pa.array([1, 0, 1, 0, 2] * 3000, pa.int64())})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=4000)
    tokenizer = load_tokenizer(tokenizer_folder, 12)
    counts = write(tmp_path / "train.parquet", tmp_path / "train.safetensors", tokenizer)
    loaded = Tokens.load(tmp_path / "train.safetensors")
    expected = ragged(list(encode(tokenizer, TEXTS)) * 3000, np.array([1, 0, 1, 0, 2] * 3000), 300)
    for name in ("input_ids", "lengths", "labels"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(expected, name))
    assert counts.reviews.tolist() == np.bincount(expected.lengths, minlength=13).tolist()
    assert counts.unknown == (expected.input_ids == tokenizer.token_to_id("[UNK]")).sum()
    longer = sum(len(ids) > 12 for ids in encode(load_tokenizer(tokenizer_folder, 256), TEXTS))
    assert summary(counts)["truncated_share"] == longer / len(TEXTS)


def test_unknown_tokens_are_counted_by_the_name_that_the_tokenizer_has_for_them():
    for name in ("[UNK]", "<unk>"):
        tokenizer = Tokenizer(models.WordPiece({name: 0, "bom": 1}, unk_token=name))
        assert unknown_id(tokenizer) == 0
    assert unknown_id(Tokenizer(models.BPE({"b": 0}, []))) is None


def test_the_stage_reads_emoji_as_the_model_will(tokenizer_folder, tmp_path):
    written = ["Ótimo 😍", "A tampa veio quebrada 😡", "Não recomendo"]
    pq.write_table(pa.table({"text": written, "label": pa.array([1, 0, 0], pa.int64())}), tmp_path / "train.parquet")
    tokenizer = load_tokenizer(tokenizer_folder, 64)
    for emoji in ("pt", None):
        write(tmp_path / "train.parquet", tmp_path / "train.safetensors", tokenizer, emoji)
        expected = ragged(encode(tokenizer, [clean(value, emoji=emoji) for value in written]), np.array([1, 0, 0]), 300)
        np.testing.assert_array_equal(Tokens.load(tmp_path / "train.safetensors").input_ids, expected.input_ids)
        assert list(Texts(tmp_path / "train.parquet", emoji)) == [clean(value, emoji=emoji) for value in written]


def test_a_checkpoint_s_files_are_linked_so_that_dvc_notices_their_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("models/base/config.json", "{}"),
        ("models/mine/config.json", "{}"),
        ("data/checkpoint/README.md", ""),
    ):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(content)
    model = params.load(ROOT / "params.yaml").model
    stage.link_checkpoint(model.model_copy(update={"checkpoint": "models/mine"}), stage.LINKS)
    Path("models/mine/config.json").write_text('{"a": 1}')
    assert (stage.LINKS / "config.json").read_text() == '{"a": 1}'
    assert not (stage.LINKS / "config.json").readlink().is_absolute()
    for name in ("models/base", None, "neuralmind/bert-base-portuguese-cased"):
        stage.link_checkpoint(model.model_copy(update={"checkpoint": name}), stage.LINKS)
        assert [path.name for path in stage.LINKS.iterdir()] == ["README.md"]
        stage.link_checkpoint(model.model_copy(update={"checkpoint": str(tmp_path / "models/mine")}), stage.LINKS)
    with pytest.raises(CheckpointError, match="models/sentiment, which is removed before a training begins; copy it"):
        stage.link_checkpoint(model.model_copy(update={"checkpoint": "models/sentiment"}), stage.LINKS)
    assert (stage.LINKS / "config.json").is_file()
