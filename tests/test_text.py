"""The text as the model sees it, and what makes two texts the same."""

import random
import unicodedata

import emoji
import pytest

from sentiment import text


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("Chegou  antes\n do\tprazo ", "Chegou antes do prazo"),
        ("na\u0303o gostei", "não gostei"),  # NFD becomes NFC
        ("ótimo\u00a0produto\u2028mesmo", "ótimo produto mesmo"),
        ("veio\x00quebrado\x1b", "veio quebrado"),
        ("\ufeffbom", "bom"),
        ("lindo \ud83d demais", "lindo demais"),  # half of an emoji
        (" \u200b\r\n", ""),
        ("", ""),
    ],
)
def test_blanks_and_control_characters_become_one_space(raw, cleaned):
    assert text.clean(raw) == cleaned


@pytest.mark.parametrize("raw", ["Adorei 👩‍🔧❤️", "R$ 1.299,90 — “vale”, né?!", "PÉSSIMO"])
def test_what_a_reader_sees_is_kept(raw):
    assert text.clean(raw) == raw


def test_lowercase_is_asked_for():
    assert text.clean("ÓTIMO Celular", case="lower") == "ótimo celular"


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        ("NÃO COMPREM!!! PRODUTO RUIM. A TAMPA QUEBROU", "Não comprem!!! Produto ruim. A tampa quebrou"),
        ("¡ÓTIMO PRODUTO, RECOMENDO", "¡Ótimo produto, recomendo"),
        ("PRODUTO MUITO BOM... (GOSTEI muito)", "Produto muito bom... (Gostei muito)"),
        ("SUPER RECOMENDO 👩‍🔧", "Super recomendo 👩‍🔧"),
    ],
)
def test_a_text_in_capitals_is_read_in_small_letters_if_that_is_asked_for(raw, read):
    assert text.clean(raw, case="truecase") == read
    assert text.clean(read, case="truecase") == read
    assert text.clean(raw) == raw


@pytest.mark.parametrize(
    "raw", ["Ótimo celular da LG", "TV SONY", "Produto MUITO BOM e barato", "GOSTEI do aparelho", "", "😍😍", "12345678"]
)
def test_what_is_not_in_capitals_stays_as_it_is_written(raw):
    assert text.clean(raw, case="truecase") == raw


@pytest.mark.parametrize(
    ("raw", "language", "read"),
    [
        ("Chegou ontem 😡😡", "pt", "Chegou ontem rosto furioso rosto furioso"),
        ("amei❤️!", "pt", "amei coração vermelho !"),
        ("👍🏽 veio certo", "pt", "polegar para cima veio certo"),
        ("MUITO RUIM, NÃO COMPREM 😡", "pt", "Muito ruim, não comprem rosto furioso"),
        ("ok 👩‍🔧", "pt", "ok mecânica"),
        ("ok 😡", "en", "ok enraged face"),
        ("Nota 10, custou 5€ – é “bom”… #1", "pt", "Nota 10, custou 5€ – é “bom”… #1"),
        ("snake_case :rosto_furioso: 👎", "pt", "snake_case :rosto_furioso: polegar para baixo"),
    ],
)
def test_emoji_are_told_in_words_if_that_is_asked_for(raw, language, read):
    assert text.clean(raw, "truecase", language) == read
    assert text.clean(read, "truecase", language) == read
    assert text.tell_emoji(text.clean(raw, "truecase"), language) == read


def test_every_emoji_is_told_in_words_and_none_without_a_language():
    for each in emoji.EMOJI_DATA:
        assert emoji.emoji_count(text.clean(f"Veio {each}!", emoji="pt")) == 0
        assert text.tell_emoji(each, None) == each


def test_an_emoji_that_a_language_has_no_words_for_stays(monkeypatch):
    names = {key: value for key, value in emoji.EMOJI_DATA["😡"].items() if key != "pt"}
    monkeypatch.setitem(emoji.EMOJI_DATA, "😡", names)
    monkeypatch.setattr(emoji.config, "load_language", lambda language: None)  # it would bring the words back
    assert text.clean("Veio 😡", emoji="pt") == "Veio 😡"


def test_cleaning_twice_changes_nothing_and_leaves_no_control_character():
    rng = random.Random(1)
    alphabet = [chr(code) for code in (*range(0x250), *range(0x300, 0x340), 0x200B, 0x200D, 0x2028, 0xFEFF, 0xD83D, 0x1F600)]
    for _ in range(5000):
        cleaned = text.clean("".join(rng.choices(alphabet, k=8)))
        assert text.clean(cleaned) == cleaned
        cased = text.clean(cleaned, "truecase")
        assert text.clean(cased, "truecase") == cased
        assert not any(unicodedata.category(char) in ("Cc", "Cs") for char in cleaned)
        assert cleaned == cleaned.strip()


@pytest.mark.parametrize(
    "columns",
    [
        ("PÉSSIMO PRODUTO", "veio quebrado 😡 no dia"),
        ("Bom", "CHEGOU ANTES DO PRAZO. GOSTEI"),
        ("BOM", "GOSTEI"),
        ("", "só texto"),
    ],
)
@pytest.mark.parametrize("case", ["as_written", "lower", "truecase"])
def test_a_text_of_several_columns_is_read_as_it_was_learnt(columns, case):
    learnt = text.tell_emoji(text.join(columns, case), "pt")
    assert text.read(text.join(columns), 2, case, "pt") == learnt
    assert text.read(text.join(columns, case), 2, case, "pt") == learnt  # what is prepared already


def test_columns_are_joined_by_a_dash_and_empty_ones_left_out():
    assert text.join(["Muito bom", " Chegou\nrápido "]) == "Muito bom - Chegou rápido"
    assert text.join([None, "Chegou rápido", "  "]) == "Chegou rápido"
    assert text.join([None, ""]) == ""
    assert text.join(["BOM", "Útil"], case="lower") == "bom - útil"


@pytest.mark.parametrize(
    "other",
    [
        "não gostei do fone",
        "NÃO GOSTEI DO FONE!!!",
        "Não gostei, do fone...",
        "  Na\u0303o gostei\ndo “fone” ",
        "Ｎão gostei do fone",
    ],
)
def test_case_punctuation_and_blanks_make_no_other_text(other):
    assert text.key(other) == text.key("Não gostei do fone.")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Gostei do fone", "Não gostei do fone"),
        ("Dou nota 1", "Dou nota 2"),
        ("pos-venda", "posvenda"),
        ("está bom", "esta bom"),
        ("👍", "👎"),
        ("!!!", "..."),
    ],
)
def test_other_words_make_another_text(one, other):
    assert text.key(one) != text.key(other)
