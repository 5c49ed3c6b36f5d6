"""From prompts to pictures in a folder: what every script that draws does, whatever its model is."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
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
    from library.inference.prompt_files import PromptEntry
    from library.inference.prompt_sources import PromptSource
    from library.inference.prompts import PromptRequest

logger = logging.getLogger(__name__)


class Commission:
    """What shall be drawn: prompts that are known are read at once, others when the model that draws is there."""

    def __init__(
        self,
        source: PromptSourceOptions,
        inputs: InputPictures,
        defaults: PromptRequest,
        *,
        place: Place = GENERATION,
        own: Sequence[PromptEntry] | None = None,
    ) -> None:
        """Read prompts that are known already, so that mistakes are told before a model is loaded.

        Args:
            source: where prompts come from, and how often each is drawn.
            inputs: what pictures are made from; without a word about prompts, theirs are drawn.
            defaults: what prompts leave open.
            place: decides which options prompts have.
            own: prompts of the inputs; None: those that they were made from.

        Raises:
            UserError: a file of prompts cannot be read, a picture does not tell its own, or none can be used.
        """
        self._source, self._inputs, self._defaults, self._place = source, inputs, defaults, place
        self._run: PromptRun | None = None
        if source.from_file:
            self._run = self._planned(file_source(source.from_file))
        elif source.prompt is not None:
            self._run = self._planned(line_source(source.prompt))
        elif not (source.interactive or source.from_module):
            self._run = self._planned(ListSource(inputs.own_prompts() if own is None else own, dynamic=False))

    def _planned(self, prompts: PromptSource) -> PromptRun:
        run = PromptRun(prompts, _plan(self._source), self._defaults, place=self._place, on_problem=_report)
        run.check()
        return run

    def draw(self, studio: Studio, folder: PictureFolder, values: Mapping[str, Any], renderer: object) -> None:
        """Draw all prompts, and tell what went wrong.

        Args:
            studio: draws.
            folder: where it puts the pictures.
            values: all options of the run by name, for a file of the user's own that makes prompts.
            renderer: what draws in the studio, likewise.

        Raises:
            UserError: that file cannot be used; or, at the end, some pictures could not be made.
            StopTraining: Ctrl-C, or a picture could not be saved.
        """
        source = self._source
        if source.from_module:
            run = self._planned(ModuleSource(source.from_module, Namespace(**values), renderer, studio.networks))
        else:
            run = self._run or self._planned(InteractiveSource(_ask))
        logger.info("seed of the run: %d", run.seed)
        pictures = (_pictures(studio, self._inputs, run.pictures_before, group) for group in run.groups())
        if source.interactive:
            # Who types prompts wants to see the pictures of each before the next, whatever the batch.
            for group in pictures:
                studio.draw(group)
        else:
            studio.draw(picture for group in pictures for picture in group)
        _conclude(folder, studio, run)


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
    if group[0].controlnet_image and inputs.nets_option:
        logger.warning("%s: --cn has no effect: there is no %s", group[0].where, inputs.nets_option)
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
