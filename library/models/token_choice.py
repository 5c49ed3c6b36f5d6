"""Tokens that are trained beside a network: found in the vocabulary, and what new ones begin with.

A new word in brackets gets a row of its own behind the vocabulary. Known tokens are found by a regular expression,
which is searched for in the vocabulary's own spelling: `</w>` ends a word, so `^dog</w>` is one token and `dog` many.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.checkpoints.lora_layouts import BUNDLED
from library.errors import Problem, UserError, raise_problems
from library.models.token_items import is_new, split_token
from library.models.tokenizer import VOCABULARY_SIZE, vocabulary

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

OPTION = "--train_tokens"
ENCODER = "clip_g"
"""Name of the text encoder in embedding files."""

_SECONDS = 10.0
"""How long the expressions may take: some that are easily written would take for ever."""
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class TrainedToken:
    """One item of `--train_tokens`.

    Attributes:
        text: the new word with its brackets, or the expression for known tokens.
        pattern: expression that gave `found`, or None.
        found: ids of known tokens: those that are trained, or whose mean a new word begins with.
        row: id of the new word; None for known tokens.
    """

    text: str
    pattern: str | None
    found: tuple[int, ...]
    row: int | None

    @property
    def rows(self) -> tuple[int, ...]:
        """Ids that are trained."""
        return self.found if self.row is None else (self.row,)


def find_tokens(items: Sequence[str], limit: int) -> tuple[TrainedToken, ...]:
    """Look tokens up in the vocabulary, and log what was found.

    Args:
        items: as `token_items` says.
        limit: refuse expressions for known tokens that find more than this.

    Raises:
        UserError: an expression is none, finds nothing that could be trained, or too much, or takes too long.
    """
    made: list[TrainedToken] = []
    problems: list[Problem] = []
    row, deadline = VOCABULARY_SIZE, time.monotonic() + _SECONDS
    for item in items:
        token, start = split_token(item)
        new = is_new(token)
        pattern = start if new else token
        where = f"{OPTION} {item}"
        try:
            found = () if pattern is None else _search(pattern, deadline, where)
        except UserError as error:
            problems += error.problems
            continue
        problems += [] if new else _not_trainable(found, limit, where)
        if new and pattern is not None and not found:
            logger.warning("%s: no token of the vocabulary matches, so %s begins at zero", where, token)
        made.append(TrainedToken(token, pattern, found, row if new else None))
        row += new
        if found:
            logger.info("%s: %s %s", where, "begins with the mean of" if new else "trains", _listed(found))
    raise_problems(problems)
    return tuple(made)


def _search(pattern: str, deadline: float, where: str) -> tuple[int, ...]:
    """Return the ids of the tokens in which an expression is found."""
    import regex

    try:
        compiled = regex.compile(pattern)
        found = []
        for token, number in vocabulary().items():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if compiled.search(token, timeout=left):
                found.append(number)
        return tuple(sorted(found))
    except regex.error as error:
        hint = "A new word stands in brackets, as [fernando]."
        raise UserError(f"{pattern!r} is no regular expression ({error})", hint, where=where) from None
    except TimeoutError:
        hint = "Write it without nested + and *."
        raise UserError(f"{pattern!r} takes too long to search for", hint, where=where) from None


def _not_trainable(found: Sequence[int], limit: int, where: str) -> list[Problem]:
    if not found:
        hint = "A whole word ends with </w>, as ^dog</w>; a new word stands in brackets, as [dog]."
        return [Problem(where, "no token of the vocabulary matches", hint)]
    if len(found) > limit:
        hint = f"Narrow the expression, or give --train_tokens_limit={len(found)}."
        return [Problem(where, f"{len(found)} tokens match: {_listed(found)}", hint)]
    return []


def _listed(ids: Sequence[int]) -> str:
    words = {number: token for token, number in vocabulary().items()}
    shown = ", ".join(words[number] for number in ids[:_SHOWN])
    return shown + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")


def mean_row(table: Tensor, ids: Sequence[int]) -> Tensor:
    """Return the mean [d] float32 of some rows, zeros of none."""
    import torch

    if not ids:
        return torch.zeros(table.shape[1])
    return table[list(ids)].float().mean(0).cpu()


def new_rows(tokens: Sequence[TrainedToken], table: Tensor, ids: Tensor, changes: Tensor) -> dict[str, Tensor]:
    """Return the vectors of new words in an original file, by the keys of kohya's layout.

    Args:
        tokens: of the training that made it.
        table: [v,d] of the text encoder.
        ids: of the rows that it changes [n].
        changes: what it adds to them [n,d].
    """
    added = dict(zip(ids.tolist(), changes, strict=True))
    return {
        f"{BUNDLED}{token.text}.{ENCODER}": (mean_row(table, token.found) + added[token.row])[None]
        for token in tokens
        if token.row in added
    }
