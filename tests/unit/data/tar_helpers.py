"""Small tar shards for tests, with any member that Python's tarfile can write."""

from __future__ import annotations

import io
import json
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image


@cache
def picture(number: int = 0, *, size: tuple[int, int] = (24, 16), kind: str = "JPEG") -> bytes:
    """Return an encoded picture whose content depends on `number`."""
    image = Image.new("RGB", size, ((37 * number) % 256, (91 * number) % 256, 128))
    image.putpixel((number % size[0], number % size[1]), (255, 255, 255))
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=95)
    return buffer.getvalue()


def sample_files(number: int, *, folder: str = "set/", **facts: Any) -> dict[str, bytes]:
    """Return the members of one ordinary sample."""
    stem = f"{folder}{number:04d}"
    return {
        f"{stem}.jpg": picture(number),
        f"{stem}.json": json.dumps({"score": number, **facts}).encode(),
        f"{stem}.txt": f"caption {number}".encode(),
    }


def write_tar(path: Path, members: dict[str, bytes], *, format: int = tarfile.GNU_FORMAT, extra: Any = ()) -> Path:
    """Write regular members, then `extra` TarInfo objects (or pairs of TarInfo and data)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for item in extra:
            info, data = item if isinstance(item, tuple) else (item, b"")
            tar.addfile(info, io.BytesIO(data))
    return path


def make_shard(path: Path, count: int = 5, start: int = 0) -> Path:
    """Write a tar file of ordinary samples."""
    members: dict[str, bytes] = {}
    for number in range(start, start + count):
        members.update(sample_files(number))
    return write_tar(path, members)
