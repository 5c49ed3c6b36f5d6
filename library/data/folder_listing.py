"""One look at a folder: its images in order, everything else by name, and what cannot be an image."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from library.data.bad_files import BadFile
from library.data.folder_tree import IMAGE_SUFFIXES

_USE_DIR_FD = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd and os.scandir in os.supports_fd
_COMPANIONS = (".npz", ".json", ".jsonl", ".toml", ".txt", ".caption", ".tags")
NO_FILE = (-1, -1, -1)


@dataclass(slots=True)
class FolderListing:
    """Names in one folder. `images` are sorted by code point; hidden files are left out, as glob patterns do."""

    folder: str
    images: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    bad: list[BadFile] = field(default_factory=list)

    def ignored_suffixes(self, extension: str | None) -> Counter[str]:
        """Count files by suffix that are neither images nor what belongs to them."""
        belongs = (*_COMPANIONS, extension) if extension else _COMPANIONS
        strange = sorted(name for name in self.others if not name.endswith(belongs) and name[0] != ".")
        return Counter(os.path.splitext(name)[1].lower() for name in strange)  # noqa: PTH122

    def path(self, name: str) -> str:
        """Return the path of a file in the folder, spelled as the user spelled the folder."""
        return os.path.join(self.folder, name)  # noqa: PTH118 - a hundred thousand calls


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of images that this installation can read."""
    known = set(IMAGE_SUFFIXES)
    from PIL import features

    if not features.check("avif"):
        known.discard(".avif")
    try:
        import pillow_jxl  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        known.discard(".jxl")
    return frozenset(known)


def list_folder(folder: str) -> FolderListing:
    """List a folder.

    Raises:
        OSError: It cannot be listed.
    """
    listing = FolderListing(folder)
    suffixes = image_suffixes()
    images, other = listing.images, listing.others.add
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[name.rfind(".") :].lower() not in suffixes or name[0] == ".":
                other(name)
            elif _is_regular(entry, listing):
                images.append(name)
    images.sort()
    return listing


def _is_regular(entry: os.DirEntry[str], listing: FolderListing) -> bool:
    """Tell whether an entry named like an image is a file; note what it is otherwise. Never opens anything."""
    try:
        if entry.is_file():
            return True
        if entry.is_dir():
            reason = "is a folder"
        elif entry.is_symlink():
            reason = "is a link that leads nowhere"
        else:
            reason = "is not a regular file (pipe, socket or device)"
    except OSError as error:
        reason = error.strerror or str(error)
    listing.bad.append(BadFile(listing.path(entry.name), reason, "Remove or rename it."))
    return False


def same_stems(names: Sequence[str]) -> dict[str, str]:
    """Return later name -> first name for images that would share caption and cache files."""
    stems = [name[: name.rfind(".")] for name in names]
    if len(set(stems)) == len(stems):
        return {}
    first: dict[str, str] = {}
    return {
        name: kept for stem, name in zip(stems, names, strict=True) if (kept := first.setdefault(stem, name)) != name
    }


def caption_names(listing: FolderListing, names: Sequence[str], extension: str) -> list[str]:
    """Return the caption file of each image, the empty text where there is none.

    Images cut out around faces (`photo_12_34_56_78.png`) may use the caption of the whole picture (`photo.txt`).
    """
    others = listing.others
    found = []
    for name in names:
        stem = name[: name.rfind(".")]
        caption = stem + extension
        if caption not in others:
            caption = stem.rsplit("_", 4)[0] + extension if stem.count("_") >= 4 else ""
            if caption not in others:
                caption = ""
        found.append(caption)
    return found


class FolderFiles:
    """Opens and examines files of one folder, by descriptor where the system can: a long path is resolved once."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        self._flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        self._flags |= getattr(os, "O_NONBLOCK", 0)  # A file that became a pipe must not block.

    def __enter__(self) -> FolderFiles:
        if _USE_DIR_FD:
            self._descriptor = os.open(self._folder, self._flags)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def open(self, name: str) -> int:
        """Return a descriptor for reading."""
        if self._descriptor is not None:
            return os.open(name, self._flags, dir_fd=self._descriptor)
        return os.open(os.path.join(self._folder, name), self._flags)  # noqa: PTH118

    def stats(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return size, mtime_ns and ctime_ns of each file, [n, 3]; -1 where the name is empty or the file is gone."""
        found = np.empty((len(names), 3), np.int64)
        flat: list[int] = []
        take = flat.extend
        stat, descriptor = os.stat, self._descriptor
        for name in names:
            if not name:
                take(NO_FILE)
                continue
            try:
                if descriptor is not None:
                    info = stat(name, dir_fd=descriptor)
                else:
                    info = stat(os.path.join(self._folder, name))  # noqa: PTH116, PTH118
                take((info.st_size, info.st_mtime_ns, info.st_ctime_ns))
            except OSError:
                take(NO_FILE)
        found.flat[:] = flat
        return found
