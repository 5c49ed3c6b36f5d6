"""LoRA files for tests: the golden key lists in small, and the same files as other programs would spell them."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from library.checkpoints import lora_names

GOLDEN = Path(__file__).resolve().parent / "golden"


def golden_keys(version):
    """Key -> true shape."""
    return json.loads((GOLDEN / f"lora_keys_{version}.json").read_text())


@cache
def small_lora(version, alpha=2.0, seed=0):
    """Not to be changed: tensors of the golden list; every width divided by 32, the width of the text features kept."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(key, shape):
        if not shape:
            return torch.tensor(alpha)
        keep = re.search(r"attn2_to_[kv]\.lora_down", key)
        small = [size if size < 32 or (keep and axis == 1) else size // 32 for axis, size in enumerate(shape)]
        return torch.randn(small, generator=generator)

    return {key: tensor(key, shape) for key, shape in golden_keys(version).items()}


def some(tensors, *parts):
    """The tensors whose keys hold one of `parts`."""
    return {key: tensor for key, tensor in tensors.items() if any(part in key for part in parts)}


def save(path, tensors, metadata=None):
    """Write with the safetensors library, so that what we write ourselves is not tested with itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, str(path), metadata)
    return path


def delta(weights):
    """What a plain LoRA module adds to its weight."""
    up, down = weights.tensors["lora_up.weight"].float(), weights.tensors["lora_down.weight"].float()
    return weights.scale * up.flatten(1) @ down.flatten(1)


def places(names):
    """(Component, module path) of kohya names; the tables behind it are tested with true models."""
    split = {name: name.removeprefix("lora_").partition("_")[::2] for name in names}
    paths = {name: lora_names.dotted_path(rest) for name, (_, rest) in split.items()}
    memory = lora_names.unet_memory_paths(paths.values())
    components = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
    return {name: (components[split[name][0]], memory[path]) for name, path in paths.items()}


def respelled(tensors, spell, *, alpha=True):
    """The tensors of a kohya file under the keys that `spell(component, path, "down" | "up" | "alpha")` gives."""
    where = places({key.partition(".")[0] for key in tensors})
    made = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.partition(".")
        if suffix != "alpha" or alpha:
            made[spell(*where[name], suffix.removeprefix("lora_").removesuffix(".weight"))] = tensor
    return made


def peft(component, path, suffix):
    """The spelling of PEFT inside diffusers."""
    return f"{component}.{path}.{ {'down': 'lora_A.weight', 'up': 'lora_B.weight'}.get(suffix, suffix) }"
