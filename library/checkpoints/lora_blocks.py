"""Which block of the U-Net a module of a LoRA file belongs to, and weights by block ("LBW" lists). Light.

Blocks go by the names of the original code: IN00..IN11, MID, OUT00..OUT11 in SD1 and SD2, IN00..IN08, MID,
OUT00..OUT08 in SDXL, and BASE for text encoders.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence

from library.errors import UserError

BASE, MID = "BASE", "MID"


def _names(inputs: Sequence[int], outputs: Sequence[int]) -> tuple[str, ...]:
    return (BASE, *(f"IN{n:02d}" for n in inputs), MID, *(f"OUT{n:02d}" for n in outputs))


BLOCK_LISTS: dict[int, tuple[str, ...]] = {
    12: _names((4, 5, 7, 8), range(6)),
    17: _names((1, 2, 4, 5, 7, 8), range(3, 12)),
    20: _names(range(9), range(9)),
    26: _names(range(12), range(12)),
}
"""Blocks of a list of weights by its length: 17 and 26 for SD1 and SD2, 12 and 20 for SDXL."""

SDXL_LENGTHS = (12, 20)
_NUMBERED = re.compile(r"_(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_")
_ORIGINAL = re.compile(r"_(input|output)_blocks_(\d+)_")


def block_of(name: str) -> str | None:
    """Return the block of a module by its name in LoRA files, or None for those outside (time and size embeddings)."""
    if name.startswith("lora_te"):
        return BASE
    if "_mid_block_" in name or "_middle_block_" in name:
        return MID
    match = _ORIGINAL.search(name)
    if match is not None:
        return f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02d}"
    match = _NUMBERED.search(name)
    if match is None:
        return None
    block, kind, index = int(match[2]), match[3], int(match[4])
    if match[1] == "down":
        number = 3 * block + 3 if kind == "downsamplers" else 3 * block + index + 1
        return f"IN{number:02d}"
    return f"OUT{3 * block + 2 if kind == 'upsamplers' else 3 * block + index:02d}"


def parse_block_weights(text: str) -> dict[str, float]:
    """Read a list of weights such as ``[1,0,0,...]``; its length says which blocks they are for.

    Returns:
        Weight by block; blocks that are not in it count 1.

    Raises:
        UserError: it is no JSON list of numbers, or of a length that nothing is known about.
    """
    where = f"--lbws {text}"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("is not a JSON list", 'Write it as "[1,0.5,...]"', where=where) from error
    if not isinstance(values, list) or any(
        isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in values
    ):
        raise UserError("is not a list of numbers", 'Write it as "[1,0.5,...]"', where=where)
    if len(values) not in BLOCK_LISTS:
        lengths = ", ".join(map(str, BLOCK_LISTS))
        raise UserError(f"has {len(values)} numbers", f"Lists have {lengths}", where=where)
    return {block: float(value) for block, value in zip(BLOCK_LISTS[len(values)], values, strict=True)}


def block_weight_function(weights: dict[str, float]) -> Callable[[str], float]:
    """Return a function from a module's name to its weight."""
    return lambda name: weights.get(block_of(name) or "", 1.0)
