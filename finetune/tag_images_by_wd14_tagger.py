"""Write tags for a folder of pictures with a tagger of the WD14 kind.

python finetune/tag_images_by_wd14_tagger.py photos --batch_size 4 --remove_underscore
python finetune/tag_images_by_wd14_tagger.py photos --local_model my_tagger --output_path meta_tags.json
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.picture_tools import PictureOptions  # noqa: E402
from finetune.tagger_options import TaggerOptions, TagOptions, TagOutputOptions  # noqa: E402
from library import cli  # noqa: E402
from library.log import safe_text  # noqa: E402
from library.option_groups import OptionSet  # noqa: E402
from networks.tool_parts import show  # noqa: E402

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from finetune.tagger_choice import Chooser
    from finetune.tagger_files import TaggerFiles
    from finetune.tagger_labels import Label
    from finetune.tagger_model import TaggerInputs, TaggerModel
    from finetune.tagger_output import TagJoiner, TagOutput
    from library.data.jobs import JobReport

_log = logging.getLogger(__name__)

Found = tuple["NDArray[np.float32]", tuple[int, int]]
"""Probabilities of one picture, and its size (width, height)."""


@dataclass(frozen=True, kw_only=True)
class Options(
    OptionSet,
    changes={
        "caption_extension": {"default": ".txt"},
        "skip_existing": {"help": "Leave pictures out that have tags already: goes on where a run was stopped."},
        "debug": {"help": "Print the tags of every picture."},
        "batch_size": {"help": "Most pictures that the model looks at together; a model may have a fixed number."},
    },
):
    """Everything that tag_images_by_wd14_tagger.py accepts."""

    pictures: PictureOptions
    tagger: TaggerOptions
    tags: TagOptions
    output: TagOutputOptions


def tag_pictures(options: Options) -> JobReport:
    """Tag all pictures of the folder; return how it went.

    Raises:
        UserError: no picture, no usable model, or nothing at all could be tagged.
        CannotSave: tags could not be written.
    """
    from finetune.tagger_labels import read_labels
    from finetune.tagger_model import TaggerModel
    from finetune.tagger_output import TagJoiner
    from finetune.tagger_pictures import Preparation
    from library.data.jobs import PictureJob, run_pictures

    pictures = options.pictures.pictures()
    files = _find_tagger(options)
    labels = read_labels(files)
    model = TaggerModel(files, len(labels))
    chooser = _make_chooser(options, labels, by_probability=files.format.logits)
    joiner = TagJoiner(options.tags.caption_separator, append=options.output.append_tags)
    output = _make_output(options, joiner)
    job = PictureJob(
        title="tagging",
        prepare=Preparation(model.side),
        work=partial(_look, model),
        finish=partial(_keep, chooser, output, options.pictures.debug),
        gather=model.gather,
    )
    try:
        report = run_pictures(
            pictures,
            job,
            batch_size=_batch_size(options, model),
            workers=options.pictures.max_data_loader_n_workers,
            skip=output.has if options.pictures.skip_existing else None,
        )
    finally:
        output.close()
    if options.output.frequency_tags:
        show(_frequency_lines(joiner))
    report.close()
    return report


def _find_tagger(options: Options) -> TaggerFiles:
    from finetune.tagger_files import local_files, repository_files

    tagger = options.tagger
    if tagger.local_model is not None:
        return local_files(tagger.local_model)
    return repository_files(tagger.repo_id, tagger.model_dir, force_download=tagger.force_download)


def _make_chooser(options: Options, labels: list[Label], *, by_probability: bool) -> Chooser:
    from finetune.tagger_choice import FIRST, LAST, ChoiceRules, Chooser
    from finetune.tagger_labels import QUALITY, RATING, adapt_labels, parse_replacements, spaced

    tags = options.tags
    adapted = adapt_labels(
        labels,
        expand_characters=tags.character_tag_expand,
        remove_underscore=tags.remove_underscore,
        replacements=parse_replacements(tags.tag_replacement or ""),
    )
    rules = ChoiceRules(
        threshold=tags.thresh,
        thresholds=tags.thresholds(),
        ratings=FIRST if tags.use_rating_tags else LAST if tags.use_rating_tags_as_last_tag else None,
        qualities=FIRST if tags.use_quality_tags else LAST if tags.use_quality_tags_as_last_tag else None,
        by_probability=by_probability,
        characters_first=tags.character_tags_first,
        always_first=tags.listed(tags.always_first_tags),
        undesired=frozenset(spaced(tag) for tag in tags.listed(tags.undesired_tags)),
    )
    chooser = Chooser(adapted, rules)
    for asked, category in ((rules.ratings, RATING), (rules.qualities, QUALITY)):
        if asked is not None and not chooser.has(category):
            _log.warning("--use_%s_tags has no effect: this tagger knows no %s tags", category, category)
    known = {label.category for label in labels}
    for category in rules.thresholds:
        if category not in known:
            _log.warning("--%s_threshold has no effect: this tagger knows no %s tags", category, category)
    return chooser


def _make_output(options: Options, joiner: TagJoiner) -> TagOutput:
    from finetune.tagger_output import MetadataOutput, TextOutput

    path = options.output.output_path
    if path is None:
        return TextOutput(options.pictures.text_file, joiner)
    return MetadataOutput(path, joiner, keep=joiner.append or options.pictures.skip_existing)


def _batch_size(options: Options, model: TaggerModel) -> int:
    wanted = options.pictures.batch_size
    if model.batch_size is None or model.batch_size == wanted:
        return wanted
    _log.warning("--batch_size %d is ignored: the model takes %d pictures at once", wanted, model.batch_size)
    return model.batch_size


def _look(model: TaggerModel, _paths: list[Path], inputs: TaggerInputs) -> list[Found]:
    """Return what the model sees in a batch."""
    return list(zip(model.probabilities(inputs), inputs.sizes_wh, strict=True))


def _keep(chooser: Chooser, output: TagOutput, debug: bool, picture: Path, found: Found) -> None:
    """Write the tags of one picture."""
    text = output.add(picture, chooser.tags(found[0]), found[1])
    if debug:
        show([safe_text(f"{picture}: {text}")])


def _frequency_lines(joiner: TagJoiner) -> Iterator[str]:
    """Yield every tag and how often it was written, the most frequent first."""
    yield "tag frequencies:"
    for tag, count in sorted(joiner.frequencies.items(), key=lambda pair: (-pair[1], pair[0])):
        yield safe_text(f"  {count:7}  {tag}")


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, tag_pictures, argv=argv)


if __name__ == "__main__":
    main()
