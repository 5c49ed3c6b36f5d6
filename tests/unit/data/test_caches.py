import json
import random
import struct
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.contracts import ImageRecord, Placement
from library.data import caches
from library.data.cache_files import Verdict, setting_aside
from library.data.cache_names import LEGACY, CacheRules, LatentNeed, cache_path, mirror_root
from library.data.caches import BrokenCache, check_file, find_valid, read_latents, write_latents
from library.data.npz import BrokenNpz, NpzFile, pack_npz
from library.errors import UserError

RULES = CacheRules(suffix="_sd", family="sd1")
VAE = "vae-1"


def make_need(
    folder, *, size_wh=(640, 480), bucket_wh=(64, 48), flip=False, mask=False, content=b"image", name="a.png"
):
    path = folder / name
    if not path.exists():
        path.write_bytes(content)
    info = path.stat()
    record = ImageRecord(0, str(path), name, size_wh, "", 1, 0, 0, file_size=info.st_size, mtime_ns=info.st_mtime_ns)
    shape = (4, bucket_wh[1] // 8, bucket_wh[0] // 8)
    return LatentNeed(record, Placement(bucket_wh, bucket_wh, (0, 0)), shape, flip=flip, mask=mask)


def latents_for(need, seed=0):
    return np.random.default_rng(seed).standard_normal(need.shape).astype(np.float32)


def write(need, *, rules=RULES, vae=VAE, seed=0):
    arrays = {"latents": latents_for(need, seed)}
    if need.flip:
        arrays["latents_flipped"] = latents_for(need, seed + 1)
    if need.mask:
        arrays["alpha_mask"] = np.random.default_rng(seed).integers(0, 2, need.mask_shape).astype(np.float32)
    path = cache_path(need.record, rules)
    write_latents(path, need, rules, vae, arrays)
    return path, arrays


def reason(need, rules=RULES, vae=VAE):
    return find_valid(need, rules, vae)[1].reason


# Names


def test_names_are_those_of_the_reference(tmp_path):
    need = make_need(tmp_path, size_wh=(900, 300))
    assert cache_path(need.record, RULES) == str(tmp_path / "a_0900x0300_sd.npz")
    assert cache_path(need.record, RULES, "_sdxl") == str(tmp_path / "a_0900x0300_sdxl.npz")
    assert cache_path(need.record, RULES, LEGACY) == str(tmp_path / "a.npz")


def test_very_long_names_stay_within_the_limit_and_apart(tmp_path):
    records = [
        ImageRecord(0, str(tmp_path / ("x" * 250 + end)), "", (64, 64), "", 1, 0, 0) for end in ("1.png", "2.png")
    ]
    names = {cache_path(record, RULES) for record in records}
    assert len(names) == 2
    for name in names:
        assert len(name.rsplit("/", 1)[-1]) <= 255 and name.endswith("_0064x0064_sd.npz")


def test_cache_dir_mirrors_folders(tmp_path):
    root = mirror_root([str(tmp_path / "data/10_cat"), str(tmp_path / "data/1_dog")])
    rules = replace(RULES, folder=str(tmp_path / "cache"), root=root)
    record = ImageRecord(0, str(tmp_path / "data/10_cat/a.png"), "", (64, 64), "", 1, 0, 0)
    assert cache_path(record, rules) == str(tmp_path / "cache/10_cat/a_0064x0064_sd.npz")
    elsewhere = replace(record, path="/elsewhere/a.png")
    assert cache_path(elsewhere, rules) == str(tmp_path / "cache/elsewhere/a_0064x0064_sd.npz")


# Round trip


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_round_trip(tmp_path, flip, mask):
    need = make_need(tmp_path, flip=flip, mask=mask)
    assert reason(need) == caches.MISSING
    path, arrays = write(need)
    assert find_valid(need, RULES, VAE) == ("_sd", Verdict())
    found = read_latents(path, need.shape, mask_shape=need.mask_shape if mask else None)
    assert np.array_equal(found.latents, arrays["latents"]) and found.latents.dtype == np.float32
    assert (found.mask is None) == (not mask)
    if mask:
        assert np.array_equal(found.mask, arrays["alpha_mask"])
    if flip:
        mirrored = read_latents(path, need.shape, flipped=True, mask_shape=need.mask_shape if mask else None)
        assert np.array_equal(mirrored.latents, arrays["latents_flipped"])
        if mask:
            assert np.array_equal(mirrored.mask, arrays["alpha_mask"][:, ::-1])


def test_layout_is_that_of_current_peers(tmp_path):
    need = make_need(tmp_path, flip=True, mask=True)
    path, _ = write(need)
    with np.load(path) as file:
        assert set(file) == {
            "latents_6x8", "latents_flipped_6x8", "alpha_mask_6x8", "original_size_6x8", "crop_ltrb_6x8", "meta_json",
        }  # fmt: skip
        assert file["original_size_6x8"].tolist() == [640, 480] and file["original_size_6x8"].dtype == np.int64
        assert file["crop_ltrb_6x8"].shape == (4,) and file["crop_ltrb_6x8"].dtype == np.float64
        assert file["alpha_mask_6x8"].shape == (48, 64) and file["alpha_mask_6x8"].dtype == np.float32
        meta = json.loads(str(file["meta_json"]))
    assert meta["format"] == 1 and meta["variants"]["6x8"]["vae"] == VAE
    with zipfile.ZipFile(path) as archive:
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def test_equal_content_gives_equal_bytes(tmp_path):
    need = make_need(tmp_path)
    path, _ = write(need)
    first = Path(path).read_bytes()
    write(need)
    assert Path(path).read_bytes() == first


def test_several_sizes_share_a_file(tmp_path):
    small, large = make_need(tmp_path), make_need(tmp_path, bucket_wh=(128, 96))
    path, small_arrays = write(small)
    assert reason(large) == caches.OTHER_RESOLUTION
    _, large_arrays = write(large, seed=5)
    assert reason(small) is None and reason(large) is None
    assert np.array_equal(read_latents(path, small.shape).latents, small_arrays["latents"])
    assert np.array_equal(read_latents(path, large.shape).latents, large_arrays["latents"])


def test_foreign_keys_survive_a_rewrite_but_old_names_of_the_same_size_do_not(tmp_path):
    need = make_need(tmp_path)
    path = cache_path(need.record, RULES)
    np.savez(path, latents=np.zeros(need.shape, np.float32), original_size=np.array([1, 2]), note=np.array([7]))
    write(need)
    with np.load(path) as file:
        assert file["note"].tolist() == [7] and "latents" not in file and "original_size" not in file
    other = make_need(tmp_path, bucket_wh=(128, 96))
    np.savez(path, latents=np.zeros(need.shape, np.float32))
    write(other)
    with np.load(path) as file:
        assert {"latents", "latents_12x16"} <= set(file)


# Files of other programs


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", ["_sd", LEGACY])
def test_peer_files_are_accepted_on_names_and_shapes(tmp_path, suffix, compressed):
    need = make_need(tmp_path, flip=True, mask=True)
    path = cache_path(need.record, RULES, suffix)
    arrays = {"latents": latents_for(need), "latents_flipped": latents_for(need, 1)}
    arrays["alpha_mask"] = np.ones(need.mask_shape, np.float32)
    (np.savez_compressed if compressed else np.savez)(path, **arrays, original_size=np.array([640, 480]))
    assert find_valid(need, RULES, VAE) == (suffix, Verdict(known=False))
    assert np.array_equal(read_latents(path, need.shape, flipped=True).latents, arrays["latents_flipped"])
    assert reason(make_need(tmp_path, bucket_wh=(128, 96))) == caches.OTHER_RESOLUTION


def test_half_precision_caches_are_widened(tmp_path):
    need = make_need(tmp_path)
    path = cache_path(need.record, RULES)
    np.savez(path, latents_6x8=latents_for(need).astype(np.float16))
    assert reason(need) is None
    assert read_latents(path, need.shape).latents.dtype == np.float32


def test_sized_names_come_before_unsized_ones(tmp_path):
    need = make_need(tmp_path)
    path = cache_path(need.record, RULES)
    np.savez(path, latents=np.zeros(need.shape, np.float32), latents_6x8=np.ones(need.shape, np.float32))
    assert read_latents(path, need.shape).latents.min() == 1


def test_files_named_sdxl_need_a_record_of_origin(tmp_path):
    need = make_need(tmp_path)
    path = cache_path(need.record, RULES, "_sdxl")
    np.savez(path, latents=latents_for(need))
    assert reason(need) == caches.OTHER_FAMILY
    write_latents(path, need, RULES, VAE, {"latents": latents_for(need)})
    assert find_valid(need, RULES, VAE) == ("_sdxl", Verdict())
    assert reason(need, vae="other") == caches.OTHER_VAE


# Validity


def test_exactly_the_changed_thing_is_the_reason(tmp_path):
    need = make_need(tmp_path)
    write(need)
    assert reason(need) is None
    assert reason(need, vae="vae-2") == caches.OTHER_VAE
    assert reason(need, vae="") is None
    assert reason(replace(need, flip=True)) == caches.NO_MIRROR
    assert reason(replace(need, mask=True)) == caches.NO_MASK
    assert reason(replace(need, interpolation="cubic")) == caches.OTHER_RESIZE
    moved = replace(need.placement, crop_xy=(1, 0))
    assert reason(replace(need, placement=moved)) == caches.OTHER_RESIZE
    assert reason(replace(need, shape=(16, 6, 8))) == caches.OTHER_RESOLUTION
    record = need.record
    assert reason(replace(need, record=replace(record, file_size=99))) == caches.IMAGE_CHANGED
    assert reason(replace(need, record=replace(record, orientation=3))) == caches.IMAGE_CHANGED
    assert reason(replace(need, record=replace(record, mtime_ns=1))) == caches.IMAGE_CHANGED


def test_masks_and_mirrors_that_nobody_asked_for_do_no_harm(tmp_path):
    need = make_need(tmp_path, flip=True, mask=True)
    path, _ = write(need)
    assert reason(replace(need, flip=False, mask=False)) is None
    assert read_latents(path, need.shape).mask is None


def test_copied_folders(tmp_path):
    need = make_need(tmp_path)
    write(need)
    copied = replace(need, record=replace(need.record, mtime_ns=1))
    assert reason(copied, replace(RULES, trust_mtime=True)) is None
    write(need, rules=replace(RULES, use_hash=True))
    assert reason(copied) is None, "the stored hash proves that the content is the same"
    (tmp_path / "a.png").write_bytes(b"IMAGE")
    assert reason(copied) == caches.IMAGE_CHANGED


def test_caches_serve_when_the_image_is_gone(tmp_path):
    need = make_need(tmp_path)
    write(need)
    (tmp_path / "a.png").unlink()
    assert reason(replace(need, record=replace(need.record, file_size=0, mtime_ns=0))) is None


def test_skipping_the_check_looks_at_existence_only(tmp_path):
    need = make_need(tmp_path)
    rules = replace(RULES, skip_check=True)
    assert reason(need, rules) == caches.MISSING
    (tmp_path / "a_0640x0480_sd.npz").write_bytes(b"anything")
    assert reason(need, rules) is None


def test_values_that_are_not_finite_are_never_written(tmp_path):
    need = make_need(tmp_path)
    bad = latents_for(need)
    bad[0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"a\.png.*--no_half_vae"):
        write_latents(cache_path(need.record, RULES), need, RULES, VAE, {"latents": bad})
    assert list(tmp_path.glob("*.npz")) == [] and len(list(tmp_path.iterdir())) == 1
    np.savez(cache_path(need.record, RULES), latents_6x8=bad)
    with pytest.raises(BrokenCache, match="not finite"):
        read_latents(cache_path(need.record, RULES), need.shape)


# Broken files


@pytest.mark.parametrize("content", [b"", b"PK", b"<html>", b"PK\x03\x04" + b"\0" * 100, b"x" * 70_000])
def test_garbage_is_unreadable(tmp_path, content):
    need = make_need(tmp_path)
    path = cache_path(need.record, RULES)
    Path(path).write_bytes(content)
    assert reason(need) == caches.UNREADABLE
    with pytest.raises(BrokenCache, match="unreadable"):
        read_latents(path, need.shape)
    write(need)
    assert reason(need) is None


def test_every_truncation_is_noticed_at_the_start(tmp_path):
    need = make_need(tmp_path, flip=True)
    path, _ = write(need)
    whole = Path(path).read_bytes()
    for cut in sorted(random.Random(0).sample(range(len(whole)), 64)):
        Path(path).write_bytes(whole[:cut])
        assert reason(need) == caches.UNREADABLE


def test_flipped_bits_never_reach_training(tmp_path):
    need = make_need(tmp_path)
    path, arrays = write(need)
    whole = Path(path).read_bytes()
    rng = random.Random(1)
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        Path(path).write_bytes(data)
        check_file(path, need, RULES, VAE)
        try:
            found = read_latents(path, need.shape)
        except BrokenCache:
            refused += 1
        else:
            assert np.array_equal(found.latents, arrays["latents"])
    assert refused > 50


def test_broken_files_are_set_aside(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"x")
    for reason in (caches.UNREADABLE, caches.MISSING):
        with pytest.raises(BrokenCache, match=reason), setting_aside(str(path)):
            read_latents(str(path), (4, 6, 8))
        assert not path.exists() and (tmp_path / "a.npz.corrupt").exists()


def test_pickled_objects_are_never_loaded(tmp_path):
    need = make_need(tmp_path)
    path = cache_path(need.record, RULES)
    np.savez(path, latents_6x8=np.array([{"a": 1}], dtype=object))
    assert reason(need) == caches.UNREADABLE
    with pytest.raises(BrokenCache):
        read_latents(path, need.shape)


def test_declared_sizes_are_checked_before_reading(tmp_path):
    need = make_need(tmp_path)
    path = cache_path(need.record, RULES)
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (400000, 400000), }".ljust(117) + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("latents_6x8.npy", member)
    assert reason(need) == caches.UNREADABLE
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("latents_6x8.npy", b"\0" * 50_000_000)
    assert reason(need) == caches.UNREADABLE
    with pytest.raises(BrokenCache):
        read_latents(path, need.shape)


