"""ControlNets of Stable Diffusion 1.x and 2.x: diffusers' `ControlNetModel`, matched with the U-Net that it guides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from library.checkpoints.control_net_file import OPTION, ControlNetFile, read_control_net
from library.errors import UserError
from library.models.assemble import build_module, check_weights, from_config
from library.models.sd_attention import name_modules, set_attention

if TYPE_CHECKING:
    import torch

_SAME = {
    "in_channels": "input channels",
    "block_out_channels": "channels per level",
    "layers_per_block": "layers per level",
    "cross_attention_dim": "text width",
}


def load_control_net(
    name: str,
    family: str,
    unet: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    allow_nan: bool = False,
    option: str = OPTION,
) -> Any:
    """Load a ControlNet for `unet`: frozen, in evaluation mode.

    Args:
        name: file, folder or hub id; see `library.checkpoints.control_net_file`.
        family: ``sd1`` or ``sd2``.
        unet: the U-Net that it will guide.
        device: where it shall be.
        dtype: type of its weights.
        allow_nan: load it although some of its weights are not numbers.
        option: the option that named it, for messages.

    Returns:
        diffusers' `ControlNetModel`.

    Raises:
        UserError: it cannot be read, is damaged, or does not fit the U-Net.
    """
    found = read_control_net(name, family, option=option)
    _require_same_shape(found, unet)
    check_weights(found.tensors, found.where, allow_nan=allow_nan)
    return build_control_net(found, device=device, dtype=dtype)


def build_control_net(found: ControlNetFile, *, device: torch.device, dtype: torch.dtype) -> Any:
    """Build diffusers' `ControlNetModel` around the tensors of a file.

    Raises:
        UserError: names or shapes do not fit the class: the file is incomplete.
    """
    from diffusers.models.controlnets.controlnet import ControlNetModel

    model = build_module(
        lambda: from_config(ControlNetModel, found.config),
        found.tensors,
        what=f"ControlNet ({found.where})",
        device=device,
        dtype=dtype,
    )
    name_modules(model)
    set_attention(model, "sdpa")
    return model


def _require_same_shape(found: ControlNetFile, unet: Any) -> None:
    for name, words in _SAME.items():
        theirs, ours = found.config[name], unet.config[name]
        if _plain(theirs) != _plain(ours):
            what = f"does not fit the model: {words} {_plain(theirs)}, and the U-Net has {_plain(ours)}"
            raise UserError(what, "Give a ControlNet that was made for this kind of model", where=found.where)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
