"""Options about tar shards, and about which samples are used: parts of `DatasetOptions` and `SubsetOptions`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from library.data.selection import caption_field_value, filters_value, selection_problems
from library.errors import Problem, UserError
from library.option_groups import OptionGroup, opt
from library.option_values import BadValue

_SHARDS = {"webdataset_path": (), "dataset_config": ()}
_STREAMING = {"webdataset_streaming": ()}
_SELECTING = ("dreambooth", "finetuning")


def ratios_value(value: object) -> tuple[str, ...]:
    """Read a list of aspect ratios; they stay as they are written.

    Raises:
        BadValue: one of them is no ratio.
    """
    from library.data.aspect_list import read_ratio

    items = value if isinstance(value, (list, tuple)) else [value]
    try:
        for item in items:
            read_ratio(item)
    except UserError as error:
        problem = error.problems[0]
        raise BadValue(f"{problem.what}. {problem.hint}") from None
    return tuple(str(item) for item in items)


@dataclass(frozen=True, kw_only=True)
class ShardOptions(OptionGroup):
    """Tar files as data, and buckets by a list of aspect ratios."""

    webdataset_path: tuple[str, ...] = opt(
        (),
        path=True,
        resume="free",
        help="Tar files of pictures, captions and JSON: paths, patterns (`data-{0000..0009}.tar`), folders, s3:// and "
        "https:// addresses, or a .txt or .yml list of them.",
    )
    webdataset_streaming: bool = opt(
        False,
        needs=_SHARDS,
        help="Read the tar files from front to end through a shuffle buffer in place of indexing them first: for data "
        "sets that are too large for that.",
    )
    webdataset_shuffle: int = opt(
        500, at_least=1, matters_when=_STREAMING, help="Samples in the shuffle buffer of each loader process."
    )
    webdataset_epoch_size: int | None = opt(
        None,
        at_least=1,
        matters_when=_STREAMING,
        help="Samples that count as an epoch of streamed data. Default: the whole run is one epoch.",
    )
    webdataset_resampled: bool = opt(
        False,
        matters_when=_STREAMING,
        help="Draw tar files at random, again and again, in place of passing through all of them: some samples come "
        "twice before others come once. Fewer tar files than processes will do.",
    )
    webdataset_cache_dir: str | None = opt(
        None,
        path=True,
        resume="free",
        matters_when=_SHARDS,
        help="Folder that remote tar files are copied into once. Default: only what is needed is read, by ranges.",
    )
    allow_pipe_urls: bool = opt(
        False,
        resume="free",
        needs={"webdataset_cache_dir": ()},
        help="Run the commands of `pipe:` entries and keep the tar files that they write in --webdataset_cache_dir. "
        "Counts on the command line alone.",
    )
    multi_aspect_ratio: tuple[str, ...] = opt(
        (),
        convert=ratios_value,
        implies={"enable_bucket": True},
        scope=("general", "dataset"),
        kinds=("dreambooth", "finetuning", "controlnet"),
        help="Aspect ratios of the buckets, such as 1/1 3/4 9/16, the transposed ones included; replaces "
        "--min_bucket_reso, --max_bucket_reso and --bucket_reso_steps, and switches --enable_bucket on.",
    )
    bucket_random_ratio: float = opt(
        0.0,
        at_least=0,
        at_most=1,
        scope=("general", "dataset"),
        kinds=("dreambooth", "finetuning", "controlnet"),
        matters_when={"multi_aspect_ratio": (), "dataset_config": ()},
        help="Share of the images that go to a bucket of any other aspect ratio of --multi_aspect_ratio.",
    )

    @property
    def encoded_share(self) -> Fraction:
        """Sides of pictures as they are trained, over sides as options and data set files give them."""
        return Fraction(1)


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(OptionGroup):
    """Which samples are used, and where their captions come from."""

    dataset_filter: tuple[str, ...] = opt(
        (),
        convert=filters_value,
        repeatable=True,
        scope=("general", "dataset", "subset"),
        kinds=_SELECTING,
        help="Use a sample only if an expression about its JSON holds: `score: score > 4.5`, or "
        "`width,height: lambda w, h: w * h > 500000`. May be given several times.",
    )
    caption_field: tuple[str, ...] = opt(
        (),
        convert=caption_field_value,
        scope=("general", "dataset", "subset"),
        kinds=_SELECTING,
        help="Where captions come from: txt, json:key, alt(key:0.95,key:0.05), or a field and an expression "
        "(`json \"lambda x: x['key']\"`). Default: the text beside the picture.",
    )

    def check(self) -> Iterator[Problem]:
        """Refuse expressions that are not allowed, before any data are looked at."""
        yield from selection_problems(self.dataset_filter, self.caption_field, "--")
