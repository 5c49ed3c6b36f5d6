"""BLIP checkpoints in the layout of their authors: names of tensors here and in transformers, and the structure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_HEAD_WIDTH = 64
"""Width of an attention head in every BLIP; the number of heads is not in the file."""

_BLOCK = "visual_encoder.blocks.{}."
_LAYER = "vision_model.encoder.layers.{}."
_OUTER_NAMES = {
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
    "visual_encoder.norm.": "vision_model.post_layernorm.",
}
_BLOCK_NAMES = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
}
_TEXT = "text_decoder."
# Numbers that modules make by themselves, and parts of other tasks.
_NOT_NEEDED = re.compile(r"position_ids$|^(text_encoder|itm_head|vision_proj|text_proj|\w+_m)\b|^(temp|\w+_queue)$")


def to_transformers(name: str) -> str | None:
    """Return what a tensor is called in `BlipForConditionalGeneration`; None for one that it does not have."""
    if name.startswith(_TEXT):
        return None if _NOT_NEEDED.search(name) else name
    return _renamed(name, _OUTER_NAMES, _BLOCK, _LAYER, _BLOCK_NAMES)


def to_original(name: str) -> str | None:
    """Return what a tensor of `BlipForConditionalGeneration` is called in the layout of the authors."""
    if name.startswith(_TEXT):
        return name
    outer = {new: old for old, new in _OUTER_NAMES.items()}
    return _renamed(name, outer, _LAYER, _BLOCK, {new: old for old, new in _BLOCK_NAMES.items()})


def _renamed(name: str, outer: Mapping[str, str], block: str, new_block: str, inner: Mapping[str, str]) -> str | None:
    match = re.match(re.escape(block).replace(r"\{\}", r"(\d+)"), name)
    head, rest = (new_block.format(match[1]), name[match.end() :]) if match else ("", name)
    for old, new in (inner if match else outer).items():
        if rest == old or (old.endswith(".") and rest.startswith(old)):
            return head + new + rest[len(old) :]
    return None


def read_original(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their names in transformers.

    Raises:
        UserError: the file is damaged, a pickle that is not allowed, or no BLIP captioning model.
    """
    import torch

    from library.checkpoints.headers import file_kind
    from library.checkpoints.pickles import load_pickle
    from library.checkpoints.tensor_files import open_tensors

    table: Any = open_tensors(path) if file_kind(path) == "safetensors" else load_pickle(path)
    if isinstance(table, Mapping) and isinstance(table.get("model"), Mapping):
        table = table["model"]
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in table.items() if isinstance(table, Mapping) else ():
        if not isinstance(name, str) or not torch.is_tensor(tensor):
            continue
        if _NOT_NEEDED.search(name):
            continue
        new = to_transformers(name) or (name if to_original(name) else None)
        if new is not None:
            found[new] = tensor
        else:
            unknown.append(name)
    if not {"vision_model.embeddings.class_embedding", "text_decoder.cls.predictions.bias"} <= set(found):
        hint = "Give model_large_caption.pth or model_base_caption_capfilt_large.pth, or a transformers folder."
        raise UserError("is no captioning model of BLIP", hint, where=str(path))
    if unknown:
        what = f"holds {len(unknown)} tensors that BLIP does not have ({unknown[0]})"
        raise UserError(what, "Is it another version of BLIP?", where=str(path))
    return found


def structure_of(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Any]]:
    """Return the configuration of the model that the shapes of its tensors describe.

    Raises:
        UserError: tensors are missing.
    """
    try:
        vision = _vision_structure(tensors)
        return {"vision_config": vision, "text_config": _text_structure(tensors, vision["hidden_size"])}
    except KeyError as error:
        raise UserError(f"lacks the tensor {error}", "Fetch the file again", where=str(path)) from error


def _vision_structure(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    patch = tensors["vision_model.embeddings.patch_embedding.weight"]
    places = tensors["vision_model.embeddings.position_embedding"]
    width = patch.shape[0]
    return {
        "hidden_size": width,
        "intermediate_size": tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(tensors, "vision_model.encoder.layers."),
        "num_attention_heads": max(width // _HEAD_WIDTH, 1),
        "patch_size": patch.shape[-1],
        "image_size": round((places.shape[1] - 1) ** 0.5) * patch.shape[-1],
        "layer_norm_eps": 1e-6,  # as the authors' vision transformer
    }


def _text_structure(tensors: Mapping[str, Tensor], vision_width: int) -> dict[str, Any]:
    words = tensors["text_decoder.bert.embeddings.word_embeddings.weight"]
    return {
        "vocab_size": words.shape[0],
        "hidden_size": words.shape[1],
        "encoder_hidden_size": vision_width,
        "intermediate_size": tensors["text_decoder.bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": _count(tensors, "text_decoder.bert.encoder.layer."),
        "num_attention_heads": max(words.shape[1] // _HEAD_WIDTH, 1),
        "max_position_embeddings": tensors["text_decoder.bert.embeddings.position_embeddings.weight"].shape[0],
        "is_decoder": True,
    }


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name[len(prefix) :].partition(".")[0]) for name in tensors if name.startswith(prefix))
