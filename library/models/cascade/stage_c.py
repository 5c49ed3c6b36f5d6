"""Stage C of Stable Cascade as a model that is trained: text to the small latents of EfficientNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpoints import load_cascade
from library.checkpoints.hub import resolve_model
from library.contracts import Condition
from library.models.cascade.base import CascadeFamily
from library.models.cascade.previewer import Previewer
from library.models.cascade.sources import CascadeSources, LazyPart
from library.models.cascade.unet import StageInputs
from library.models.cascade.vision import embed_images, make_image_encoder

if TYPE_CHECKING:
    from library.contracts import Batch, FamilySpec
    from library.draws import Draws
    from library.models.cascade.options import CascadeTextOptions, StageCModelOptions
    from library.models.family import WeightPlan

IMAGE = "image"
"""Name of the image embeddings [B,I] among the extras of a condition; absent: no image."""


class StageC(CascadeFamily):
    """The model family of stage C; see `library.models.family.ModelFamily`.

    Conditions hold the hidden states [B,L,1280], the pooled vector [B,1280] and, if pictures are looked at, their
    embeddings. Times are ratios in [0,1], always float32.
    """

    def __init__(
        self,
        spec: FamilySpec,
        sources: CascadeSources,
        model: StageCModelOptions,
        text: CascadeTextOptions,
        weights: WeightPlan,
        *,
        seed: int = 0,
        highvram: bool = False,
    ) -> None:
        super().__init__(spec, sources, model, text, weights, seed=seed, highvram=highvram)
        self.unet.set_dropout(model.stage_c_dropout)
        self.previewer: LazyPart | None = None
        self.image_encoder: LazyPart | None = None
        self._image_rate = model.clip_image_cond_rate
        if model.previewer_checkpoint_path:
            loaded = load_cascade.load_previewer(model.previewer_checkpoint_path)
            self.previewer = self.lazy(loaded, Previewer, "previewer", keep_cache=highvram)
        if model.clip_image_cond_rate:
            name = model.image_model_checkpoint_path or ""
            vision = load_cascade.load_vision(resolve_model(name, "--image_model_checkpoint_path"))
            self.image_encoder = self.lazy(vision, make_image_encoder, "image encoder", keep_cache=highvram)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents [B,16,h,w], float32, for pixels [B,3,H,W] in [-1,1]."""
        encoder = self.effnet.model
        return encoder((pixels.to(self.effnet.device).float() + 1) / 2).float()

    def condition(self, batch: Batch, draws: Draws) -> Condition:
        """Return the text condition of a batch and, with `--clip_image_cond_rate`, the embeddings of some pictures."""
        condition = super().condition(batch, draws)
        if self.image_encoder is None or batch.pixels is None:
            return condition
        with torch.no_grad():
            pixels = (batch.pixels.to(self.image_encoder.device).float() + 1) / 2
            embeddings = embed_images(self.image_encoder.model, pixels)
            shown = draws.uniform("image_condition") < self._image_rate
            embeddings = embeddings * shown.to(embeddings)[:, None]
        return replace(condition, extra={**condition.extra, IMAGE: embeddings})

    def denoise(
        self, noisy: Tensor, t: Tensor, condition: Condition, control: Mapping[Any, Any] | None = None
    ) -> Tensor:
        """Predict the noise in latents [B,16,h,w].

        Args:
            noisy: noised latents.
            t: what the network is told of the noise, float32 [B] in [0,1].
            condition: from `condition` or `encode_text`.
            control: residuals of a ControlNet by the number of the residual block.
        """
        if condition.pooled is None:
            raise ValueError("stage C needs the pooled text")
        inputs = StageInputs(pooled=condition.pooled, text=condition.hidden, image=condition.extra.get(IMAGE))
        return self.unet(noisy, t.float(), inputs, control=control)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the previewer's pixels [B,3,8h,8w], float32 in [-1,1]."""
        if self.previewer is None:
            raise ValueError("a previewer is needed to look at latents of stage C")
        return self.previewer.model(latents.to(self.previewer.device)).float() * 2 - 1

    def release_vae(self) -> None:
        """Free the memory of encoder and previewer; they are built again when they are needed."""
        super().release_vae()
        if self.previewer is not None:
            self.previewer.release()
