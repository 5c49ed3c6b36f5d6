"""From the members of a tar file to samples: which are used, which are passed over, and what is said about these."""

from __future__ import annotations

import posixpath
from collections import Counter
from dataclasses import dataclass, field

from library.data.bad_files import printable
from library.data.caption_files import BadCaption, decode_caption
from library.data.image_headers import Header, ReadAt, parse_header
from library.data.images import BadImage, image_header
from library.data.storage import MAX_MEMBER_BYTES, MAX_TEXT_BYTES, Locator
from library.data.tar_headers import FILE, FOLDER, Member, TarWalk
from library.new_file import format_bytes

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "avif", "jxl", "tif", "tiff", "gif")
"""In the order of preference, where a sample has several pictures of its own name."""
TEXT_SUFFIXES = ("txt", "caption", "json", "tags")
PICKLED = ("pyd", "pkl", "pickle", "pth", "pt", "ckpt", "bin", "npy", "npz", "joblib", "dill")
_MOST_NOTES = 1000


@dataclass(frozen=True, slots=True)
class UsedMember:
    """A member that belongs to a sample: a picture with its header, or a text."""

    name: str
    offset: int
    size: int
    header: Header = (0, 0, 0)
    text: str = ""


@dataclass(slots=True)
class Found:
    """Samples by key, each with its members by field; and what was passed over: `kinds` has the kind of each note."""

    samples: dict[str, dict[str, UsedMember]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, text: str) -> None:
        """Count an entry that is passed over, and keep the text about it while there are few."""
        self.skipped[kind] += 1
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(text)
            self.kinds.append(kind)


def collect(shard: str, read_at: ReadAt, size: int) -> Found:
    """Walk through a tar file.

    Args:
        shard: path or address, for messages and pictures of rare formats.
        read_at: reads parts of it.
        size: in bytes.

    Raises:
        NotATar: it is something else.
        OSError: it cannot be read.
    """
    found = Found()
    walk = TarWalk(read_at, size)
    last = ""
    for member in walk:
        place = place_of(member, found)
        if place is None:
            continue
        last, name_field = place
        sample = found.samples.setdefault(last, {})
        if name_field in sample:
            found.note("duplicate", f"{printable(member.name)}: a second member of this name is passed over")
            continue
        used = used_member(shard, member, name_field.rpartition(".")[2], read_at, found)
        if used is not None:
            sample[name_field] = used
    if walk.cut_at is not None:
        _leave_out_cut(found, walk, last)
    found.samples = {key: sample for key, sample in found.samples.items() if sample}
    return found


def _leave_out_cut(found: Found, walk: TarWalk, last: str) -> None:
    """Say that a file is damaged, and drop the sample that is incomplete, or the last one where it may be."""
    if walk.why in ("cut off", "damaged"):
        place = None if walk.cut_member is None else place_of(walk.cut_member, Found())
        found.samples.pop(last if place is None else place[0], None)
    kept = sum(bool(sample) for sample in found.samples.values())
    text = f"{walk.why} at byte {walk.cut_at}, {kept} samples used"
    found.skipped["damage"] += 1
    found.notes.insert(0, text)
    found.kinds.insert(0, "damage")


def place_of(member: Member, found: Found) -> tuple[str, str] | None:
    """Return the key of the sample and the field that a member belongs to, None when it is passed over (and noted)."""
    name = member.name
    if member.kind == FOLDER:
        return None
    while name.startswith("./"):
        name = name[2:]
    if member.kind != FILE:
        found.note(member.kind, f"{printable(member.name)}: a {member.kind} is passed over")
        return None
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":":
        found.note("unsafe name", f"{printable(member.name)}: a name that leads outside is passed over")
        return None
    folder, base = posixpath.split(name)
    stem, dot, fields = base.partition(".")
    if not stem or (stem.startswith("__") and stem.endswith("__")):
        found.skipped["hidden file"] += 1
        return None
    suffix = fields.rpartition(".")[2].lower()
    if suffix in PICKLED:
        found.note("pickled data", f"{printable(name)}: may run code when it is opened, and is never opened")
        return None
    if not dot or suffix not in (*PICTURE_SUFFIXES, *TEXT_SUFFIXES):
        found.skipped[f"other file (.{suffix})" if dot else "other file"] += 1
        return None
    return posixpath.join(folder, stem), fields.lower()


def used_member(shard: str, member: Member, suffix: str, read_at: ReadAt, found: Found) -> UsedMember | None:
    """Return a member with its text or header; None when it cannot be used (and is noted).

    Raises:
        OSError: the tar file cannot be read.
    """
    picture = suffix in PICTURE_SUFFIXES
    limit = MAX_MEMBER_BYTES if picture else MAX_TEXT_BYTES
    name = member.name.removeprefix("./")
    if member.size > limit:
        amount = f"{format_bytes(member.size)}, the limit is {format_bytes(limit)}"
        found.note("too large", f"{printable(name)}: has {amount}")
        return None
    if not picture:
        return _text(member, name, read_at, found)
    if not member.size:
        found.note("bad picture", f"{printable(name)}: empty file")
        return None
    return _picture(shard, member, name, read_at, found)


def _text(member: Member, name: str, read_at: ReadAt, found: Found) -> UsedMember | None:
    whole = len(member.head) == member.size
    data = member.head if whole else read_at(member.offset, member.size)
    try:
        text = decode_caption(data, "utf-8")
    except BadCaption as error:
        found.note("bad text", f"{printable(name)}: {error.reason}")
        return None
    return UsedMember(name, member.offset, member.size, text=text.replace("\0", ""))


def _picture(shard: str, member: Member, name: str, read_at: ReadAt, found: Found) -> UsedMember:
    """Look at the header; a bad picture stays in its sample, so that the sample is reported and not just shorter."""

    def inside(offset: int, length: int) -> bytes:
        return read_at(member.offset + offset, max(0, min(length, member.size - offset)))

    header = parse_header(member.head, inside)
    if header is None:
        try:
            header = image_header(str(Locator(shard, name, member.offset, member.size)))
        except BadImage as error:
            found.note("bad picture", f"{printable(name)}: {error.reason}")
            header = (0, 0, 0)
    return UsedMember(name, member.offset, member.size, header)
