"""Which samples of a subset are used, and which texts are their captions: `dataset_filter` and `caption_field`.

Both are kept as the texts that a command line could hold, so that they travel through options, data set files and
states alike. A filter is `key: expression` or `key,key: expression`; JSON where a key holds one of these characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from library.data.caption_files import caption_of
from library.data.captions import ALTERNATIVE
from library.data.filters import JSON_FIELD, CaptionGetter, parse_captions_getter, parse_filters
from library.errors import Problem, UserError
from library.option_values import BadValue

_PLAIN = re.compile(r"[^\s,:\[\]\"'][^,:\"']*")
_FIELD = re.compile(r"[\w.-]+")
_MOST_REASONS = 5


def filters_value(value: Any) -> tuple[str, ...]:
    """Read filters: `"score: score > 4.5"` or `["score", "lambda s: s > 4.5"]`, one or a list of them.

    Raises:
        BadValue: one of them is neither.
    """
    items = value if isinstance(value, (list, tuple)) else [value]
    if len(items) == 2 and isinstance(items[1], str) and _is_bare_pair(items):
        items = [items]
    return tuple(_canonical(item) for item in items)


def _is_bare_pair(items: Sequence[Any]) -> bool:
    """Tell whether a list is one [key, expression] and not two filters: a key has no colon."""
    return isinstance(items[0], str) and ":" not in items[0]


def _canonical(item: Any) -> str:
    if isinstance(item, str):
        _pair(item)
        return item
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        raise BadValue(f"expected [key, expression], got {item!r}")
    keys, expression = item
    names = [keys] if isinstance(keys, str) else keys
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise BadValue(f"expected a key or a list of keys, got {keys!r}")
    if not isinstance(expression, str):
        raise BadValue(f"expected an expression in quotes, got {expression!r}")
    if all(_PLAIN.fullmatch(name) and name == name.strip() for name in names):
        return f"{','.join(names)}: {expression}"
    return json.dumps([list(names), expression])


def _pair(text: str) -> list[Any]:
    """Return [keys, expression] of one filter as it is written.

    Raises:
        BadValue: it is no filter.
    """
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or len(found) != 2:
            raise BadValue(f"{text!r} is no [key, expression] in JSON")
        return found
    keys, colon, expression = text.partition(":")
    if not colon or not keys.strip():
        raise BadValue(f"{text!r} is not `key: expression`, such as `score: score > 4.5`")
    return [[key.strip() for key in keys.split(",")], expression.strip()]


def caption_field_value(value: Any) -> tuple[str, ...]:
    """Read the source of captions: a field, a getter, or [field, getter].

    Raises:
        BadValue: it is none of these.
    """
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items) or len(items) > 2:
        raise BadValue(f"expected a field and perhaps a getter, got {value!r}")
    if len(items) == 1:
        (one,) = items
        if one.startswith("alt(") and not one.endswith(")"):
            raise BadValue(f"{one!r} has no closing bracket: write alt(key:0.95,key:0.05)")
        if not _FIELD.fullmatch(one) and not one.startswith(("json:", "alt(")):
            raise BadValue(f"{one!r} is no field such as txt, and neither json:key nor alt(key:0.95,key:0.05)")
        return (JSON_FIELD, one) if one.startswith(("json:", "alt(")) else (one, "identity")
    return tuple(items)


def selection_problems(filters: Sequence[str], caption_field: Sequence[str], where: str) -> Iterator[Problem]:
    """Yield what is wrong with filters and the source of captions, with the key that each is about."""
    for name, read in (
        ("dataset_filter", lambda place: parse_filters([_pair(text) for text in filters] or None, where=place)),
        ("caption_field", lambda place: parse_captions_getter(list(caption_field) or None, where=place)),
    ):
        try:
            read(f"{where}{name}")
        except UserError as error:
            yield from error.problems


class Selection:
    """Filters and captions of one subset.

    Args:
        filters: `dataset_filter` of the subset.
        caption_field: of the subset; empty: the text beside the picture.
        multiline: all lines of a caption are kept.
    """

    def __init__(self, filters: Sequence[str], caption_field: Sequence[str], *, multiline: bool) -> None:
        self.filters = parse_filters([_pair(text) for text in filters] or None, where="dataset_filter")
        self._getter = getter_of(caption_field)
        self._multiline = multiline

    @property
    def idle(self) -> bool:
        """Whether every sample is used, with the text beside it."""
        return not self.filters.rules and self._getter is None

    @property
    def needs_facts(self) -> bool:
        """Whether the JSON of samples is looked at."""
        return bool(self.filters.rules) or (self._getter is not None and self._getter.field == JSON_FIELD)

    def accepts(self, facts: Mapping[str, Any] | None) -> bool:
        """Judge a sample by its JSON object, and count it."""
        return not self.filters.rules or self.filters.accepts(facts)

    def caption(self, fields: Mapping[str, Any]) -> str | None:
        """Return the caption of a sample, its alternatives joined (see `library.data.captions`); None: it has none."""
        if self._getter is None:
            texts = [fields.get("txt", fields.get("caption"))]
        else:
            texts = self._getter.alternatives(fields)
        if not any(isinstance(text, str) for text in texts):
            return None
        return ALTERNATIVE.join(caption_of(text or "", self._multiline)[0] for text in texts)

    def report(self) -> str:
        """Return how many samples passed, and what the others were left out for."""
        filters = self.filters
        total = filters.accepted + filters.reasons.total()
        listed = "; ".join(f"{count} {reason}" for reason, count in filters.reasons.most_common(_MOST_REASONS))
        return f"dataset_filter: {filters.accepted} of {total} samples are used" + (
            f", left out: {listed}" if listed else ""
        )


def getter_of(caption_field: Sequence[str]) -> CaptionGetter | None:
    """Return what reads captions, None where they are the text beside the picture."""
    return parse_captions_getter(list(caption_field), where="caption_field") if caption_field else None
