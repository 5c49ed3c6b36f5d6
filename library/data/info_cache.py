"""`metadata_cache.json` of an image folder (`cache_info`): sizes and captions as sd-scripts keeps them.

Files written by sd-scripts say nothing about the state of the images they describe: their entries are taken for files
that did not change since the file was written. Ours add size and time of change, which the other side ignores.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library import files
from library.data.captions import clean_caption
from library.data.dataset_file import parse_json
from library.data.folder_scan import FolderScan, FolderSettings, Known
from library.data.metadata_files import as_size
from library.data.scan_index import READ
from library.errors import UserError
from library.text_files import read_text

_log = logging.getLogger(__name__)

FILE_NAME = "metadata_cache.json"
_MAX_BYTES = 1 << 30


def read_info_cache(folder: str, settings: FolderSettings, *, exif: bool) -> dict[str, Known]:
    """Return what the file says by image name; nothing when it is missing or broken.

    Args:
        folder: Image folder.
        settings: How captions are read; entries read otherwise are passed over.
        exif: Orientation counts, so that a size without one cannot be used.
    """
    path = os.path.join(folder, FILE_NAME)  # noqa: PTH118
    if not Path(path).is_file():
        return {}
    try:
        table = parse_json(read_text(path, limit=_MAX_BYTES), path)
        written_ns = Path(path).stat().st_mtime_ns
    except (UserError, OSError) as error:
        _log.warning("%s is passed over: %s", path, error)
        return {}
    if not isinstance(table, dict):
        _log.warning("%s is passed over: it is no JSON object", path)
        return {}
    known = {}
    for key, entry in table.items():
        if isinstance(entry, dict):
            # The spelling of the folder may have changed since; both kinds of separator occur.
            name = key.replace("\\", "/").rpartition("/")[2]
            known[name] = _known(entry, settings, exif, written_ns)
    return known


def _known(entry: Mapping[str, Any], settings: FolderSettings, exif: bool, written_ns: int) -> Known:
    size, caption = as_size(entry.get("resolution")), entry.get("caption")
    orientation = entry.get("orientation")
    if not isinstance(orientation, int) or not 1 <= orientation <= 8:
        orientation = None if exif else 1
    ours = entry.get("read_as")
    if not isinstance(caption, str) or (ours is not None and ours != settings.caption_key):
        caption = None
    return Known(
        header=(*size, orientation) if size is not None and orientation is not None else None,
        caption=None if caption is None else clean_caption(caption)[0],
        stat=_pair(entry, "size", "mtime_ns"),
        caption_stat=_pair(entry, "caption_size", "caption_mtime_ns"),
        written_ns=written_ns,
    )


def _pair(entry: Mapping[str, Any], first: str, second: str) -> tuple[int, int] | None:
    values = entry.get(first), entry.get(second)
    return values if isinstance(values[0], int) and isinstance(values[1], int) else None  # type: ignore[return-value]


def write_info_cache(scan: FolderScan, known: Mapping[str, Known]) -> None:
    """Write the file anew when it does not describe the folder as it is; being unable to is no error."""
    facts = scan.facts
    table = {}
    same = len(known) == len(facts)
    headers, stats, caption_stats = facts.headers.tolist(), facts.stats.tolist(), facts.caption_stats.tolist()
    states = facts.caption_states.tolist()
    for row, (name, caption) in enumerate(zip(facts.names, facts.captions, strict=True)):
        width, height, orientation = headers[row]
        (size, mtime_ns, _), (caption_size, caption_mtime_ns, _) = stats[row], caption_stats[row]
        # A missing caption file is left to the next look at the folder: the words for it may have changed.
        has_caption = {"caption": caption} if states[row] >= READ else {}
        table[scan.listing.path(name)] = {
            **has_caption,
            "resolution": [width, height],
            "orientation": orientation,
            "size": size,
            "mtime_ns": mtime_ns,
            "caption_size": caption_size,
            "caption_mtime_ns": caption_mtime_ns,
            "read_as": scan.settings.caption_key,
        }
        old = known.get(name)
        same = same and old is not None and old.header == (width, height, orientation)
        same = (
            same
            and old is not None
            and (old.stat, old.caption_stat)
            == (
                (size, mtime_ns),
                (caption_size, caption_mtime_ns),
            )
        )
    if same:
        return
    try:
        files.write_json(Path(scan.folder) / FILE_NAME, table)
    except (files.CannotSave, OSError, ValueError) as error:
        _log.warning("%s", error)
