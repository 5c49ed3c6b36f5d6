"""Which pictures and captions a check of a data set looks at: those of folders, or those that a configuration names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.data.bad_files import BadFile
from library.data.caption_files import MAX_BYTES, BadCaption, caption_of, decode_caption
from library.data.dataset_config import load_dataset_specs
from library.data.dataset_spec import SubsetSpec
from library.data.folder_listing import FolderListing, caption_names, list_folder, same_stems
from library.data.folder_scan import FolderSettings
from library.data.jobs import find_pictures
from library.data.metadata_scan import scan_metadata
from library.data.options import ALL_KINDS, DatasetOptions, SubsetOptions
from library.errors import UserError


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture and its caption.

    Attributes:
        path: of the picture.
        caption: all of it that training may see; None where none is asked for or `problem` tells why there is none.
        where: the file that holds the caption, or would.
        problem: kind of finding that the caption is, such as `no_caption`.
        detail: more about the problem.
    """

    path: Path
    caption: str | None = None
    where: str = ""
    problem: str = ""
    detail: str = ""


@dataclass(slots=True)
class Sources:
    """What a check looks at, and what was wrong already while it was found."""

    pictures: list[Picture] = field(default_factory=list)
    orphans: list[Path] = field(default_factory=list)
    twins: list[BadFile] = field(default_factory=list)
    missing: list[BadFile] = field(default_factory=list)

    def once(self) -> Sources:
        """Return the same without what several data sets share."""
        pictures: dict[tuple[Path, str | None], Picture] = {}
        for one in self.pictures:
            pictures.setdefault((one.path, one.caption), one)
        twins, missing = ({bad.path: bad for bad in found}.values() for found in (self.twins, self.missing))
        return Sources(list(pictures.values()), list(dict.fromkeys(self.orphans)), list(twins), list(missing))


@dataclass(frozen=True, slots=True)
class _Reading:
    """How captions are read: suffix of their files (None: none are wanted), encoding, lines, and a stand-in."""

    extension: str | None
    encoding: str
    multiline: bool = False
    stand_in: str | None = None


def sources_of_folder(folder: Path, *, recursive: bool, extension: str | None, encoding: str = "utf-8") -> Sources:
    """Return the pictures of a folder with their captions.

    Args:
        folder: its path.
        recursive: look into its sub-folders, too.
        extension: suffix of caption files, None when there are none.
        encoding: of caption files.

    Raises:
        UserError: the folder is missing, cannot be read, or holds no picture.
    """
    sources = Sources()
    reading = _Reading(extension, encoding)
    for inside in dict.fromkeys(path.parent for path in find_pictures(folder, recursive=recursive)):
        _add_folder(sources, list_folder(str(inside)), reading)
    return sources


def sources_of_config(path: str, *, encoding: str = "utf-8") -> Sources:
    """Return the pictures that a dataset configuration names, with the captions that training would use.

    Args:
        path: of the configuration.
        encoding: of caption files.

    Raises:
        UserError: the configuration or a metadata file is unusable, or a folder cannot be read.
    """
    data = DatasetOptions(dataset_config=path, resolution="512", masked_loss=True)
    specs = load_dataset_specs(data, SubsetOptions(), kinds=ALL_KINDS, bucket_step_multiple=1)
    sources = Sources()
    for subset in (subset for spec in specs for subset in spec.subsets):
        try:
            _add_subset(sources, subset, encoding)
        except OSError as error:
            raise UserError(error.strerror or str(error), where=subset.label) from error
    return sources.once()


def _add_subset(sources: Sources, subset: SubsetSpec, encoding: str) -> None:
    if subset.metadata_file is not None:
        _add_metadata(sources, subset)
        return
    if subset.webdataset_path:
        hint = "Their pictures are looked at when they are indexed; unpack them to have everything checked."
        raise UserError("pictures in tar files are not checked by this tool", hint, where=subset.label)
    # The empty text is what folders named `10_` ask for.
    stand_in = subset.class_tokens
    reading = _Reading(subset.caption_extension, encoding, subset.enable_wildcard, stand_in)
    _add_folder(sources, list_folder(subset.image_dir or "."), reading)
    if subset.conditioning_data_dir is not None:
        _add_folder(sources, list_folder(subset.conditioning_data_dir), _Reading(None, encoding))


def _add_metadata(sources: Sources, subset: SubsetSpec) -> None:
    scan = scan_metadata(subset, FolderSettings())
    sources.missing += scan.bad
    for place in scan.located:
        if place.cached_wh is not None:
            continue  # Only its latents are left, and these are checked when they are used.
        path = Path(os.path.join(place.folder, place.name))  # noqa: PTH118
        caption = place.entry.full_caption(subset.caption_separator, subset.enable_wildcard)
        where = f"{subset.metadata_file}: {place.entry.key}"
        if caption.strip():
            sources.pictures.append(Picture(path, caption, where))
        else:
            kind = "no_caption" if place.entry.caption is None and place.entry.tags is None else "empty_caption"
            sources.pictures.append(Picture(path, None, where, kind))


def _add_folder(sources: Sources, listing: FolderListing, reading: _Reading) -> None:
    names = sorted([*listing.images, *(os.path.basename(bad.path) for bad in listing.bad)])  # noqa: PTH119
    for name, first in same_stems(names).items():
        reason = f"has the same name as {first} up to the suffix: both share caption and cache files"
        sources.twins.append(BadFile(listing.path(name), reason, "Rename or remove one of them."))
    if reading.extension is None:
        sources.pictures += [Picture(Path(listing.path(name))) for name in names]
        return
    captions = caption_names(listing, names, reading.extension)
    sources.orphans += list(_orphans(listing, names, captions, reading.extension))
    sources.pictures += [
        _with_caption(listing, name, caption, reading) for name, caption in zip(names, captions, strict=True)
    ]


def _orphans(listing: FolderListing, names: Sequence[str], captions: Iterable[str], extension: str) -> Iterator[Path]:
    """Yield caption files that belong to no picture."""
    used = {*captions, *(name[: name.rfind(".")] + extension for name in names)}
    for name in sorted(listing.others):
        if name.endswith(extension) and name not in used and not name.startswith("."):
            yield Path(listing.path(name))


def _with_caption(listing: FolderListing, name: str, caption: str, reading: _Reading) -> Picture:
    path = Path(listing.path(name))
    if not caption:
        if reading.stand_in is not None:
            return Picture(path, reading.stand_in)
        return Picture(path, None, "", "no_caption")
    where = listing.path(caption)
    try:
        with Path(where).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            return Picture(path, None, where, "bad_caption", f"more than {MAX_BYTES >> 20} MiB")
        text, _ = caption_of(decode_caption(data, reading.encoding), reading.multiline)
    except BadCaption as error:
        return Picture(path, None, where, "bad_caption", f"{error.reason}. {error.hint}")
    except OSError as error:
        return Picture(path, None, where, "bad_caption", error.strerror or str(error))
    if not text:
        return Picture(path, None, where, "empty_caption")
    return Picture(path, text, where)
