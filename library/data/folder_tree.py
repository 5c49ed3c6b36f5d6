"""DreamBooth folder trees: sub-folders named `<repeats>_<words>`, each a subset."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from library.errors import Problem

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")


@dataclass(slots=True)
class FolderTree:
    """What a parent folder holds: (folder, repeats, words) sorted by name, and why other folders were passed over."""

    parent: str
    subsets: list[tuple[str, int, str]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    images_beside: int = 0

    def nothing_found(self, option: str) -> Problem:
        """Return the problem of a tree without a single usable folder."""
        if self.ignored:
            found = f"no folder named <repeats>_<words> in it; found {'; '.join(self.ignored[:10])}"
            return Problem(f"{option} {self.parent}", found)
        if self.images_beside:
            example = str(Path(self.parent) / "10_sks dog")
            return Problem(
                f"{option} {self.parent}",
                f"holds {self.images_beside} images but no folder named <repeats>_<words>",
                f"Move them into a folder such as {example!r} and give its parent.",
            )
        return Problem(f"{option} {self.parent}", "is empty", "Give the parent of folders such as '10_sks dog'.")


def parse_folder_name(name: str) -> tuple[int, str] | None:
    """Return (repeats, words) of a name such as `10_sks dog`, or None when it does not start with a number."""
    first, _, words = name.partition("_")
    try:
        return int(first), words
    except ValueError:
        return None


def read_folder_tree(parent: str, option: str) -> FolderTree | Problem:
    """Look at the direct sub-folders of `parent`; a `Problem` when it cannot be read at all.

    Args:
        parent: The folder that the user named.
        option: The option that named it, for messages.
    """
    tree = FolderTree(parent)
    try:
        with os.scandir(parent) as entries:
            names = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError as error:
        resolved = Path(parent).absolute()
        return Problem(f"{option} {parent}", error.strerror or str(error), f"Looked for {resolved}.")
    for name, is_folder in names:
        if name.startswith("."):
            continue
        if not is_folder:
            tree.images_beside += name.lower().endswith(IMAGE_SUFFIXES)
            continue
        parsed = parse_folder_name(name)
        if parsed is None:
            tree.ignored.append(f"{name!r} has no repeats (rename it to '10_{name.lstrip('_')}' for 10 repeats)")
        elif parsed[0] < 1:
            tree.ignored.append(f"{name!r} asks for {parsed[0]} repeats")
        else:
            tree.subsets.append((os.path.join(parent, name), *parsed))  # noqa: PTH118 - keeps the user's spelling
    return tree
