"""Brings a LoRA that was read into the layout of another program: kohya's, PEFT's, or the older one of diffusers.

PEFT and diffusers keep no alpha beside the tensors, so it is folded into the factors: up becomes up * alpha / rank, and
the configuration in the header then says alpha == rank. Only plain LoRA (and DoRA with one magnitude an output) has a
place in their files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.checkpoints import lora_names
from library.checkpoints.cascade_lora import CASCADE
from library.checkpoints.key_maps import TEXT_MODEL
from library.checkpoints.lora_kinds import DOWN, RANKED, UP
from library.checkpoints.lora_names import TEXT, TEXT_1, TEXT_2, UNET
from library.checkpoints.lora_scales import HEADER_ENTRY
from library.errors import Problem, raise_problems

if TYPE_CHECKING:
    from torch import Tensor

    from library.checkpoints.lora_file import AdapterWeights, LoraFile

_FACTORS: Mapping[tuple[str, bool], tuple[str, str]] = {
    ("peft", True): ("lora_A.weight", "lora_B.weight"),
    ("peft", False): ("lora_A.weight", "lora_B.weight"),
    ("diffusers", True): ("lora.down.weight", "lora.up.weight"),
    ("diffusers", False): ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
}
"""How the factors down and up are called, by style and whether they are the U-Net's."""

_COMPONENTS = {UNET: "unet", TEXT: "text_encoder", TEXT_1: "text_encoder", TEXT_2: "text_encoder_2"}
_KIND_NAMES = {
    "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "diag-oft": "OFT", "boft": "BOFT",
    "full": "full differences", "norm": "norm layers", "ia3": "IA3", "tlora": "T-LoRA",
}  # fmt: skip
_BASE_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", CASCADE: "stable_cascade"}
_FOLDED = frozenset({DOWN, UP, "alpha", "scalar", "dora_scale"})


@dataclass(frozen=True)
class Exported:
    """What a file of another layout holds.

    Attributes:
        tensors: by key.
        metadata: of the header.
        left_out: names of modules that the layout cannot name.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    left_out: tuple[str, ...] = ()


def to_kohya(file: LoraFile) -> Exported:
    """Return the tensors and metadata of a kohya (or LyCORIS) file: alphas everywhere, ranks in the metadata."""
    import torch

    tensors: dict[str, Tensor] = {}
    for weights in file.modules.values():
        tensors.update(weights.file_tensors())
        if weights.kind in RANKED and "alpha" not in weights.tensors:
            tensors[f"{weights.name}.alpha"] = torch.tensor(weights.alpha)
    metadata = {name: text for name, text in file.metadata.items() if name not in (HEADER_ENTRY, "format")}
    plain = all(weights.kind == "lora" for weights in file.modules.values())
    facts = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": _common(weights.rank for weights in file.modules.values()),
        "ss_network_alpha": _common(weights.alpha for weights in file.modules.values()),
    }
    if file.base in _BASE_VERSIONS:
        facts |= {"ss_base_model_version": _BASE_VERSIONS[file.base], "ss_v2": str(file.base == "sd2")}
    return Exported(tensors, {**facts, **metadata})


def _common(values: Iterable[float]) -> str:
    found = set(values)
    return str(found.pop()) if len(found) == 1 else "Dynamic"


def to_diffusers(file: LoraFile, style: str = "peft") -> Exported:
    """Return the tensors and metadata of a file for PEFT and diffusers.

    Args:
        file: any LoRA file.
        style: ``peft`` or ``diffusers``.

    Raises:
        UserError: a module is of a kind that such files cannot hold.
    """
    raise_problems(_cannot_hold(file))
    tensors: dict[str, Tensor] = {}
    left_out = []
    ranks: dict[str, dict[str, int]] = {}
    with_dora = set()
    for name, weights in file.modules.items():
        part, path = file.places[name]
        if not lora_names.is_known_path(part, path):
            left_out.append(name)
            continue
        component = _COMPONENTS[part]
        down_name, up_name = _FACTORS[style, part == UNET]
        tensors[f"{component}.{path}.{down_name}"] = weights.tensors[DOWN]
        tensors[f"{component}.{path}.{up_name}"] = _folded_up(weights)
        magnitude = weights.tensors.get("dora_scale")
        if magnitude is not None:
            # PEFT keeps [out] for a matrix and [1, out, 1, 1] for a convolution. It also takes the name without
            # `.weight`, but transformers, which loads text encoders, does not.
            shape = (-1,) if weights.tensors[DOWN].dim() == 2 else (1, -1, 1, 1)
            tensors[f"{component}.{path}.lora_magnitude_vector.weight"] = magnitude.reshape(shape)
            with_dora.add(component)
        # Newer versions of transformers have no `text_model` in memory, so settings name modules without it.
        ranks.setdefault(component, {})[path.removeprefix(TEXT_MODEL)] = weights.rank
    config = {
        f"{component}.{key}": value
        for component, table in ranks.items()
        for key, value in _config(table, component in with_dora).items()
    }
    metadata = {**file.metadata, "format": "pt", HEADER_ENTRY: json.dumps(config, indent=2, sort_keys=True)}
    return Exported(tensors, metadata, tuple(left_out))


def _folded_up(weights: AdapterWeights) -> Tensor:
    up = weights.tensors[UP]
    factor = weights.scale * float(weights.tensors.get("scalar", 1.0))
    return up if factor == 1 else (up.float() * factor).to(up.dtype)


def _config(ranks: Mapping[str, int], dora: bool) -> dict[str, Any]:
    """Return the settings of PEFT's `LoraConfig` for modules of these ranks."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": dora,
        "use_rslora": False,
    }


def _cannot_hold(file: LoraFile) -> list[Problem]:
    """Say once for every kind of module why it cannot be written."""
    reasons: dict[str, str] = {}
    for name, weights in file.modules.items():
        reason = _reason(weights)
        if reason:
            reasons.setdefault(reason, name)
    hint = "Only plain LoRA and DoRA can be converted to this layout"
    return [
        Problem(str(file.path), f"{reason} (such as {name}) have no place there", hint)
        for reason, name in reasons.items()
    ]


def _reason(weights: AdapterWeights) -> str:
    if weights.kind != "lora":
        return f"{_KIND_NAMES.get(weights.kind, weights.kind)} modules"
    extra = sorted(set(weights.tensors) - _FOLDED)
    if extra:
        return f"LoRA modules with {', '.join(extra)}"
    magnitude = weights.tensors.get("dora_scale")
    if magnitude is not None and magnitude.numel() != weights.tensors[UP].shape[0]:
        return "DoRA modules with one magnitude an input"
    return ""
