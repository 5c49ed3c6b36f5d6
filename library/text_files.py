"""Text files that users name: UTF-8, bounded, with messages that say what to do."""

from __future__ import annotations

from pathlib import Path

from library.errors import UserError

MAX_BYTES = 16 << 20
"""Larger files are refused unread, unless the caller knows better."""

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: str | Path, *, where: str = "", limit: int = MAX_BYTES) -> str:
    """Return the text of a UTF-8 file without its byte order mark.

    Args:
        path: The file.
        where: What messages start with; default: the path.
        limit: Larger files are refused unread.

    Raises:
        UserError: The file is missing, unreadable, larger than `limit` bytes or not UTF-8.
    """
    file, where = Path(path), where or str(path)
    try:
        if not file.is_file():
            found = "is not a file" if file.exists() else "file not found"
            raise UserError(found, f"Looked for {file.absolute()}.", where=where)
        size = file.stat().st_size
        if size > limit:
            raise UserError(f"is larger than {limit >> 20} MB", "Is this the right file?", where=where)
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(getattr(error, "strerror", None) or str(error), where=where) from error
    if data.startswith(_UTF16_MARKS):
        raise UserError("not UTF-8 (looks like UTF-16)", "Save it as UTF-8.", where=where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"not UTF-8 (line {line})", "Save it as UTF-8.", where=where) from error
