"""The run of gen_img.py: the model and what changes it, then prompts, which become pictures in a folder."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from library.errors import Problem, UserError
from library.inference import loading
from library.inference.generation_networks import (
    check_networks,
    load_embeddings,
    network_sources,
    prepare_networks,
    read_embeddings,
)
from library.inference.making import make_maker, make_renderer
from library.inference.outputs import PictureFolder
from library.inference.picture_inputs import InputPictures
from library.inference.prompt_run import PromptPlan, PromptRun
from library.inference.prompt_sources import InteractiveSource, ListSource, ModuleSource, file_source, line_source
from library.inference.prompts import PromptRequest
from library.inference.studio import Picture, Studio

if TYPE_CHECKING:
    from library.inference.generation_networks import NetworkBank
    from library.inference.option_set import GenerationOptions
    from library.inference.prompt_sources import PromptSource
    from library.inference.render import DiffusionRenderer

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
    embeddings = read_embeddings(opts.networks.textual_inversion_embeddings)
    attached = len(sources) > opts.networks.merged_count
    inputs = InputPictures(opts, with_networks=attached)
    prompts = _known_prompts(opts, inputs)
    run = None if prompts is None else _run(opts, prompts)
    if run is not None:
        run.check()
    folder = PictureFolder(opts.files, {"Model": path.stem, "Clip skip": opts.text.clip_skip})

    device, dtype = loading.choose_device(), loading.precision(opts.speed)
    loading.report_device(device, dtype)
    family = loading.load_family(opts, path, spec, device)
    family.vae.work_in(slices=opts.speed.vae_slices or 1, channels_last=opts.speed.opt_channels_last)
    load_embeddings(family, embeddings)
    pre_calculate = opts.networks.network_pre_calc and not inputs.regional
    if opts.networks.network_pre_calc and inputs.regional:
        logger.warning("--network_pre_calc has no effect: networks with regions cannot be part of the weights")
    bank = prepare_networks(family, sources, dtype, pre_calculate=pre_calculate)
    renderer = make_renderer(opts, family, bank.networks, dtype)
    studio = Studio(make_maker(opts.highres, renderer), bank, folder, batch_size=opts.speed.batch_size)
    run = run or _run(opts, _asked_prompts(opts, renderer, bank))
    logger.info("seed of the run: %d", run.seed)
    if opts.source.interactive:
        # Who types a prompt wants to see its pictures before the next one, whatever the batch size.
        for group in run.groups():
            studio.draw(_pictures(studio, inputs, run.pictures_before, group))
    else:
        studio.draw(
            picture for group in run.groups() for picture in _pictures(studio, inputs, run.pictures_before, group)
        )
    _conclude(folder, studio, run)


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


def _run(opts: GenerationOptions, source: PromptSource) -> PromptRun:
    options = opts.source
    if options.interactive and (options.n_iter > 1 or options.shuffle_prompts):
        logger.warning("--n_iter and --shuffle_prompts have no effect: prompts are drawn once, as they are typed")
    plan = PromptPlan(
        seed=options.seed,
        n_iter=1 if options.interactive else options.n_iter,
        images_per_prompt=options.images_per_prompt,
        iter_same_seed=options.iter_same_seed,
        shuffle_prompts=options.shuffle_prompts and not options.interactive,
    )
    return PromptRun(source, plan, defaults(opts), on_problem=_report)


def _known_prompts(opts: GenerationOptions, inputs: InputPictures) -> PromptSource | None:
    """Return prompts that can be read before the model is loaded; None: they are asked for later."""
    source = opts.source
    if source.from_file:
        return file_source(source.from_file)
    if source.prompt is not None:
        return line_source(source.prompt)
    if source.interactive or source.from_module:
        return None
    return ListSource(inputs.own_prompts(), dynamic=False)


def _asked_prompts(opts: GenerationOptions, renderer: DiffusionRenderer, bank: NetworkBank) -> PromptSource:
    if opts.source.from_module:
        return ModuleSource(opts.source.from_module, Namespace(**opts.values()), renderer, bank.networks)
    return InteractiveSource(_ask)


def _ask() -> str:
    """Read a prompt from standard input; Ctrl-C while nothing is drawn means the same as its end."""
    try:
        if sys.stdin.isatty():
            sys.stderr.write("\nprompt (Ctrl-D ends): ")
            sys.stderr.flush()
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        raise EOFError from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"is not text in {sys.stdin.encoding}", "Type or pipe UTF-8.", where="standard input"
        ) from error
    if not line:
        raise EOFError
    return line


def _report(problem: Problem) -> None:
    logger.error("prompt left out: %s", problem)


def _pictures(studio: Studio, inputs: InputPictures, before: int, group: Sequence[PromptRequest]) -> Iterator[Picture]:
    """Yield the pictures of a prompt; one whose own files cannot be read is reported and left out."""
    if group[0].clip_prompt:
        logger.warning("%s: --c is only stored with the picture: nothing here guides by CLIP", group[0].where)
    for turn, request in enumerate(group, start=before):
        try:
            yield inputs.picture(turn, request)
        except UserError as error:
            for problem in error.problems:
                _report(problem)
            studio.failed += 1


def _conclude(folder: PictureFolder, studio: Studio, run: PromptRun) -> None:
    made = len(folder.written)
    logger.info("%d picture%s in %s", made, "" if made == 1 else "s", folder.path)
    failures = []
    if studio.failed:
        failures.append(f"{studio.failed} of {made + studio.failed} pictures could not be made")
    if run.problems:
        failures.append(f"{len(run.problems)} mistake{'' if len(run.problems) == 1 else 's'} in prompts")
    if failures:
        raise UserError(f"{' and '.join(failures)}; see the messages above")
