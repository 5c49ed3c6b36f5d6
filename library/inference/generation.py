"""The run of gen_img.py: the model and what changes it, then prompts, which become pictures in a folder."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from library.inference import loading
from library.inference.drawing import Commission
from library.inference.generation_networks import read_additions
from library.inference.making import make_maker, make_renderer
from library.inference.outputs import PictureFolder
from library.inference.picture_inputs import InputPictures, named_files
from library.inference.prompts import PromptRequest
from library.inference.studio import Studio

if TYPE_CHECKING:
    from library.inference.option_set import GenerationOptions

logger = logging.getLogger(__name__)


def generate(opts: GenerationOptions) -> None:
    """Load everything, draw all prompts, and tell what went wrong.

    Raises:
        UserError: something is missing or does not fit; or, at the end, some pictures could not be made.
        StopTraining: Ctrl-C, or a picture could not be saved.
    """
    path = loading.find_checkpoint(opts.model.ckpt or "")
    spec = loading.recognise(path, opts.model)
    additions = read_additions(opts.networks, spec)
    inputs = InputPictures(named_files(opts))
    commission = Commission(opts.source, inputs, defaults(opts))
    folder = PictureFolder(opts.files, {"Model": path.stem, "Clip skip": opts.text.clip_skip})

    device, dtype = loading.choose_device(), loading.precision(opts.speed)
    loading.report_device(device, dtype)
    family = loading.load_family(opts, path, spec, device)
    family.vae.work_in(slices=opts.speed.vae_slices or 1, channels_last=opts.speed.opt_channels_last)
    pre_calculate = opts.networks.network_pre_calc and not inputs.regional
    if opts.networks.network_pre_calc and inputs.regional:
        logger.warning("--network_pre_calc has no effect: networks with regions cannot be part of the weights")
    bank, _ = additions.join(family, dtype, pre_calculate=pre_calculate)
    renderer = make_renderer(opts, family, bank.networks, dtype)
    studio = Studio(make_maker(opts.highres, renderer), bank, folder, batch_size=opts.speed.batch_size)
    commission.draw(studio, folder, opts.values(), renderer)


def defaults(opts: GenerationOptions) -> PromptRequest:
    """Return what prompts leave open; a side of 0 follows from the picture of `--image_path`."""
    width, height = opts.sampling.size_wh
    if opts.images.image_path and not (opts.sampling.W and opts.sampling.H):
        width, height = opts.sampling.W or 0, opts.sampling.H or 0
    return PromptRequest(
        prompt="",
        width=width,
        height=height,
        steps=opts.sampling.steps,
        scale=opts.sampling.scale,
        negative_scale=opts.sampling.negative_scale,
        sampler=opts.sampling.sampler,
        strength=opts.images.strength,
    )
