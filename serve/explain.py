"""Which words a prediction comes from, by occlusion: take each word away and see how the probability changes.

Zeiler & Fergus (2014) did so with patches of images; Li, Monroe & Jurafsky (2016), "Understanding Neural Networks through
Representation Erasure", with words.
"""

import re
from typing import Any

WORD = re.compile(r"\w+(?:[-'\u2019]\w+)*|[^\w\s]+")
MOST_WORDS = 64


def words(text: str) -> list[tuple[int, int]]:
    """Where words (and runs of punctuation or emoji) begin and end."""
    return [match.span() for match in WORD.finditer(text)]


def without(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """The text without each word; without its only word it is a full stop, since an empty text is no review."""
    return [(text[:start] + text[end:]).strip() or "." for start, end in spans]


def explanation(
    text: str, spans: list[tuple[int, int]], whole: dict[str, Any], parts: list[dict[str, Any]], left_out: int
) -> dict[str, Any]:
    """The answer of POST /explain: `whole` is the prediction of the text, `parts` those without each word."""
    label = whole["sentiment"]
    found = [
        {
            "word": text[start:end],
            "start": start,
            "end": end,
            "weight": round(whole["probabilities"][label] - part["probabilities"][label], 6),
        }
        for (start, end), part in zip(spans, parts, strict=True)
    ]
    return whole | {"method": "occlusion", "explained": label, "words": found, "words_left_out": left_out}
