"""The index file: the next start opens nothing that did not change, and notices everything that did."""

import os
import time

import numpy as np
import pytest
from scan_helpers import image_bytes, scan, write_image

import library.data.folder_scan as folder_scan
from library.data.scan_index import INDEX_NAME

OLD = time.time_ns() - 3600 * 10**9


def age(folder):
    """Make files look an hour old."""
    for path in folder.iterdir():
        os.utime(path, ns=(OLD, OLD))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_scan, "KEEP_FROM", 1)
    # Status times cannot be set back, so files of a test would always count as just changed.
    monkeypatch.setattr("library.data.scan_index.RACY_NS", -(10**15))
    folder = tmp_path / "2_x"
    for index in range(6):
        write_image(folder / f"{index}.png", (64 + index, 64), f"caption {index}")
    age(folder)
    return folder


@pytest.fixture
def opened(monkeypatch):
    """Names of files opened by the scan."""
    names = []
    original = folder_scan.FolderFiles.open

    def spy(self, name):
        names.append(name)
        return original(self, name)

    monkeypatch.setattr(folder_scan.FolderFiles, "open", spy)
    return names


def rescan(folder, **options):
    return scan(train_data_dir=str(folder.parent), **options).table


def rows(table):
    return [(r.key, r.size_wh, r.caption, r.file_size, r.mtime_ns, r.orientation) for r in table]


def test_nothing_is_opened_when_nothing_changed(folder, opened):
    first = rescan(folder)
    assert sorted(opened) == sorted([f"{i}.png" for i in range(6)] + [f"{i}.txt" for i in range(6)])
    opened.clear()
    assert rows(rescan(folder)) == rows(first)
    assert opened == []


def change_image(folder):
    write_image(folder / "1.png", (128, 64))
    return ["1.png"]


def change_image_keeping_time_and_size(folder):
    data = image_bytes((66, 64))
    size = (folder / "1.png").stat().st_size
    (folder / "1.png").write_bytes((data + b"\0" * size)[:size])
    os.utime(folder / "1.png", ns=(OLD, OLD))
    return ["1.png"]


def change_caption(folder):
    (folder / "2.txt").write_text("another caption")
    return ["2.txt"]


def remove_caption(folder):
    (folder / "2.txt").unlink()
    return []


def add_image(folder):
    write_image(folder / "2b.png", (100, 64), "new")
    return ["2b.png", "2b.txt"]


def remove_image(folder):
    (folder / "3.png").unlink()
    return []


def rename_image(folder):
    (folder / "3.png").rename(folder / "9.png")
    return ["9.png"]


def exchange_images(folder):
    (folder / "0.png").rename(folder / "t")
    (folder / "1.png").rename(folder / "0.png")
    (folder / "t").rename(folder / "1.png")
    return ["0.png", "1.png"]


@pytest.mark.parametrize(
    "change",
    [
        change_image,
        change_image_keeping_time_and_size,
        change_caption,
        remove_caption,
        add_image,
        remove_image,
        rename_image,
        exchange_images,
    ],
)
def test_only_what_changed_is_read_again(folder, opened, change):
    before = rows(rescan(folder))
    expected = change(folder)
    opened.clear()
    after = rows(rescan(folder))
    assert sorted(opened) == sorted(expected)
    (folder / INDEX_NAME).unlink()
    assert rows(rescan(folder)) == after
    assert after != before
    opened.clear()
    assert rows(rescan(folder)) == after
    assert opened == []


def test_other_caption_settings_read_captions_again(folder, opened):
    rescan(folder)
    opened.clear()
    rescan(folder, subset={"enable_wildcard": True})
    assert opened == [f"{i}.txt" for i in range(6)]


def test_files_changed_just_before_the_scan_are_not_trusted(folder, opened, monkeypatch):
    monkeypatch.setattr("library.data.scan_index.RACY_NS", 2 * 10**9)
    rescan(folder)
    opened.clear()
    rescan(folder)
    assert len(opened) == 12


def test_small_quick_folders_get_no_index(folder, monkeypatch):
    monkeypatch.setattr(folder_scan, "KEEP_FROM", 500)
    rescan(folder)
    assert not (folder / INDEX_NAME).exists()


def test_damaged_index_is_read_anew(folder, caplog):
    good = rows(rescan(folder))
    path = folder / INDEX_NAME
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(data), 60).tolist():
        broken = bytearray(data)
        broken[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        assert rows(rescan(folder)) == good
    for length in (0, 1, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert rows(rescan(folder)) == good
    assert "is damaged" in caplog.text


def test_index_goes_to_the_cache_folder_when_the_images_cannot_be_written(folder, tmp_path, opened, monkeypatch):
    import library.data.scan_index as scan_index
    from library.data.scan import ScanContext

    original = scan_index.files.atomic_file

    def refusing(path, **options):
        if path.parent == folder:
            raise scan_index.files.CannotSave("read-only")
        return original(path, **options)

    monkeypatch.setattr(scan_index.files, "atomic_file", refusing)
    context = ScanContext(cache_dir=str(tmp_path / "cache"))
    first = scan(train_data_dir=str(tmp_path), context=context).table
    assert not (folder / INDEX_NAME).exists()
    opened.clear()
    assert rows(scan(train_data_dir=str(tmp_path), context=context).table) == rows(first)
    assert opened == []
    assert rows(rescan(folder)) == rows(first)


def test_decoded_images_are_remembered(folder, monkeypatch):
    import library.data.decode_check as decode_check

    seen = []
    monkeypatch.setattr(decode_check, "_checker", lambda: lambda path, size, **_: seen.append((path, size)))
    rescan(folder, check_images="all")
    assert sorted(seen) == [(str(folder / f"{i}.png"), (64 + i, 64)) for i in range(6)]
    seen.clear()
    change_image(folder)
    rescan(folder, check_images="auto")
    assert seen == [(str(folder / "1.png"), (128, 64))]


def test_slow_folders_are_read_in_threads(folder, monkeypatch):
    expected = rows(rescan(folder))
    (folder / INDEX_NAME).unlink()
    monkeypatch.setattr(folder_scan, "_SAMPLE", 1)
    monkeypatch.setattr(folder_scan, "_CHUNK", 2)
    monkeypatch.setattr(folder_scan, "_SLOW_SECONDS", -1.0)
    assert rows(rescan(folder)) == expected
