"""PNG files that say how their picture was made, in text chunks that generation reads back."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.prompts import PromptRequest


def png_bytes(image: Image, request: PromptRequest) -> bytes:
    """Return `image` as a PNG with the request's prompt, seed, sampler, steps, scale and negative prompt."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    texts = {
        "prompt": request.prompt,
        "seed": request.seed,
        "sampler": request.sampler,
        "steps": request.steps,
        "scale": request.scale,
        "negative-prompt": request.negative_prompt,
    }
    for key, value in texts.items():
        if value not in (None, ""):
            info.add_text(key, str(value))
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
