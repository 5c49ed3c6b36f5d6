"""From the keys of a metadata file to image files, or to the caches that are left of them; linear in their number."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from library.data.bad_files import BadFile
from library.data.caches import stored_size
from library.data.dataset_spec import SubsetSpec
from library.data.folder_listing import FolderListing, image_suffixes, list_folder
from library.data.folder_scan import FolderScan, FolderSettings, Known, scan_folder
from library.data.metadata_files import MetadataEntry, read_metadata
from library.garbage import collection_paused

_log = logging.getLogger(__name__)

MISSING_SUFFIX = ".missing"
"""Of the names of images that are gone, where nothing tells what theirs was."""
_OTHER_FOLDER = re.compile(r"[/\\:]|\.\.")


@dataclass(frozen=True, slots=True)
class Located:
    """Where the image of an entry is. `cached_wh` is set when only a cache is left, with the size of the image."""

    entry: MetadataEntry
    folder: str
    name: str
    cached_wh: tuple[int, int] | None = None


@dataclass(slots=True)
class MetadataScan:
    """A resolved metadata file: entries in the order of the file, scans of the folders they lie in, and bad entries.

    `resolutions` are the buckets that a preparation tool chose, when every entry has one and a cache; `all_old` tells
    that these caches all have the oldest names, which do not say what they hold.
    """

    located: list[Located] = field(default_factory=list)
    folders: dict[str, FolderScan] = field(default_factory=dict)
    bad: list[BadFile] = field(default_factory=list)
    resolutions: tuple[tuple[int, int], ...] | None = None
    all_old: bool = False

    @property
    def total(self) -> int:
        """Return the number of entries looked at."""
        return len(self.located) + len(self.bad)


@dataclass(slots=True)
class _Folder:
    """Names of one folder, indexed by stem for images and for latent caches."""

    images: set[str] = field(default_factory=set)
    by_stem: dict[str, list[str]] = field(default_factory=dict)
    caches: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    old_caches: set[str] = field(default_factory=set)
    listing: FolderListing | None = None

    @classmethod
    def of(cls, listing: FolderListing, cache_pattern: re.Pattern[str]) -> _Folder:
        folder = cls(set(listing.images), listing=listing)
        for name in listing.images:
            folder.by_stem.setdefault(name[: name.rfind(".")], []).append(name)
        # Sorted, so that of several caches of one image always the same one tells its size.
        for name in sorted(name for name in listing.others if name.endswith(".npz")):
            match = cache_pattern.fullmatch(name)
            if match and "width" in cache_pattern.groupindex:
                folder.caches[match["stem"]] = (int(match["width"]), int(match["height"]))
            elif match:
                folder.caches[match["stem"]] = None
            elif "width" in cache_pattern.groupindex:
                folder.caches.setdefault(name[:-4], None)
                folder.old_caches.add(name[:-4])
        return folder


def scan_metadata(
    subset: SubsetSpec,
    settings: FolderSettings,
    *,
    trust_sizes: bool = False,
    latent_suffix: str = "_sd",
    latent_sized: bool = True,
) -> MetadataScan:
    """Read the metadata file of a subset and find its images.

    A key is, in this order: an absolute path; a path inside `image_dir`; the same without the image's suffix; a path
    from the working directory; the stem of latent caches whose image is gone.

    Args:
        subset: Its `metadata_file` and `image_dir`.
        settings: How image files are read; captions are not.
        trust_sizes: Take `image_size` of an entry without opening the file.
        latent_suffix: Ending of latent cache files of the model family, `_sd` in `a_0512x0512_sd.npz`.
        latent_sized: Their names tell the size of the image, as in this example.

    Raises:
        UserError: The metadata file is unusable.
    """
    with collection_paused():
        return _scan(subset, settings, trust_sizes=trust_sizes, latent_suffix=latent_suffix, sized=latent_sized)


def _scan(
    subset: SubsetSpec, settings: FolderSettings, *, trust_sizes: bool, latent_suffix: str, sized: bool
) -> MetadataScan:
    entries = read_metadata(subset.metadata_file or "")
    finder = _Finder(subset.image_dir, latent_suffix, sized=sized)
    scan = MetadataScan()
    seen: dict[tuple[str, str], str] = {}
    for entry in entries:
        place = finder.locate(entry)
        if isinstance(place, BadFile):
            scan.bad.append(place)
        elif (twin := seen.setdefault((place.folder, place.name[: place.name.rfind(".")]), entry.key)) != entry.key:
            reason = f"is the same image as {twin!r}, or differs in the suffix only: both would share cache files"
            scan.bad.append(BadFile(entry.key, reason, "Remove one of them."))
        else:
            scan.located.append(place)
    scan.resolutions = _fixed_resolutions(scan.located, finder)
    scan.all_old = all(finder.has_cache(place, old=True) for place in scan.located)
    _scan_folders(scan, settings, trust_sizes, finder)
    return scan


class _Finder:
    """Resolves keys; lists every folder once."""

    def __init__(self, image_dir: str | None, latent_suffix: str, *, sized: bool) -> None:
        self._image_dir = image_dir
        self._folders: dict[str, _Folder] = {}
        self._ending = None if sized else f"{latent_suffix}.npz"
        size = r"_(?P<width>\d{2,})x(?P<height>\d{2,})" if sized else ""
        self._pattern = re.compile(rf"(?P<stem>.+){size}{re.escape(latent_suffix)}\.npz", re.DOTALL)
        self._suffixes = image_suffixes()
        self._inside: dict[str, str] = {}

    def folder(self, path: str) -> _Folder:
        """Return the names in a folder, nothing when it cannot be listed."""
        found = self._folders.get(path)
        if found is None:
            try:
                found = _Folder.of(list_folder(path or "."), self._pattern)
            except (OSError, ValueError):  # ValueError: characters that no file name can hold
                found = _Folder()
            self._folders[path] = found
        return found

    def locate(self, entry: MetadataEntry) -> Located | BadFile:
        """Return where the image of an entry is, or why it is nowhere."""
        key = entry.key
        if self._image_dir is not None and _OTHER_FOLDER.search(key) is None:
            # A plain name in image_dir, as most keys are.
            names = self.folder(self._image_dir)
            if key in names.images:
                return Located(entry, self._image_dir, key)
            found = names.by_stem.get(key)
            if found is not None and len(found) == 1:
                return Located(entry, self._image_dir, found[0])
        tried = []
        for folder, name in self._candidates(entry.key):
            names = self.folder(folder)
            if name in names.images:
                return Located(entry, folder, name)
            with_suffix = self._with_suffix(names, name)
            if with_suffix is not None:
                return Located(entry, folder, with_suffix)
            tried.append((folder, name, names))
        for folder, name, names in tried:
            cached = self._cached(entry, folder, name, names)
            if cached is not None:
                return cached
        if self._image_dir is not None and _climbs(key) and not os.path.isabs(key):  # noqa: PTH117
            what = "leads out of image_dir, and there is no such image seen from the working directory either"
            return BadFile(key, what, "Use a path inside it, or an absolute path.")
        where = os.path.join(tried[0][0], tried[0][1])  # noqa: PTH118 - spelled as the user spelled it
        hint = "" if self._image_dir or os.path.isabs(entry.key) else "Give --train_data_dir (image_dir)."  # noqa: PTH117
        return BadFile(entry.key, f"no image and no cache of this name (looked for {where})", hint)

    def _candidates(self, key: str) -> Iterator[tuple[str, str]]:
        if os.path.isabs(key):  # noqa: PTH117
            yield os.path.split(key)
            return
        head, name = os.path.split(key)
        if self._image_dir is not None and not _climbs(key):
            folder = self._inside.get(head)
            if folder is None:
                folder = self._inside[head] = os.path.join(self._image_dir, head) if head else self._image_dir  # noqa: PTH118
            yield folder, name
        yield head, name

    def _with_suffix(self, names: _Folder, name: str) -> str | None:
        found = names.by_stem.get(name)
        if not found:
            return None
        if len(found) > 1:
            _log.warning("%s: several images of this name (%s): %s is used", name, ", ".join(found), found[0])
        return found[0]

    def _cached(self, entry: MetadataEntry, folder: str, name: str, names: _Folder) -> Located | None:
        """Return a place without an image file when a cache of the stem exists and the size is known."""
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        if suffix.lower() not in self._suffixes:
            stem, name = name, name + MISSING_SUFFIX
        if stem not in names.caches:
            return None
        size = entry.image_size or names.caches[stem] or self._stored_size(folder, stem) or entry.train_resolution
        return None if size is None else Located(entry, folder, name, size)

    def _stored_size(self, folder: str, stem: str) -> tuple[int, int] | None:
        """Return the size that a cache whose name tells none holds."""
        return None if self._ending is None else stored_size(os.path.join(folder, f"{stem}{self._ending}"))  # noqa: PTH118

    def has_cache(self, place: Located, *, old: bool = False) -> bool:
        """Tell whether a latent cache lies beside the image; with `old`, whether `<stem>.npz` does, its oldest form."""
        stem, folder = place.name[: place.name.rfind(".")], self.folder(place.folder)
        return stem in (folder.old_caches if old else folder.caches)


def _climbs(key: str) -> bool:
    """Tell whether a path goes to the folder above."""
    return ".." in key and ".." in re.split(r"[/\\]", key)


def _fixed_resolutions(located: Iterable[Located], finder: _Finder) -> tuple[tuple[int, int], ...] | None:
    """Return the buckets that a preparation tool chose, when every entry has one and a cache."""
    found = set()
    for place in located:
        resolution = place.entry.train_resolution
        if resolution is None or not finder.has_cache(place):
            return None
        found.add(resolution)
    return tuple(sorted(found)) or None


def _scan_folders(scan: MetadataScan, settings: FolderSettings, trust_sizes: bool, finder: _Finder) -> None:
    wanted: dict[str, dict[str, Known]] = {}
    for place in scan.located:
        if place.cached_wh is None:
            size = place.entry.image_size if trust_sizes else None
            header = (*size, 1) if size is not None else None
            wanted.setdefault(place.folder, {})[place.name] = Known(header)
    for folder, names in wanted.items():
        known = names if trust_sizes else None
        listing = finder.folder(folder).listing
        scan.folders[folder] = scan_folder(folder or ".", settings, wanted=list(names), known=known, listing=listing)
