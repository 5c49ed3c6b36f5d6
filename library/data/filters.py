"""`dataset_filters` and `captions_getter`: which samples are used, and what their captions are made of.

Both may hold expressions, which `library.data.expressions` reads without ever running code. A sample has fields: `json`
is its JSON object, `txt` or `caption` its text.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from library.data.expressions import Expression, Rejected
from library.errors import Problem, UserError, raise_problems
from library.option_values import nearest

JSON_FIELD = "json"
_WEIGHTED = re.compile(r"\s*([^\s:,()]+)\s*(?::\s*([0-9.]+)\s*)?")
_GETTERS = (
    "Write identity, json:key, json:key.key, alt(key:0.95, key:0.05), or an expression such as lambda x: x['key']."
)


@dataclass(frozen=True, slots=True)
class Rule:
    """One filter: the keys whose values the expression gets."""

    keys: tuple[str, ...]
    expression: Expression

    def why_not(self, facts: Mapping[str, Any]) -> str | None:
        """Return why a sample with these facts is left out, None when it passes."""
        missing = [key for key in self.keys if key not in facts]
        if missing:
            return f"no {missing[0]!r}"
        try:
            passes = self.expression(*[facts[key] for key in self.keys])
        except Rejected as error:
            return f"{', '.join(self.keys)}: {error}"
        return None if passes else f"{self.expression.source}"


@dataclass
class DatasetFilters:
    """All filters of a data set; a sample is used when every one says yes.

    A missing key and a value of another type count as no. `reasons` counts what samples were left out for.
    """

    rules: tuple[Rule, ...]
    accepted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def accepts(self, facts: Mapping[str, Any] | None) -> bool:
        """Judge one sample by its JSON object and take note of the outcome; a sample without one is left out."""
        for rule in self.rules:
            reason = rule.why_not(facts if isinstance(facts, Mapping) else {})
            if reason is not None:
                self.reasons[reason] += 1
                return False
        self.accepted += 1
        return True

    def check(self, where: str = "dataset_filters") -> None:
        """Make sure that something is left.

        Raises:
            UserError: samples were judged and none was accepted; names the most frequent reasons.
        """
        if self.accepted or not self.reasons:
            return
        listed = "; ".join(f"{reason} ({count} times)" for reason, count in self.reasons.most_common(3))
        what = f"none of {sum(self.reasons.values())} samples is left: {listed}"
        raise UserError(what, "Are the keys those of the samples' JSON files?", where=where)


def parse_filters(value: Any, *, where: str = "dataset_filters") -> DatasetFilters:
    """Read `[[key, expression], [[key, key], expression], ...]`.

    Raises:
        UserError: holds every filter that cannot be used, with the column.
    """
    if value is None:
        return DatasetFilters(())
    if not _is_list(value):
        raise UserError("is not a list of [key, expression]", "Write - ['score', 'lambda s: s > 4.5'].", where=where)
    rules: list[Rule] = []
    problems: list[Problem] = []
    for number, item in enumerate(value, 1):
        try:
            rules.append(_rule(item, f"{where}, filter {number}"))
        except UserError as error:
            problems.extend(error.problems)
    raise_problems(problems)
    return DatasetFilters(tuple(rules))


def _rule(item: Any, where: str) -> Rule:
    if not _is_list(item) or len(item) != 2:
        raise UserError("is not a pair [key, expression]", "Write ['score', 'lambda s: s > 4.5'].", where=where)
    keys = tuple(item[0]) if _is_list(item[0]) else (item[0],)
    if not keys or not all(isinstance(key, str) for key in keys):
        raise UserError("its key is not a text or a list of texts", where=where)
    return Rule(keys, Expression(item[1], keys, where=f"{where} ({', '.join(keys)})"))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


class CaptionGetter:
    """Where captions come from.

    Args:
        source: name of the field that is read (`txt`, `json`).
        getter: `identity`, `json:key.key`, `alt(key:weight, key:weight)` or an expression of one value.
        where: What messages start with.

    Raises:
        UserError: `getter` is none of these.
    """

    def __init__(self, source: str = "txt", getter: str = "identity", *, where: str = "captions_getter") -> None:
        self.field = source
        self._paths: tuple[tuple[tuple[str, ...], float], ...] = ()
        self._expression: Expression | None = None
        getter = getter.strip() if isinstance(getter, str) else getter
        if getter == "identity":
            return
        if not isinstance(getter, str):
            raise UserError(f"expected a text, got {type(getter).__name__}", _GETTERS, where=where)
        if getter.startswith("json:"):
            self.field, self._paths = JSON_FIELD, ((_path(getter[5:], where), 1.0),)
        elif getter.isidentifier() and getter != "x":
            # A bare name would be an expression that changes nothing: it is meant as the name of a getter.
            near = nearest(getter, ("identity",), cutoff=0.6)
            raise UserError(
                f"there is no getter {getter!r}", f"Did you mean {near}?" if near else _GETTERS, where=where
            )
        elif getter.startswith("alt(") and getter.endswith(")"):
            self._paths = tuple(_weighted(part, where) for part in getter[4:-1].split(","))
        else:
            self._expression = Expression(getter, ("x",), where=where)

    def __call__(self, fields: Mapping[str, Any], rng: random.Random) -> str | None:
        """Return the caption of a sample, None when it has none.

        Args:
            fields: of the sample: texts, and under `json` the parsed object.
            rng: decides where there are alternatives; those that the sample does not have take no part.
        """
        return choose(self.alternatives(fields), self.weights, rng)

    @property
    def weights(self) -> tuple[float, ...]:
        """How often each alternative is chosen, in proportion; a single one where there is no choice."""
        return tuple(weight for _path, weight in self._paths) or (1.0,)

    def alternatives(self, fields: Mapping[str, Any]) -> list[str | None]:
        """Return the texts that a sample offers, one for each weight; None where it has none."""
        if self._paths:
            return [_at(fields.get(JSON_FIELD), path) for path, _weight in self._paths]
        value = fields.get(self.field)
        if self._expression is not None:
            try:
                value = self._expression(value)
            except Rejected:
                value = None
        return [value if isinstance(value, str) else None]


def choose(texts: Sequence[str | None], weights: Sequence[float], rng: random.Random) -> str | None:
    """Return one of the texts that are there; None when none is."""
    found = [(text, weight) for text, weight in zip(texts, weights, strict=True) if text is not None]
    if len(found) > 1:
        return rng.choices([text for text, _ in found], [weight for _, weight in found])[0]
    return found[0][0] if found else None


def parse_captions_getter(value: Any, *, where: str = "captions_getter") -> CaptionGetter:
    """Read `[field, getter]`; None means the text beside the picture, as it is.

    Raises:
        UserError: it is no such pair, or the getter cannot be used.
    """
    if value is None:
        return CaptionGetter()
    if not _is_list(value) or len(value) != 2 or not isinstance(value[0], str):
        raise UserError("is not a pair [field, getter]", f"Write ['txt', 'identity']. {_GETTERS}", where=where)
    return CaptionGetter(value[0], value[1], where=where)


def _path(text: str, where: str) -> tuple[str, ...]:
    keys = tuple(text.strip().split("."))
    if not all(keys):
        raise UserError(f"no key in {text!r}", _GETTERS, where=where)
    return keys


def _weighted(text: str, where: str) -> tuple[tuple[str, ...], float]:
    match = _WEIGHTED.fullmatch(text)
    try:
        weight = float(match[2] or 1) if match else 0.0
    except ValueError:
        weight = 0.0
    if not match or weight <= 0:
        raise UserError(f"{text.strip()!r} is not key:weight with a weight above 0", _GETTERS, where=where)
    return _path(match[1], where), weight


def _at(facts: Any, path: tuple[str, ...]) -> str | None:
    """Return the text at a path of keys."""
    for key in path:
        facts = facts.get(key) if isinstance(facts, Mapping) else None
    return facts if isinstance(facts, str) else None
