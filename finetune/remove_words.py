"""Phrases about lettering that GIT reports, often where there is none, and captions without them.

"a girl with the word anime on it" becomes "a girl". A reading is what stands in quotation marks, or one word.
"""

from __future__ import annotations

import re

_READING = r"(?:\"[^\"]*\"|'(?:[^']|(?<=\w)'(?=\w))*'|\w[\w'-]*)"  # quoted, "I'm" included, or a word
_LETTERS = r"(?:\w(?:\s+\w\b)+)"  # single ones in a row: "the letters a b c"
_OWNER = r"(?:(?:the|a|an|his|her|its|their|him)\s+)?"
_ON = rf"on\s+{_OWNER}\w+(?:\s+of\s+{_OWNER}\w+)?"
_PLACE = (
    rf"(?:\s*(?:(?:is|are)\s+)?(?:(?:written|printed)\s+)?{_ON}"
    rf"|\s*(?:written|printed)\s+in\s+{_OWNER}\w+"
    r"|\s*in\s+the\s+(?:middle|center|centre|corner|background))?"
)
_KIND = r"(?:words?|letters?|names?)"
_OPENING = r"(?:^|[\s,]+)"

_PHRASES = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # "that says the word x on it", "which reads 'x y'"
        rf"{_OPENING}(?:that|which)\s+(?:says?|reads?)\b\s*(?:the\s+{_KIND}\s+)?{_READING}{_PLACE}",
        # "has the word x on the front", "with the letters a b on it", "and the name 'x y'", "with the words on it"
        rf"{_OPENING}(?:has|have|with|and)\s+the\s+{_KIND}\s+(?:{_ON}|(?:{_LETTERS}|{_READING}){_PLACE})",
        # "with the number 5 on his back"; without a place the number may be one of things
        rf"{_OPENING}(?:has|have|with|and)\s+the\s+numbers?\s+\d+\s+{_ON}",
        # "word x on it"
        rf"{_OPENING}(?:the\s+)?{_KIND}\s+{_READING}\s+on\s+it\b",
        # What the end of the caption cut off: "with the words", "that says 'x y"
        rf"{_OPENING}(?:has|have|with|and)\s+the\s+{_KIND}\s*(?:[\"'][^\"']*)?$",
        rf"{_OPENING}(?:that|which)\s+(?:says?|reads?)\b\s*(?:the\s+{_KIND})?\s*(?:[\"'][^\"']*)?$",
    )
)
_LOOSE_END = re.compile(r"(?:[\s,]+(?:and|with|has|that|which))+\s*$", re.IGNORECASE)


def without_words(caption: str) -> str:
    """Return a caption without phrases about lettering; one that consists of nothing else stays as it is."""
    text = caption
    before = None
    while text != before:
        before = text
        for phrase in _PHRASES:
            text = phrase.sub("", text)
    if text != caption:
        text = _LOOSE_END.sub("", text)
    text = re.sub(r"\s+(?=[,.])", "", " ".join(text.split())).strip(" ,")
    return text or caption
