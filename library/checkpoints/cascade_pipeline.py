"""What makes pipelines of diffusers out of folders with the parts of Stable Cascade: index, scheduler, tokenizer.

Diffusers draws with two pipelines, of which each has a folder of its own: one for stage C, one for stages B and A.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.checkpoints.folders import as_json
from library.checkpoints.model_configs import DIFFUSERS_VERSION, tokenizer_files
from library.files import write_bytes

_VOCABULARY = Path(__file__).resolve().parent.parent / "assets" / "clip_vocab"
_INDEX = "model_index.json"
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

_STAGE_A_HOME = "wuerstchen"
"""Where the published index has the class of stage A. Versions of diffusers that moved it do not find it there, nor by
the name that they write themselves: with these the decoder's pipeline has to be put together from its parts."""

_UNET = ["diffusers", "StableCascadeUNet"]
_SHARED: Mapping[str, Any] = {
    "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}
_PIPELINES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "prior": (
        "StableCascadePriorPipeline",
        {
            "prior": _UNET,
            "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "resolution_multiple": 42.67,
        },
    ),
    "decoder": (
        "StableCascadeDecoderPipeline",
        {"decoder": _UNET, "vqgan": [_STAGE_A_HOME, "PaellaVQModel"], "latent_dim_scale": 10.67},
    ),
}
_OPTIONAL = ("image_encoder", "feature_extractor")
_WRITTEN = ("scheduler", "tokenizer", "feature_extractor")
"""Components without weights, which are made here."""


def pipeline_of(folder: Path) -> str | None:
    """Return the component that the pipeline in a folder is about, `prior` or `decoder`; None: none is complete.

    With both there is none, since diffusers has one pipeline in a folder.
    """
    there = [name for name in _PIPELINES if (folder / name).is_dir()]
    if len(there) != 1:
        return None
    needed = [*_SHARED, *(name for name, value in _PIPELINES[there[0]][1].items() if isinstance(value, list))]
    weights = [name for name in needed if name not in (*_WRITTEN, *_OPTIONAL)]
    return there[0] if all((folder / name).is_dir() for name in weights) else None


def complete_pipeline(folder: Path) -> bool:
    """Write what diffusers needs beside the parts with weights; return whether there is a pipeline now.

    The index is made anew; other files that are there already stay as they are.

    Raises:
        CannotSave: the disk is full or the place cannot be written.
    """
    about = pipeline_of(folder)
    if about is None:
        return False
    name, own = _PIPELINES[about]
    pictured = (folder / "image_encoder").is_dir()
    index: dict[str, Any] = {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION, **_SHARED, **own}
    absent = {} if pictured else {part: [None, None] for part in _OPTIONAL if part in index}
    write_bytes(folder / _INDEX, as_json({**index, **absent}))
    for path, content in _small_files(folder, pictured=pictured).items():
        if not (folder / path).exists():
            (folder / path).parent.mkdir(exist_ok=True)
            write_bytes(folder / path, content)
    return True


def _small_files(folder: Path, *, pictured: bool) -> dict[str, bytes]:
    scheduler = {"_class_name": "DDPMWuerstchenScheduler", "_diffusers_version": DIFFUSERS_VERSION}
    files = {"scheduler/scheduler_config.json": as_json({**scheduler, "s": 0.008, "scaler": 1.0})}
    for name in ("vocab.json", "merges.txt"):
        files[f"tokenizer/{name}"] = (_VOCABULARY / name).read_bytes()
    files |= {f"tokenizer/{name}": as_json(table) for name, table in tokenizer_files("stable_cascade").items()}
    if pictured:
        side = json.loads((folder / "image_encoder" / "config.json").read_text(encoding="utf-8"))["image_size"]
        files["feature_extractor/preprocessor_config.json"] = as_json(_preprocessor(side))
    return files


def _preprocessor(side: int) -> dict[str, Any]:
    """Return how pictures are brought to what CLIP's image encoder sees."""
    steps = {f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")}
    return {
        **steps,
        "crop_size": {"height": side, "width": side},
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": _CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": _CLIP_STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
