"""From prompts to pictures in a folder: what every script that draws does, whatever its model is."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.errors import Problem, UserError
from library.inference.prompt_options import GENERATION, Place
from library.inference.prompt_run import PromptPlan, PromptRun
from library.inference.prompt_sources import InteractiveSource, ListSource, ModuleSource, file_source, line_source
from library.inference.studio import Picture, Studio

if TYPE_CHECKING:
    from library.inference.options import PromptSourceOptions
    from library.inference.outputs import PictureFolder
    from library.inference.picture_inputs import InputPictures
    from library.inference.prompt_sources import PromptSource
    from library.inference.prompts import PromptRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Workshop:
    """What draws: the studio, what its pictures are made from, and the folder that they go to."""

    studio: Studio
    inputs: InputPictures
    folder: PictureFolder


def known_prompts(source: PromptSourceOptions, inputs: InputPictures) -> PromptSource | None:
    """Return prompts that can be read before the model is loaded; None: they are asked for later.

    Raises:
        UserError: a file of prompts cannot be read, or a picture does not tell its own.
    """
    if source.from_file:
        return file_source(source.from_file)
    if source.prompt is not None:
        return line_source(source.prompt)
    if source.interactive or source.from_module:
        return None
    return ListSource(inputs.own_prompts(), dynamic=False)


def asked_prompts(
    source: PromptSourceOptions, values: Mapping[str, Any], renderer: object, networks: Sequence[object]
) -> PromptSource:
    """Return prompts that a file of the user's own makes, or that somebody types.

    Args:
        source: where prompts come from.
        values: all options of the run by name.
        renderer: what draws.
        networks: those that are applied to the model.

    Raises:
        UserError: the file cannot be used.
    """
    if source.from_module:
        return ModuleSource(source.from_module, Namespace(**values), renderer, networks)
    return InteractiveSource(_ask)


def planned(
    prompts: PromptSource, source: PromptSourceOptions, defaults: PromptRequest, place: Place = GENERATION
) -> PromptRun:
    """Return the pictures of a run, planned; prompts that are known already are read once.

    Args:
        prompts: what to draw.
        source: how often.
        defaults: what prompts leave open.
        place: decides which options prompts have.

    Raises:
        UserError: none of the known prompts can be used.
    """
    run = PromptRun(prompts, _plan(source), defaults, place=place, on_problem=_report)
    run.check()
    return run


def draw_prompts(run: PromptRun, workshop: Workshop, *, one_by_one: bool = False) -> None:
    """Draw all prompts, and tell what went wrong.

    Args:
        run: the pictures.
        workshop: what draws.
        one_by_one: somebody types prompts, and wants to see the pictures of each before the next, whatever the batch.

    Raises:
        UserError: at the end, if some pictures could not be made.
        StopTraining: Ctrl-C, or a picture could not be saved.
    """
    studio, inputs = workshop.studio, workshop.inputs
    logger.info("seed of the run: %d", run.seed)
    pictures = (_pictures(studio, inputs, run.pictures_before, group) for group in run.groups())
    if one_by_one:
        for group in pictures:
            studio.draw(group)
    else:
        studio.draw(picture for group in pictures for picture in group)
    _conclude(workshop.folder, studio, run)


def _plan(options: PromptSourceOptions) -> PromptPlan:
    if options.interactive and (options.n_iter > 1 or options.shuffle_prompts):
        logger.warning("--n_iter and --shuffle_prompts have no effect: prompts are drawn once, as they are typed")
    return PromptPlan(
        seed=options.seed,
        n_iter=1 if options.interactive else options.n_iter,
        images_per_prompt=options.images_per_prompt,
        iter_same_seed=options.iter_same_seed,
        shuffle_prompts=options.shuffle_prompts and not options.interactive,
    )


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
