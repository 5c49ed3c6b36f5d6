"""Stage C and stage B as the data side and the option checks see them; files are looked into before any is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from library.contracts import END_ID, FamilySpec, TokenizerSpec
from library.errors import named_by
from library.models.cascade.options import CascadeModelOptions, StageCModelOptions

TOKENIZER = TokenizerSpec("clip_g", pad_id=END_ID)

ENCODED_SHARE = 0.75
"""Sides of a picture as EfficientNet sees it, over those of the picture that is drawn of its latents."""

STAGE_C = FamilySpec(
    name="stable_cascade",
    prediction_type="epsilon",
    tokenizers=(TOKENIZER,),
    latent_channels=16,
    latent_downscale=32,
    latent_scale=1.0,
    bucket_step_multiple=32,
    side_multiple=32,
    smallest_side=32,
    latent_cache_suffix="_sc_latents",
    latent_cache_sized=False,
    text_cache_suffix="_sc_te_outputs",
    text_array_names=("hidden_state1", "pool2"),
    text_cache_half=True,
    foreign_latents="sd-scripts wrote wrong latents of stage C before 20 February 2024, and such files do not tell "
    "their age; delete them to have them made anew",
    base_model_version="stable_cascade",
    architecture="stable-cascade",
    implementation="https://github.com/Stability-AI/StableCascade",
    default_resolution_wh=(768, 768),
)
"""A picture of 768 pixels trains what is drawn at 1024: the encoder sees pictures at three quarters of their size."""

STAGE_B = replace(
    STAGE_C,
    name="stable_cascade_b",
    latent_channels=4,
    latent_downscale=4,
    side_multiple=8,
    # Patches of two latent pixels are halved three times.
    smallest_side=64,
    latent_cache_suffix="_sc_b_latents",
    # The condition is encoded from the pixels at a new size in every step.
    needs_pixels=True,
    default_resolution_wh=(1024, 1024),
)


def check_cascade_files(model: CascadeModelOptions) -> None:
    """Look into the files that options name, and refuse what is not the part that the option is for.

    Large files are only looked into. What is missing altogether is the business of the option checks.

    Raises:
        UserError: naming option, file and what it is.
    """
    from library.checkpoints import load_cascade
    from library.checkpoints.detect_cascade import inspect_cascade, part_folder, require_part
    from library.checkpoints.key_maps_cascade import Part
    from library.models.cascade.file_fit import check_file_fit

    looked: list[tuple[str, str | None, Part]] = [
        (model.stage_option, model.stage_path, "stage_c" if model.stage == "c" else "stage_b"),
        ("--text_model_checkpoint_path", model.text_model_checkpoint_path, "text"),
    ]
    if isinstance(model, StageCModelOptions) and model.clip_image_cond_rate:
        looked.append(("--image_model_checkpoint_path", model.image_model_checkpoint_path, "vision"))
    for option, name, part in looked:
        path = Path(name or "")
        if not name or not path.exists():
            continue
        with named_by(option):
            if path.is_dir():
                part_folder(path, part)
                continue
            version = model.model_version if part.startswith("stage_") else None
            require_part(inspect_cascade(path), part, version=version, where=f"{option} {path}")
    for option, load in (
        ("--effnet_checkpoint_path", load_cascade.load_effnet),
        ("--previewer_checkpoint_path", load_cascade.load_previewer),
        ("--stage_a_checkpoint_path", load_cascade.load_stage_a),
    ):
        if name := getattr(model, option.removeprefix("--"), None):
            with named_by(option):
                load(name)
    check_file_fit(model)
