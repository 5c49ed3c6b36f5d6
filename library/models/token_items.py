"""How tokens that are trained beside a network are written: `[word]`, `[word]=PATTERN`, or PATTERN. Light."""

from __future__ import annotations

from typing import Any

from library.option_values import BadValue

LONGEST_PATTERN = 200
_BRACKETS = (("[", "]"), ("<", ">"))


def is_new(token: str) -> bool:
    """Whether a token is a new one, by the brackets around it, rather than a pattern of known ones."""
    return any(token.startswith(first) and token.endswith(last) for first, last in _BRACKETS)


def split_token(item: str) -> tuple[str, str | None]:
    """Return (token, pattern that a new one begins with or None) for an item of `--train_tokens`."""
    for first, last in _BRACKETS:
        if item.startswith(first):
            token, closing, rest = item.partition(last)
            if closing and rest.startswith("="):
                return token + closing, rest[1:]
    return item, None


def token_list(value: Any) -> tuple[str, ...]:
    """Read `--train_tokens`: words of the command line, or [token, pattern or null] pairs of a configuration.

    Raises:
        BadValue: a pair for a known token has a pattern, or something is no text.
    """
    items = [value] if isinstance(value, str) else list(value)
    return tuple(_item(item) for item in items)


def _item(item: Any) -> str:
    if isinstance(item, str):
        return item
    token, pattern = item if isinstance(item, (list, tuple)) and len(item) == 2 else (None, None)
    if not isinstance(token, str) or not isinstance(pattern, (str, type(None))):
        raise BadValue(f"expected a token, or a pair [token, pattern or null], got {item!r}")
    if pattern is None:
        return token
    if not is_new(token):
        raise BadValue(f"{token!r} stands for known tokens, which begin as they are: give null in place of {pattern!r}")
    return f"{token}={pattern}"
