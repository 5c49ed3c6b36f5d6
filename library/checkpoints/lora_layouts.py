"""Reads the tensor names of LoRA files of every layout as what they mean: module, tensor, base model. Light.

Every program spells the same thing differently: `lora_unet_mid_block_..._to_q.lora_down.weight` (kohya),
`unet.mid_block....to_q.lora_A.weight` (PEFT), `unet.mid_block....processor.to_q_lora.down.weight` (old diffusers),
`lycoris_mid_block_..._to_q.lokr_w1` (LyCORIS alone). All become the kohya name and a suffix of kohya or LyCORIS.
Only names, shapes and the header's strings are needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from library.checkpoints import lora_names
from library.checkpoints.cascade_lora import CASCADE, WORD_CHANGES, WORD_IDS, is_cascade_path, memory_path
from library.checkpoints.lora_kinds import DOWN, MAGNITUDE, UP
from library.checkpoints.lora_names import TEXT, TEXT_1, TEXT_2, UNET

Shapes = Mapping[str, tuple[int, ...]]

BUNDLED = "bundle_emb."

_KOHYA_SUFFIX = re.compile(
    r"\.(?:(?P<lora>lora_(?:down|up|mid))(?:\.weight)?|(?P<alpha>alpha)|"
    r"(?P<other>dora_scale|diff(?:_b)?|[wb]_norm|scalar|oft_blocks|oft_diag|rescale|on_input|"
    r"[ab][12]\.weight|bm\.weight|q_layer\.weight|p_layer\.weight|lambda_layer|bias_(?:indices|values|size))|"
    r"(?P<factor>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12]))(?:\.default)?)$"
)
_OTHER_SUFFIXES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("peft", re.compile(r"\.lora_(?P<side>[AB]|magnitude_vector)(?:(?:\.[\w-]+)?\.weight)?$")),
    ("diffusers", re.compile(r"(?:\.lora|_lora|\.lora_linear_layer)\.(?P<side>down|up)\.weight$")),
)
_SIDES = {
    "A": DOWN,
    "B": UP,
    "down": DOWN,
    "up": UP,
    "magnitude_vector": MAGNITUDE,
}
_FLAT = re.compile(r"(lora|oft)_(prior_unet|prior_te|unet|te1|te2|te)_([^.]+)")
_LYCORIS = re.compile(r"lycoris_(?:(unet|text_encoder_2|text_encoder_1|text_encoder|te1|te2|te)_)?([^.]+)")
_PARTS = {
    "unet": UNET,
    "te": TEXT,
    "prior_unet": UNET,
    "prior_te": TEXT,
    "te1": TEXT_1,
    "te2": TEXT_2,
    "text_encoder": TEXT,
    "text_encoder_1": TEXT_1,
    "text_encoder_2": TEXT_2,
}
_DOTTED_PARTS = {
    **{f"{name}.": part for name, part in _PARTS.items()},
    **{f"lora_{name}.": part for name, part in _PARTS.items()},
    "prior.": UNET,
    "model.diffusion_model.": UNET,
    "diffusion_model.": UNET,
    "clip_l.": TEXT,
    "clip_g.": TEXT_2,
}
_WRAPPERS = ("base_model.model.", "base_model.")
_TEXT_LAYER = re.compile(r"self_attn\.to_(q|k|v|out)$")
_FOREIGN = {
    "flux": re.compile(r"double_blocks|single_blocks|single_transformer_blocks"),
    "sd3": re.compile(r"joint_blocks"),
    "another model with a transformer in place of the U-Net": re.compile(r"^(lora_)?transformer[._]"),
}
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
_VERSIONS = (
    ("sd_v1", "sd1"), ("sd_v2", "sd2"), ("sdxl", "sdxl"), ("sd3", "sd3"), ("flux", "flux"),
    ("stable-diffusion-v1", "sd1"), ("stable-diffusion-v2", "sd2"), ("stable-diffusion-xl", "sdxl"),
    ("stable-diffusion-3", "sd3"), ("stable-cascade", CASCADE), ("stable_cascade", CASCADE),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class KeyPlace:
    """Where a tensor belongs.

    Attributes:
        part: of the model, as in `lora_names`; empty when only the flat name is known.
        path: module path in memory; for a flat name that is not understood, that name without its prefix.
        suffix: of kohya and LyCORIS, or `MAGNITUDE`.
        style: ``kohya``, ``lycoris``, ``peft``, ``diffusers``.
        prefix: ``lora`` or ``oft``.
    """

    part: str
    path: str
    suffix: str
    style: str
    prefix: str = "lora"


@dataclass(frozen=True, slots=True)
class Listing:
    """The tensors of a LoRA file, sorted.

    Attributes:
        layout: of which program the file looks like.
        base: model family it was made for, or None.
        may_be_sdxl: whether names and sizes leave open that it is for SDXL.
        modules: kohya name -> suffix -> key in the file.
        places: kohya name -> (part, module path in memory).
        bundled: keys of embeddings that came along.
        unknown: keys that nobody understands.
        twice: pairs of keys that mean the same tensor.
        uses_peft_names: whether the factors are called `lora_A` and `lora_B`.
    """

    layout: str
    base: str | None
    may_be_sdxl: bool
    modules: Mapping[str, Mapping[str, str]]
    places: Mapping[str, tuple[str, str]]
    bundled: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    twice: tuple[tuple[str, str], ...] = ()
    uses_peft_names: bool = False


def sort_keys(shapes: Shapes, metadata: Mapping[str, str], *, base: str | None = None) -> Listing:
    """Tell what the tensors of a LoRA file are.

    Args:
        shapes: of every tensor of the file.
        metadata: of the header.
        base: ``sd1``, ``sd2``, ``sdxl`` or ``stable_cascade`` when it is known; None finds out.
    """
    bundled = tuple(key for key in shapes if key.startswith(BUNDLED) or key in (WORD_CHANGES, WORD_IDS))
    found = {key: place for key in shapes if key not in bundled and (place := place_of(key)) is not None}
    found = _in_memory_paths(found)
    if base is None:
        base, may_be_sdxl = _find_base(found, shapes, metadata)
    else:
        may_be_sdxl = False
    found = _numbered_encoders(found, base)
    names = _kohya_names(found, base)
    modules: dict[str, dict[str, str]] = {}
    twice = []
    for key, place in found.items():
        tensors = modules.setdefault(names[key], {})
        if place.suffix in tensors:
            twice.append((tensors[place.suffix], key))
        tensors.setdefault(place.suffix, key)
    lonely = {name for name, tensors in modules.items() if set(tensors) <= {"alpha", "scalar", "dora_scale", MAGNITUDE}}
    unknown = [key for key in shapes if key not in bundled and (key not in found or names[key] in lonely)]
    return Listing(
        layout=_layout(found, metadata, bundled),
        base=base,
        may_be_sdxl=may_be_sdxl,
        modules={name: tensors for name, tensors in modules.items() if name not in lonely},
        places={names[key]: (place.part, place.path) for key, place in found.items()},
        bundled=bundled,
        unknown=tuple(unknown),
        twice=tuple(twice),
        uses_peft_names=any(place.style == "peft" for place in found.values()),
    )


def place_of(key: str) -> KeyPlace | None:
    """Take a tensor's name apart; None when it is no name of a LoRA."""
    plain = key.replace("$$", ".")
    match = _KOHYA_SUFFIX.search(plain)
    if match is not None:
        suffix = f"{match['lora']}.weight" if match["lora"] else match["alpha"] or match["other"] or match["factor"]
        plain_lora = suffix in (DOWN, UP, "alpha", "dora_scale")
        return _with_module(plain[: match.start()], suffix, "kohya" if plain_lora else "lycoris")
    for style, pattern in _OTHER_SUFFIXES:
        match = pattern.search(plain)
        if match is not None:
            return _with_module(plain[: match.start()], _SIDES[match["side"]], style)
    flat = plain.removesuffix(".weight")  # IA3 has nothing else
    return _with_module(flat, "weight", "lycoris") if flat != plain and _FLAT.fullmatch(flat) else None


