r"""Attention weights in captions: `(word)`, `((word))`, `(word:1.3)`, `[word]`, and `\(` for a literal bracket."""

from __future__ import annotations

import math
import re

import numpy as np

ROUND = 1.1
SQUARE = 1 / 1.1
LARGEST = 1000.0
"""Hundreds of nested brackets would make hidden states overflow; no sensible weight comes near this."""
_LONGEST = 1 << 15
"""Characters that are looked at: far more than the longest caption uses, and a bound for hostile ones."""

_LEXEME = re.compile(r"\\[()\[\]\\]|\\|[(\[\])]|:[+-]?[.\d]+(?=\))|[^\\()\[\]:]+|:")


def parse_attention(text: str) -> list[tuple[str, float]]:
    """Split `text` into pieces with their weights; neighbours of equal weight are joined.

    A bracket that is never closed reaches to the end; a closing one without an opening one is text, and so is a weight
    that is no number. Never raises, whatever the text.

    Returns:
        At least one pair (piece, weight).
    """
    pieces: list[str] = []
    scopes: list[tuple[int, int, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    lexemes = _LEXEME.findall(text[:_LONGEST])
    for position, lexeme in enumerate(lexemes):
        if lexeme in opened:
            opened[lexeme].append(len(pieces))
        elif lexeme == ")" and opened["("]:
            weight = _weight(lexemes[position - 1])
            scopes.append((opened["("].pop(), len(pieces), ROUND if weight is None else weight))
        elif lexeme == "]" and opened["["]:
            scopes.append((opened["["].pop(), len(pieces), SQUARE))
        elif not (opened["("] and lexemes[position + 1 : position + 2] == [")"] and _weight(lexeme) is not None):
            pieces.append(lexeme[1:] if lexeme[0] == "\\" else lexeme)
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        scopes.extend((start, len(pieces), factor) for start in opened[bracket])
    return _join(pieces, _factors(len(pieces), scopes))


def _weight(lexeme: str) -> float | None:
    """Return the number of a lexeme like `:1.3`, None when it is something else or not a finite number."""
    if len(lexeme) < 2 or lexeme[0] != ":":
        return None
    try:
        value = float(lexeme[1:])
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _factors(count: int, scopes: list[tuple[int, int, float]]) -> list[float]:
    """Multiply the scopes in the order in which they were closed: equal nestings then give equal bits."""
    factors = np.ones(count)
    with np.errstate(all="ignore"):
        for start, end, factor in scopes:
            factors[start:end] *= factor
    return np.nan_to_num(np.clip(factors, -LARGEST, LARGEST)).tolist()


def _join(pieces: list[str], factors: list[float]) -> list[tuple[str, float]]:
    joined: list[tuple[list[str], float]] = []
    for piece, factor in zip(pieces, factors, strict=True):
        if joined and joined[-1][1] == factor:
            joined[-1][0].append(piece)
        else:
            joined.append(([piece], factor))
    return [("".join(parts), factor) for parts, factor in joined] or [("", 1.0)]
