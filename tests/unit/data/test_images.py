import io
import os
import random
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from library.contracts import Placement
from library.data.augment import (
    Augmentation,
    View,
    apply_view,
    choose_view,
    face_in_name,
    mask_of,
    normalise,
    resize,
)
from library.data.images import BadImage, check_decodable, image_header, image_size, load_image


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return path


# Decoding


def test_rgb_and_its_alpha(tmp_path):
    pixels = noise(5, 7, 4)
    path = saved(tmp_path / "a.png", Image.fromarray(pixels))
    assert np.array_equal(load_image(path), pixels[:, :, :3]), "hidden colours of transparent pixels stay"
    assert np.array_equal(load_image(path, alpha=True), pixels)
    opaque = saved(tmp_path / "b.png", Image.fromarray(pixels[:, :, :3]))
    assert load_image(opaque, alpha=True).shape == (5, 7, 3)


@pytest.mark.parametrize("byte_order", ["<u2", ">u2"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, byte_order):
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    suffix = "png" if byte_order == "<u2" else "tif"
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(values.astype(byte_order)))
    assert load_image(path)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert load_image(path).shape == (1, 4, 3)


def test_32_bit_and_float_greys(tmp_path):
    path = saved(tmp_path / "i.tif", Image.fromarray(np.array([[0, 65535, 70000, -5]], np.int32)))
    assert load_image(path)[0, :, 1].tolist() == [0, 255, 255, 0]
    path = saved(tmp_path / "f.tif", Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)))
    assert load_image(path)[0, :, 2].tolist() == [0, 128, 255]
    path = saved(tmp_path / "g.tif", Image.fromarray(np.array([[0.0, 100.0, 300.0]], np.float32)))
    assert load_image(path)[0, :, 0].tolist() == [0, 100, 255]
    path = saved(tmp_path / "n.tif", Image.fromarray(np.array([[0.0, np.nan]], np.float32)))
    with pytest.raises(BadImage, match="NaN"):
        load_image(path)


def test_palette_bilevel_grey_and_cmyk(tmp_path):
    rgb = Image.fromarray(noise(6, 6))
    palette = rgb.quantize(8)
    assert np.array_equal(load_image(saved(tmp_path / "p.png", palette)), np.asarray(palette.convert("RGB")))
    palette.info["transparency"] = bytes([0, 255, 255, 255, 255, 255, 255, 255])
    path = saved(tmp_path / "pt.png", palette, transparency=palette.info["transparency"])
    assert set(load_image(path, alpha=True)[:, :, 3].ravel().tolist()) == {0, 255}
    assert load_image(path).shape == (6, 6, 3)
    grey = Image.fromarray(noise(4, 4, 1))
    assert np.array_equal(load_image(saved(tmp_path / "l.png", grey))[:, :, 2], np.asarray(grey))
    bilevel = grey.convert("1")
    assert set(load_image(saved(tmp_path / "1.png", bilevel)).ravel().tolist()) <= {0, 255}
    with_alpha = Image.merge("LA", (grey, grey))
    assert np.array_equal(load_image(saved(tmp_path / "la.png", with_alpha), alpha=True)[:, :, 3], np.asarray(grey))
    cmyk = rgb.convert("CMYK")
    path = saved(tmp_path / "c.tif", cmyk)
    assert np.array_equal(load_image(path), np.asarray(cmyk.convert("RGB")))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (9, 5), color) for color in ("red", "blue")]
    path = saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], lossless=True)
    pixels = load_image(path, size_wh=(9, 5))
    assert pixels.shape == (5, 9, 3) and pixels[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_exif_orientation(tmp_path, orientation, suffix):
    image = Image.fromarray(noise(6, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"a.{suffix}", image, exif=exif, lossless=True)
    with Image.open(path) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
        plain = np.asarray(stored.convert("RGB"))
    assert np.array_equal(load_image(path), upright)
    assert np.array_equal(load_image(path, orientation=1), plain)
    assert image_size(path) == (upright.shape[1], upright.shape[0])
    assert image_header(path) == (4, 6, orientation)
    assert check_decodable(path, image_size(path)) is None


def test_content_decides_not_the_name(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(noise(8, 8)).save(path, format="JPEG")
    assert load_image(path).shape == (8, 8, 3)


# Bad files


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html></html>", "looks like HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"hello", "looks like text"),
        (b"\x00\x01\x02\x03" * 20, "not an image"),
    ],
)
def test_impostors_are_named(tmp_path, content, reason):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(BadImage) as caught:
        load_image(path)
    assert reason in caught.value.reason and str(path) in str(caught.value)
    assert reason in str(check_decodable(path, (1, 1)))