def test_a_broken_neighbour_does_not_survive_a_rewrite(tmp_path):
    small, large = make_need(tmp_path), make_need(tmp_path, bucket_wh=(128, 96))
    path, arrays = write(small)
    data = bytearray(Path(path).read_bytes())
    place = data.find(arrays["latents"].tobytes()[:16])
    data[place] ^= 1
    Path(path).write_bytes(data)
    assert reason(small) is None, "the quick check reads no data"
    write(large)
    assert reason(large) is None and reason(small) == caches.OTHER_RESOLUTION


@pytest.mark.parametrize("meta", ["[]", "{", '{"variants": 3}', '{"variants": {"6x8": 1}}', "[" * 5000])
def test_damaged_records_of_origin(tmp_path, meta):
    need = make_need(tmp_path)
    path = cache_path(need.record, RULES)
    np.savez(path, latents_6x8=latents_for(need), meta_json=np.array(meta))
    assert reason(need) == caches.UNREADABLE
    write(need)
    assert reason(need) is None


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    need = make_need(tmp_path)
    path, arrays = write(need)
    monkeypatch.setenv("SD_FAULT", "cache.mid:enospc")
    with pytest.raises(Exception, match="disk full"):
        write(need, seed=9)
    monkeypatch.delenv("SD_FAULT")
    assert np.array_equal(read_latents(path, need.shape).latents, arrays["latents"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.png", "a_0640x0480_sd.npz"]


# The npz reader


@given(st.binary(max_size=400))
@settings(max_examples=100, deadline=None)
def test_reader_raises_nothing_else(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    path.write_bytes(data)
    try:
        with NpzFile(path) as file:
            for name in file.names:
                file.header(name)
                file.read(name, 1 << 20)
    except BrokenNpz:
        pass


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_reader_survives_damaged_archives(tmp_path_factory, changes, compressed):
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    save = np.savez_compressed if compressed else np.savez
    save(path, a=np.arange(20, dtype=np.float32), b=np.array("text"))
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    path.write_bytes(data)
    try:
        with NpzFile(path) as file:
            for name in file.names:
                file.header(name)
                file.read(name, 1 << 16)
    except BrokenNpz:
        pass


def test_reader_agrees_with_numpy(tmp_path):
    arrays = {
        "scalar": np.array("text"),
        "empty": np.zeros((0, 3), np.float64),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "half": np.arange(4, dtype=np.float16),
        "big": np.arange(4, dtype=">i4"),
    }
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with NpzFile(path) as file:
        assert set(file.names) == set(arrays)
        for name, array in arrays.items():
            assert file.header(name).shape == array.shape
            assert np.array_equal(file.read(name, 1 << 20), array)
    path.write_bytes(pack_npz(arrays, [("kept", np.lib.format.magic(1, 0))]))
    with np.load(path) as file:
        assert all(np.array_equal(file[name], array) for name, array in arrays.items())


WRITER = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import test_caches as t
folder = Path({folder!r})
while True:
    for number in range(6):
        t.write(t.make_need(folder, name=f"{{number}}.png"), seed=number)
    print("round", flush=True)
"""


def test_writers_killed_at_any_time_leave_whole_files(tmp_path):
    import subprocess
    import sys

    here = Path(__file__).parent
    needs = [make_need(tmp_path, name=f"{number}.png") for number in range(6)]
    rng = random.Random(3)
    for _ in range(4):
        writers = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    WRITER.format(root=str(here.parents[2]), tests=str(here), folder=str(tmp_path)),
                ],
                stdout=subprocess.PIPE,
            )
            for _ in range(2)
        ]
        for writer in writers:
            writer.stdout.readline()
        time.sleep(rng.random() * 0.05)
        for writer in writers:
            writer.kill()
            writer.wait()
            writer.stdout.close()
        for number, need in enumerate(needs):
            assert reason(need) is None
            assert np.array_equal(
                read_latents(cache_path(need.record, RULES), need.shape).latents, latents_for(need, number)
            )
