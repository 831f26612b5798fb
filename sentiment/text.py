"""The text of a review as the model sees it, and as duplicates are told by; one way for training and serving."""

import re
import unicodedata
from collections.abc import Sequence

KEPT_FORMATS = {"\u200d"}  # the joiner inside emoji such as 👩‍🔧
NOT_TEXT = {"Cc", "Cf", "Cs", "Co", "Cn"}  # control, format, surrogate, private use, unassigned
WORD = re.compile(r"\w+")


def clean(text: str, lowercase: bool = False) -> str:
    """The text in NFC, control characters and runs of blanks as one space, none at the ends."""
    if not text.isascii() or not text.isprintable():
        text = unicodedata.normalize("NFC", text)
    if not text.isprintable():
        text = "".join(" " if is_not_text(char) else char for char in text)
    text = " ".join(text.split())
    return text.lower() if lowercase else text


def is_not_text(char: str) -> bool:
    """Whether a character is a control or format character, or none at all (a lone surrogate, an unassigned code)."""
    return not char.isprintable() and char not in KEPT_FORMATS and unicodedata.category(char) in NOT_TEXT


def join(parts: Sequence[str | None], lowercase: bool = False) -> str:
    """One text from several columns, each cleaned, the empty ones left out."""
    return " - ".join(filter(None, (clean(part, lowercase) for part in parts if part)))


def key(text: str) -> str:
    """What two texts share if they are the same: their words without case, blanks and punctuation.

    A text without a single word (say, of emoji alone) is its own key.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(WORD.findall(folded)) or text
