"""What transformers takes without a word in the folder of a captioning model, and what would make nonsense of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from library.checkpoints.tensor_files import all_finite

_MOST_LAYERS = 1000
_ALL_THERE = 0.5
"""Share of the model's vocabulary that its tokenizer must know; a few places are often left free."""


def check_structure(config: Any) -> None:
    """Refuse a structure that would take hours to build, before it is built.

    Raises:
        ValueError: it has an absurd number of layers.
    """
    for name, value in _numbers(config.to_dict()):
        if "layer" in name and value > _MOST_LAYERS:
            raise ValueError(f"config.json wants {value} for {name}, the limit is {_MOST_LAYERS}")


def check_loaded(model: Any, tokenizer: Any) -> None:
    """Refuse weights that are no numbers, and a tokenizer that lost its vocabulary, which transformers makes empty.

    Raises:
        ValueError: the message says which.
    """
    bad = all_finite(dict(model.named_parameters()))
    if bad:
        raise ValueError(f"{len(bad)} tensors hold NaN or infinity ({', '.join(bad[:3])})")
    wanted = getattr(model.config.get_text_config(), "vocab_size", 0)
    if len(tokenizer) < _ALL_THERE * wanted:
        raise ValueError(f"its tokenizer knows {len(tokenizer)} words, the model {wanted}: files are missing")


def _numbers(table: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of a table and of the tables in it."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield name, value
