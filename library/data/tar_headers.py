"""Walking through a tar file without unpacking it: where each member lies, and the first bytes of it.

Formats: POSIX ustar and pax (IEEE Std 1003.1), and GNU tar with its long names and large numbers. Every length that a
header declares is checked before anything is read, so a hostile file costs no more than its own bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from library.data.image_headers import HEAD_BYTES, ReadAt

BLOCK = 512
MAX_MEMBERS = 2_000_000
_MAX_EXTENDED = 1 << 20
_TAIL = 1 << 16

FILE, FOLDER = "file", "folder"
_REGULAR = b"0\x007"
_KINDS = {b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"5": FOLDER, b"6": "pipe", b"S": "sparse file"}
_WITHOUT_DATA = b"123456"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class NotATar(ValueError):
    """The file is something else; the text says what it seems to be."""


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a tar file.

    Attributes:
        name: as stored; undecodable bytes are kept as surrogates.
        kind: `FILE`, `FOLDER`, or what it is instead.
        offset: of its first byte.
        size: in bytes.
        head: its first bytes, as many as are cheap to have.
    """

    name: str
    kind: str
    offset: int
    size: int
    head: bytes


@dataclass(slots=True)
class _Extended:
    """What extended headers say of the member that follows."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False
    too_large: bool = False


class TarWalk:
    """Iterates over the members of a tar file.

    Afterwards `cut_at` is the byte from which on the file is cut off or damaged (None: it is whole), `why` says which,
    and `cut_member` is the member that was begun there, if so much is known.

    Args:
        read_at: reads parts of the file.
        size: of the file in bytes.
    """

    def __init__(self, read_at: ReadAt, size: int) -> None:
        self._read_at, self._size = read_at, size
        self.cut_at: int | None = None
        self.why = ""
        self.cut_member: Member | None = None

    def __iter__(self) -> Iterator[Member]:
        """Yield every member whose bytes are all there.

        Raises:
            NotATar: the file does not begin like one.
        """
        position, count = 0, 0
        extended = _Extended()
        while position + BLOCK <= self._size:
            window = self._read_at(position, BLOCK + HEAD_BYTES)
            block = window[:BLOCK]
            if block.count(0) == BLOCK:
                self._check_tail(position)
                return
            if len(block) < BLOCK or not _sum_fits(block) or count >= MAX_MEMBERS:
                self._give_up(position, block, count)
                return
            count += 1
            begin, kind = position + BLOCK, block[156:157]
            if kind == b"S":
                begin = self._after_sparse_map(begin, block)
            size = _number(block[124:136])
            if kind not in b"xgLK" and extended.size is not None:
                size = extended.size
            stored = 0 if kind in _WITHOUT_DATA else size
            if size < 0 or begin + stored > self._size:
                self._note(position, "cut off")
                self.cut_member = None if kind in b"xgLK" else _member(block, begin, 0, extended, b"")
                return
            if kind in b"xgLK":
                self._extend(extended, kind, begin, size)
            else:
                yield _member(block, begin, size, extended, window[begin - position :])
                extended = _Extended()
            position = begin + stored + -stored % BLOCK
        if position == 0:
            raise NotATar("is no tar file, or empty")
        self._note(position, "has no end mark; it is probably cut off")

    def _give_up(self, position: int, block: bytes, count: int) -> None:
        if position == 0:
            raise NotATar(_what_it_is(block))
        if count >= MAX_MEMBERS:
            self._note(position, f"more than {MAX_MEMBERS} members")
        else:
            self._note(position, "cut off" if len(block) < BLOCK else "damaged")

    def _note(self, position: int, why: str) -> None:
        self.cut_at, self.why = position, why

    def _check_tail(self, position: int) -> None:
        """After the end mark there must be nothing; archives that were only joined have their second half there."""
        if position == 0:
            raise NotATar("nothing but zeros, or an empty archive")
        tail = self._read_at(position, min(self._size - position, _TAIL))
        if tail.count(0) != len(tail):
            self._note(position, "has more behind its end mark (joined archives?), which is not read")

    def _after_sparse_map(self, begin: int, block: bytes) -> int:
        """Skip the blocks that GNU tar puts between the header and the data of a sparse file."""
        more = block[482]
        while more and begin + BLOCK <= self._size:
            more = self._read_at(begin, BLOCK)[504]
            begin += BLOCK
        return begin

    def _extend(self, extended: _Extended, kind: bytes, begin: int, size: int) -> None:
        if kind in b"gK":
            return  # defaults for all members and targets of links: of no use here
        if size > _MAX_EXTENDED:
            extended.too_large = True
            return
        data = self._read_at(begin, size)
        if kind == b"L":
            extended.name = _decoded(data)
            return
        for key, value in _records(data):
            if key == b"path":
                extended.name = _decoded(value)
            elif key == b"size" and value.isdigit() and len(value) < 19:
                extended.size = int(value)
            elif key.startswith(b"GNU.sparse"):
                extended.sparse = True


def _member(block: bytes, begin: int, size: int, extended: _Extended, head: bytes) -> Member:
    kind = block[156:157]
    name = extended.name
    if name is None:
        name = _decoded(block[:100])
        if block[257:263] == b"ustar\0" and block[345]:
            name = f"{_decoded(block[345:500])}/{name}"
    what = FILE if kind in _REGULAR else _KINDS.get(kind, "entry of an unknown kind")
    if what == FILE and name.endswith("/"):
        what = FOLDER  # as the oldest archives mark them
    if extended.sparse:
        what = "sparse file"
    if extended.too_large:
        what = "entry with an oversized header"
    return Member(name, what, begin, size, head[:size])


def _sum_fits(block: bytes) -> bool:
    """Compare the checksum of a header; some old writers summed up signed bytes."""
    field = block[148:156]
    digits = field.strip(b" \0")
    if not digits or not digits.isdigit():
        return False
    try:
        wanted = int(digits, 8)
    except ValueError:
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(rest)
    return wanted == unsigned or wanted == unsigned - 256 * sum(byte > 127 for byte in rest)


def _number(field: bytes) -> int:
    """Return a number of a header, -1 if it is none: octal digits, or base 256 for large ones."""
    if field[0] & 0x80:
        return -1 if field[0] & 0x40 else int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    try:
        return int(digits or b"0", 8)
    except ValueError:
        return -1


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the `length key=value` records of a pax header as far as they make sense."""
    position = 0
    while position < len(data):
        digits, space, _ = data[position : position + 20].partition(b" ")
        if not space or not digits.isdigit():
            return
        end = position + int(digits)
        key, equals, value = data[position + len(digits) + 1 : end].partition(b"=")
        if not equals or end > len(data) or not value.endswith(b"\n"):
            return
        yield key, value[:-1]
        position = end


def _decoded(data: bytes) -> str:
    return data.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _what_it_is(block: bytes) -> str:
    for magic, name in _COMPRESSED.items():
        if block.startswith(magic):
            return f"is compressed with {name}; unpack it once, parts of it cannot be read otherwise"
    if block.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is no tar file (looks like HTML); download it again"
    if block.startswith(b"version https://git-lfs"):
        return "is a Git-LFS pointer; run git lfs pull"
    return "is no tar file"
