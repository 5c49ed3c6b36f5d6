"""Checks the arguments of `lycoris.kohya`, which passes over unknown ones and finds out late about wrong values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import Problem
from library.option_values import BadValue, convert, nearest

if TYPE_CHECKING:
    from types import ModuleType

NAME = "lycoris.kohya"
_WHERE = "--network_args"
_WHOLE = ("conv_dim", "block_size", "factor")
_REAL = (
    "conv_alpha", "dropout", "rank_dropout", "module_dropout", "constraint", "constrain",
    "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio",
)  # fmt: skip
_OTHERS = """
    algo preset rank_dropout_scale use_tucker use_cp use_conv_cp disable_conv_cp use_scalar train_norm rescaled dora_wd
    wd_on_output full_matrix bypass_mode rs_lora unbalanced_factorization decompose_both"""
KNOWN = frozenset((*_WHOLE, *_REAL, *_OTHERS.split()))
"""All arguments that it reads."""


def lycoris_problems(module: ModuleType, arguments: Mapping[str, str]) -> Iterator[Problem]:
    """Yield arguments that LyCORIS does not read, and values that it cannot read.

    Args:
        module: `lycoris.kohya`; its tables of algorithms and presets are looked into, where it has them.
        arguments: `--network_args`.
    """
    for key, value in arguments.items():
        if key not in KNOWN:
            near = nearest(key, KNOWN)
            hint = f"Did you mean {near}?" if near else f"It reads {', '.join(sorted(KNOWN))}."
            yield Problem(_WHERE, f"{NAME} reads no {key!r}", hint)
        elif value and key in (*_WHOLE, *_REAL):
            try:
                convert(value, int if key in _WHOLE else float, None)
            except BadValue as error:
                yield Problem(_WHERE, f"{key}: {error}")
    yield from _unknown_word("algo", arguments.get("algo", "").lower(), getattr(module, "network_module_dict", ()))
    preset = arguments.get("preset", "")
    if not _is_file(preset):
        yield from _unknown_word("preset", preset, getattr(module, "PRESET", ()), or_file=True)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # no name that a file could have
        return False


def _unknown_word(key: str, word: str, known: Collection[str], *, or_file: bool = False) -> Iterator[Problem]:
    if not word or not known or word in known:
        return
    near = nearest(word, known)
    rest = ", nor a file" if or_file else ""
    hint = f"Did you mean {near}?" if near else f"It has {', '.join(known)}."
    yield Problem(_WHERE, f"{key}: {word!r} is none of LyCORIS' own{rest}", hint)


def float8_problems(name: str, arguments: Mapping[str, str]) -> Iterator[Problem]:
    """Yield why a network module cannot work on weights kept in 8 bits."""
    if name == NAME and arguments.get("bypass_mode", "").lower() not in ("true", "1"):
        what = "LyCORIS calculates in the type of the base weights, which 8 bits are too few for"
        yield Problem("--fp8_base", what, "Add bypass_mode=True to --network_args, or use a module of networks.")
