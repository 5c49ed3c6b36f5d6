"""Stage B of Stable Cascade as a model that is trained: latents of stage C to those of stage A."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from library.checkpoints import load_cascade
from library.contracts import Condition
from library.models.cascade.base import CascadeFamily
from library.models.cascade.sources import CascadeSources
from library.models.cascade.stage_a import StageA
from library.models.cascade.unet import StageInputs

if TYPE_CHECKING:
    from library.contracts import Batch, FamilySpec
    from library.draws import Draws
    from library.models.cascade.options import CascadeTextOptions, StageBModelOptions
    from library.models.family import WeightPlan

EFFNET = "effnet"
"""Name of the EfficientNet latents [B,16,h,w] among the extras of a condition."""
_SMALLEST = 0.5
_STEP = 32


class StageB(CascadeFamily):
    """The model family of stage B; see `library.models.family.ModelFamily`.

    Conditions hold the hidden states of the text, of which stage B uses only the pooled vector [B,1280], and as an
    extra the EfficientNet latents of the picture. Times are ratios in [0,1], always float32.
    """

    def __init__(
        self,
        spec: FamilySpec,
        sources: CascadeSources,
        model: StageBModelOptions,
        text: CascadeTextOptions,
        weights: WeightPlan,
        *,
        seed: int = 0,
        highvram: bool = False,
    ) -> None:
        super().__init__(spec, sources, model, text, weights, seed=seed, highvram=highvram)
        self._missing = model.effnet_dropout_rate
        loaded = load_cascade.load_stage_a(model.stage_a_checkpoint_path or "")
        self.stage_a = self.lazy(loaded, StageA, "stage A", keep_cache=highvram)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents of stage A [B,4,H/4,W/4], float32, for pixels [B,3,H,W] in [-1,1]."""
        return self.stage_a.model.encode(_from_zero_to_one(pixels, self.stage_a.device)).float()

    def condition(self, batch: Batch, draws: Draws) -> Condition:
        """Return the condition of a batch: the text, and the pictures through EfficientNet at a size that is drawn.

        One factor from 0.5 to 1 for the whole batch, so that stage B learns to decode latents of several compressions;
        some pictures have no latents, which are zeros then.
        """
        condition = super().condition(batch, draws)
        if batch.pixels is None:
            raise ValueError("stage B needs pixels for its condition")
        # The encoder has a type of its own, as where latents are cached, and it needs no mixed precision.
        with torch.no_grad(), torch.autocast(self.effnet.device.type, enabled=False):
            size = smaller_size(batch.pixels.shape[-2:], _SMALLEST + (1 - _SMALLEST) * draws.scalar("effnet_size"))
            pixels = _from_zero_to_one(batch.pixels, self.effnet.device)
            latents = self.effnet.model(functional.interpolate(pixels, size, mode="nearest")).float()
            seen = draws.uniform("effnet_condition") >= self._missing
            latents = latents * seen.to(latents).reshape(-1, 1, 1, 1)
        return replace(condition, extra={**condition.extra, EFFNET: latents})

    def denoise(
        self, noisy: Tensor, t: Tensor, condition: Condition, control: Mapping[Any, Any] | None = None
    ) -> Tensor:
        """Predict the noise in latents of stage A [B,4,h,w].

        Args:
            noisy: noised latents.
            t: what the network is told of the noise, float32 [B] in [0,1].
            condition: from `condition`; without EfficientNet latents they are zeros.
            control: not for stage B.
        """
        if condition.pooled is None:
            raise ValueError("stage B needs the pooled text")
        return self.unet(noisy, t.float(), StageInputs(condition.pooled, effnet=condition.extra.get(EFFNET)))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels of stage A [B,3,4h,4w], float32 in [-1,1]."""
        return self.stage_a.model.decode(latents.to(self.stage_a.device)).float() * 2 - 1

    def release_vae(self) -> None:
        """Free the memory of EfficientNet and stage A; they are built again when they are needed."""
        super().release_vae()
        self.stage_a.release()

    def fingerprinted(self, part: str) -> Mapping[str, Tensor]:
        """Return the tensors that the fingerprint of a part tells apart; latents are made by stage A's encoder."""
        if part != "vae":
            return super().fingerprinted(part)
        tensors = {} if self.stage_a.source is None else self.stage_a.source.tensors
        return {name: tensor for name, tensor in tensors.items() if name.startswith(("in_block.", "down_blocks."))}


def smaller_size(size_hw: tuple[int, ...], factor: float) -> tuple[int, int]:
    """Return (height, width) times a factor, rounded down to what EfficientNet compresses to whole pixels.

    >>> smaller_size((1024, 768), 0.8)
    (800, 608)
    """
    height, width = (max(int(side * factor) // _STEP * _STEP, _STEP) for side in size_hw)
    return height, width


def _from_zero_to_one(pixels: Tensor, device: torch.device) -> Tensor:
    return (pixels.to(device).float() + 1) / 2
