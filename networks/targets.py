"""Which layers of a model get an adapter, and what each is called in files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from library.checkpoints.cascade_lora import CASCADE, is_cascade_name
from library.checkpoints.lora_names import is_sdxl_unet, unet_file_paths
from library.checkpoints.parameter_order import sort_as_reference
from library.errors import UserError

TEXT_CLASSES = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
TRANSFORMER_CLASSES = ("Transformer2DModel",)
CONV_CLASSES = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
WHOLE_CLASSES = ("CascadeUNet",)
"""Models all of whose linear layers and 1x1 convolutions are adapted, wherever they are."""

UNET_PREFIX = "lora_unet"
TEXT_PREFIX = "lora_te"


@dataclass(frozen=True, slots=True)
class Target:
    """A layer that an adapter can be attached to.

    Attributes:
        name: in files, such as `lora_unet_mid_block_attentions_0_proj_in`.
        path: in memory, such as `mid_block.attentions.0.proj_in`.
        layer: the `torch.nn.Linear` or `torch.nn.Conv2d` itself.
        encoder: number of the text encoder, from 0; None: the U-Net.
    """

    name: str
    path: str
    layer: Any
    encoder: int | None = None

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution whose kernel is larger than 1x1."""
        return isinstance(self.layer, nn.Conv2d) and not _is_pointwise(self.layer)


def _is_pointwise(layer: Any) -> bool:
    """Whether a layer looks at one pixel (or one token) at a time."""
    return layer.__class__.__name__ == "Linear" or tuple(layer.kernel_size) == (1, 1)


def encoders_of(text_encoder: Any) -> list[Any]:
    """Return the text encoders as a list: network modules are handed a bare module, a list of several, or None."""
    if text_encoder is None:
        return []
    return list(text_encoder) if isinstance(text_encoder, (list, tuple)) else [text_encoder]


def text_targets(text_encoder: Any, prefix: str = TEXT_PREFIX) -> list[Target]:
    """Return the linear layers of all text encoders."""
    encoders = encoders_of(text_encoder)
    found: list[Target] = []
    for index, encoder in enumerate(encoders):
        start = prefix if len(encoders) == 1 else f"{prefix}{index + 1}"
        found += _targets(encoder, start, TEXT_CLASSES, index)
    return _without_doubles(found)


def unet_targets(unet: Any, classes: Collection[str] = TRANSFORMER_CLASSES, prefix: str = UNET_PREFIX) -> list[Target]:
    """Return the linear layers and convolutions of the U-Net below modules of the given classes.

    Of Stable Cascade it is every linear layer and 1x1 convolution, whatever the classes.
    """
    return _without_doubles(_targets(unet, prefix, classes, None))


def _targets(root: nn.Module, prefix: str, classes: Collection[str], encoder: int | None) -> Iterator[Target]:
    # Leaves are chosen by exact class: a quantised or replaced linear layer has no weight that could be adapted.
    paths: dict[str, Any] = {}
    for path, module in root.named_modules():
        whole = module.__class__.__name__ in WHOLE_CLASSES
        if not whole and module.__class__.__name__ not in classes:
            continue
        for child, leaf in module.named_modules():
            if leaf.__class__.__name__ in ("Linear", "Conv2d") and (not whole or _is_pointwise(leaf)):
                paths.setdefault(f"{path}.{child}" if path else child, leaf)
    # Files of SDXL alone call the layers of the U-Net as its original code does.
    in_file = unet_file_paths(paths, sdxl=is_sdxl_unet(paths)) if encoder is None else {path: path for path in paths}
    for path, leaf in sort_as_reference(paths.items()):
        yield Target(f"{prefix}.{in_file[path]}".replace(".", "_"), path, leaf, encoder)


def _without_doubles(targets: Iterator[Target] | Sequence[Target]) -> list[Target]:
    found = list(targets)
    names = [target.name for target in found]
    doubles = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) != len(names) else []
    if doubles:
        raise UserError(f"two layers of the model would be called {doubles[0]} in files", where="--network_module")
    return found


def base_of(layers: Iterable[Any]) -> str | None:
    """Tell the model family from U-Net layers (targets or adapters); None when none of them shows it.

    Projections around the transformer blocks are convolutions in SD1 only, and SDXL has names of its own.
    """
    for item in layers:
        if is_cascade_name(item.name):
            return CASCADE
        if "_input_blocks_" in item.name or "_middle_block_" in item.name or "_output_blocks_" in item.name:
            return "sdxl"
        if item.name.endswith(("_proj_in", "_proj_out")):
            return "sd1" if isinstance(item.layer, nn.Conv2d) else "sd2"
    return None
