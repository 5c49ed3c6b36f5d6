"""PNG files that say how their picture was made, in text chunks that generation and other programs read back."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.images import carried_texts

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.prompts import PromptRequest

_SAMPLERS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "lms": "LMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_a": "DPM2 a",
    "dpmsolver++": "DPM++ 2M",
    "dpmsingle": "DPM++ 2S",
}
"""Names that web interfaces know the samplers by."""

PARAMETERS = "parameters"
"""Chunk in which web interfaces keep everything as one text."""

_NEGATIVE = "Negative prompt:"
_SETTINGS = "Steps:"


def png_bytes(image: Image, request: PromptRequest, *, facts: Mapping[str, object] | None = None) -> bytes:
    """Return `image` as a PNG that tells its prompt, seed, sampler, steps and scale.

    Args:
        image: the picture.
        request: what it was made from.
        facts: more for the text that web interfaces read, such as ``Model``.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in request_texts(request).items():
        info.add_text(key, value)
    info.add_text(PARAMETERS, parameters_text(request, image.size, facts or {}))
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def request_texts(request: PromptRequest) -> dict[str, str]:
    """Return the text chunks of a picture; what was not asked for is left out."""
    texts = {
        "prompt": request.prompt,
        "seed": request.seed,
        "sampler": request.sampler,
        "steps": request.steps,
        "scale": request.scale,
        "negative-prompt": request.negative_prompt,
        "negative-scale": request.negative_scale,
        "scale-end": request.scale_end,
        "shift": request.shift,
        "clip-prompt": request.clip_prompt,
        "raw-prompt": request.raw_prompt if request.raw_prompt != request.prompt else "",
    }
    return {key: str(value) for key, value in texts.items() if value not in (None, "")}


def parameters_text(request: PromptRequest, size_wh: tuple[int, int], facts: Mapping[str, object]) -> str:
    """Return prompt, negative prompt and settings as the web interfaces write them under their pictures."""
    settings: dict[str, object] = {
        "Steps": request.steps,
        "Sampler": _SAMPLERS.get(request.sampler.removeprefix("k_"), request.sampler),
        "CFG scale": f"{request.scale:g}",
        "CFG scale at the end": None if request.scale_end is None else f"{request.scale_end:g}",
        "Seed": request.seed,
        "Size": f"{size_wh[0]}x{size_wh[1]}",
        "Shift": None if request.shift is None else f"{request.shift:g}",
        "Denoising strength": None if request.strength is None else f"{request.strength:g}",
        **facts,
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"{_NEGATIVE} {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: object) -> str:
    """Put quotes around what would end the setting before its end."""
    text = str(value)
    if not any(character in text for character in ',:\n"'):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def read_prompt(path: Path) -> tuple[str, str] | None:
    """Return prompt and negative prompt that a PNG was made from, here or in a web interface; None if it does not tell.

    Raises:
        BadImage: the file is no picture.
    """
    texts = carried_texts(path, behind_pixels=True)
    if "prompt" in texts:
        return texts["prompt"], texts.get("negative-prompt", "")
    if PARAMETERS in texts:
        return split_parameters(texts[PARAMETERS])
    return None


def split_parameters(text: str) -> tuple[str, str]:
    """Return prompt and negative prompt of a text that a web interface wrote."""
    lines = text.splitlines()
    if lines and lines[-1].lstrip().startswith(_SETTINGS):
        lines.pop()
    start = next((number for number, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = [line.removeprefix(_NEGATIVE) if number == 0 else line for number, line in enumerate(lines[start:])]
    return " ".join(lines[:start]).strip(), " ".join(negative).strip()
