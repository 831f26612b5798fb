"""The text of a review as the model sees it, and as duplicates are told by; one way for training and serving."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

Case = Literal["as_written", "lower", "truecase"]

SEPARATOR = " - "  # of columns that are read as one text
KEPT_FORMATS = {"\u200d"}  # the joiner inside emoji such as 👩‍🔧
NOT_TEXT = {"Cc", "Cf", "Cs", "Co", "Cn"}  # control, format, surrogate, private use, unassigned
WORD = re.compile(r"\w+")
SHOUTED_LETTERS, SHOUTED_SHARE = 8, 0.6  # capitals, and their share of the letters, from which on a text is in capitals
SENTENCE_START = re.compile(r"(?:^|[.!?…]\s+)\W*\w")
SKIN_TONES = dict.fromkeys(range(0x1F3FB, 0x1F400))  # which say nothing of a product
PERHAPS_EMOJI = re.compile("[©®\u203c-\u3299\U0001f004-\U0001faff]")  # one of these is in every emoji


def clean(text: str, case: Case = "as_written", emoji: str | None = None) -> str:
    """The text in NFC, control characters and runs of blanks as one space, none at the ends.

    `case`: lower for small letters, truecase for that where the text is in capitals, but for the first letter of each sentence.
    `emoji`: the language in whose words each emoji is told (by the names of Unicode CLDR); None leaves them as they are.
    """
    if not text.isascii() or not text.isprintable():
        text = unicodedata.normalize("NFC", text)
    if not text.isprintable():
        text = "".join(" " if is_not_text(char) else char for char in text)
    text = " ".join(text.split())
    if case == "truecase" and is_shouted(text):
        text = SENTENCE_START.sub(lambda found: found[0].upper(), text.lower())
    elif case == "lower":
        text = text.lower()
    return tell_emoji(text, emoji)


def tell_emoji(text: str, language: str | None) -> str:
    """The text with words of a language in place of emoji, 😡 as "rosto furioso"; those that it has no words for stay."""
    if language is None or not PERHAPS_EMOJI.search(text):
        return text
    import emoji  # which takes a twentieth of a second, and few texts need

    emoji.config.load_language(language)

    def words(found: str, _: object) -> str:
        plain = found.translate(SKIN_TONES)
        names = emoji.EMOJI_DATA[plain if plain in emoji.EMOJI_DATA else found]
        return f" {names[language].strip(':').replace('_', ' ')} " if language in names else found

    return " ".join(emoji.replace_emoji(text, words).split())


def tells_emoji(language: str | None) -> bool:
    """Whether emoji can be told in words of a language; None is not to tell them."""
    if language is None:
        return True
    import emoji

    return language in emoji.LANGUAGES


def is_shouted(text: str) -> bool:
    """Whether a text is in capitals, most of it."""
    capitals = sum(map(str.isupper, text))
    return capitals >= SHOUTED_LETTERS and capitals > SHOUTED_SHARE * sum(map(str.isalpha, text))


def is_not_text(char: str) -> bool:
    """Whether a character is a control or format character, or none at all (a lone surrogate, an unassigned code)."""
    return not char.isprintable() and char not in KEPT_FORMATS and unicodedata.category(char) in NOT_TEXT


def join(parts: Sequence[str | None], case: Case = "as_written") -> str:
    """One text from several columns, each cleaned, the empty ones left out."""
    return SEPARATOR.join(filter(None, (clean(part, case) for part in parts if part)))


def read(text: str, columns: int, case: Case, emoji: str | None) -> str:
    """A text as people write it as a model reads it: if it is joined from so many columns, each of them is cleaned by itself."""
    if columns == 1:
        return clean(text, case, emoji)
    return tell_emoji(join(clean(text).split(SEPARATOR, columns - 1), case), emoji)


def longest_part(text: str) -> str:
    """The longest of the columns that a text was joined from: what it shares with one that was read with others, or alone."""
    return max(text.split(SEPARATOR), key=len)


def key(text: str) -> str:
    """What two texts share if they are the same: their words without case, blanks and punctuation.

    A text without a single word (say, of emoji alone) is its own key.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(WORD.findall(folded)) or text
