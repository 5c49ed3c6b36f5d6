"""The order of parameters in the optimizer files of the reference implementation, and so in ours."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
# A transformer block of diffusers registers its norms between the layers; the reference registers them last.
_BLOCK = re.compile(r"^(?P<block>(?:.*\.)?transformer_blocks\.\d+\.)(?P<child>attn1|ff|attn2|norm1|norm2|norm3)\.")
_CHILDREN = ("attn1", "ff", "attn2", "norm1", "norm2", "norm3")


def sort_as_reference(named: Iterable[tuple[str, T]]) -> list[tuple[str, T]]:
    """Return (name, item) pairs in the reference's order; only the inside of transformer blocks changes.

    Args:
        named: pairs in the order in which diffusers registers them.
    """
    ordered: list[tuple[str, T]] = []
    run: list[tuple[int, tuple[str, T]]] = []
    block = None

    def close() -> None:
        ordered.extend(pair for _, pair in sorted(run, key=lambda entry: entry[0]))
        run.clear()

    for name, item in named:
        match = _BLOCK.match(name)
        here = match["block"] if match else None
        if here != block:
            close()
            block = here
        if match:
            run.append((_CHILDREN.index(match["child"]), (name, item)))
        else:
            ordered.append((name, item))
    close()
    return ordered


def in_reference_order(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the named parameters of `module` as the reference orders them in its `optimizer.bin`."""
    return sort_as_reference(module.named_parameters())
