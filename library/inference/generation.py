"""The run of gen_img.py: the model and what changes it, then prompts, which become pictures in a folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.inference import loading
from library.inference.diffusion import Watch
from library.inference.generation_networks import (
    NetworkBank,
    check_networks,
    load_embeddings,
    network_sources,
    prepare_networks,
)
from library.inference.outputs import PictureFolder
from library.inference.prompt_text import PromptEncoder
from library.inference.render import DiffusionRenderer, RenderSettings
from library.inference.studio import Picture, Stages, Studio

if TYPE_CHECKING:
    from library.inference.extensions import PictureInputs
    from library.inference.option_set import GenerationOptions
    from library.inference.prompts import PromptRequest
    from library.models.sd import StableDiffusion

logger = logging.getLogger(__name__)


def generate(opts: GenerationOptions) -> None:
    """Load everything, draw all prompts, and tell what went wrong.

    Raises:
        UserError: something is missing or does not fit; or, at the end, some pictures could not be made.
        StopTraining: Ctrl-C, or a picture could not be saved.
    """
    path = loading.find_checkpoint(opts.model.ckpt or "")
    spec = loading.recognise(path, opts.model)
    sources = network_sources(opts.networks)
    check_networks(sources, spec, show_metadata=opts.networks.network_show_meta)
    device, dtype = loading.choose_device(), loading.precision(opts.speed)
    family = loading.load_family(opts, path, spec, device)
    load_embeddings(family, opts.networks.textual_inversion_embeddings)
    bank = prepare_networks(family, sources, dtype, pre_calculate=opts.networks.network_pre_calc)
    renderer = DiffusionRenderer(
        family,
        RenderSettings(
            batch_size=opts.speed.batch_size,
            vae_batch=opts.speed.vae_batch,
            zero_terminal_snr=opts.model.zero_terminal_snr,
            zero_steps_offset=opts.sampling.force_scheduler_zero_steps_offset,
        ),
        autocast=loading.autocast(device, dtype),
        extensions=(),
        encoder=PromptEncoder(family),
    )

    def make(requests: Sequence[PromptRequest], inputs: Sequence[PictureInputs], watch: Watch) -> Stages:
        return [("", renderer.render(requests, inputs, watch=watch))]

    folder = PictureFolder(opts.files, {"Model": path.stem, "Clip skip": opts.text.clip_skip})
    studio = Studio(make, bank, folder, batch_size=opts.speed.batch_size)
    from library.inference.prompt_options import GENERATION
    from library.inference.prompts import PromptRequest, parse_prompt_line
    defaults = PromptRequest(prompt="", steps=opts.sampling.steps, sampler=opts.sampling.sampler)
    request = parse_prompt_line(opts.source.prompt or "", where="--prompt", defaults=defaults, place=GENERATION)
    studio.draw([Picture(request)])
    logger.info("%d pictures in %s", len(folder.written), folder.path)
