"""Looking at every picture of a folder: order, batches, bad pictures, dying workers, and work at the same time."""

import os
import time
from pathlib import Path

import pytest

from library import files
from library.data.images import BadImage, load_image
from library.data.jobs import PictureJob, find_pictures, run_pictures
from library.errors import UserError


def make_pictures(folder: Path, *names: str) -> Path:
    from PIL import Image

    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + index, 8)).save(path)
    return folder


def width_of(path: Path) -> int:
    """A `prepare` for loader processes."""
    return load_image(path).shape[1]


def width_or_death(path: Path) -> int:
    if "killer" in path.name:
        os._exit(9)
    return width_of(path)


def job(done: dict, prepare=width_of, work=None, **more) -> PictureJob:
    def plain(paths, widths):
        return [f"{path.name} {width}" for path, width in zip(paths, widths, strict=True)]

    return PictureJob("looking", prepare, work or plain, done.__setitem__, **more)


def names(paths) -> list[str]:
    return [path.name for path in paths]


def test_pictures_are_found_in_order(tmp_path):
    make_pictures(tmp_path, "b.png", "a.JPG", "sub/c.webp", "sub/deep/d.bmp", ".hidden/e.png", ".f.png")
    (tmp_path / "a.txt").write_text("text")
    assert names(find_pictures(tmp_path, recursive=False)) == ["a.JPG", "b.png"]
    found = find_pictures(tmp_path, recursive=True)
    assert found == [tmp_path / "a.JPG", tmp_path / "b.png", tmp_path / "sub/c.webp", tmp_path / "sub/deep/d.bmp"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_links_to_folders_are_followed_once(tmp_path):
    make_pictures(tmp_path / "real", "a.png")
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "round").symlink_to(tmp_path / "real")
    (tmp_path / "top" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = find_pictures(tmp_path / "top", recursive=True)
    assert names(found) == ["gone.png", "a.png"]


@pytest.mark.parametrize(
    ("folder", "message"),
    [("missing", "no such folder"), ("file.png", "is not a folder"), ("empty", "holds no pictures. Give --recursive")],
)
def test_nothing_to_do_is_the_users_error(tmp_path, folder, message):
    make_pictures(tmp_path, "file.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_pictures(tmp_path / folder, recursive=False)


def test_pictures_that_share_their_text_are_mentioned(tmp_path, caplog):
    find_pictures(make_pictures(tmp_path, "a.png", "a.jpg", "b.png"), recursive=False)
    assert "1 pictures share the name of another one" in caplog.text
    assert "a.jpg and a.png" in caplog.text


@pytest.mark.parametrize("workers", [None, 2])
def test_everything_is_done_in_order_and_bad_pictures_are_named(tmp_path, workers, caplog):
    make_pictures(tmp_path, *(f"{index}.png" for index in range(7)))
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "5.png").write_bytes(b"")
    batches = []

    def work(paths, widths):
        batches.append(len(paths))
        return [str(width) for width in widths]

    done = {}
    report = run_pictures(find_pictures(tmp_path, recursive=False), job(done, work=work), batch_size=2, workers=workers)
    assert {path.name: text for path, text in done.items()} == {
        "0.png": "8",
        "1.png": "9",
        "2.png": "10",
        "4.png": "12",
        "6.png": "14",
    }
    assert list(done) == sorted(done)
    assert batches == [2, 2, 1]
    assert (report.done, report.skipped) == (5, 0)
    assert [Path(bad.path).name for bad in report.failed] == ["3.png", "5.png"]
    report.close()
    assert "3.png: not an image (looks like text)" in caplog.text
    assert "5.png: empty file" in caplog.text


def test_what_is_done_already_is_skipped(tmp_path):
    paths = find_pictures(make_pictures(tmp_path, "0.png", "1.png", "2.png"), recursive=False)
    done = {}
    report = run_pictures(paths, job(done), skip=lambda path: path.name == "1.png")
    assert names(done) == ["0.png", "2.png"]
    assert (report.done, report.skipped) == (2, 1)
    again = run_pictures(paths, job(done), skip=lambda path: True)
    assert (again.done, again.skipped) == (0, 3)
    again.close()


def test_a_failing_batch_is_tried_picture_by_picture(tmp_path):
    def work(paths, widths):
        if any(path.name == "2.png" for path in paths):
            raise RuntimeError("the model dislikes this")
        return widths

    done = {}
    paths = find_pictures(make_pictures(tmp_path, *(f"{index}.png" for index in range(5))), recursive=False)
    report = run_pictures(paths, job(done, work=work), batch_size=4)
    assert names(done) == ["0.png", "1.png", "3.png", "4.png"]
    assert [(Path(bad.path).name, bad.reason) for bad in report.failed] == [
        ("2.png", "RuntimeError: the model dislikes this")
    ]


def test_inputs_are_gathered_and_a_failing_gathering_concerns_single_pictures(tmp_path):
    def gather(widths):
        if 9 in widths:
            raise ValueError("nine")
        return sum(widths)

    def work(paths, total):
        return [total] * len(paths)

    done = {}
    paths = find_pictures(make_pictures(tmp_path, *(f"{index}.png" for index in range(4))), recursive=False)
    report = run_pictures(paths, job(done, work=work, gather=gather), batch_size=2)
    assert {path.name: total for path, total in done.items()} == {"0.png": 8, "2.png": 21, "3.png": 21}
    assert [Path(bad.path).name for bad in report.failed] == ["1.png"]


def test_what_the_user_must_mend_in_the_model_ends_the_run(tmp_path):
    def work(paths, widths):
        raise UserError("another input layout", where="model.onnx")

    paths = find_pictures(make_pictures(tmp_path, "0.png", "1.png"), recursive=False)
    with pytest.raises(UserError, match="another input layout"):
        run_pictures(paths, job({}, work=work))


def test_a_model_that_fails_at_everything_is_no_matter_of_pictures(tmp_path):
    def work(paths, widths):
        raise ZeroDivisionError("a bug")

    paths = find_pictures(make_pictures(tmp_path, *(f"{index}.png" for index in range(12))), recursive=False)
    with pytest.raises(ZeroDivisionError):
        run_pictures(paths, job({}, work=work))


def test_a_result_that_cannot_be_kept_concerns_its_picture_alone(tmp_path):
    done = {}

    def finish(path, result):
        if path.name == "0.png":
            raise BadImage(path, "its text file is not UTF-8")
        done[path] = result

    paths = find_pictures(make_pictures(tmp_path, "0.png", "1.png"), recursive=False)
    report = run_pictures(paths, PictureJob("looking", width_of, lambda paths, widths: widths, finish))
    assert (names(done), report.done, report.failed[0].reason) == (["1.png"], 1, "its text file is not UTF-8")


def test_a_full_disk_ends_the_run(tmp_path):
    def finish(path, result):
        raise files.CannotSave("no space left")

    paths = find_pictures(make_pictures(tmp_path, *(f"{index}.png" for index in range(9))), recursive=False)
    with pytest.raises(files.CannotSave):
        run_pictures(paths, PictureJob("looking", width_of, lambda paths, widths: widths, finish))


def test_nothing_but_bad_pictures_is_an_error(tmp_path):
    (tmp_path / "0.png").write_bytes(b"")
    report = run_pictures(find_pictures(tmp_path, recursive=False), job({}))
    with pytest.raises(UserError, match=r"none of 1 pictures could be used; .*0\.png: empty file"):
        report.close()


def test_a_picture_that_kills_its_loader_is_named_and_the_others_are_done(tmp_path):
    make_pictures(tmp_path, *(f"{index}.png" for index in range(6)), "3_killer.png", "5_killer.png")
    done = {}
    paths = find_pictures(tmp_path, recursive=False)
    report = run_pictures(paths, job(done, prepare=width_or_death), batch_size=2, workers=2)
    assert names(done) == [f"{index}.png" for index in range(6)]
    assert [Path(bad.path).name for bad in report.failed] == ["3_killer.png", "5_killer.png"]
    assert "ended the process that loaded it" in report.failed[0].reason


def test_loaders_that_always_die_end_the_run(tmp_path):
    paths = find_pictures(make_pictures(tmp_path, *(f"{index}_killer.png" for index in range(6))), recursive=False)
    with pytest.raises(UserError, match="5 pictures in a row ended the process"):
        run_pictures(paths, job({}, prepare=width_or_death), workers=1)


def test_loading_and_writing_take_place_while_the_model_works(tmp_path):
    def prepare(path):
        time.sleep(0.02)
        return 1

    def work(paths, ones):
        time.sleep(0.06)
        return ones

    paths = [tmp_path / f"{index}.png" for index in range(40)]
    looking = PictureJob("looking", prepare, work, lambda path, result: time.sleep(0.02))
    report = run_pictures(paths, looking, batch_size=2)
    assert report.done == 40
    # One after the other, the model would work a third of the time.
    assert report.busy_seconds > 0.75 * report.seconds
