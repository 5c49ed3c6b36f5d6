"""Pack a folder of pictures with captions and JSON files into tar shards, or check shards that exist.

    python tools/make_webdataset.py photos shards --shard_size 1000
    python tools/make_webdataset.py photos shards --shard_size 500MB --prefix photos --recursive
    python tools/make_webdataset.py --check shards "more/data-{0000..0009}.tar"

A picture `0001.jpg` becomes a sample with `0001.txt` (or `0001.caption`) and `0001.json` as far as they exist. The same
folder gives the same bits every time. A check ends with status 3 when there is something to complain about.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library import cli  # noqa: E402
from library.errors import EXIT_FOUND, Problem, StopTraining  # noqa: E402
from library.option_groups import OptionGroup, OptionSet, opt  # noqa: E402
from library.option_values import BadValue  # noqa: E402
from networks.tool_parts import show  # noqa: E402

if TYPE_CHECKING:
    from library.data.tar_index import ShardIndex
    from library.data.tar_writing import PackedSample

_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,3})?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_SHOWN = 20


def shard_limit(value: Any) -> str:
    """Check `--shard_size`.

    Raises:
        BadValue: It is neither a number of pictures nor an amount of bytes.
    """
    match = _SIZE.fullmatch(str(value).strip())
    if match is None or limits(str(value).strip()) in ((0, None), (None, 0)):
        raise BadValue(f"expected a number of pictures such as 1000, or an amount such as 500MB, got {value!r}")
    return str(value).strip()


def limits(text: str) -> tuple[int | None, int | None]:
    """Return the most pictures, or the most bytes, that a checked `--shard_size` stands for."""
    match = _SIZE.fullmatch(text)
    if match is None or text.isdigit():
        return int(text) if text.isdigit() else 0, None
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return None, int(float(number) * base ** " kmgt".index(unit.lower() or " "))


@dataclass(frozen=True, kw_only=True)
class PackOptions(OptionGroup, title="shards"):
    """What is packed, and how."""

    folder: str | None = opt(None, positional=True, path=True, help="Folder with pictures.")
    target: str | None = opt(None, positional=True, path=True, help="Folder for the tar files.")
    shard_size: str = opt(
        "1000", convert=shard_limit, help="Most pictures in a tar file (1000), or its largest size (500MB, 2GiB)."
    )
    prefix: str = opt("data", help="Tar files are called <prefix>-0000.tar and so on.")
    recursive: bool = opt(False, help="Look into the sub-folders, too; their names become part of the samples' names.")
    caption_extension: str | None = opt(
        None, help="Suffix of caption files; none: no captions. Default: .txt, and where there is none .caption."
    )
    skip_existing: bool = opt(False, help="Leave tar files alone that hold what they should, as after a break.")
    max_data_loader_n_workers: int = opt(
        4, at_least=0, help="Processes that look at pictures, at most one for each core. 0: one thread."
    )
    shards: tuple[str, ...] = opt(
        (), flag="check", help="Check tar files (paths, folders, patterns) in place of making any."
    )
    decode: bool = opt(False, needs={"check": ()}, help="With --check: decode every picture.")

    @property
    def captions(self) -> tuple[str, ...]:
        """Suffixes of caption files, the preferred one first."""
        from library.data.tar_writing import CAPTION_SUFFIXES

        if self.caption_extension is None:
            return CAPTION_SUFFIXES
        if self.caption_extension in ("", "none"):
            return ()
        dot = "" if self.caption_extension.startswith(".") else "."
        return (f"{dot}{self.caption_extension}",)


@dataclass(frozen=True, kw_only=True)
class Options(OptionSet):
    """Everything that make_webdataset.py accepts."""

    pack: PackOptions

    def check_together(self) -> Iterator[Problem]:
        """Two folders, or shards to check."""
        pack = self.pack
        if pack.shards:
            if pack.folder:
                yield Problem("--check", "goes without folders", "Name what is to be checked behind --check.")
            return
        if not (pack.folder and pack.target):
            yield Problem("folder and target", "are required", "See --help.")
        elif Path(pack.target).is_file():
            yield Problem(f"target {pack.target}", "is a file, not a folder", "Give the name of a folder.")
        if "/" in pack.prefix or not pack.prefix or pack.prefix.startswith("."):
            yield Problem("--prefix", f"{pack.prefix!r} cannot begin a file name", "Use letters and digits.")


def run(options: Options) -> None:
    """Pack or check."""
    if options.pack.shards:
        check(options.pack)
    else:
        pack(options.pack)


def pack(options: PackOptions) -> None:
    """Write the shards.

    Raises:
        UserError: there is nothing to pack.
        StopTraining: a signal arrived, or the disk is full.
    """
    from tqdm import tqdm

    from library.data.tar_writing import is_written, left_over, plan_shards, shard_name, write_shard
    from library.signals import StopFlag

    samples, report = _look(options)
    most_samples, most_bytes = limits(options.shard_size)
    shards = plan_shards(samples, most_samples=most_samples, most_bytes=most_bytes)
    target = Path(options.target or "")
    names = [shard_name(options.prefix, number, len(shards)) for number in range(len(shards))]
    kept = 0
    with StopFlag(watch_parent=False, announce=False):
        for name, shard in zip(tqdm(names, desc="packing", unit="shard", leave=False), shards, strict=True):
            if options.skip_existing and is_written(target / name, shard):
                kept += 1
                continue
            write_shard(target / name, shard)
    without = sum(not sample.has_caption for sample in samples)
    lines = [f"{len(shards)} tar files in {target}: {len(samples)} pictures, {without} of them without a caption"]
    if kept:
        lines.append(f"{kept} of them were there already")
    if old := left_over(target, options.prefix, names):
        lines.append(f"{len(old)} files of an earlier run are left, which are not part of this one: {old[0]} ...")
    first, last = names[0], names[-1]
    pattern = f"{options.prefix}-{{{first[len(options.prefix) + 1 : -4]}..{last[len(options.prefix) + 1 : -4]}}}.tar"
    lines.append(f'webdataset_path: "{target / (pattern if len(names) > 1 else first)}"')
    show(lines)
    report.close()


def _look(options: PackOptions) -> tuple[list[PackedSample], Any]:
    """Return the samples of all pictures that can be used, in order of their names, and what became of the others."""
    from library.data.bad_files import BadFile
    from library.data.jobs import PictureJob, find_pictures, run_pictures
    from library.data.tar_writing import SampleLook, same_names

    folder = Path(options.folder or "")
    paths = find_pictures(folder, recursive=options.recursive)
    found: dict[Path, PackedSample] = {}
    job = PictureJob(
        "looking", SampleLook(str(folder), options.captions), lambda _paths, inputs: inputs, found.__setitem__
    )
    report = run_pictures(paths, job, batch_size=32, workers=options.max_data_loader_n_workers)
    samples = sorted(found.values(), key=lambda sample: (sample.key, sample.picture))
    clashes = same_names(samples)
    for source, other in clashes.items():
        report.failed.append(BadFile(source, f"would have the same name as {other}", "Rename one of them."))
        report.done -= 1
    samples = [sample for sample in samples if sample.picture not in clashes]
    if not samples:
        report.close()
    return samples, report


def check(options: PackOptions) -> None:
    """Tell what is in tar files, and what is wrong with them.

    Raises:
        UserError: a file is missing or no tar file.
        StopTraining: there is something to complain about (status 3).
    """
    from tqdm import tqdm

    from library.data.shards import expand_shards
    from library.data.tar_index import index_shards

    shards = expand_shards(options.shards, where="--check")
    with tqdm(total=len(shards), desc="checking", unit="shard", leave=False) as bar:
        indexes = index_shards(shards, progress=lambda done, total: bar.update(done - bar.n))
    findings = [str(bad) for index in indexes for bad in index.problems()]
    findings += _sample_findings(indexes, decode=options.decode)
    count = sum(map(len, indexes))
    show([f"{len(shards)} tar files with {count} samples"])
    show(findings[:_SHOWN])
    if len(findings) > _SHOWN:
        show([f"and {len(findings) - _SHOWN} more"])
    if not count:
        findings.append("no samples")
    if findings:
        raise StopTraining(f"{len(findings)} findings in {len(shards)} tar files with {count} samples", EXIT_FOUND)


def _sample_findings(indexes: list[ShardIndex], *, decode: bool) -> list[str]:
    """Return what is wrong with samples, beyond what the index says."""
    from tqdm import tqdm

    from library.data.bad_files import BadFile, printable
    from library.data.images import check_decodable
    from library.errors import UserError

    found: list[str] = []
    for index in tqdm(indexes, desc="decoding", unit="shard", leave=False, disable=not decode):
        for sample in index:
            place = f"{index.shard}, {printable(sample.key)}"
            if sample.picture is None:
                found.append(str(BadFile(place, "has no picture")))
            elif sample.caption is None:
                found.append(str(BadFile(place, "has no caption")))
            try:
                sample.facts()
            except UserError as error:
                found.append(str(BadFile(place, f"JSON: {error.problems[0].what}")))
            if decode and sample.picture is not None and all(sample.header[:2]):
                width, height, _ = sample.header
                reason = check_decodable(str(sample.picture), (width, height), orientation=1)
                if reason is not None:
                    found.append(str(BadFile(place, reason)))
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the script with `argv`, or with the command line."""
    cli.main(Options, run, argv=argv)


if __name__ == "__main__":
    main()
