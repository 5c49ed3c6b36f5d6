"""Names of the modules that a LoRA file speaks of: module paths in memory <-> the flat names of files. Light.

In memory a U-Net has diffusers' module paths and a text encoder those that begin with `text_model.`. A file joins a
prefix and the path with underscores: `lora_unet_mid_block_attentions_0_proj_in`. The U-Net of SDXL alone goes by the
paths of its original code there: `lora_unet_middle_block_1_proj_in`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from library.checkpoints import cascade_lora, key_maps
from library.errors import UserError

UNET, TEXT, TEXT_1, TEXT_2 = "unet", "text_encoder", "text_encoder_1", "text_encoder_2"
PREFIXES: Mapping[str, str] = {UNET: "lora_unet", TEXT: "lora_te", TEXT_1: "lora_te1", TEXT_2: "lora_te2"}

# SDXL has two resnets a block and attention in the two deepest levels; names of a part of the model need not show it.
_SDXL_MEMORY = ("down_blocks.0.resnets.1.-", "up_blocks.0.attentions.0.-", "up_blocks.1.attentions.0.-")
_SDXL_FILE = ("input_blocks.3.0.op.-",)
_SGM_STARTS = ("input_blocks.", "middle_block.", "output_blocks.", "label_emb.", "time_embed.", "out.")
_TEXT_STARTS = ("encoder.layers.", "embeddings.", "final_layer_norm")

_WORDS = (
    "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "proj_in", "proj_out", "to_q", "to_k", "to_v",
    "to_out", "time_emb_proj", "conv_shortcut", "conv_in", "conv_out", "conv_norm_out", "time_embedding",
    "add_embedding", "linear_1", "linear_2", "input_blocks", "middle_block", "output_blocks", "in_layers",
    "emb_layers", "out_layers", "skip_connection", "time_embed", "label_emb", "text_model", "self_attn", "q_proj",
    "k_proj", "v_proj", "out_proj", "layer_norm1", "layer_norm2", "final_layer_norm", "token_embedding",
    "position_embedding", "text_projection", *cascade_lora.WORDS,
)  # fmt: skip
_WORD = re.compile(rf"(?<![^_])({'|'.join(sorted(_WORDS, key=len, reverse=True))})(?=_|$)")
_KNOWN_PATHS = {
    UNET: re.compile(
        r"(down|up)_blocks\.\d+\.(attentions|resnets|downsamplers|upsamplers)\.\d+(\..+)?|"
        r"mid_block\.(attentions|resnets)\.\d+(\..+)?|"
        r"conv_in|conv_out|conv_norm_out|(time|add)_embedding\.linear_[12]"
    ),
    TEXT: re.compile(
        r"text_model\.(encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12])|"
        r"embeddings\.(token|position)_embedding|final_layer_norm)|text_projection"
    ),
}
_ADAPTER_KEY = re.compile(
    r"^(lora_(prior_)?unet_|lora_(prior_)?te\d?_|oft_unet_|lycoris_|bundle_emb\.|weights\.\d+\.lora_(up|down)$)|"
    r"\.lora_([AB]|up|down)\.|\.lora_magnitude_vector|[._]lora\.(up|down)\.|\.lora_linear_layer\.|"
    r"\.hada_w\d|\.lokr_w\d|\.oft_blocks$|\.dora_scale$"
)


def looks_like_adapter(key: str) -> bool:
    """Whether a tensor of this name belongs to a LoRA or a similar file of any layout."""
    return _ADAPTER_KEY.search(key) is not None


def module_names(memory_names: Iterable[str], part: str) -> dict[str, str]:
    """Map the names that a file uses to module paths, for one part of a model.

    Args:
        memory_names: module paths; all of the part's, or those that matter.
        part: ``unet``, ``text_encoder`` (a model's only one), ``text_encoder_1`` or ``text_encoder_2``.

    Returns:
        File name -> module path as it was given, in the given order.

    Raises:
        UserError: two modules would have the same name in a file.
    """
    paths = [path for path in memory_names if path]
    in_file = unet_file_paths(paths) if part == UNET else {path: text_path(path) for path in paths}
    names: dict[str, str] = {}
    for path in paths:
        name = flat_name(part, in_file[path])
        if name in names:
            raise UserError(f"the modules {names[name]!r} and {path!r} would both be called {name!r} in a LoRA file")
        names[name] = path
    return names


def flat_name(part: str, file_path: str) -> str:
    """Join the prefix of a part and a module path (as files spell it) to the name that a file uses."""
    return f"{PREFIXES[part]}_{file_path.replace('.', '_')}"


def text_path(path: str) -> str:
    """Return a text encoder's module path with the `text_model.` that some libraries leave out."""
    return key_maps.TEXT_MODEL + path if path.startswith(_TEXT_STARTS) else path


def is_sdxl_unet(paths: Iterable[str]) -> bool:
    """Whether module paths are those of an SDXL U-Net: several transformer blocks in a row, or sizes as input."""
    return any("transformer_blocks.1." in path or path.startswith("add_embedding") for path in paths)


def unet_file_paths(paths: Iterable[str], *, sdxl: bool | None = None) -> dict[str, str]:
    """Map U-Net module paths of memory to the paths that LoRA files use; only those of SDXL differ.

    Args:
        paths: as in memory.
        sdxl: which model it is; None looks at the paths.
    """
    paths = list(paths)
    if not (is_sdxl_unet(paths) if sdxl is None else sdxl):
        return {path: path for path in paths}
    renamed = key_maps.unet_to_file([*(f"{path}.weight" for path in paths), *_SDXL_MEMORY])
    return {path: renamed[f"{path}.weight"].removesuffix(".weight") for path in paths}


def unet_memory_paths(paths: Iterable[str]) -> dict[str, str]:
    """Map U-Net module paths of either spelling to diffusers' paths."""
    paths = list(paths)
    original = [path for path in paths if path.startswith(_SGM_STARTS)]
    renamed = key_maps.unet_to_memory([*(f"{path}.weight" for path in original), *_SDXL_FILE])
    return {path: renamed.get(f"{path}.weight", path).removesuffix(".weight") for path in paths}


def is_sgm_path(path: str) -> bool:
    """Whether a U-Net module path is spelled as in the original code (`input_blocks.1.1...`)."""
    return path.startswith(_SGM_STARTS)


@lru_cache(maxsize=16384)
def dotted_path(flat: str) -> str:
    """Return the module path that a flat name without its prefix stands for, knowing which words hold underscores."""
    return _WORD.sub(lambda match: match[1].replace("_", "\0"), flat).replace("_", ".").replace("\0", "_")


def is_known_path(part: str, path: str) -> bool:
    """Whether a path of memory can be one of a Stable Diffusion U-Net, of stage C, or of a CLIP text encoder."""
    if part == UNET and cascade_lora.is_cascade_path(path):
        return True
    return _KNOWN_PATHS[UNET if part == UNET else TEXT].fullmatch(path) is not None
