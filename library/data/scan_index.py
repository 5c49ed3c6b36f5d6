"""What is known about the images of a folder, and the file that keeps it for the next start.

The file lies in the folder itself as `.image_index`. An entry holds as long as size, time of change and time of status
change of image and caption are what they were, so that edits, copies and renames are seen; entries whose files changed
while (or just before) the index was written are never kept, since a later edit could leave the same times.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from library import files
from library.data.array_file import NotAnArrayFile, pack_arrays, unpack_arrays
from library.data.records import TextColumn

_log = logging.getLogger(__name__)

INDEX_NAME = ".image_index"
FORMAT = 1
RACY_NS = 2_000_000_000

NO_CAPTION, READ, EMPTY_FILE, CLEANED, NOT_LOOKED_FOR = range(5)
"""States of a caption: no file, read, file of zero bytes, control characters removed, captions not wanted."""


@dataclass(slots=True)
class FolderFacts:
    """Images of one folder, one row each.

    `stats` and `caption_stats` are size, mtime_ns, ctime_ns [n, 3] (-1: no file); `headers` are the stored width and
    height and the EXIF orientation [n, 3]; `checked` tells which images were decoded completely without an error.
    """

    names: list[str]
    stats: NDArray[np.int64]
    headers: NDArray[np.int32]
    caption_names: list[str]
    caption_stats: NDArray[np.int64]
    captions: TextColumn
    caption_states: NDArray[np.uint8]
    checked: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: NDArray[np.int64]) -> FolderFacts:
        """Return the facts of `rows` in that order."""
        numbers = rows.tolist()
        return FolderFacts(
            [self.names[row] for row in numbers],
            self.stats[rows],
            self.headers[rows],
            [self.caption_names[row] for row in numbers],
            self.caption_stats[rows],
            self.captions.take(rows),
            self.caption_states[rows],
            self.checked[rows],
        )

    @staticmethod
    def join(first: FolderFacts, second: FolderFacts) -> FolderFacts:
        """Return the rows of `first`, then those of `second`."""
        return FolderFacts(
            first.names + second.names,
            np.concatenate([first.stats, second.stats]),
            np.concatenate([first.headers, second.headers]),
            first.caption_names + second.caption_names,
            np.concatenate([first.caption_stats, second.caption_stats]),
            TextColumn.join([first.captions, second.captions]),
            np.concatenate([first.caption_states, second.caption_states]),
            np.concatenate([first.checked, second.checked]),
        )


def index_paths(folder: str, cache_dir: str | None) -> list[Path]:
    """Return where the index of a folder may lie: in the folder, or in the cache folder when that cannot be written."""
    paths = [Path(folder) / INDEX_NAME]
    if cache_dir is not None:
        name = blake2b(str(Path(folder).absolute()).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
        paths.append(Path(cache_dir) / f"image_index-{name}.bin")
    return paths


def load_index(folder: str, caption_settings: str, cache_dir: str | None = None) -> FolderFacts | None:
    """Return what is remembered about a folder; None when there is nothing or it cannot be read.

    Captions that were read with other settings come back as not looked for.
    """
    for path in index_paths(folder, cache_dir):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        try:
            return _unpacked(data, caption_settings)
        except NotAnArrayFile as error:
            _log.warning("%s is damaged (%s): the folder is read anew", path, error)
    return None


def _unpacked(data: bytes, caption_settings: str) -> FolderFacts:
    header, arrays = unpack_arrays(data, verify=True)
    if header.get("format") != FORMAT:
        raise NotAnArrayFile("another format")
    try:
        facts = FolderFacts(
            names=_split_names(arrays["names"]),
            stats=arrays["stats"],
            headers=arrays["headers"],
            caption_names=_split_names(arrays["caption_names"]),
            caption_stats=arrays["caption_stats"],
            captions=TextColumn(arrays["captions"], arrays["caption_offsets"]),
            caption_states=arrays["caption_states"],
            checked=arrays["checked"],
        )
    except (KeyError, UnicodeDecodeError) as error:
        raise NotAnArrayFile(str(error)) from error
    lengths = {len(part) for part in _parts(facts)}
    if len(lengths) != 1 or not len(facts):
        raise NotAnArrayFile("columns of different lengths")
    if header.get("captions") != caption_settings:
        facts.caption_states = np.full(len(facts), NOT_LOOKED_FOR, np.uint8)
    return facts


def _parts(facts: FolderFacts) -> tuple[Any, ...]:
    return (
        facts.names,
        facts.stats,
        facts.headers,
        facts.caption_names,
        facts.caption_stats,
        facts.captions,
        facts.caption_states,
        facts.checked,
    )


def _split_names(joined: NDArray[np.uint8]) -> list[str]:
    return joined.tobytes().decode("utf-8", "surrogatepass").split("\0")


def _join_names(names: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer("\0".join(names).encode("utf-8", "surrogatepass"), np.uint8)


def save_index(
    folder: str, facts: FolderFacts, caption_settings: str, started_ns: int, cache_dir: str | None = None
) -> None:
    """Write the index, into the folder or else into the cache folder; being unable to is no error.

    Args:
        folder: The folder that the facts are about.
        facts: Good rows only.
        caption_settings: How captions were looked for.
        started_ns: Time at which the scan began; rows that changed since or just before are not trusted next time.
        cache_dir: Folder for caches, if the user named one.
    """
    stats, caption_stats = facts.stats.copy(), facts.caption_stats.copy()
    for array in (stats, caption_stats):
        array[array[:, 1:].max(axis=1, initial=0) > started_ns - RACY_NS] = -2
    pieces = pack_arrays(
        {"format": FORMAT, "captions": caption_settings},
        [
            ("names", _join_names(facts.names)),
            ("stats", stats),
            ("headers", facts.headers),
            ("caption_names", _join_names(facts.caption_names)),
            ("caption_stats", caption_stats),
            ("captions", facts.captions.blob),
            ("caption_offsets", facts.captions.offsets),
            ("caption_states", facts.caption_states),
            ("checked", facts.checked),
        ],
    )
    for path in index_paths(folder, cache_dir):
        try:
            with files.atomic_file(path, sync=False, kind="cache") as temporary, files.NewFile(temporary) as file:
                for piece in pieces:
                    file.write(piece)
        except (files.CannotSave, OSError) as error:
            _log.debug("index not written: %s", error)
        else:
            return
