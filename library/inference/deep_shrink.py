"""Deep shrink: the deep half of the U-Net sees smaller features in the first steps.

Large pictures then get one composition, as the model learned it at its own size, and details later. The features are
made smaller in front of one downward block; on the way up they are brought to the size of each skip connection again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from library.errors import UserError
from library.inference.extensions import Extension, Remarks, StepHooks

if TYPE_CHECKING:
    from collections.abc import Callable

    from library.inference.extensions import BatchContext, DenoiserInput, Moment, PictureInputs
    from library.inference.prompts import PromptRequest

logger = logging.getLogger(__name__)

_TIMESTEP = 650
_DEPTHS = ("depth_1", "depth_2")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepShrink:
    """Where and when features shrink.

    Attributes:
        depth_1: number of the downward block, from 0, in front of which they shrink; None: nothing shrinks.
        timesteps_1: they do so down to this timestep.
        depth_2: block in front of which they shrink below `timesteps_1`.
        timesteps_2: they do so there down to this timestep.
        ratio: their size afterwards.
    """

    depth_1: int | None = None
    timesteps_1: float = _TIMESTEP
    depth_2: int | None = None
    timesteps_2: float = _TIMESTEP
    ratio: float = 0.5

    def depth_at(self, timestep: float) -> int | None:
        """Return the block in front of which features shrink at a timestep."""
        if self.depth_1 is None:
            return None
        if timestep >= self.timesteps_1:
            return self.depth_1
        return self.depth_2 if timestep >= self.timesteps_2 else None

    def changed_by(self, request: PromptRequest) -> DeepShrink:
        """Return the settings with what a prompt itself says; a negative depth there means none."""
        said: dict[str, Any] = dict(request.deep_shrink)
        for name in _DEPTHS:
            if name in said:
                said[name] = int(said[name]) if said[name] >= 0 else None
        return replace(self, **said)


class DeepShrinking(Extension):
    """Shrinks features in the U-Net of a batch."""

    def __init__(self, settings: DeepShrink, unet: nn.Module, copies: Sequence[nn.Module] = ()) -> None:
        """Take what holds without a word in the prompt.

        Args:
            settings: where and when.
            unet: the denoiser, of diffusers.
            copies: ControlNets, whose features must keep the size of those that they are added to.
        """
        self._settings = settings
        self._unet: Any = unet
        self._copies: Sequence[Any] = copies
        self._remarks = Remarks(logger)

    def batch_key(self, request: PromptRequest, inputs: PictureInputs) -> DeepShrink:
        """Return the settings of a picture.

        Raises:
            UserError: the U-Net has no block of that depth.
        """
        settings, blocks = self._settings.changed_by(request), len(self._unet.down_blocks)
        for name in _DEPTHS:
            depth = getattr(settings, name)
            if depth is not None and depth >= blocks:
                hint = f"Give a depth from 0 to {blocks - 1}."
                raise UserError(
                    f"deep shrink at depth {depth}: the U-Net has {blocks} blocks", hint, where=request.where
                )
        self._remark(request, settings)
        return settings

    def _remark(self, request: PromptRequest, settings: DeepShrink) -> None:
        """Warn about what was set and has no effect."""
        said = request.deep_shrink
        if settings.depth_1 is None:
            if said and "depth_1" not in said:
                self._remarks.warn(request.where, "deep shrink is off without --dsd1 or --ds_depth_1")
        elif settings.depth_2 is not None and settings.timesteps_2 >= settings.timesteps_1:
            what = f"deep shrink at depth {settings.depth_2} has no effect: it would begin below timestep"
            ends = f"{settings.timesteps_1:g} and end at {settings.timesteps_2:g}, so lower the latter"
            self._remarks.warn(request.where if said else "", f"{what} {ends} (--ds_timesteps_2)")

    @contextmanager
    def begin(self, batch: BatchContext) -> Iterator[StepHooks]:
        """Hook the blocks, unless nothing shrinks."""
        settings = self._settings.changed_by(batch.requests[0])
        if settings.depth_1 is None:
            yield StepHooks()
            return
        hooks = _ShrinkHooks(settings)
        with ExitStack() as stack:
            for module in (self._unet, *self._copies):
                for depth, block in enumerate(module.down_blocks):
                    handle = block.register_forward_pre_hook(partial(hooks.before_block, depth), with_kwargs=True)
                    stack.callback(handle.remove)
            for block in self._unet.up_blocks:
                stack.enter_context(_replaced_forward(block))
            yield hooks


class _ShrinkHooks(StepHooks):
    """Knows at every step which block gets smaller features."""

    def __init__(self, settings: DeepShrink) -> None:
        self._settings = settings
        self._depth: int | None = None

    def predict(self, moment: Moment, call: DenoiserInput, predict: Callable[[DenoiserInput], Tensor]) -> Tensor:
        """Set the depth for this step."""
        self._depth = self._settings.depth_at(moment.timestep)
        return predict(call)

    def before_block(self, depth: int, block: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, Any] | None:
        """Shrink what goes into the chosen block."""
        if depth != self._depth:
            return None
        return args, {**named, "hidden_states": _shrunk(named["hidden_states"], self._settings.ratio)}


def _shrunk(features: Tensor, ratio: float) -> Tensor:
    sides = [int(side * ratio) for side in features.shape[-2:]]
    if not all(sides):
        return _resized(features, tuple(max(1, side) for side in sides))
    # By the ratio, not to the size: places are counted so in sd-scripts, which matters where a side is odd.
    return features if ratio == 1 else _bicubic(features, scale_factor=ratio)


def _resized(features: Tensor, hw: tuple[int, ...]) -> Tensor:
    return features if tuple(features.shape[-2:]) == tuple(hw) else _bicubic(features, size=hw)


def _bicubic(features: Tensor, **target: Any) -> Tensor:
    # In float32: bicubic interpolation does not know every type on every device.
    return F.interpolate(features.float(), **target, mode="bicubic", align_corners=False).to(features.dtype)


@contextmanager
def _replaced_forward(block: Any) -> Iterator[None]:
    """Let an upward block bring its features to the size of each skip connection."""
    vars(block)["forward"] = partial(_upwards, block)
    try:
        yield
    finally:
        vars(block).pop("forward", None)


def _upwards(
    block: Any,
    hidden_states: Tensor,
    res_hidden_states_tuple: tuple[Tensor, ...],
    temb: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    upsample_size: Any = None,
    **_: Any,
) -> Tensor:
    """Compute an `UpBlock2D` or `CrossAttnUpBlock2D` of diffusers; its class joins features of equal size only."""
    skips = list(res_hidden_states_tuple)
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    for resnet, attention in zip(block.resnets, attentions, strict=True):
        skip = skips.pop()
        hidden_states = resnet(torch.cat([_resized(hidden_states, skip.shape[-2:]), skip], dim=1), temb)
        if attention is not None:
            hidden_states = attention(hidden_states, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
    for upsampler in block.upsamplers or ():
        hidden_states = upsampler(hidden_states, upsample_size)
    return hidden_states
