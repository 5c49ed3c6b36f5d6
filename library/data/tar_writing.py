"""Tar shards made of folders: which pictures go into which file, and files that are the same bits every time."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from library import files
from library.data.dataset_file import parse_json
from library.data.images import BadImage, image_header
from library.data.storage import MAX_MEMBER_BYTES, MAX_TEXT_BYTES, forget_open, reader_of
from library.data.tar_headers import BLOCK, NotATar, TarWalk
from library.errors import UserError
from library.text_files import read_text

CAPTION_SUFFIXES = (".txt", ".caption")
_RECORD = 20 * BLOCK
"""What GNU tar fills files up to."""


@dataclass(frozen=True, slots=True)
class PackedFile:
    """One member to be: its name, and the file that it is made of."""

    name: str
    source: str
    size: int
    mtime_ns: int

    @property
    def stored(self) -> int:
        """Bytes that it takes in a tar file, about: header and padding included."""
        return BLOCK + self.size + -self.size % BLOCK


@dataclass(frozen=True, slots=True)
class PackedSample:
    """A picture and what belongs to it: `files` sorted by name; `key` is what their names begin with."""

    key: str
    picture: str
    files: tuple[PackedFile, ...]

    @property
    def stored(self) -> int:
        """Bytes that it takes in a tar file."""
        return sum(file.stored for file in self.files)

    @property
    def has_caption(self) -> bool:
        """Whether there is a text among the files."""
        return any(file.name.endswith(".txt") for file in self.files)


@dataclass(frozen=True, slots=True)
class SampleLook:
    """Finds what belongs to a picture, and whether it can be used; runs in loader processes.

    Attributes:
        root: folder that names in the tar file begin below.
        captions: suffixes of caption files; the first that exists counts.
    """

    root: str
    captions: tuple[str, ...] = CAPTION_SUFFIXES

    def __call__(self, path: Path) -> PackedSample:
        """Return the files of one sample.

        Raises:
            UserError: the picture, its caption or its JSON file cannot be used.
        """
        image_header(path)
        # A dot would end the name of the sample where the format looks for its fields.
        relative = path.relative_to(self.root).with_suffix("").as_posix()
        folder, _, base = relative.rpartition("/")
        name = f"{folder}/{base.replace('.', '_')}" if folder else base.replace(".", "_")
        found = [_packed(f"{name}{path.suffix.lower()}", path, MAX_MEMBER_BYTES)]
        caption = next((file for suffix in self.captions if (file := path.with_suffix(suffix)).is_file()), None)
        if caption is not None:
            _text_of(caption)
            found.append(_packed(f"{name}.txt", caption, MAX_TEXT_BYTES))
        facts = path.with_suffix(".json")
        if facts.is_file():
            _text_of(facts, json=True)
            found.append(_packed(f"{name}.json", facts, MAX_TEXT_BYTES))
        return PackedSample(name, str(path), tuple(sorted(found, key=lambda file: file.name)))


def _text_of(path: Path, *, json: bool = False) -> None:
    """Make sure that a text can be read; what is wrong is a matter of the picture, so the file is named with it."""
    try:
        text = read_text(path)
        if json and not isinstance(parse_json(text, str(path)), dict):
            raise UserError("is no JSON object")
    except UserError as error:
        problem = error.problems[0]
        raise UserError(f"{path.name}: {problem.what}", problem.hint) from error


def _packed(name: str, path: Path, limit: int) -> PackedFile:
    info = path.stat()
    if info.st_size > limit:
        what = f"has {files.format_bytes(info.st_size)}, the limit is {files.format_bytes(limit)}"
        raise BadImage(path, what)
    return PackedFile(name, str(path), info.st_size, info.st_mtime_ns)


def same_names(samples: Iterable[PackedSample]) -> dict[str, str]:
    """Return picture -> earlier picture for those whose samples would have the same name."""
    first: dict[str, str] = {}
    clashes = {}
    for sample in samples:
        if first.setdefault(sample.key, sample.picture) != sample.picture:
            clashes[sample.picture] = first[sample.key]
    return clashes


def plan_shards(
    samples: Sequence[PackedSample], *, most_samples: int | None = None, most_bytes: int | None = None
) -> list[list[PackedSample]]:
    """Share out samples, in order: each shard takes as many as the limits allow, and at least one."""
    shards: list[list[PackedSample]] = []
    room = 0
    for sample in samples:
        full = most_samples is not None and bool(shards) and len(shards[-1]) >= most_samples
        if not shards or full or (most_bytes is not None and sample.stored > room):
            shards.append([])
            room = 0 if most_bytes is None else most_bytes - 2 * BLOCK
        shards[-1].append(sample)
        room -= sample.stored
    return shards


def write_shard(path: Path, samples: Iterable[PackedSample]) -> None:
    """Write a tar file that depends on names and contents alone (no times, no owners), and look at what it holds.

    Raises:
        UserError: a file changed since it was looked at.
        CannotSave: the tar file could not be written, or does not hold what was written.
    """
    samples = list(samples)
    files.write_bytes(path, _pieces(samples))
    if not holds(path, samples):
        raise files.CannotSave(f"{path} does not hold what was written into it. Is the disk all right?", path)


def _pieces(samples: Iterable[PackedSample]) -> Iterator[bytes]:
    written = 0
    for sample in samples:
        for file in sample.files:
            try:
                data = Path(file.source).read_bytes()
            except OSError as error:
                raise UserError(error.strerror or str(error), where=file.source) from error
            if len(data) != file.size:
                raise UserError("changed while it was packed", "Run the tool again.", where=file.source)
            info = tarfile.TarInfo(file.name)
            info.size = file.size
            info.mode = 0o644
            header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
            padding = bytes(-len(data) % BLOCK)
            written += len(header) + len(data) + len(padding)
            yield header
            yield data
            yield padding
    end = 2 * BLOCK
    yield bytes(end + -(written + end) % _RECORD)


def is_written(path: Path, samples: Iterable[PackedSample]) -> bool:
    """Tell whether a tar file holds exactly these samples, and is not older than any of their files."""
    samples = list(samples)
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return False
    newer = any(file.mtime_ns > changed for sample in samples for file in sample.files)
    return not newer and holds(path, samples)


def holds(path: Path, samples: Iterable[PackedSample]) -> bool:
    """Tell whether a tar file holds exactly these samples, by names and sizes, and is whole."""
    wanted = [file for sample in samples for file in sample.files]
    forget_open(str(path))
    try:
        walk = TarWalk(reader_of(str(path)), path.stat().st_size)
        members = [(member.name, member.size) for member in walk]
    except (OSError, NotATar):
        return False
    return walk.cut_at is None and members == [(file.name, file.size) for file in wanted]


def shard_name(prefix: str, number: int, count: int) -> str:
    """Return the name of a shard: numbers of equal length, four digits at least."""
    return f"{prefix}-{number:0{max(4, len(str(count - 1)))}d}.tar"


def left_over(folder: Path, prefix: str, names: Iterable[str]) -> list[str]:
    """Return shards of an earlier, longer run that lie beside those of this one."""
    kept = set(names)
    if not folder.is_dir():
        return []
    found = (name for name in os.listdir(folder) if name.startswith(f"{prefix}-") and name.endswith(".tar"))  # noqa: PTH208
    return sorted(name for name in found if name not in kept and name[len(prefix) + 1 : -4].isdigit())
