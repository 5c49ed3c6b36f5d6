"""How much of a caption fits into its tokens: for reports, by looking at chunks of 77 CLIP ids."""

from __future__ import annotations

from library.contracts import END_ID

_BODY = slice(1, 76)


def fills_all_tokens(ids: list[list[int]], pad_id: int) -> bool:
    """Whether the last place for a token of the caption is taken, so that more of it was probably cut off."""
    return bool(ids) and len(ids[-1]) == 77 and ids[-1][75] not in (END_ID, pad_id)


def count_tokens(ids: list[list[int]], pad_id: int) -> int:
    """Return how many tokens the caption itself has in chunks of 77."""
    count = 0
    for chunk in ids:
        body = chunk[_BODY]
        end = next((place for place, token in enumerate(body) if token == END_ID), len(body))
        while end and pad_id != END_ID and body[end - 1] == pad_id:
            end -= 1
        count += end
    return count