def _with_module(module: str, suffix: str, style: str) -> KeyPlace | None:
    flat = _FLAT.fullmatch(module)
    if flat is not None:
        # Early files of kohya's branch for Stable Cascade end names with a stray underscore.
        name = flat[3].rstrip("_")
        return _checked(KeyPlace(_PARTS[flat[2]], lora_names.dotted_path(name), suffix, style, flat[1]), name)
    flat = _LYCORIS.fullmatch(module)
    if flat is not None:
        path = lora_names.dotted_path(flat[2])
        part = _PARTS[flat[1]] if flat[1] else _part_of(path)
        return _checked(KeyPlace(part, path, suffix, "lycoris"), flat[2]) if part else None
    part, path = _split_dotted(module)
    style = "diffusers" if style == "kohya" else style
    return _checked(KeyPlace(part, path, suffix, style), path.replace(".", "_")) if part else None


def _split_dotted(module: str) -> tuple[str, str]:
    """Return (part, path) of a dotted name; the part is empty when the path could be anything."""
    part, path, before = "", module, ""
    while path != before:
        before = path
        for wrapper in _WRAPPERS:
            path = path.removeprefix(wrapper)
        prefix = next((prefix for prefix in _DOTTED_PARTS if path.startswith(prefix)), None)
        if prefix is not None and not part:
            part, path = _DOTTED_PARTS[prefix], path[len(prefix) :]
    path = path.replace(".processor.", ".").removesuffix("_lora")
    return part or _part_of(path), path


