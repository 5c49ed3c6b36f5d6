"""tag_images_by_wd14_tagger.py on taggers of a few kilobytes: pictures, formats, every option, and bad input."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from tagger_models import DEFAULT_LABELS, default_tagger, mapped_tagger, save_model, weights_of, write_tag_list

from finetune import tag_images_by_wd14_tagger as script
from library.data.metadata_files import read_metadata
from tests.conftest import PHOTOS


def run(*argv):
    with pytest.raises(SystemExit) as ended:
        script.main([str(item) for item in argv])
    return ended.value.code


def text(path):
    return path.read_bytes().decode("utf-8")


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    return default_tagger(tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    return mapped_tagger(tmp_path_factory.mktemp("mapped"))


@pytest.fixture
def red(tmp_path):
    """A folder with one picture: red 1.0, green 0.4, blue 0.2."""
    folder = tmp_path / "pictures é"
    folder.mkdir()
    Image.new("RGB", (60, 60), (255, 102, 51)).save(folder / "red.png")
    return folder


def tags_of(folder, tagger, *words):
    assert run(folder, "--local_model", tagger, *words) == 0
    content = text(folder / "red.txt")
    assert content.endswith("\n") and content.count("\n") == 1
    return content[:-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "red_hair, green,grass, ^_^, duck_(costume)_(farm)"),
        (["--onnx", "--thresh", "0.7"], "red_hair, ^_^"),
        (["--general_threshold", "0.9"], "red_hair, duck_(costume)_(farm)"),
        (["--character_threshold", "0.9"], "red_hair, green,grass, ^_^"),
        (["--remove_underscore"], "red hair, green,grass, ^_^, duck (costume) (farm)"),
        (["--undesired_tags", "red hair,^_^"], "green,grass, duck_(costume)_(farm)"),
        (["--thresh", "0.7", "--use_rating_tags"], "sensitive, red_hair, ^_^"),
        (["--thresh", "0.7", "--use_rating_tags_as_last_tag"], "red_hair, ^_^, sensitive"),
        (["--character_tags_first", "--thresh", "0.5"], "duck_(costume)_(farm), red_hair, ^_^"),
        (
            ["--thresh", "0.5", "--always_first_tags", "^_^,duck_(costume)_(farm),sky"],
            "duck_(costume)_(farm), ^_^, red_hair",
        ),
        (["--thresh", "0.5", "--character_tag_expand"], "red_hair, ^_^, duck_(costume), farm"),
        (["--thresh", "0.5", "--tag_replacement", "red_hair,ginger;^_^,smile"], "ginger, smile, duck_(costume)_(farm)"),
        (
            ["--tag_replacement", r"green\,grass,lawn\; wet", "--general_threshold", "0.39"],
            "red_hair, lawn; wet, ^_^, duck_(costume)_(farm)",
        ),
        (["--thresh", "0.7", "--tag_replacement", "red hair,^_^"], "^_^"),
        (["--caption_separator", "; ", "--thresh", "0.7"], "red_hair; ^_^"),
    ],
)
def test_options_of_tags(red, tagger, words, expected):
    assert tags_of(red, tagger, *words) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "red_hair, artist_a, screenshot, duck_(farm)"),
        (["--thresh", "0.9"], "red_hair, artist_a, screenshot"),
        (["--artist_threshold", "0.99", "--meta_threshold", "0.99"], "red_hair, duck_(farm)"),
        (
            ["--thresh", "0.9", "--use_rating_tags", "--use_quality_tags"],
            "general, worst_quality, red_hair, artist_a, screenshot",
        ),
        (["--thresh", "0.97", "--use_quality_tags_as_last_tag"], "red_hair, artist_a, screenshot, worst_quality"),
        (["--character_tags_first"], "duck_(farm), red_hair, artist_a, screenshot"),
    ],
)
def test_sub_folder_format(tmp_path, mapped, words, expected):
    folder = tmp_path / "p"
    folder.mkdir()
    Image.new("RGB", (60, 60), (255, 115, 51)).save(folder / "red.png")  # green: sigmoid(4 * -0.1) = 0.4
    assert tags_of(folder, mapped, *words) == expected


def test_no_quality_tags_in_the_default_format(red, tagger, capsys):
    assert tags_of(red, tagger, "--use_quality_tags", "--meta_threshold", "0.5", "--thresh", "0.7") == "red_hair, ^_^"
    output = capsys.readouterr().err
    assert "--use_quality_tags has no effect" in output and "--meta_threshold has no effect" in output


def test_text_files_are_added_to(red, tagger):
    (red / "red.txt").write_text("smile,red_hair , café\n", encoding="utf-8")
    assert tags_of(red, tagger, "--append_tags", "--thresh", "0.7") == "smile, red_hair, café, ^_^"
    assert tags_of(red, tagger, "--append_tags", "--thresh", "0.7") == "smile, red_hair, café, ^_^"
    assert tags_of(red, tagger, "--thresh", "0.7") == "red_hair, ^_^"


def test_frequencies(red, tagger, capsys):
    Image.new("RGB", (30, 60), (255, 255, 255)).save(red / "white.png")
    assert run(red, "--local_model", tagger, "--frequency_tags", "--thresh", "0.9", "--debug") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == ["tag frequencies:", "        2  red_hair", "        1  blue_sky", "        1  green,grass"]
    assert lines[0].endswith("red.png: red_hair")


def test_one_file_for_all(red, tagger, tmp_path):
    (red / "more").mkdir()
    turned = Image.open(PHOTOS / "duck" / "00.jpg")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(red / "more" / "turned.jpg", exif=exif)
    target = tmp_path / "out" / "tags.json"
    assert run(red, "--local_model", tagger, "--output_path", target, "--thresh", "0.7", "--recursive") == 0
    table = json.loads(text(target))
    assert table[str(red / "red.png")] == {"tags": "red_hair, ^_^", "image_size": [60, 60]}
    assert table[str(red / "more" / "turned.jpg")]["image_size"] == [turned.height, turned.width]
    assert not list(red.rglob("*.txt"))
    assert [entry.tags for entry in read_metadata(str(target))][0] == "red_hair, ^_^"


def test_one_file_with_a_line_for_each(red, tagger, tmp_path):
    target = tmp_path / "tags.jsonl"
    assert run(red, "--local_model", tagger, "--output_path", target, "--thresh", "0.7") == 0
    line = {"image_path": str(red / "red.png"), "caption": "red_hair, ^_^", "image_size": [60, 60]}
    assert [json.loads(line) for line in text(target).splitlines()] == [line]


def test_one_file_is_gone_on_with(red, tagger, tmp_path, capsys):
    target = tmp_path / "tags.json"
    key = str(red / "red.png")
    target.write_text(json.dumps({key: {"tags": "mine", "caption": "c"}, "other": {"tags": "x"}}), encoding="utf-8")
    words = [red, "--local_model", tagger, "--output_path", target, "--thresh", "0.7"]
    assert run(*words, "--skip_existing") == 0
    assert json.loads(text(target))[key]["tags"] == "mine"
    assert "1 skipped" in capsys.readouterr().err
    assert run(*words, "--append_tags") == 0
    added = json.loads(text(target))
    assert added[key] == {"tags": "mine, red_hair, ^_^", "caption": "c", "image_size": [60, 60]} and "other" in added
    assert run(*words) == 0
    assert list(json.loads(text(target))) == [key]


def test_text_files_that_are_there_are_skipped(red, tagger):
    (red / "red.txt").write_text("mine", encoding="utf-8")
    Image.new("RGB", (9, 9)).save(red / "black.png")
    assert run(red, "--local_model", tagger, "--skip_existing") == 0
    assert text(red / "red.txt") == "mine" and text(red / "black.txt") == "\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_named_and_the_others_tagged(red, tagger, capsys, workers):
    (red / "broken.jpg").write_bytes(b"<html>")
    (red / "empty.png").write_bytes(b"")
    words = ["--batch_size", 2, "--max_data_loader_n_workers", workers, "--thresh", "0.7"]
    assert tags_of(red, tagger, *words) == "red_hair, ^_^"
    output = capsys.readouterr().err
    assert "broken.jpg: not an image" in output and "empty.png: empty file" in output
    (red / "red.png").unlink()
    assert run(red, "--local_model", tagger, *words) == 2
    assert "none of 2 pictures could be used" in capsys.readouterr().err


def test_text_file_that_cannot_be_added_to(red, tagger, capsys):
    Image.new("RGB", (9, 9), "red").save(red / "good.png")
    (red / "red.txt").write_bytes(b"caf\xe9")
    assert run(red, "--local_model", tagger, "--append_tags", "--thresh", "0.7") == 0
    assert (red / "red.txt").read_bytes() == b"caf\xe9" and text(red / "good.txt") == "red_hair, ^_^\n"
    assert "red.png: red.txt: caption is not UTF-8" in capsys.readouterr().err


def test_batches_and_workers_do_not_change_the_tags(tmp_path, tagger):
    found = []
    for words in ([], ["--batch_size", "3"], ["--batch_size", "2", "--max_data_loader_n_workers", "2"]):
        target = tmp_path / "tags.json"
        assert run(PHOTOS / "duck", "--local_model", tagger, "--output_path", target, *words) == 0
        found.append(text(target))
    assert found[0] == found[1] == found[2]


def test_fixed_batch_size_of_a_model(tmp_path, red, tagger, capsys):
    fixed = default_tagger(tmp_path / "fixed", batch=3)
    for number in range(4):
        Image.new("RGB", (20, 20), (60 * number, 0, 0)).save(red / f"{number}.png")
    assert tags_of(red, fixed, "--batch_size", "2") == "red_hair, green,grass, ^_^, duck_(costume)_(farm)"
    assert "--batch_size 2 is ignored: the model takes 3 pictures at once" in capsys.readouterr().err
    assert text(red / "3.txt") == "red_hair, ^_^, duck_(costume)_(farm)\n" and text(red / "0.txt") == "\n"


def test_model_file_and_another_size(tmp_path, red):
    small = default_tagger(tmp_path / "small", side=32)
    (small / "model.onnx").rename(small / "other name.onnx")
    assert tags_of(red, small / "other name.onnx", "--thresh", "0.7") == "red_hair, ^_^"


def test_models_that_were_downloaded_before(tmp_path, red, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default_tagger(tmp_path / "wd14_tagger_model" / "SmilingWolf_wd-v1-4-convnext-tagger-v2")
    mapped_tagger(tmp_path / "models" / "me_taggers" / "v1")
    assert run(red, "--thresh", "0.7") == 0
    assert text(red / "red.txt") == "red_hair, ^_^\n"
    assert run(red, "--thresh", "0.97", "--repo_id", "me/taggers/v1", "--model_dir", "models") == 0
    assert text(red / "red.txt") == "red_hair, artist_a, screenshot\n"


def test_downloads_go_through_the_hub_client(tmp_path, red, monkeypatch, capsys):
    import huggingface_hub

    fetched = []

    def download(name, filename, *, local_dir, force_download, revision, **_):
        fetched.append((name, filename, force_download, revision))
        if not (local_dir / "v1").exists():
            mapped_tagger(local_dir / "v1")

    info = type("Info", (), {"sha": "abc"})
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: info)
    words = [red, "--repo_id", "me/taggers/v1", "--model_dir", tmp_path / "models"]
    assert run(*words) == 0 and run(*words) == 0
    assert fetched == [
        ("me/taggers", f"v1/{name}", False, "abc") for name in ("model_optimized.onnx", "tag_mapping.json")
    ]
    assert run(*words, "--force_download") == 0
    assert len(fetched) == 4 and fetched[-1][2] is True
    monkeypatch.undo()
    assert run(red, "--repo_id", "me/others", "--model_dir", tmp_path / "models") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: --repo_id me/others: cannot be downloaded: ") and "--local_model" in last


def test_a_download_that_cannot_be_written(tmp_path, red, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: type("Info", (), {"sha": "a"}))
    (tmp_path / "models").write_bytes(b"")  # a file where the folder should be
    assert run(red, "--repo_id", "me/taggers/v1", "--model_dir", tmp_path / "models") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(tmp_path / "models") in last and "cannot be reached" not in last


def one_error(red, capsys, model, *words):
    assert run(red, "--local_model", model, *words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_models_of_another_form(tmp_path, red, capsys):
    matrix = weights_of([0] * 9, [1 / 255] * 9)

    def other(shape, axes=(1, 2), weights=matrix):
        save_model(tmp_path / "t" / "model.onnx", weights, shape=shape, axes=axes, clip=False)
        write_tag_list(tmp_path / "t")
        return one_error(red, capsys, tmp_path / "t")

    message = other(["n", 3, 448, 448], (2, 3))
    assert "model.onnx: its input is [n, 3, 448, 448], not [batch, height, width, 3]" in message
    assert "its input is [n, 448, 224, 3], but taggers look at squares" in other(["n", 448, 224, 3])
    few = weights_of([0] * 8, [1 / 255] * 8)
    assert "has 8 outputs, but selected_tags.csv names 9 tags" in other(["n", 448, 448, 3], weights=few)
    assert "gives values from" in other(["n", 448, 448, 3], weights=1000 * matrix)


def test_files_that_are_no_tagger(tmp_path, red, tagger, capsys):
    folder = tmp_path / "t"
    folder.mkdir()
    assert "is no tagger. The folder must hold model.onnx with selected_tags.csv" in one_error(red, capsys, folder)
    (folder / "saved_model.pb").write_bytes(b"")
    assert "is a Keras model, and only ONNX models run here" in one_error(red, capsys, folder)
    write_tag_list(folder)
    (folder / "model.onnx").write_bytes(b"nothing")
    assert "model.onnx: is no ONNX model" in one_error(red, capsys, folder)
    assert "no such file or folder" in one_error(red, capsys, tmp_path / "u")
    (folder / "selected_tags.csv").unlink()
    assert "there is no selected_tags.csv or tag_mapping.json" in one_error(red, capsys, folder / "model.onnx")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("selected_tags.csv", "a,b\n1,2\n", "the first line has no name and category"),
        ("selected_tags.csv", "tag_id,name,category\n1,x\n", "line 2 has no name or no category"),
        ("selected_tags.csv", "tag_id,name,category\n", "holds no tags"),
        ("tag_mapping.json", "[]", "the top level is no object"),
        ("tag_mapping.json", '{"1": {"tag": "a", "category": "General"}}', "none for output 0"),
        ("tag_mapping.json", '{"0": {"tag": "a"}}', "entry 0 has no tag and category"),
        ("tag_mapping.json", '{"0": ', "JSON error"),
    ],
)
def test_damaged_lists_of_tags(tmp_path, red, capsys, name, content, message):
    make = default_tagger if name.endswith("csv") else mapped_tagger
    folder = make(tmp_path / "t")
    (folder / name).write_text(content, encoding="utf-8")
    assert message in one_error(red, capsys, folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tag_replacement", "a,b,c"], "--tag_replacement: 'a,b,c' is no pair of tags"),
        (["--append_tags", "--skip_existing"], "--append_tags: cannot be combined with --skip_existing"),
        (["--use_rating_tags", "--use_rating_tags_as_last_tag"], "--use_rating_tags: cannot be combined"),
        (["--force_download"], "--force_download: cannot be combined with --local_model"),
        (["--thresh", "1.5"], "--thresh"),
        (["--output_path", "tags.txt"], "--output_path tags.txt: is no name of a metadata file"),
    ],
)
def test_wrong_options(red, tagger, capsys, words, message):
    assert message in one_error(red, capsys, tagger, *words)


def test_wrong_name_of_a_repository(red, capsys):
    assert run(red, "--repo_id", "nobody") == 2
    assert "--repo_id nobody: is no name of a hub repository" in capsys.readouterr().err


def test_without_onnxruntime(red, tagger, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime, which runs taggers, is not installed. pip install" in one_error(red, capsys, tagger)


def test_provider_by_availability():
    from finetune.tagger_model import PROVIDERS, choose_providers

    openvino, cuda, rocm, cpu = PROVIDERS
    assert choose_providers([cpu, rocm, cuda, openvino]) == [openvino, cpu]
    assert choose_providers([cpu, cuda, rocm]) == [cuda, cpu]
    assert choose_providers(["AzureExecutionProvider", cpu]) == [cpu]


def test_preparation_of_pictures(tmp_path):
    from finetune.tagger_pictures import Preparation

    small = Image.new("RGB", (2, 1), (10, 20, 30))
    small.save(tmp_path / "small.png")
    found = Preparation(4)(tmp_path / "small.png")
    assert found.size_wh == (2, 1) and found.pixels.shape == (4, 4, 3)
    square = Image.new("RGB", (2, 2), "white")
    square.paste(small, (0, 0))  # one row is missing: nothing is added above, one row below
    assert np.array_equal(found.pixels[:, :, ::-1], np.asarray(square.resize((4, 4), Image.Resampling.LANCZOS)))

    glass = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    glass.paste((0, 0, 0, 128), (0, 0, 8, 4))
    glass.save(tmp_path / "glass.png")
    values = Preparation(8)(tmp_path / "glass.png").pixels
    assert (values[4:] == 255).all() and (values[:4] == 127).all()
    palette = Image.new("P", (8, 8))
    palette.putpalette([255, 0, 0] * 2)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert (Preparation(8)(tmp_path / "palette.png").pixels == 255).all()

    large = np.random.default_rng(0).integers(0, 255, (64, 32, 3), np.uint8)
    Image.fromarray(large).save(tmp_path / "large.png")
    values = Preparation(8)(tmp_path / "large.png").pixels
    expected = large.reshape(8, 8, 4, 8, 3).mean(axis=(1, 3)).round()[:, :, ::-1]
    assert np.abs(values[:, 2:6].astype(int) - expected).max() <= 1 and (values[:, :2] == 255).all()


def test_long_pictures_do_not_fill_the_memory(tmp_path):
    from finetune.tagger_pictures import Preparation

    Image.new("1", (20000, 10)).save(tmp_path / "long.png")
    found = Preparation(64)(tmp_path / "long.png")
    assert found.size_wh == (20000, 10) and found.pixels.shape == (64, 64, 3)


def test_a_picture_of_the_default_format_is_blue_green_red(red, tmp_path):
    matrix = weights_of([label[2] for label in DEFAULT_LABELS], [1 / 255] * 9)
    save_model(tmp_path / "t" / "model.onnx", matrix, shape=["n", 448, 448, 3], axes=(1, 2))
    write_tag_list(tmp_path / "t", [(f"channel{label[2]}_{n}", 0) for n, label in enumerate(DEFAULT_LABELS)])
    found = tags_of(red, tmp_path / "t", "--thresh", "0.9").split(", ")
    assert {tag.partition("_")[0] for tag in found} == {"channel2"}
