"""Pictures that show what stage B makes of another picture's small latents: samples while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL.Image import Resampling

from library.errors import UserError
from library.inference.cascade import CASCADE_DEFAULTS, CascadeLatents
from library.inference.cascade_decoders import StageBDecoder, StageBSettings
from library.inference.cascade_sampling import STAGE_B
from library.inference.diffusion import UNWATCHED, Watch, picture_generator
from library.inference.picture_inputs import opened
from library.inference.prompt_options import STAGE_B_SAMPLES
from library.inference.prompt_text import PromptEncoder
from library.inference.rendering import HeldPart, kept, on_device
from library.models.cascade.specs import ENCODED_SHARE
from library.models.cascade.stage_b import smaller_size

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from library.inference.prompts import PromptRequest
    from library.models.cascade.stage_b import StageB


class ReconstructionRenderer:
    """Renders pictures that prompts name by `--cn` again, from their EfficientNet latents and the prompt."""

    sample_defaults = replace(CASCADE_DEFAULTS, steps=10, scale=1.5)
    """What prompts of sample pictures leave open."""
    sample_place = STAGE_B_SAMPLES
    """The options that they may have."""
    reads_guides = True

    def __init__(self, family: StageB, *, autocast: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Create the renderer; nothing is moved or loaded yet."""
        self._family = family
        self._autocast = autocast
        self._encoder: PromptEncoder | None = None

    def session(self) -> AbstractContextManager[None]:
        """Return the context in which EfficientNet and stage A stay in memory."""
        return kept([self._family.effnet, self._family.stage_a])

    @torch.no_grad()
    def render(self, requests: Sequence[PromptRequest], *, watch: Watch = UNWATCHED) -> list[Image]:
        """Return one picture per request, each from its own seed.

        Raises:
            RenderingStopped: `watch` said stop.
            UserError: a request names no picture, or one that cannot be read.
        """
        return [self._one(request, watch) for request in requests]

    def _one(self, request: PromptRequest, watch: Watch) -> Image:
        family, device = self._family, self._family.weights.device
        encoder = self._encoder = self._encoder or PromptEncoder(family)
        prompt, negative = encoder.tokenize(request.prompt), encoder.tokenize(request.negative_prompt)
        with self._autocast(), on_device(family.text_encoders, device):
            pooled = encoder.encode([prompt, negative], 1, device).pooled
        if pooled is None or request.seed is None:
            raise ValueError("a picture needs a pooled prompt and a seed")
        latents = family.effnet.model(_pixels(request).to(device))[0].float()
        settings = StageBSettings(
            steps=request.steps, scale=request.scale, shift=request.shift or STAGE_B.shift, sampler=request.sampler
        )
        decoder = StageBDecoder(HeldPart(family.unet), family.stage_a, settings, device=device, autocast=self._autocast)
        generator = picture_generator(request.seed)
        made = CascadeLatents(request, latents, pooled[0].float(), pooled[1].float(), generator)
        return decoder.decode([made], watch)[0]


def _pixels(request: PromptRequest) -> Tensor:
    """Return the picture of a request as EfficientNet sees it, [1,3,H,W] in [0,1]."""
    if not request.controlnet_image:
        hint = "Name a picture that stage B makes again: --cn photo.jpg."
        raise UserError("stage B alone makes no picture of a prompt", hint, where=request.where)
    height, width = smaller_size((request.height, request.width), ENCODED_SHARE)
    picture = opened(Path(request.controlnet_image)).resize((width, height), Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
