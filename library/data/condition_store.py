"""What ControlNet filters find in pictures, kept in a file beside each picture: found at the first visit, then read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from library.contracts import ConditionFinder
from library.data.cache_files import META, BrokenCache, meta_array, opened, read_meta, write_cache
from library.data.cache_names import CacheRules, LatentNeed, text_cache_path
from library.data.npz import BrokenNpz
from library.new_file import CannotSave

if TYPE_CHECKING:
    import random

_log = logging.getLogger(__name__)

_PART = "condition"
_LARGEST = 1 << 26
Found = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class KeptConditions:
    """Reads what a filter finds from files, and writes those that are missing or stale; picklable.

    Attributes:
        maker: the filter.
        key: its `kept`, asked for once.
        names: rules of the names of the files.
    """

    maker: ConditionFinder
    key: str
    names: CacheRules

    def prepare(
        self, need: LatentNeed, picture: Callable[[], NDArray[Any]], rng: random.Random, *, flipped: bool
    ) -> NDArray[Any]:
        """Return the condition of a picture, the same bits as `maker.prepare` would.

        Args:
            need: which view of which picture.
            picture: decodes it; called when there is no usable file.
            rng: all that is left to chance.
            flipped: whether the view is mirrored.
        """
        width, height = need.placement.bucket_wh
        path, origin = self._path(need, flipped), need.provenance(self.names, self.key)
        found = self._read(path, origin, (height, width))
        if found is None:
            found = self.maker.find(picture())
            self._write(path, origin, found)
        made: NDArray[Any] = self.maker.paint(found, (height, width), rng)
        return made

    def _path(self, need: LatentNeed, flipped: bool) -> str:
        # A picture may be trained in several sizes.
        size = "{:04d}x{:04d}".format(*need.placement.bucket_wh)
        suffix = f"_{size}{self.names.suffix}{'_flipped' if flipped else ''}"
        return text_cache_path(need.record.path, replace(self.names, suffix=suffix))

    def _read(self, path: str, origin: Mapping[str, Any], size_hw: tuple[int, int]) -> Found | None:
        """Return what the file holds, None where there is none that can be used."""
        try:
            with opened(path) as file:
                if read_meta(file, _PART) != origin:
                    return None
                found = {name: file.read(name, _LARGEST) for name in file.names if name != META}
        except (BrokenCache, BrokenNpz):
            return None
        return found if self.maker.accepts(found, size_hw) else None

    def _write(self, path: str, origin: Mapping[str, Any], found: Found) -> None:
        try:
            write_cache(path, {**found, META: meta_array(_PART, origin)})
        except CannotSave as error:
            _tell_once(str(Path(path).parent), error.reason)


@lru_cache(maxsize=64)
def _tell_once(folder: str, reason: str) -> None:
    _log.warning("what the ControlNet looks at is not kept in %s: %s", folder, reason)
