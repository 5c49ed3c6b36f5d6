"""Header parsing agrees with Pillow on size and orientation, and never takes damaged bytes for an image."""

import io
import random
import struct

import pytest
from PIL import Image
from scan_helpers import image_bytes

from library.data.image_headers import HEAD_BYTES, BadHeader, ask_pillow, parse_header


def parse(data):
    return parse_header(data[:HEAD_BYTES], lambda offset, length: data[offset : offset + length])


def exif(orientation, big_endian=False, padding=0):
    data = Image.Exif()
    data[0x0112] = orientation
    if padding:
        data[0x010E] = "x" * padding
    data.endian = ">" if big_endian else "<"
    return data.tobytes()


def by_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        orientation = Image.Image.getexif(image).get(0x0112, 1)
        return *image.size, orientation if 1 <= orientation <= 8 else 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(64, 48), (1, 1), (301, 5)])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8, 9])
def test_agrees_with_pillow(kind, size, orientation):
    save = {} if orientation is None else {"exif": exif(orientation, big_endian=orientation == 8)}
    data = image_bytes(size, kind, **save)
    assert parse(data) == by_pillow(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_header_longer_than_the_first_read(kind):
    data = image_bytes((70, 50), kind, exif=exif(6, padding=30_000), icc_profile=bytes(range(256)) * 200)
    assert parse(data) == (70, 50, 6) == by_pillow(data)


@pytest.mark.parametrize(
    ("kind", "save"),
    [
        ("JPEG", {"progressive": True}),
        ("JPEG", {"comment": b"\xff\xd8 " * 50}),
        ("JPEG", {"xmp": b'<rdf tiff:Orientation="5"/>'}),
        ("PNG", {"optimize": True}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"quality": 5}),
    ],
)
def test_variants(kind, save):
    data = image_bytes((123, 77), kind, **save)
    assert parse(data) == by_pillow(data)


def test_animated_webp_has_its_true_size():
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (64, 96), (i * 40, 0, 0)) for i in range(3)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    assert parse(buffer.getvalue()) == (64, 96, 1)


@pytest.mark.parametrize(
    "save",
    [
        {"pnginfo": True},
        {"format": "GIF"},
        {"format": "BMP"},
        {"format": "TIFF"},
    ],
)
def test_oddities_go_to_pillow(tmp_path, save):
    if "pnginfo" in save:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
        data = image_bytes((30, 20), "PNG", pnginfo=info)
    else:
        data = image_bytes((30, 20), save["format"])
    assert parse(data) is None
    (tmp_path / "x.png").write_bytes(data)
    assert ask_pillow(str(tmp_path / "x.png"), 10**6) == by_pillow(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_cut_and_flipped_headers_never_crash(kind):
    data = image_bytes((64, 48), kind, exif=exif(6))
    rng = random.Random(5)
    for length in range(0, min(len(data), 300)):
        assert parse(data[:length]) in (None, (64, 48, 6), (64, 48, 1))
    for _ in range(500):
        broken = bytearray(data)
        broken[rng.randrange(min(len(data), 200))] ^= 1 << rng.randrange(8)
        found = parse(bytes(broken))
        assert found is None or (found[0] > 0 and found[1] > 0 and 1 <= found[2] <= 8)


def test_pillow_names_what_a_file_is(tmp_path):
    path = tmp_path / "a.png"
    for content, words in [
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git-LFS"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (image_bytes()[:20], "Truncated"),
    ]:
        path.write_bytes(content)
        with pytest.raises(BadHeader, match=words):
            ask_pillow(str(path), 10**6)


def test_a_tiny_file_that_claims_to_be_huge():
    ihdr = struct.pack(">II", 60_000, 60_000) + b"\x08\x02\0\0\0"
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + ihdr + b"\0" * 4 + b"\0\0\0\0IDAT"
    assert parse(data) == (60_000, 60_000, 1)