def _part_of(path: str) -> str:
    if lora_names.is_known_path(UNET, path) or lora_names.is_sgm_path(path):
        return UNET
    return TEXT if lora_names.is_known_path(TEXT, lora_names.text_path(path)) else ""


def _checked(place: KeyPlace, flat: str) -> KeyPlace:
    """Spell a path as it is in memory; keep the flat name where the path means nothing to us."""
    path = place.path
    if place.part == UNET:
        path = memory_path(f"{path}.0" if path.endswith(".to_out") else path)
        known = lora_names.is_known_path(UNET, path) or lora_names.is_sgm_path(path)
    else:
        path = lora_names.text_path(_TEXT_LAYER.sub(r"self_attn.\1_proj", path))
        known = lora_names.is_known_path(TEXT, path)
    return replace(place, path=path if known else flat)


def _in_memory_paths(found: Mapping[str, KeyPlace]) -> dict[str, KeyPlace]:
    """Spell every U-Net path as diffusers does."""
    paths = lora_names.unet_memory_paths({place.path for place in found.values() if place.part == UNET})
    return {
        key: replace(place, path=paths[place.path]) if place.part == UNET and paths[place.path] != place.path else place
        for key, place in found.items()
    }


def _numbered_encoders(found: Mapping[str, KeyPlace], base: str | None) -> dict[str, KeyPlace]:
    """Call the only encoder that a file names the first of two where the model has two."""
    parts = {place.part for place in found.values()}
    if base != "sdxl" and TEXT_2 not in parts and TEXT_1 not in parts:
        return dict(found)
    return {key: replace(place, part=TEXT_1) if place.part == TEXT else place for key, place in found.items()}


def _kohya_names(found: Mapping[str, KeyPlace], base: str | None) -> dict[str, str]:
    in_unet = {place.path for place in found.values() if place.part == UNET}
    known = {path for path in in_unet if lora_names.is_known_path(UNET, path)}
    in_file = lora_names.unet_file_paths(known, sdxl=base == "sdxl")
    return {key: lora_names.flat_name(place.part, in_file.get(place.path, place.path)) for key, place in found.items()}