def test_only_regular_files_are_opened(tmp_path):
    with pytest.raises(BadImage, match="regular"):
        load_image(tmp_path)
    with pytest.raises(BadImage, match="No such file"):
        load_image(tmp_path / "missing.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo.png")
        with pytest.raises(BadImage, match="regular"):
            load_image(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with pytest.raises(BadImage):
        load_image(tmp_path / "loop.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif", "avif"])
def test_truncated_files_fail_cleanly(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    try:
        Image.fromarray(noise(40, 40)).save(path)
    except (KeyError, OSError, ValueError):
        pytest.skip(f"this Pillow writes no {suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    reason = check_decodable(path, (40, 40))
    assert reason is not None and "\n" not in reason


def png_claiming(width, height, rows):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + b"\0" * width for _ in range(rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_before_anything_is_allocated(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_claiming(60000, 60000, 1))
    with pytest.raises(BadImage, match=r"3\.6 Gpx, limit 179 Mpx \(--max_image_pixels\)"):
        load_image(path)
    path.write_bytes(png_claiming(100, 100, 100))
    with pytest.raises(BadImage, match="limit"):
        load_image(path, max_pixels=9_999)
    assert load_image(path, max_pixels=10_000).shape == (100, 100, 3)


def test_a_webp_bomb_is_refused_by_its_header(tmp_path):
    path = tmp_path / "a.webp"
    canvas = (16383 - 1).to_bytes(3, "little") * 2
    path.write_bytes(
        b"RIFF" + (22).to_bytes(4, "little") + b"WEBPVP8X" + (10).to_bytes(4, "little") + bytes(4) + canvas
    )
    with pytest.raises(BadImage, match="268 Mpx"):
        load_image(path)


def test_size_must_be_the_one_that_was_scanned(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(noise(10, 20)))
    assert check_decodable(path, (20, 10)) is None
    assert "is 20x10, was 20x12" in str(check_decodable(path, (20, 12)))


def test_huge_jpegs_are_decoded_reduced(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(noise(640, 320)))
    assert load_image(path, enough_wh=(40, 80), reduce_above=1000).shape == (160, 80, 3)
    assert load_image(path, enough_wh=(40, 80)).shape == (640, 320, 3)
    assert load_image(path).shape == (640, 320, 3)
    assert load_image(path, size_wh=(320, 640), enough_wh=(300, 600), reduce_above=1000).shape == (640, 320, 3)


@given(st.integers(0, 5), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_damaged_files_raise_nothing_else(tmp_path_factory, kind, changes):
    suffix = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")[kind]
    buffer = io.BytesIO()
    Image.fromarray(noise(12, 12)).save(buffer, format=suffix)
    data = bytearray(buffer.getvalue())
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    path = tmp_path_factory.mktemp("fuzz") / "a.png"
    path.write_bytes(data)
    reason = check_decodable(path, (12, 12), max_pixels=1_000_000)
    assert reason is None or isinstance(reason, str)


# Resizing and cropping


@pytest.mark.parametrize(
    ("target", "expected"),
    [((10, 8), "area"), ((20, 8), "area"), ((40, 8), "lanczos"), ((40, 64), "lanczos"), ((20, 33), "lanczos")],
)
def test_default_filter(target, expected):
    pixels = noise(32, 20)
    if expected == "area":
        wanted = cv2.resize(pixels, target, interpolation=cv2.INTER_AREA)
    else:
        wanted = np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.LANCZOS))
    assert np.array_equal(resize(pixels, target), wanted)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("area", lambda p, s: cv2.resize(p, s, interpolation=cv2.INTER_AREA)),
        ("linear", lambda p, s: cv2.resize(p, s, interpolation=cv2.INTER_LINEAR)),
        ("bilinear", lambda p, s: cv2.resize(p, s, interpolation=cv2.INTER_LINEAR)),
        ("cubic", lambda p, s: cv2.resize(p, s, interpolation=cv2.INTER_CUBIC)),
        ("bicubic", lambda p, s: cv2.resize(p, s, interpolation=cv2.INTER_CUBIC)),
        ("nearest", lambda p, s: cv2.resize(p, s, interpolation=cv2.INTER_NEAREST_EXACT)),
        ("lanczos", lambda p, s: np.asarray(Image.fromarray(p).resize(s, Image.Resampling.LANCZOS))),
        ("lanczos4", lambda p, s: np.asarray(Image.fromarray(p).resize(s, Image.Resampling.LANCZOS))),
        ("box", lambda p, s: np.asarray(Image.fromarray(p).resize(s, Image.Resampling.BOX))),
    ],
)
@pytest.mark.parametrize("target", [(10, 8), (50, 70)])
def test_named_filters(name, wanted, target):
    pixels = noise(32, 20)
    assert np.array_equal(resize(pixels, target, name), wanted(pixels, target))


def test_equal_size_is_left_alone():
    pixels = noise(3, 4)
    assert resize(pixels, (4, 3), "cubic") is pixels


