"""What the scan found worth telling: counted over all subsets, with the first examples, one line per kind."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from library.data.bad_files import printable

EXAMPLES = 5

_WORDS = {
    "no_caption": "{n} images have no caption file and no class words: their caption is empty",
    "empty_caption": "{n} caption files are empty: their caption is empty",
    "no_text": "{n} metadata entries have neither caption nor tags: their caption is empty",
    "cleaned": "control characters removed from {n} captions",
    "ignored": "{n} files in image folders are of no supported image format and ignored",
    "other_size": "image_size in the metadata differs from the file for {n} images: the file is right",
    "only_cache": "{n} image files are gone: trained from their latent caches",
    "no_text_member": "{n} samples in tar files have no caption: it is empty",
    "no_picture": "{n} samples in tar files have no picture and are passed over",
    "harmful": "{n} entries of tar files that could do harm are passed over",
    "unused": "{n} entries of tar files are of no use here and passed over",
    "turned": "{n} images are turned upright as EXIF says (--no_exif_transpose leaves them as stored)",
}


class ScanNotes:
    """Counts by kind, with the first few examples."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, count: int, examples: Iterable[str] = ()) -> None:
        """Count `count` occurrences of `kind`."""
        if count:
            self._counts[kind] = self._counts.get(kind, 0) + count
            shown = self._examples.setdefault(kind, [])
            shown.extend(islice(examples, EXAMPLES - len(shown)))

    def lines(self) -> list[str]:
        """Return one line per kind that occurred."""
        lines = []
        for kind, words in _WORDS.items():
            if kind in self._counts:
                examples = self._examples[kind]
                more = ", ..." if self._counts[kind] > len(examples) else ""
                shown = f" ({', '.join(map(printable, examples))}{more})" if examples else ""
                lines.append(words.format(n=self._counts[kind]) + shown)
        return lines
