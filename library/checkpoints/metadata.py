"""What a saved model says about itself: the entries of ModelSpec 1.0.1. Light.

All values are strings, as the header of a safetensors file wants them. Nothing here holds a path.
"""

from __future__ import annotations

import base64
import datetime
import logging
import mimetypes
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.contracts import FamilySpec

_log = logging.getLogger(__name__)

PRODUCT = "sd-finetune-toolkit"
VERSION = "0.1.0"
_SPECIFICATION = "1.0.1"
_MAX_THUMBNAIL_BYTES = 4 * 1024**2
_LAST_TIMESTEP = 1000
_COPIED = (
    "author",
    "description",
    "license",
    "tags",
    "usage_hint",
    "merged_from",
    "trigger_phrase",
    "preprocessor",
    "is_negative_embedding",
)


def modelspec_metadata(
    spec: FamilySpec,
    described: Any,
    *,
    output_name: str | None,
    resolution_wh: tuple[int, int] | None = None,
    clip_skip: int | None = None,
    timesteps: tuple[int | None, int | None] = (None, None),
    kind: str = "",
) -> dict[str, str]:
    """Return the `modelspec.*` entries of a model.

    Args:
        spec: architecture and prediction type.
        described: holds the user's `metadata_*` options as attributes.
        output_name: title when the user gives none.
        resolution_wh: what the data sets were trained at; None is the family's own.
        clip_skip: `--clip_skip`, written only when given.
        timesteps: (`--min_timestep`, `--max_timestep`), written when one is given.
        kind: empty for a full model, else ``lora``, ``textual-inversion``, ``controlnet``...
    """
    width, height = resolution_wh or spec.default_resolution_wh
    title = described.metadata_title or output_name or f"{_TITLES.get(kind, 'Checkpoint')}@{time.time()}"
    table = {
        "sai_model_spec": _SPECIFICATION,
        "architecture": f"{spec.architecture}/{kind}" if kind else spec.architecture,
        "implementation": "diffusers" if kind == "lora" and spec.name in ("sd1", "sd2") else spec.implementation,
        "implementation_version": f"{PRODUCT}/{VERSION}",
        "title": title,
        "resolution": f"{width}x{height}",
        "date": datetime.datetime.now().replace(microsecond=0).isoformat(),
        "prediction_type": "v" if spec.prediction_type == "v_prediction" else "epsilon",
    }
    low, high = timesteps
    if low is not None or high is not None:
        table["timestep_range"] = f"{low if low is not None else 0},{high if high is not None else _LAST_TIMESTEP}"
    if clip_skip is not None:
        table["encoder_layer"] = str(clip_skip)
    for name in _COPIED:
        value = getattr(described, f"metadata_{name}")
        if value is not None:
            table[name] = str(value)
    thumbnail = thumbnail_url(described.metadata_thumbnail)
    if thumbnail is not None:
        table["thumbnail"] = thumbnail
    return {f"modelspec.{name}": value for name, value in table.items()}


_TITLES = {"lora": "LoRA", "textual-inversion": "TextualInversion", "controlnet": "ControlNet"}


def thumbnail_url(value: str | None) -> str | None:
    """Return a picture as a data URL: one that is given as it is, a file encoded; None with a warning otherwise."""
    if not value or value.startswith("data:"):
        return value or None
    path = Path(value)
    try:
        if path.stat().st_size > _MAX_THUMBNAIL_BYTES:
            _log.warning(
                "--metadata_thumbnail: %s is larger than %d bytes and is left out", value, _MAX_THUMBNAIL_BYTES
            )
            return None
        data = path.read_bytes()
    except OSError as error:
        _log.warning("--metadata_thumbnail: %s cannot be read (%s) and is left out", value, error.strerror or error)
        return None
    mime = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"