def test_view_crops_flips_and_keeps_alpha():
    pixels = noise(12, 16, 4)
    view = View(Placement((8, 8), (16, 12), (4, 2)), flipped=True)
    assert np.array_equal(apply_view(pixels, view, None), pixels[2:10, 4:12][:, ::-1])


def test_mask_has_the_geometry_of_the_image():
    ramp = np.tile(np.linspace(0, 255, 1920).astype(np.uint8)[None, :, None], (1080, 1, 4))
    view = View(Placement((640, 384), (683, 384), (21, 0)))
    image = apply_view(ramp[:, :, :3], view, None)
    mask = apply_view(np.ascontiguousarray(ramp[:, :, 3:].repeat(3, 2)), view, None)
    assert np.array_equal(image, mask)
    assert image[0, 0, 0] == 7 and image[0, -1, 0] in (246, 247)


def test_normalise_is_the_usual_formula():
    pixels = np.arange(256, dtype=np.uint8).reshape(8, 32, 1).repeat(3, 2)
    values = normalise(pixels)
    assert values.shape == (3, 8, 32) and values.dtype == np.float32 and values.flags.c_contiguous
    expected = (np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    assert np.array_equal(values[1].ravel(), expected)
    assert values.min() == -1 and values.max() == 1
    assert mask_of(np.array([[0, 51, 255]], np.uint8)).tolist() == [[0.0, pytest.approx(0.2), 1.0]]


def test_random_crop_covers_the_excess_evenly():
    placement = Placement((8, 8), (12, 8), (2, 0))
    crops = [
        choose_view(placement, Augmentation(random_crop=True), flipped=False, rng=random.Random(i)).placement.crop_xy
        for i in range(500)
    ]
    assert {y for _, y in crops} == {0}
    assert {x for x, _ in crops} == {0, 1, 2, 3, 4}
    assert min(sum(x == value for x, _ in crops) for value in range(5)) > 60


def test_color_changes_a_third_of_the_visits_and_not_the_alpha():
    placement = Placement((4, 4), (4, 4), (0, 0))
    pixels = np.full((4, 4, 4), 200, np.uint8)
    pixels[:, :, 2] = 90
    changed = 0
    values = set()
    for i in range(600):
        view = choose_view(placement, Augmentation(color=True), flipped=False, rng=random.Random(i))
        result = apply_view(pixels, view, None)
        assert (result[:, :, 3] == 200).all()
        changed += not np.array_equal(result, pixels)
        values.add(int(result[0, 0, 0]))
    assert 150 < changed < 250
    assert min(values) < 165 and max(values) == 255, "the power works on 0..255: 200 becomes about 153 to 255"


def test_no_generator_means_nothing_random():
    placement = Placement((8, 8), (12, 8), (2, 0))
    wild = Augmentation(random_crop=True, color=True, face_range=(1.0, 2.0))
    view = choose_view(placement, wild, flipped=False, rng=None, name="x_1_2_3_4.png")
    assert view == View(placement)


# Faces


@pytest.mark.parametrize(
    ("name", "face"),
    [
        ("a_b_0100_0200_0030_0040.png", (100, 200, 30, 40)),
        ("a_100_200_30_40.png", (100, 200, 30, 40)),
        ("100_200_30_40.png", None),
        ("a_b_x_200_30_40.png", None),
        ("a_b_1_2_0_0.png", None),
        ("a.png", None),
    ],
)
def test_faces_in_names(name, face):
    assert face_in_name(name) == face


def test_face_crop_is_centred_on_the_face():
    view = choose_view(
        Placement((64, 64), (96, 64), (16, 0)),
        Augmentation(face_range=(2.0, 2.0)),
        flipped=False,
        rng=random.Random(0),
        name="a_b_300_150_64_64.png",
        size_wh=(600, 400),
    )
    # The face is 64 wide and shall fill half of 64: scale 0.5.
    assert view.placement == Placement((64, 64), (300, 200), (150 - 32, 75 - 32))


@given(
    st.integers(16, 300), st.integers(16, 300), st.integers(0, 300), st.integers(0, 300), st.integers(1, 200),
    st.booleans(), st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_face_crops_stay_inside(width, height, x, y, face, random_crop, seed):
    cover = max(32 / width, 48 / height)
    resized = (max(32, int(width * cover + 0.5)), max(48, int(height * cover + 0.5)))
    view = choose_view(
        Placement((32, 48), resized, (0, 0)),
        Augmentation(face_range=(1.0, 3.0), random_crop=random_crop),
        flipped=False,
        rng=random.Random(seed),
        name=f"a_b_{x}_{y}_{face}_{face}.png",
        size_wh=(width, height),
    )
    placement = view.placement
    assert placement.bucket_wh == (32, 48)
    for axis in range(2):
        assert 0 <= placement.crop_xy[axis] <= placement.resized_wh[axis] - placement.bucket_wh[axis]
