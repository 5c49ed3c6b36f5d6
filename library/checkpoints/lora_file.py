"""Reads and writes LoRA files. Whatever layout a file has, callers see kohya names and tensors of kohya or LyCORIS.

`inspect_lora` judges a safetensors file by its header, without torch; `read_lora` maps the tensors and looks at every
value. Nothing is dropped in silence: what nobody understands is listed in `unknown`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints import cascade_lora, detect, lora_names
from library.checkpoints.detect_cascade import cascade_parts
from library.checkpoints.headers import file_kind, read_header
from library.checkpoints.lora_kinds import DOWN, MAGNITUDE, RANKED, check_module, kind_of, rank_of
from library.checkpoints.lora_layouts import Listing, Shapes, sort_keys
from library.checkpoints.lora_scales import PeftConfigs, read_peft_configs
from library.errors import Problem, UserError, raise_problems

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FOLDER_FILES = (
    "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin", "pytorch_lora_weights.bin",
)  # fmt: skip
_MAX_PROBLEMS = 8
HASHES = ("sshs_model_hash", "sshs_legacy_hash")
"""Metadata that describe the file itself and are computed anew whenever one is written."""


@dataclass(frozen=True)
class AdapterWeights:
    """What a file holds for one module.

    Attributes:
        name: kohya's name of the module, such as ``lora_unet_mid_block_attentions_0_proj_in``.
        kind: ``lora``, ``loha``, ``lokr``, ``glora``, ``oft`` (networks.oft), ``diag-oft``, ``boft``, ``full``,
            ``norm``, ``ia3``, ``tlora``.
        tensors: by suffix (``lora_down.weight``, ``alpha``, ``hada_w1_a``...).
    """

    name: str
    kind: str
    tensors: dict[str, Tensor]

    @property
    def rank(self) -> int:
        """Number of ranks, 0 where the kind has none."""
        return rank_of(self.kind, {suffix: tuple(tensor.shape) for suffix, tensor in self.tensors.items()})

    @property
    def alpha(self) -> float:
        """The file's alpha; without one, the rank."""
        alpha = self.tensors.get("alpha")
        return float(self.rank) if alpha is None else float(alpha)

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by: alpha / rank, and 1 where there is no rank."""
        return self.alpha / self.rank if self.rank else 1.0

    def file_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, tensor) as a file holds them."""
        name = f"oft{self.name.removeprefix('lora')}" if self.kind == "oft" else self.name
        return ((f"{name}.{suffix}", tensor) for suffix, tensor in self.tensors.items())


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file as everybody sees it, whatever its layout.

    Attributes:
        path: of the file.
        layout: ``kohya``, ``lycoris``, ``peft``, ``diffusers``, ``onetrainer``, ``ai-toolkit``, ``official`` (that of
            Stable Cascade's original trainer).
        base: ``sd1``, ``sd2``, ``sdxl``, another family's name, or None when it cannot be told.
        modules: by kohya name.
        metadata: of the header.
        bundled: embeddings that came along, by key.
        unknown: keys that nobody understands; callers list them.
        places: kohya name -> (part of the model, module path in memory).
        may_be_sdxl: the base is not known and may be SDXL, whose names differ from those used here then.
    """

    path: Path
    layout: str
    base: str | None
    modules: dict[str, AdapterWeights]
    metadata: dict[str, str]
    bundled: dict[str, Tensor] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    may_be_sdxl: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of all modules under the keys that a kohya or LyCORIS file has."""
        return {key: tensor for module in self.modules.values() for key, tensor in module.file_tensors()}


@dataclass(frozen=True)
class LoraInfo:
    """What names, shapes and metadata say about a LoRA file; attributes as in `LoraFile`.

    Attributes:
        kinds: number of modules of each kind.
        ranks: the ranks that occur.
        names: kohya names of the modules.
        has_unet: whether modules of the U-Net are in it.
        has_text_encoder: whether modules of a text encoder are in it.
        prediction_type: of the model it was trained on, where the metadata say so.
        layers: number of modules whose names are those of layers of Stable Diffusion models.
    """

    path: Path
    layout: str
    base: str | None
    kinds: Mapping[str, int]
    ranks: frozenset[int]
    names: tuple[str, ...]
    has_unet: bool
    has_text_encoder: bool
    prediction_type: str | None
    metadata: Mapping[str, str]
    bundled: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    layers: int = 0

    @property
    def modules(self) -> int:
        """Number of modules."""
        return len(self.names)


def inspect_lora(path: str | Path) -> LoraInfo:
    """Find out what a LoRA file is from its header; only a pickle has to be loaded (mapped).

    Raises:
        UserError: as `read_lora`, except for what only the values tell.
    """
    path = lora_path(path)
    if file_kind(path) == "safetensors":
        header = read_header(path)
        shapes, metadata = header.shapes, dict(header.metadata)
    else:
        from library.checkpoints.pickles import load_state_dict

        shapes = {name: tuple(tensor.shape) for name, tensor in load_state_dict(path).tensors.items()}
        metadata = {}
    view = _original(path, shapes, metadata)
    shapes = view.shapes if view else shapes
    listing = _checked_listing(path, shapes, metadata, None)
    by_module = {name: {suffix: shapes[key] for suffix, key in keys.items()} for name, keys in listing.modules.items()}
    kinds: dict[str, int] = {}
    ranks = set()
    for name, suffixes in by_module.items():
        kind = kind_of(suffixes, listing.modules[name].values())
        kinds[kind] = kinds.get(kind, 0) + 1
        ranks.add(rank_of(kind, suffixes))
    parts = {listing.places[name][0] for name in by_module}
    return LoraInfo(
        path=path,
        layout="official" if view else listing.layout,
        base=listing.base,
        kinds=kinds,
        ranks=frozenset(ranks),
        names=tuple(by_module),
        has_unet=lora_names.UNET in parts,
        has_text_encoder=bool(parts - {lora_names.UNET}),
        prediction_type=_prediction(metadata),
        metadata=metadata,
        bundled=listing.bundled,
        unknown=listing.unknown,
        layers=sum(lora_names.is_known_path(*listing.places[name]) for name in by_module),
    )


def _prediction(metadata: Mapping[str, str]) -> str | None:
    if metadata.get("ss_base_model_version", "").endswith("_v"):
        return "v_prediction"
    return detect.classify(Path(), {}, metadata).prediction_type


def read_lora(
    path: str | Path, *, base: str | None = None, entries: Sequence[cascade_lora.Entry] | None = None
) -> LoraFile:
    """Open a LoRA file of any layout; its tensors are views of the mapped file.

    Args:
        path: a file, or a folder as PEFT and diffusers write them.
        base: the model family, where it is known better than the file tells.
        entries: what the numbers of a file of Stable Cascade's original trainer stand for, where that is known better.

    Raises:
        UserError: the file is damaged or no LoRA, a factor lacks its partner or does not fit it, a rank is 0, an alpha
            is no number, or there is NaN or infinity in it. The message names the file and the key.
    """
    from library.checkpoints.tensor_files import MappedTensors, open_tensors

    path = lora_path(path)
    tensors = open_tensors(path)
    metadata = dict(tensors.header.metadata) if isinstance(tensors, MappedTensors) else {}
    shapes = (
        tensors.header.shapes
        if isinstance(tensors, MappedTensors)
        else {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    )
    view = _original(path, shapes, metadata, entries)
    if view:
        shapes, tensors = view.shapes, view.tensors(tensors)
    listing = _checked_listing(path, shapes, metadata, base)
    held = {key: tensors[key] for keys in listing.modules.values() for key in keys.values()}
    _check_values(path, held)
    configs = read_peft_configs(path, metadata, uses_peft_names=listing.uses_peft_names)
    return LoraFile(
        path=path,
        layout="official" if view else listing.layout,
        base=listing.base,
        modules={
            name: AdapterWeights(name, *_weights(str(path), keys, held, listing.places[name], configs))
            for name, keys in listing.modules.items()
        },
        metadata=metadata,
        bundled={key: tensors[key] for key in listing.bundled},
        unknown=listing.unknown,
        places={name: listing.places[name] for name in listing.modules},
        may_be_sdxl=listing.may_be_sdxl,
    )


def _original(
    path: Path, shapes: Shapes, metadata: Mapping[str, str], entries: Sequence[cascade_lora.Entry] | None = None
) -> cascade_lora.OfficialView | None:
    """Return a file of the original trainer of Stable Cascade by kohya's names; None for every other layout."""
    if not cascade_lora.is_official(shapes):
        return None
    entries = cascade_lora.entries_of(shapes, metadata, str(path)) if entries is None else entries
    return cascade_lora.official_view(shapes, entries, str(path))


def lora_path(path: str | Path) -> Path:
    """Return the file that a path means: itself, or the weights in a folder as PEFT and diffusers write them.

    Raises:
        UserError: a folder without such a file.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), None)
    if found is None:
        raise UserError("a folder without LoRA weights", f"It should hold {_FOLDER_FILES[0]}", where=str(path))
    return found


def require_base(lora: LoraInfo | LoraFile, family_name: str, where: str = "") -> None:
    """Refuse a LoRA that was made for another model family; one that does not tell passes.

    Args:
        lora: the file.
        family_name: of the model it shall be used with, such as ``sd1``.
        where: the option that named the file.

    Raises:
        UserError: naming both models.
    """
    if lora.base is None or lora.base == family_name:
        return
    made_for, used_with = detect.family_label(lora.base), detect.family_label(family_name)
    place = f"{where} {lora.path}".strip()
    raise UserError(
        f"this LoRA was made for {made_for}, but the model is {used_with}",
        f"Use a LoRA for {used_with}, or the base model that this one was made for",
        where=place,
    )


def require_layers(info: LoraInfo, where: str = "") -> None:
    """Refuse a LoRA of which no module can be a layer of a Stable Diffusion model.

    Raises:
        UserError: naming the first of its modules.
    """
    if not info.layers:
        what = f"none of its {info.modules} modules is a layer of the model, such as {info.names[0]}"
        hint = "It was made for a model of another kind"
        raise UserError(what, hint, where=f"{where} {info.path}".strip())


def _checked_listing(path: Path, shapes: Shapes, metadata: Mapping[str, str], base: str | None) -> Listing:
    listing = sort_keys(shapes, metadata, base=base)
    if not listing.modules:
        raise _not_a_lora(path, shapes, metadata, listing)
    where = str(path)
    problems = [Problem(where, f"{first!r} and {second!r} are the same tensor") for first, second in listing.twice]
    for keys in listing.modules.values():
        suffixes = {suffix: shapes[key] for suffix, key in keys.items()}
        problems += [Problem(where, what) for what in check_module(suffixes, keys)]
    if len(problems) > _MAX_PROBLEMS:
        more = Problem(where, f"and {len(problems) - _MAX_PROBLEMS} more problems of this kind")
        problems = [*problems[:_MAX_PROBLEMS], more]
    raise_problems(problems)
    return listing


def _not_a_lora(path: Path, shapes: Shapes, metadata: Mapping[str, str], listing: Listing) -> UserError:
    first = next((key for key in shapes if lora_names.looks_like_adapter(key)), None)
    if not shapes:
        return UserError("holds no tensors", "Fetch or save the LoRA again", where=str(path))
    if first is not None and not listing.bundled:
        hint = "It may be for a kind of model other than Stable Diffusion, or only a part of a file"
        return UserError(f"no usable LoRA module in it, only tensors such as {first!r}", hint, where=str(path))
    if parts := cascade_parts(shapes):
        label = f"Stable Cascade: {', '.join(part.label for part in parts.values())}"
    else:
        label = detect.classify(path, shapes, metadata).label if first is None else detect.family_label("embedding")
    return UserError(f"not a LoRA but {label}", "Give a LoRA file", where=str(path))


def _check_values(path: Path, held: Mapping[str, Tensor]) -> None:
    from library.checkpoints.tensor_files import all_finite

    bad = all_finite(held)
    if bad:
        shown = ", ".join(repr(key) for key in bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        hint = "The training that made it diverged; use an earlier save"
        raise UserError(f"NaN or infinity in {shown}", hint, where=str(path))


def _weights(
    where: str, keys: Mapping[str, str], held: Mapping[str, Tensor], place: tuple[str, str], configs: PeftConfigs
) -> tuple[str, dict[str, Tensor]]:
    """Return (kind, tensors) of one module, with the ways in which PEFT differs brought into kohya's form."""
    import torch

    tensors = {suffix: held[key] for suffix, key in keys.items()}
    shapes = {suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()}
    kind = kind_of(shapes, keys.values())
    if MAGNITUDE in tensors:
        # LyCORIS' shape for one magnitude an output: [out, 1] or [out, 1, 1, 1].
        tensors["dora_scale"] = tensors.pop(MAGNITUDE).reshape(-1, *[1] * (tensors[DOWN].dim() - 1))
    alpha = tensors.get("alpha")
    if alpha is not None:
        tensors["alpha"] = alpha.reshape(())
        if kind in RANKED and float(alpha) == 0:
            raise UserError(f"{keys['alpha']!r} is 0, so its module would do nothing", where=where)
    elif configs and kind in RANKED:
        scaled = configs.alpha(*place, rank_of(kind, shapes))
        if scaled is not None:
            tensors["alpha"] = torch.tensor(scaled, dtype=torch.float32)
    return kind, tensors


# Writing ------------------------------------------------------------------------------------------------------------


def write_lora(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
    *,
    precision: torch.dtype | None = None,
) -> Path:
    """Write a LoRA file, complete or not at all; alphas become single floats.

    A `.safetensors` file carries the metadata and the hashes that model managers know it by; every other suffix gives
    a pickle of the bare tensors.

    Args:
        path: the final name.
        tensors: by the keys of the file.
        metadata: strings for the header; hashes in it are replaced.
        precision: dtype of the tensors in the file; None keeps each one's own.

    Raises:
        NonFiniteWeights: there is NaN or infinity in a tensor, or `precision` makes some.
        CannotSave: the disk is full or the file cannot be written.
    """
    from library.checkpoints.ckpt_writer import write_ckpt
    from library.checkpoints.tensor_files import write_safetensors

    path = Path(path)
    table = {name: _single_float(tensor) if name.endswith(".alpha") else tensor for name, tensor in tensors.items()}
    if path.suffix.lower() != ".safetensors":
        write_ckpt(path, table, None, precision=precision, require_finite=True)
        return path
    kept = {name: str(value) for name, value in (metadata or {}).items() if name not in HASHES}
    write_safetensors(path, table, kept, precision=precision, require_finite=True, network_hashes=True)
    return path


def _single_float(alpha: Tensor) -> Tensor:
    alpha = alpha.detach().reshape(())
    return alpha if alpha.is_floating_point() else alpha.float()
