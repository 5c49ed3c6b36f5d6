"""Look at every picture and caption of a data set, and tell what is wrong with them.

    python tools/check_dataset.py photos --recursive --caption_extension .txt --report check.json
    python tools/check_dataset.py --dataset_config photos.toml --max_token_length 225

Ends with status 0 when there is nothing to complain about, and with 3 when there is. See docs/data_tools.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import EXIT_FOUND, Problem, StopTraining  # noqa: E402
from library.models.options import token_length  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from networks.tool_parts import check_output, show  # noqa: E402

if TYPE_CHECKING:
    from library.data.check_sources import Sources
    from library.data.dataset_check import Limits
    from library.data.jobs import JobReport
    from library.data.picture_facts import PictureFacts

_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class CheckOptions(OptionGroup, title="check"):
    """What is looked at, and what is wrong with it."""

    folder: str | None = opt(None, positional=True, path=True, help="Folder with pictures and captions.")
    dataset_config: str | None = opt(
        None, path=True, help="TOML or JSON file that describes data sets; takes the place of the folder."
    )
    recursive: bool = opt(False, help="Look into the sub-folders of the folder, too.")
    caption_extension: str = opt(
        ".caption", help="Suffix of caption files in the folder; none: there are no captions to look for."
    )
    caption_encoding: str = opt("utf-8", help="Encoding of caption files.")
    max_token_length: int | None = opt(
        None, choices=(150, 225), convert=token_length, help="Longest caption in tokens. Default: 75."
    )
    min_side: int = opt(256, at_least=1, help="Pictures with a shorter side are tiny.")
    max_megapixels: float = opt(64.0, more_than=0, help="Pictures with more are oversized.")
    max_image_pixels: int = opt(
        179_000_000, at_least=1, help="Pictures with more pixels cannot be read, as in training."
    )
    near_distance: int = opt(
        4, at_least=0, at_most=10, help="Number of bits of 64 in which the hashes of pictures that look alike differ."
    )
    no_near: bool = opt(False, help="Do not look for pictures that look alike.")
    ignore: tuple[str, ...] = opt((), help="Kinds of findings that do not count, such as: rotated near_duplicate.")
    report: str | None = opt(None, path=True, help="JSON file for all findings.")
    skip_existing: bool = opt(
        False,
        needs={"report": ()},
        help="Do not decode pictures again that have not changed since the last check with the same --report.",
    )
    shown: int = opt(20, at_least=0, help="Findings of each kind that are shown; the report has all.")
    max_data_loader_n_workers: int = opt(
        8, at_least=0, help="Processes that decode pictures, at most one for each core. 0: one thread."
    )

    def check(self) -> Iterator[Problem]:
        """One source, kinds that exist, a report that can be written."""
        from library.data.check_kinds import KINDS

        if bool(self.folder) == bool(self.dataset_config):
            what = "give one of them" if self.folder else "is required"
            yield Problem("folder or --dataset_config", what, "See --help.")
        if self.dataset_config and self.recursive:
            yield Problem("--recursive", "goes with a folder, not with --dataset_config", "Drop it.")
        for kind in self.ignore:
            if kind not in KINDS:
                yield Problem(f"--ignore {kind}", "is no kind of finding", f"Choose among {', '.join(KINDS)}.")
        if self.report and Path(self.report).is_dir():
            yield Problem(f"--report {self.report}", "is a folder", "Give the name of a file.")
        yield from check_output("--report", self.report, (self.dataset_config,))

    @property
    def extension(self) -> str | None:
        """Suffix of caption files with its dot, None for none."""
        if self.caption_extension in ("", "none"):
            return None
        return self.caption_extension if self.caption_extension.startswith(".") else f".{self.caption_extension}"

    @property
    def facts_file(self) -> Path | None:
        """File beside the report with what is known about each picture."""
        return Path(self.report).with_suffix(".facts.json") if self.report else None

    @property
    def limits(self) -> Limits:
        """What is too much or too little."""
        from library.data.dataset_check import Limits

        return Limits(
            min_side=self.min_side,
            max_megapixels=self.max_megapixels,
            max_tokens=self.max_token_length or 75,
            near_distance=None if self.no_near else self.near_distance,
        )


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that check_dataset.py accepts."""

    check: CheckOptions = field(default_factory=CheckOptions)


def check(options: CheckOptions) -> None:
    """Look at everything and tell what was found.

    Raises:
        UserError: the folder or the configuration cannot be read.
        StopTraining: there are findings (status 3), or a signal arrived.
    """
    from library import files
    from library.data.dataset_check import as_report, find_all, summary_lines
    from library.models.specs import SD_V1_TOKENIZER
    from library.models.tokenizer import ClipTokenizer

    sources = _sources(options)
    job, facts = _look(options, sources)
    found = find_all(sources, facts, job.failed, options.limits, ClipTokenizer(SD_V1_TOKENIZER).token_count)
    count = len(facts) + len(job.failed)
    report = as_report(found, options.limits, pictures=count, ignored=options.ignore)
    if options.report:
        files.write_json(options.report, report)
    show(summary_lines(found, pictures=count, ignored=options.ignore, shown=options.shown))
    total = sum(report["counts"].values())
    if total:
        listed = ", ".join(f"{number} {kind}" for kind, number in report["counts"].items() if number)
        more = f"; all are in {options.report}" if options.report else ""
        raise StopTraining(f"{total} findings in {count} pictures ({listed}){more}", EXIT_FOUND)


def _sources(options: CheckOptions) -> Sources:
    from library.data.check_sources import sources_of_config, sources_of_folder

    if options.dataset_config:
        return sources_of_config(options.dataset_config, encoding=options.caption_encoding)
    return sources_of_folder(
        Path(options.folder or ""),
        recursive=options.recursive,
        extension=options.extension,
        encoding=options.caption_encoding,
    )


def _look(options: CheckOptions, sources: Sources) -> tuple[JobReport, dict[Path, PictureFacts]]:
    """Decode what is not known yet; what was found out is kept beside the report, also when the check is stopped."""
    from library.data.jobs import PictureJob, run_pictures
    from library.data.picture_facts import PictureLook, read_facts, write_facts

    paths = list(dict.fromkeys(picture.path for picture in sources.pictures))
    kept = options.facts_file
    known = read_facts(kept, paths) if kept is not None and options.skip_existing else {}
    job = PictureJob(
        "decoding",
        prepare=PictureLook(options.max_image_pixels),
        work=lambda _paths, inputs: inputs,
        finish=known.__setitem__,
    )
    try:
        report = run_pictures(
            paths, job, batch_size=_BATCH, workers=options.max_data_loader_n_workers, skip=frozenset(known).__contains__
        )
    finally:
        if kept is not None:
            write_facts(kept, known)
    return report, {path: known[path] for path in paths if path in known}


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, lambda opts: check(opts.check), argv=argv)


if __name__ == "__main__":
    main()
