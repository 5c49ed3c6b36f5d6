"""What draws a batch of pictures as the options of gen_img.py say: a renderer with its extensions, once or twice."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from library.errors import UserError
from library.inference import loading
from library.inference.control import ControlNet, ControlNets, load_control_nets
from library.inference.deep_shrink import DeepShrink, DeepShrinking
from library.inference.gradual_latent import GradualLatent, GradualLatents, read_unsharp
from library.inference.highres import HighresFix
from library.inference.image_to_image import ImageToImage
from library.inference.inpainting import Inpainting
from library.inference.prompt_text import PromptEncoder
from library.inference.regional import RegionalPrompts
from library.inference.render import DiffusionRenderer, RenderSettings
from library.inference.start_noise import NoiseExperiments
from library.inference.studio import Stage

if TYPE_CHECKING:
    import torch

    from library.inference.diffusion import Watch
    from library.inference.extensions import Extension, PictureInputs
    from library.inference.option_set import GenerationOptions
    from library.inference.options_pictures import HighresOptions
    from library.inference.prompts import PromptRequest
    from library.inference.studio import Make
    from library.models.sd import StableDiffusion

FIRST, SECOND = "0", "1"
"""Marks of the two pictures of a highres fix in file names."""


def make_renderer(
    opts: GenerationOptions, family: StableDiffusion, networks: Sequence[Any], dtype: torch.dtype
) -> DiffusionRenderer:
    """Return the renderer with everything that may change its pictures.

    Args:
        opts: of the script.
        family: must know all its words by now.
        networks: those that are attached to it.
        dtype: number format to calculate in.

    Raises:
        UserError: a ControlNet cannot be loaded.
    """
    settings = RenderSettings(
        batch_size=opts.speed.batch_size,
        vae_batch=opts.speed.vae_batch,
        zero_terminal_snr=opts.model.zero_terminal_snr,
        zero_steps_offset=opts.sampling.force_scheduler_zero_steps_offset,
    )
    encoder = PromptEncoder(family, max_chunks=opts.text.chunks, normalize=opts.text.emb_normalize_mode, breaks=True)
    extensions = tuple(_extensions(opts, family, networks, _control_nets(opts, family, dtype)))
    autocast = loading.autocast(family.weights.device, dtype)
    return DiffusionRenderer(family, settings, autocast=autocast, extensions=extensions, encoder=encoder)


def _extensions(
    opts: GenerationOptions, family: StableDiffusion, networks: Sequence[Any], nets: Sequence[ControlNet]
) -> Iterator[Extension]:
    """Yield what changes pictures; those that a prompt alone may ask for are always there, and idle without it."""
    control = ControlNets(nets)
    yield GradualLatents(gradual_latent(opts))
    yield ImageToImage()
    yield Inpainting()
    yield RegionalPrompts(networks, colour_codes=opts.networks.network_regional_mask_max_color_codes)
    yield DeepShrinking(deep_shrink(opts), family.unet, copies=control.models)
    if nets:
        yield control
    if opts.noise.pyramid_noise_prob is not None or opts.noise.noise_offset_prob is not None:
        yield NoiseExperiments(opts.noise)


def deep_shrink(opts: GenerationOptions) -> DeepShrink:
    """Return what the command line says about deep shrink."""
    options = opts.shrink
    return DeepShrink(
        depth_1=options.ds_depth_1,
        timesteps_1=options.ds_timesteps_1,
        depth_2=options.ds_depth_2,
        timesteps_2=options.ds_timesteps_2,
        ratio=options.ds_ratio,
    )


def gradual_latent(opts: GenerationOptions) -> GradualLatent:
    """Return what the command line says about gradual latent.

    Raises:
        UserError: the parameters of its sharpening cannot be read.
    """
    options = opts.gradual
    return GradualLatent(
        timesteps=options.gradual_latent_timesteps,
        ratio=options.gradual_latent_ratio,
        ratio_step=options.gradual_latent_ratio_step,
        every_n_steps=options.gradual_latent_every_n_steps,
        s_noise=options.gradual_latent_s_noise,
        unsharp=read_unsharp(options.gradual_latent_unsharp_params, "--gradual_latent_unsharp_params"),
    )


def _control_nets(opts: GenerationOptions, family: StableDiffusion, dtype: torch.dtype) -> list[ControlNet]:
    options = opts.control
    if not options.control_net_models:
        return []
    return load_control_nets(
        family,
        options.control_net_models,
        preparations=options.control_net_preps,
        multipliers=options.control_net_multipliers,
        ratios=options.control_net_ratios,
        dtype=dtype,
    )


def make_maker(options: HighresOptions, renderer: DiffusionRenderer) -> Make:
    """Return what draws a batch: in one pass, or in the two of a highres fix.

    Raises:
        UserError: the upscaler module cannot be used.
    """
    if options.highres_fix_scale is None:
        return lambda requests, inputs, watch: [Stage("", requests, renderer.render(requests, inputs, watch=watch))]
    fix = HighresFix(
        scale=options.highres_fix_scale,
        steps=options.highres_fix_steps,
        strength=options.highres_fix_strength,
        latents="bilinear" if options.highres_fix_latents_upscaling else None,
        upscaler=_upscaler(options, renderer) if options.highres_fix_upscaler else None,
        second_guided=not options.highres_fix_disable_control_net,
    )

    def make(requests: Sequence[PromptRequest], inputs: Sequence[PictureInputs], watch: Watch) -> list[Stage]:
        made = fix.render(renderer, requests, inputs, keep_first=options.highres_fix_save_1st, watch=watch)
        second = Stage(SECOND, requests, made.second)
        if not made.first:
            return [second]
        return [Stage(FIRST, [fix.first_request(request) for request in requests], made.first), second]

    return make


def _upscaler(options: HighresOptions, renderer: DiffusionRenderer) -> Any:
    """Import the upscaler module and let it make its upscaler."""
    name = options.highres_fix_upscaler or ""
    pairs = (item.partition("=") for item in (options.highres_fix_upscaler_args or "").split(";") if item.strip())
    try:
        upscaler = importlib.import_module(name).create_upscaler(**{key.strip(): value for key, _, value in pairs})
        if hasattr(upscaler, "to"):
            upscaler.to(next(renderer.family.denoiser.parameters()).device)
    except Exception as error:  # noqa: BLE001 - a module of the user's own may fail in any way
        what = f"cannot be used ({type(error).__name__}: {error})"
        hint = "It is the dotted name of a module with a function create_upscaler."
        raise UserError(what, hint, where=f"--highres_fix_upscaler {name}") from error
    return upscaler
