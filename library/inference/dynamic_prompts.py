r"""Prompts with variants: `a {red|green} fox`.

| written | becomes |
|---|---|
| `{a|b|c}` | one of the variants, by chance |
| `{2$$a|b|c}` | two different ones, by chance, with `, ` between them |
| `{1-2$$a|b|c}` | one or two of them |
| `{2$$ and $$a|b|c}` | two, with ` and ` between them |
| `{e$$a|b|c}` | a prompt for each; several such groups give all combinations; counts and separators as above |

Groups may stand inside of variants. `\{` and `\}` are braces of the text itself; so is a brace without a partner, and
an empty pair. A variant may be empty. Spaces around variants are kept.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from library.errors import UserError

MOST_PROMPTS = 10_000
"""Most combinations that one prompt may enumerate."""
LONGEST = 20_000
"""Characters of a prompt with variants."""
DEEPEST = 20
"""How deep groups may be nested."""
MOST_GROUPS = 500
_MOST_CHARACTERS, _MOST_PIECES = 1 << 25, 1 << 20
"""Of all enumerated prompts together."""

_LEXEME = re.compile(r"\\\\|\\[{}]|[^\\{}|]+|.", re.DOTALL)
_HEAD = re.compile(r"(?P<each>[eE]\$\$)?(?:(?P<count>[0-9-]+)\$\$)?(?:(?P<separator>.+?)\$\$)?", re.DOTALL)
_COUNT = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")
_SEPARATOR = ", "

_Node: TypeAlias = "str | _Group"
_Sequence: TypeAlias = tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """A pair of braces: how many options are taken, what stands between them, and whether all choices are made.

    `enumerates` says that this group, or one inside of it, is `enumerated`.
    """

    options: tuple[_Sequence, ...]
    low: int
    high: int
    separator: str
    enumerated: bool
    enumerates: bool


def is_dynamic(text: str) -> bool:
    """Tell whether `text` holds anything that `expand` would change."""
    return "{" in text or "}" in text


def close_braces(text: str) -> str:
    r"""Return `text` with a backslash before every brace that has no partner, which makes it text."""
    pieces: list[str] = _LEXEME.findall(text)
    opened: list[int] = []
    loose: list[int] = []
    for place, lexeme in enumerate(pieces):
        if lexeme == "{":
            opened.append(place)
        elif lexeme == "}":
            if opened:
                opened.pop()
            else:
                loose.append(place)
    for place in (*opened, *loose):
        pieces[place] = "\\" + pieces[place]
    return "".join(pieces)


def expand(text: str, rng: random.Random, count: int = 1) -> list[str]:
    """Return the prompts that `text` stands for.

    Args:
        text: a prompt, or a whole prompt line: options may have variants too.
        rng: decides. The same generator state gives the same prompts.
        count: how many prompts are wanted, each with its own choices. A text that enumerates gives all its
            combinations once instead, whatever the count; other groups in it are chosen anew for each.

    Raises:
        UserError: too many combinations, groups or levels, or a count that cannot be read.
    """
    if not is_dynamic(text):
        return [text] * count
    if len(text) > LONGEST:
        raise UserError(f"a prompt with variants has at most {LONGEST} characters", "Make it shorter.")
    tree = _parse(close_braces(text))
    if not any(_enumerates(node) for node in tree):
        return [_choose(tree, rng) for _ in range(count)]
    found: list[str] = []
    for one in _combinations(tree, rng):
        found.append(_choose(one, rng))
        if len(found) * len(found[-1]) > _MOST_CHARACTERS:
            raise _too_many()
    return found


def _parse(text: str) -> _Sequence:
    """Return text and groups in turn; braces are closed. Every level of the stack holds the options read so far."""
    stack: list[list[list[_Node]]] = [[[]]]
    groups = 0
    for lexeme in _LEXEME.findall(text):
        if lexeme == "{":
            stack.append([[]])
            groups += 1
            if groups > MOST_GROUPS or len(stack) > DEEPEST + 1:
                hint = r"Write \{ for a brace that is meant as such."
                raise UserError(f"more than {MOST_GROUPS} variant groups, or {DEEPEST} inside each other", hint)
        elif lexeme == "}":
            options = stack.pop()
            stack[-1][-1].append("{}" if options == [[]] else _group(options))
        elif lexeme == "|" and len(stack) > 1:
            stack[-1].append([])
        else:
            stack[-1][-1].append(lexeme[1] if lexeme in (r"\{", r"\}") else lexeme)
    return _joined_text(stack[0][0])


def _joined_text(nodes: Sequence[_Node]) -> _Sequence:
    """Join neighbouring pieces of text."""
    joined: list[_Node] = []
    for node in nodes:
        if isinstance(node, str) and joined and isinstance(joined[-1], str):
            joined[-1] += node
        else:
            joined.append(node)
    return tuple(joined)


def _group(written: Sequence[Sequence[_Node]]) -> _Group:
    options = [_joined_text(option) for option in written]
    head = _HEAD.match(options[0][0]) if options[0] and isinstance(options[0][0], str) else None
    enumerated, low, high, separator = False, 1, 1, _SEPARATOR
    if head is not None:
        options[0] = (str(options[0][0])[head.end() :], *options[0][1:])
        enumerated = head["each"] is not None
        separator = head["separator"] or _SEPARATOR
        low, high = _counts(head["count"] or "1")
    high = min(high, len(options))
    enumerates = enumerated or any(_enumerates(node) for option in options for node in option)
    return _Group(tuple(options), min(low, high), high, separator, enumerated, enumerates)


def _counts(text: str) -> tuple[int, int]:
    found = _COUNT.fullmatch(text)
    if found is None:
        raise UserError(f"{text[:20]!r} is no number of variants", "Write {2$$a|b|c} or {1-2$$a|b|c}.")
    first = int(found[1])
    second = first if found[2] is None else int(found[2])
    return min(first, second), max(first, second)


def _enumerates(node: _Node) -> bool:
    return isinstance(node, _Group) and node.enumerates


def _combinations(sequence: _Sequence, rng: random.Random) -> list[_Sequence]:
    """Return all combinations of the groups that are enumerated; what is left in them is for `_choose`."""
    return _product([_variants(node, rng) for node in sequence])


def _variants(node: _Node, rng: random.Random) -> list[_Sequence]:
    if isinstance(node, str) or not node.enumerates:
        return [(node,)]
    parts = [_combinations(option, rng) for option in node.options]
    between: list[_Sequence] = [(node.separator,)]
    found: list[_Sequence] = []
    size = 0
    for chosen in _selections(node, parts, rng):
        row = [piece for part in chosen for piece in (between, part)][1:]
        more = _product(row)
        found.extend(more)
        size += sum(map(len, more))
        if len(found) > MOST_PROMPTS or size > _MOST_PIECES:
            raise _too_many()
    return found


def _selections(
    node: _Group, parts: Sequence[list[_Sequence]], rng: random.Random
) -> Iterator[Sequence[list[_Sequence]]]:
    """Yield the options that are taken together: every selection, or one by chance."""
    if not node.enumerated:
        yield rng.sample(parts, rng.randint(node.low, node.high))
        return
    for count in range(node.low, node.high + 1):
        yield from itertools.combinations(parts, count)


def _product(parts: Sequence[list[_Sequence]]) -> list[_Sequence]:
    if math.prod(map(len, parts)) > MOST_PROMPTS:
        raise _too_many()
    return [tuple(itertools.chain.from_iterable(row)) for row in itertools.product(*parts)]


def _choose(sequence: _Sequence, rng: random.Random) -> str:
    pieces: list[str] = []
    for node in sequence:
        if isinstance(node, str):
            pieces.append(node)
        else:
            chosen = rng.sample(node.options, rng.randint(node.low, node.high))
            if len(chosen) * len(node.separator) > LONGEST:
                raise UserError(f"separators add up to more than {LONGEST} characters", "Take a shorter one.")
            pieces.append(node.separator.join(_choose(option, rng) for option in chosen))
    return "".join(pieces)


def _too_many() -> UserError:
    hint = "Take e$$ out of some of the braces, so that they choose by chance."
    return UserError(f"more than {MOST_PROMPTS} combinations, or too long ones", hint)
