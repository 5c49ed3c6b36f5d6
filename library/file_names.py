"""Names of files that users choose, and that must work on every system."""

from __future__ import annotations

_RESERVED = {"con", "prn", "aux", "nul", *(f"com{n}" for n in range(1, 10)), *(f"lpt{n}" for n in range(1, 10))}


def bad_file_name(name: str) -> str | None:
    """Return why `name` cannot be the first part of file names on every system, or None when it can."""
    if any(character in name for character in '/\\:*?"<>|'):
        return 'contains one of / \\ : * ? " < > |'
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "contains a control character"
    if name.strip(". ") == "" or name.endswith((".", " ")) or name.startswith(" "):
        return "starts with a space, or ends with a dot or a space"
    if name.split(".")[0].lower() in _RESERVED:
        return "is a reserved name on Windows"
    return "is longer than 180 bytes" if len(name.encode("utf-8", "replace")) > 180 else None


def safe_file_name(name: str) -> str:
    """Return `name` with `_` for what not every system takes in a name; empty if nothing is left of it."""
    if bad_file_name(name):
        name = "".join(
            "_" if character in '/\\:*?"<>|' or not character.isprintable() else character for character in name
        )
        name = name.strip(". ")
    return "" if bad_file_name(name) else name
