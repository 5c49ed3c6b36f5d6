"""ControlNets in generation: pictures that guide others, one or several models at a time.

"Adding Conditional Control to Text-to-Image Diffusion Models" (https://arxiv.org/abs/2302.05543): a copy of the U-Net's
downward half looks at the noisy latents and a guide picture, and what it finds is added to the U-Net's skip connections
and middle. The guide counts for the negative prompt too, unless a ControlNet averages over all places of the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from library.errors import UserError
from library.inference.extensions import Extension, StepHooks, add_control
from library.inference.guides import GUIDES, Prepare, preparation

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.extensions import BatchContext, DenoiserInput, Moment, PictureInputs
    from library.inference.prompts import PromptRequest
    from library.models.family import ModelFamily


@dataclass(frozen=True, slots=True)
class ControlNet:
    """A ControlNet at work.

    Attributes:
        model: diffusers' `ControlNetModel`.
        multiplier: strength of what it adds.
        ratio: share of the steps, from the first, in which it works: a step counts if it ends within that share.
        prepare: makes what the model looks at from the guide, which has the size of the picture by then.
    """

    model: Any
    multiplier: float = 1.0
    ratio: float = 1.0
    prepare: Prepare = lambda picture: picture

    def works_at(self, moment: Moment) -> bool:
        """Whether it works in this step."""
        return self.multiplier != 0 and (moment.index + 1) / moment.total <= self.ratio

    @property
    def averages(self) -> bool:
        """Whether what it adds is the same at all places, as that of a ControlNet for styles is."""
        return bool(self.model.config.get("global_pool_conditions"))


def load_control_nets(
    family: ModelFamily,
    names: Sequence[str],
    *,
    preparations: Sequence[str] = (),
    multipliers: Sequence[float] = (),
    ratios: Sequence[float] = (),
    dtype: torch.dtype,
) -> list[ControlNet]:
    """Load ControlNets for the denoiser of `family`; lists that end early go on with `none`, 1 and 1.

    Args:
        family: Stable Diffusion 1.x or 2.x.
        names: files, folders or hub ids.
        preparations: as written in `--control_net_preps`.
        multipliers: strengths.
        ratios: shares of the steps.
        dtype: type of the weights.

    Raises:
        UserError: a model cannot be used, or a preparation is unknown.
    """
    from library.models.control_net import load_control_net

    # Before anything is loaded: a misspelt preparation should not cost a minute.
    prepares = [preparation(_at(preparations, place, "none")) for place in range(len(names))]
    device = next(family.denoiser.parameters()).device
    return [
        ControlNet(
            load_control_net(name, family.spec.name, family.denoiser, device=device, dtype=dtype),
            multiplier=_at(multipliers, place, 1.0),
            ratio=_at(ratios, place, 1.0),
            prepare=prepares[place],
        )
        for place, name in enumerate(names)
    ]


def _at(values: Sequence[Any], place: int, default: Any) -> Any:
    return values[place] if place < len(values) else default


class ControlNets(Extension):
    """Lets ControlNets look at the guides of pictures; pictures without guides are made as if there were none."""

    def __init__(self, nets: Sequence[ControlNet]) -> None:
        """Take the ControlNets, in the order of `PictureInputs.guides`."""
        self._nets = tuple(nets)

    @property
    def models(self) -> tuple[Any, ...]:
        """The modules, for what changes the U-Net and has to change its copies alike."""
        return tuple(net.model for net in self._nets)

    def batch_key(self, request: PromptRequest, inputs: PictureInputs) -> bool:
        """Tell whether there are guides.

        Raises:
            UserError: not as many as ControlNets.
        """
        if len(inputs.guides) not in (0, len(self._nets)):
            what = f"{len(inputs.guides)} guide pictures for {len(self._nets)} ControlNets"
            raise UserError(what, f"Give one for each with {GUIDES}.", where=request.where)
        return bool(inputs.guides)

    @contextmanager
    def begin(self, batch: BatchContext) -> Iterator[StepHooks]:
        """Bring the guides to the size of the pictures, prepare them and move them to the device."""
        if not batch.inputs[0].guides:
            yield StepHooks()
            return
        size_wh = batch.requests[0].width, batch.requests[0].height
        guides = [
            torch.cat([_pixels(inputs.guides[place], size_wh, net.prepare) for inputs in batch.inputs]).to(batch.device)
            for place, net in enumerate(self._nets)
        ]
        yield _ControlHooks(self._nets, guides, batch.latent_shape[1:])


class _ControlHooks(StepHooks):
    """The ControlNets of one batch with their guides [B,3,H,W] in [0,1]."""

    def __init__(self, nets: Sequence[ControlNet], guides: Sequence[Tensor], latent_hw: tuple[int, int]) -> None:
        self._nets, self._guides, self._latent_hw = nets, guides, latent_hw

    def control(self, moment: Moment, call: DenoiserInput) -> Mapping[str, Any] | None:
        """Return the sum of what the ControlNets add in this step."""
        total: Mapping[str, Any] | None = None
        for net, guide in zip(self._nets, self._guides, strict=True):
            if net.works_at(moment):
                # As diffusers has it: what changes both prompts alike at all places would not count for much.
                rows = len(guide) if net.averages else len(call.noisy)
                total = add_control(total, _residuals(net, call, self._fitted(guide, call.noisy.shape[-2:], rows)))
        return total

    def _fitted(self, guide: Tensor, hw: tuple[int, ...], rows: int) -> Tensor:
        """Return the guide for so many rows, smaller where the latents are smaller than the finished ones."""
        if tuple(hw) != self._latent_hw:
            downscale = guide.shape[-1] // self._latent_hw[1]
            guide = F.interpolate(guide, size=(hw[0] * downscale, hw[1] * downscale), mode="area")
        return guide.repeat(rows // guide.shape[0], 1, 1, 1)


def _residuals(net: ControlNet, call: DenoiserInput, guide: Tensor) -> dict[str, Any]:
    """Return what a ControlNet adds to the last rows, those that `guide` has; to the others it adds nothing."""
    rows, others = len(guide), len(call.noisy) - len(guide)
    noisy, t, hidden = (tensor[-rows:] for tensor in (call.noisy, call.t, call.condition.hidden))
    if not torch.is_autocast_enabled(noisy.device.type):
        noisy, hidden, guide = (tensor.to(net.model.dtype) for tensor in (noisy, hidden, guide))
    down, middle = net.model(noisy, t, hidden, guide, net.multiplier, return_dict=False)
    if others:
        down, middle = [_after_zeros(tensor, others) for tensor in down], _after_zeros(middle, others)
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


def _after_zeros(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), tensor])


def _pixels(guide: Image, size_wh: tuple[int, int], prepare: Prepare) -> Tensor:
    """Return a guide of the given size as [1,3,H,W] in [0,1]."""
    import numpy as np
    from PIL import Image as ImageModule

    picture = guide.convert("RGB")
    if picture.size != size_wh:
        picture = picture.resize(size_wh, ImageModule.Resampling.LANCZOS)
    levels = np.asarray(prepare(picture).convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(levels).permute(2, 0, 1)[None]
