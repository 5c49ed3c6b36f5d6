"""The image encoder of Stable Cascade, CLIP ViT-L/14: pictures to the embeddings that stage C may be conditioned on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from library.models.cascade.effnet import standardize

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def make_image_encoder(config: Mapping[str, Any]) -> nn.Module:
    """Create transformers' `CLIPVisionModelWithProjection`; meant for the meta device."""
    from transformers.models.clip.configuration_clip import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

    vision_config = CLIPVisionConfig.from_dict(dict(config))
    vision_config._attn_implementation = "sdpa"
    return CLIPVisionModelWithProjection(vision_config)


def embed_images(encoder: Any, pixels: Tensor) -> Tensor:
    """Return embeddings [N,768] of pixels [N,3,H,W] in [0,1].

    The shorter side is resized to what the encoder takes (bicubic), the middle square is cut out.
    """
    size, weight = encoder.config.image_size, encoder.visual_projection.weight
    shorter = min(pixels.shape[-2:])
    # Cut off, not rounded, as transformers does.
    sides = [side * size // shorter for side in pixels.shape[-2:]]
    resized = functional.interpolate(pixels.float(), sides, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (resized.shape[-2] - size) // 2, (resized.shape[-1] - size) // 2
    square = resized[..., top : top + size, left : left + size]
    return encoder(standardize(square, _MEAN, _STD).to(weight.dtype)).image_embeds
