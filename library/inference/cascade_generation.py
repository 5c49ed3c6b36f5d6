"""The run of stable_cascade_gen_img.py: the stages and what changes them, then prompts, which become pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.inference import loading
from library.inference.cascade import CASCADE_DEFAULTS, CascadeRenderer, CascadeSettings
from library.inference.cascade_control import ControlPictures, open_controls
from library.inference.cascade_decoders import PreviewDecoder, StageBDecoder, StageBSettings
from library.inference.cascade_extensions import CascadeExtension, ImageVariation, StartPictures
from library.inference.cascade_loading import CascadeParts, Placement
from library.inference.drawing import Commission
from library.inference.generation_networks import read_additions
from library.inference.options_cascade import STAGE_B, CascadeGenerationOptions
from library.inference.outputs import PictureFolder
from library.inference.picture_inputs import InputPictures, PictureFiles, opened
from library.inference.prompt_files import PromptEntry
from library.inference.prompt_options import CASCADE_GENERATION
from library.inference.prompt_text import PromptEncoder
from library.inference.studio import Stage, Studio
from library.models.cascade.specs import STAGE_C

if TYPE_CHECKING:
    from collections.abc import Sequence

    from library.inference.cascade import Decoder
    from library.inference.diffusion import Watch
    from library.inference.extensions import PictureInputs
    from library.inference.options import PromptSourceOptions
    from library.inference.prompts import PromptRequest


def generate(opts: CascadeGenerationOptions) -> None:
    """Open everything, draw all prompts, and tell what went wrong.

    Raises:
        UserError: something is missing or does not fit; or, at the end, some pictures could not be made.
        StopTraining: Ctrl-C, or a picture could not be saved.
    """
    additions = read_additions(opts.networks, STAGE_C, opts.words.train_tokens)
    inputs = InputPictures(_picture_files(opts))
    source, own = _prompts(opts, inputs)
    commission = Commission(source, inputs, defaults(opts), place=CASCADE_GENERATION, own=own)
    folder = PictureFolder(opts.files, _facts(opts))

    place = _placement(opts)
    loading.report_device(place.device, place.dtype)
    parts = CascadeParts(opts.model, place)
    # Files are only looked into so far: what is wrong with them is told before any is read.
    decoder = _decoder(opts, parts)
    extensions = _extensions(opts, parts)
    if opts.control.controlnet_checkpoint_path:
        extensions.append(_control(opts, parts))
    family = parts.stage_c()
    bank, words = additions.join(family, place.dtype, pre_calculate=opts.networks.network_pre_calc)
    # Small as they are, they stay where the parts that they belong to come to run; those that are added to weights
    # which wait elsewhere do so there.
    for module in (*words, *(() if opts.networks.network_pre_calc else bank.networks)):
        module.to(place.device)
    renderer = CascadeRenderer(
        family,
        decoder,
        _settings(opts),
        autocast=loading.autocast(place.device, place.dtype),
        extensions=extensions,
        encoder=PromptEncoder(family, max_chunks=opts.text.chunks, normalize=opts.text.emb_normalize_mode, breaks=True),
        device=place.device,
    )

    def make(requests: Sequence[PromptRequest], given: Sequence[PictureInputs], watch: Watch) -> list[Stage]:
        return [Stage("", requests, renderer.render(requests, given, watch=watch))]

    studio = Studio(make, bank, folder, batch_size=opts.speed.batch_size)
    commission.draw(studio, folder, opts.values(), renderer)


def defaults(opts: CascadeGenerationOptions) -> PromptRequest:
    """Return what prompts leave open; a side of 0 follows from the picture of `--image`."""
    sampling, images = opts.sampling, opts.images
    width, height = sampling.size_wh
    if images.image and not (sampling.W and sampling.H):
        width, height = sampling.W or 0, sampling.H or 0
    # A picture that results only look like leaves no trace in the noise.
    start = 1.0 if images.image and images.varied and sampling.t_start is None else sampling.t_start
    return replace(
        CASCADE_DEFAULTS,
        width=width,
        height=height,
        steps=sampling.steps,
        scale=sampling.scale,
        scale_end=sampling.scale_end,
        shift=sampling.shift,
        sampler=sampling.sampler,
        strength=start,
    )


def _placement(opts: CascadeGenerationOptions) -> Placement:
    device = loading.choose_device()
    home = torch.device("cpu") if opts.speed.lowvram else device
    return Placement(device, home, torch.bfloat16 if opts.speed.bf16 else torch.float32)


def _settings(opts: CascadeGenerationOptions) -> CascadeSettings:
    sampling = opts.sampling
    return CascadeSettings(
        batch_size=opts.speed.batch_size,
        shift=sampling.shift,
        cfg_rho=sampling.cfg_rho,
        cfg_t_start=sampling.cfg_t_start,
        cfg_t_stop=sampling.cfg_t_stop,
        composes=True,
        steers_prompt_only=opts.control.controlnet_cond_only,
    )


def _decoder(opts: CascadeGenerationOptions, parts: CascadeParts) -> Decoder:
    sampling, place = opts.sampling, parts.place
    if sampling.decoder != STAGE_B:
        parts.check_text(None)
        return PreviewDecoder(parts.previewer(), place.device)
    stage = parts.stage_b()
    parts.check_text(stage.source)
    settings = StageBSettings(
        batch_size=opts.speed.batch_size, steps=sampling.steps_b, scale=sampling.scale_b, cfg_rho=sampling.cfg_rho
    )
    autocast = loading.autocast(place.device, place.dtype)
    return StageBDecoder(stage, parts.stage_a(), settings, device=place.device, autocast=autocast)


def _extensions(opts: CascadeGenerationOptions, parts: CascadeParts) -> list[CascadeExtension]:
    if not opts.images.image:
        return []
    if opts.images.varied:
        return [ImageVariation(parts.image_encoder())]
    return [StartPictures(parts.effnet("--image"))]


def _control(opts: CascadeGenerationOptions, parts: CascadeParts) -> ControlPictures:
    sources, effnet = open_controls(opts.control, parts)
    mask = opts.control.controlnet_mask
    return ControlPictures(
        sources,
        effnet=effnet,
        mask=None if mask is None else opened(Path(mask)),
        autocast=loading.autocast(parts.place.device, parts.place.dtype),
    )


def _picture_files(opts: CascadeGenerationOptions) -> PictureFiles:
    return PictureFiles(
        images=opts.images.image,
        guides=opts.control.controlnet_image,
        nets=len(opts.control.controlnet_checkpoint_path),
        images_option="--image",
        guides_option="--controlnet_image",
        nets_option="--controlnet_checkpoint_path",
    )


def _prompts(
    opts: CascadeGenerationOptions, inputs: InputPictures
) -> tuple[PromptSourceOptions, Sequence[PromptEntry] | None]:
    """Return where prompts come from: without a word about it, and without pictures, somebody types them.

    With pictures that results only look like, there need not be any text.
    """
    source = opts.source
    if source.prompt is not None or source.from_file or source.from_module or source.interactive:
        return source, None
    if not opts.images.image:
        return replace(source, interactive=True), None
    return source, [PromptEntry(str(path), "") for path in inputs.images] if opts.images.varied else None


def _facts(opts: CascadeGenerationOptions) -> dict[str, object]:
    """Return what pictures tell about the run, beside what their prompts say."""
    sampling, model = opts.sampling, opts.model
    facts: dict[str, object] = {
        "Model": Path(model.stage_c_checkpoint_path or "").stem,
        "CFG rescale": sampling.cfg_rho,
    }
    if sampling.decoder != STAGE_B:
        return {**facts, "Decoder": sampling.decoder}
    name = model.stage_b_checkpoint_path or model.stage_c_checkpoint_path or ""
    return {**facts, "Stage B": Path(name).stem, "Stage B steps": sampling.steps_b, "Stage B CFG": sampling.scale_b}
