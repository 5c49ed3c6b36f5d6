"""Which Stable Cascade parts a file holds, from its header, and what to say when it holds another one.

Light for safetensors files and Diffusers folders: no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.checkpoints import key_maps_cascade as keys
from library.checkpoints.cascade_configs import CONFIGS
from library.checkpoints.detect import classify, family_label, read_json
from library.checkpoints.headers import file_kind, read_header
from library.checkpoints.key_maps_cascade import Part
from library.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]

_LABELS: Mapping[Part, str] = {
    "stage_c": "stage C",
    "stage_b": "stage B",
    "stage_a": "stage A",
    "effnet": "the EfficientNet encoder",
    "previewer": "the previewer",
    "controlnet": "a ControlNet for stage C",
    "text": "a text encoder with projection",
    "vision": "a CLIP image encoder",
}
_OPTIONS: Mapping[Part, str] = {
    "stage_c": "--stage_c_checkpoint_path",
    "stage_b": "--stage_b_checkpoint_path",
    "stage_a": "--stage_a_checkpoint_path",
    "effnet": "--effnet_checkpoint_path",
    "previewer": "--previewer_checkpoint_path",
    "controlnet": "--controlnet_checkpoint_path",
    "text": "--text_model_checkpoint_path",
    "vision": "--image_model_checkpoint_path",
}
_FOLDERS: Mapping[Part, tuple[str, ...]] = {
    "stage_c": ("prior", "prior_lite"),
    "stage_b": ("decoder", "decoder_lite"),
    "stage_a": ("vqgan",),
    "text": ("text_encoder",),
    "vision": ("image_encoder",),
}
_RESIDUAL_BLOCK = re.compile(r"(down|up)_blocks\.\d+\.\d+\.depthwise\.weight$")
_VERSIONS: Mapping[str, Mapping[int, str]] = {
    stage: {config.residual_blocks: version for (key, version), config in CONFIGS.items() if f"stage_{key}" == stage}
    for stage in ("stage_c", "stage_b")
}


@dataclass(frozen=True, slots=True)
class CascadePart:
    """One part of a file.

    Attributes:
        part: which one.
        prefix: of its names in the file.
        layout: ``official``, ``split`` (ComfyUI's) or ``diffusers``; of stages B and C.
        version: ``3.6B``, ``1B``, ``3B``, ``700M``, or empty for other sizes and parts.
    """

    part: Part
    prefix: str
    layout: str = "official"
    version: str = ""

    @property
    def label(self) -> str:
        """The part in words."""
        return _LABELS[self.part] + (f" ({self.version})" if self.version else "")


@dataclass(frozen=True, slots=True)
class CascadeFile:
    """What a file or folder holds: parts by name, the strings of its header, and words for what else it may be."""

    path: Path
    parts: Mapping[Part, CascadePart]
    metadata: Mapping[str, str]
    other: str = ""

    @property
    def label(self) -> str:
        """What the file is, in words."""
        if not self.parts:
            return self.other
        return f"Stable Cascade: {', '.join(part.label for part in self.parts.values())}"


def cascade_option(part: Part) -> str:
    """Return the option that names the file of a part."""
    return _OPTIONS[part]


def cascade_parts(shapes: Shapes) -> dict[Part, CascadePart]:
    """Return the Stable Cascade parts among tensors of these names and shapes."""
    found = {}
    for part, prefix in keys.find_parts(shapes).items():
        layout, version = "official", ""
        if part in ("stage_c", "stage_b"):
            layout = keys.layout_of(keys.without_prefix(shapes, prefix).values())
            version = _version(shapes, prefix, part)
        found[part] = CascadePart(part, prefix, layout, version)
    return found


def _version(shapes: Shapes, prefix: str, part: Part) -> str:
    """Name the released model with as many blocks: widths may be anything, so narrow models of its layout count."""
    names = keys.without_prefix(shapes, prefix).values()
    return _VERSIONS[part].get(sum(_RESIDUAL_BLOCK.match(name) is not None for name in names), "")


def inspect_cascade(path: str | Path) -> CascadeFile:
    """Find out which Stable Cascade parts a file holds, or the weights of one folder of a Diffusers model.

    Raises:
        UserError: nothing is there, the file is damaged, or it is a pickle that is not allowed.
    """
    path = Path(path)
    if file_kind(path) == "safetensors":
        header = read_header(path)
        shapes, metadata = header.shapes, header.metadata
    else:
        from library.checkpoints.pickles import load_state_dict

        shapes = {name: tuple(tensor.shape) for name, tensor in load_state_dict(path).tensors.items()}
        metadata = {}
    parts = cascade_parts(shapes)
    other = "" if parts else family_label(classify(path, shapes, metadata).family)
    return CascadeFile(path, parts, metadata, other)


def require_part(file: CascadeFile, part: Part, *, version: str | None = None, where: str = "") -> CascadePart:
    """Return a part of a file.

    Args:
        file: what was found.
        part: which part the user has to give.
        version: `--model_version`, if given; compared where the file has the blocks of a released model.
        where: option and file for messages; the file alone by default.

    Raises:
        UserError: the file holds something else, or another version.
    """
    where = where or str(file.path)
    found = file.parts.get(part)
    if found is None:
        options = " and ".join(f"{_OPTIONS[other]} takes {_LABELS[other]}" for other in file.parts)
        hint = f"{options[:1].upper()}{options[1:]}" if options else f"Give {_LABELS[part]} of Stable Cascade"
        raise UserError(f"is {file.label}, not {_LABELS[part]} of Stable Cascade", hint, where=where)
    if version and found.version and version != found.version:
        hint = f"Leave --model_version out, or set it to {found.version}"
        raise UserError(f"is {found.label}, but --model_version says {version}", hint, where=where)
    return found


def component_parts(path: Path) -> tuple[Part, ...]:
    """Return the parts of a Diffusers model by its folders."""
    return tuple(
        part for part, names in _FOLDERS.items() if any((path / name / "config.json").is_file() for name in names)
    )


def part_folder(path: Path, part: Part) -> Path:
    """Return the folder with the weights of a part: `path` itself, or the one inside a Diffusers model.

    Raises:
        UserError: the model has no such part.
    """
    if (path / "config.json").is_file():
        name = str(read_json(path / "config.json").get("_class_name", ""))
        if name and part in ("stage_c", "stage_b") and name != "StableCascadeUNet":
            raise UserError(f"holds a {name}, not {_LABELS[part]} of Stable Cascade", where=str(path))
        return path
    names = _FOLDERS.get(part, ())
    for name in names:
        if (path / name / "config.json").is_file():
            return path / name
    held = ", ".join(sorted(item.name for item in path.iterdir())[:6]) or "nothing"
    expected = f"Expected the folder {' or '.join(names)}" if names else "Give a .safetensors file"
    raise UserError(f"no {_LABELS[part]} of Stable Cascade in this folder (it holds {held})", expected, where=str(path))
