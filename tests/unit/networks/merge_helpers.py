"""LoRA files of random numbers for the tiny models, with names that come from diffusers' own module paths."""

import json
import re
from functools import cache

import torch
from safetensors.torch import load_file, save_file

UNET_LAYER = re.compile(r"attentions\.\d+\.(.*(to_[qkv]|to_out\.0|net\.0\.proj|net\.2)|proj_(in|out))$")
UNET_CONV = re.compile(r"(resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)|samplers\.0\.conv)$")
TEXT_LAYER = re.compile(r"(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$")


@cache
def layer_shapes(family="sd1", conv=False):
    """Name in LoRA files -> (part, module path, shape of the weight) of the tiny model."""
    from library.models.random_models import random_parts

    parts = random_parts(family)
    found = {}
    for part, prefix, tensors in (("unet", "lora_unet_", parts.unet), ("text", "lora_te_", parts.text)):
        for key, tensor in tensors.items():
            path = key.removesuffix(".weight")
            wanted = (UNET_LAYER.search(path) or (conv and UNET_CONV.search(path))) if part == "unet" else None
            if key.endswith(".weight") and (wanted or (part == "text" and TEXT_LAYER.search(path))):
                found[prefix + path.replace(".", "_")] = (part, path, tuple(tensor.shape))
    return found


def random_lora(path, layers, rank=4, alpha=2.0, seed=0, metadata=None, skip=()):
    """Write a LoRA for `layers` (see `layer_shapes`); returns its tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (_, _, shape) in layers.items():
        if name in skip:
            continue
        tensors[f"{name}.lora_down.weight"] = torch.randn((rank, *shape[1:]), generator=generator) * 0.1
        tensors[f"{name}.lora_up.weight"] = (
            torch.randn((shape[0], rank, *(1 for _ in shape[2:])), generator=generator) * 0.1
        )
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path, metadata)
    return tensors


def delta_of(tensors, name, shape):
    """(alpha / rank) up @ down of one module, in float64."""
    up, down = (tensors[f"{name}.lora_{part}.weight"].double().flatten(1) for part in ("up", "down"))
    alpha = tensors.get(f"{name}.alpha", torch.tensor(float(down.shape[0])))
    return (float(alpha) / down.shape[0] * up @ down).reshape(shape)


def header_of(path):
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__", {})


def run(script, *argv):
    """Run a script of networks/ in this process; returns its exit status."""
    try:
        script.main([str(item) for item in argv])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def model_weights(path, family):
    """Weights of a single-file checkpoint or folder by part and diffusers' names, read apart from what is tested."""
    from library.checkpoints.load import load_parts

    parts = load_parts(str(path), family)
    return {"unet": parts.unet, "text": parts.text, "vae": parts.vae}


def assert_merged(before, after, changes, tolerance=1e-6):
    """Every weight of `after` is that of `before` plus what `changes` ({(part, path): delta}) says."""
    touched = 0
    for part, tensors in before.items():
        assert set(after[part]) == set(tensors)
        for key, tensor in tensors.items():
            delta = changes.get((part, key.removesuffix(".weight"))) if key.endswith(".weight") else None
            if delta is None:
                assert torch.equal(after[part][key], tensor), key
            else:
                touched += 1
                found = after[part][key].double() - tensor.double()
                torch.testing.assert_close(found, delta.reshape(found.shape), rtol=0, atol=tolerance)
    assert touched == len(changes)


def read(path):
    return load_file(path)
