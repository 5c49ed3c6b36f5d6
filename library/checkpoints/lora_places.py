"""Where in a checkpoint the weight of each module lies that a LoRA file can name. Light: names only.

A place is a tensor of the file, or a third of its rows where the file joins q, k and v (OpenCLIP). The tensors of a
Diffusers folder are named with their component in front: `unet/down_blocks.0...`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from library.checkpoints import key_maps, lora_names
from library.errors import UserError

_SDXL_TEXT_1 = "conditioner.embedders.0.transformer."
_SDXL_TEXT_2 = "conditioner.embedders.1.model."
_ENDINGS = (".weight", ".bias")
_FOLDERS = {"text_encoder": lora_names.TEXT_1, "text_encoder_2": lora_names.TEXT_2}


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of a checkpoint, or the third of its rows that belongs to a module."""

    tensor: str
    third: int | None = None


def find_places(names: Iterable[str], family: str, *, folder: bool = False) -> dict[str, Place]:
    """Map `<module name in LoRA files>.weight` and `.bias` to their places in a checkpoint.

    Args:
        names: of the checkpoint's tensors.
        family: ``sd1``, ``sd2`` or ``sdxl``.
        folder: the names are those of a Diffusers folder, with their component in front.
    """
    names = list(names)
    parts = _folder_parts(names, family) if folder else _file_parts(names, family)
    places: dict[str, Place] = {}
    for part, rows in parts:
        table = dict(rows)
        paths = dict.fromkeys(name.rpartition(".")[0] for name in table if name.endswith(_ENDINGS))
        for flat, path in lora_names.module_names(paths, part).items():
            for ending in _ENDINGS:
                if path + ending in table:
                    places[flat + ending] = table[path + ending]
    return places


Rows = Iterator[tuple[str, Place]]


def _file_parts(names: list[str], family: str) -> Iterator[tuple[str, Rows]]:
    if family not in ("sd1", "sd2", "sdxl"):
        raise UserError(f"LoRA files cannot be merged into a model of the family {family}")
    unet = dict(key_maps.iter_prefixed(names, key_maps.UNET_PREFIX))
    memory = key_maps.unet_to_memory(unet.values())
    yield lora_names.UNET, ((memory[short], Place(full)) for full, short in unet.items())
    if family == "sd1":
        yield lora_names.TEXT, _clip(names, key_maps.TEXT_V1_PREFIX)
    elif family == "sd2":
        yield lora_names.TEXT, _openclip(names, key_maps.TEXT_V2_PREFIX)
    else:
        yield lora_names.TEXT_1, _clip(names, _SDXL_TEXT_1)
        yield lora_names.TEXT_2, _openclip(names, _SDXL_TEXT_2)


def _clip(names: list[str], prefix: str) -> Rows:
    for full, short in key_maps.iter_prefixed(names, prefix):
        name = key_maps.text_name_to_memory(short)
        if name is not None:
            yield name, Place(full)


def _openclip(names: list[str], prefix: str) -> Rows:
    for full, short in key_maps.iter_prefixed(names, prefix):
        found = key_maps.openclip_to_memory(short)
        for third, name in enumerate(found):
            yield name, Place(full, third if len(found) > 1 else None)


def _folder_parts(names: list[str], family: str) -> Iterator[tuple[str, Rows]]:
    yield lora_names.UNET, ((short, Place(full)) for full, short in key_maps.iter_prefixed(names, "unet/"))
    for component, part in _FOLDERS.items():
        yield part if family == "sdxl" else lora_names.TEXT, _clip(names, f"{component}/")