def _layout(found: Mapping[str, KeyPlace], metadata: Mapping[str, str], bundled: Iterable[str]) -> str:
    """Name the program or the convention that a file comes from."""
    if any("$$" in key for key in found) or "ai-toolkit" in metadata.get("software", ""):
        return "ai-toolkit"
    own = "ss_train_tokens" in metadata
    if any(key.startswith(BUNDLED) and not own for key in bundled) or any(key.startswith("ot_") for key in metadata):
        return "onetrainer"
    styles = {place.style for place in found.values()}
    return next((style for style in ("lycoris", "peft", "diffusers") if style in styles), "kohya")


# Which base model ---------------------------------------------------------------------------------------------------


def _find_base(found: Mapping[str, KeyPlace], shapes: Shapes, metadata: Mapping[str, str]) -> tuple[str | None, bool]:
    """Return the base, and whether it may be SDXL though nothing says so. Sizes count more than what a file claims."""
    unet = {place.path for place in found.values() if place.part == UNET}
    parts = {place.part for place in found.values()}
    if any(map(is_cascade_path, unet)):
        return CASCADE, False
    width = _text_width(found, shapes)
    if width in _WIDTHS:
        return _WIDTHS[width], False
    foreign = _foreign(shapes, unet)
    if foreign is not None:
        return foreign, False
    shallow = any(map(_never_in_sdxl, unet))
    original = any(map(_is_original_name, found)) and not shallow
    if TEXT_2 in parts or TEXT_1 in parts or lora_names.is_sdxl_unet(unet) or original:
        return "sdxl", False
    base = _claimed_base(metadata) or _base_of_layers(found, shapes)
    return base, base is None and not shallow


def _text_width(found: Mapping[str, KeyPlace], shapes: Shapes) -> int | None:
    """Return how wide the text features are that the U-Net takes: the input of its cross attention."""
    for key, place in found.items():
        if place.part == UNET and place.path.endswith(("attn2.to_k", "attn2.to_v")):
            shape = shapes[key]
            if place.suffix in (DOWN, "hada_w1_b", "diff", "a2.weight") and len(shape) >= 2:
                return shape[1]
    return None


def _foreign(shapes: Shapes, unet: Iterable[str]) -> str | None:
    if any(lora_names.is_known_path(UNET, path) for path in unet):
        return None
    return next((name for name, pattern in _FOREIGN.items() if any(pattern.search(key) for key in shapes)), None)


def _is_original_name(key: str) -> bool:
    return re.search(r"(^|[._])(input_blocks|middle_block|output_blocks)[._]", key) is not None


def _claimed_base(metadata: Mapping[str, str]) -> str | None:
    for key in ("ss_base_model_version", "modelspec.architecture"):
        claimed = metadata.get(key, "").lower()
        for start, base in _VERSIONS:
            if claimed.startswith(start):
                return base
    return {"true": "sd2", "false": "sd1"}.get(metadata.get("ss_v2", "").lower())


def _base_of_layers(found: Mapping[str, KeyPlace], shapes: Shapes) -> str | None:
    """Tell SD1 from SD2: projections are 1x1 convolutions in SD1; the text encoder of SD2 has 23 layers, not 12.

    That of Stable Cascade has 32.
    """
    deepest = 0
    for key, place in found.items():
        is_projection = place.part == UNET and place.path.endswith((".proj_in", ".proj_out"))
        if is_projection and place.suffix in (DOWN, "diff"):
            return "sd1" if len(shapes[key]) == 4 else "sd2"
        layer = re.match(r"text_model\.encoder\.layers\.(\d+)\.", place.path)
        if place.part != UNET and layer is not None:
            deepest = max(deepest, int(layer[1]))
    return CASCADE if deepest >= 23 else "sd2" if deepest >= 12 else None


def _never_in_sdxl(path: str) -> bool:
    return re.match(r"(down|up)_blocks\.3\.|down_blocks\.0\.attentions|up_blocks\.2\.attentions", path) is not None
