"""The commands of the guides to fine-tuning, textual inversion, data and pictures run, one after the other.

As written but for their size, on tiny models; what asks for a download gets a local model in its place.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests import guides
from tests.conftest import PHOTOS
from tests.guides import DOCS, TRAINING
from tests.support import tensor_digest, train_network

ONE_STEP = "--max_train_steps=1"


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_sd1) -> Path:
    """An empty folder with a model, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_sd1, "model.safetensors")
    return tmp_path


def succeed(line: str, *more: str, status: tuple[int, ...] = (0,)) -> None:
    assert guides.run(line, *more) in status, line


def test_fine_tuning_from_photographs_to_a_page_of_pictures(place, tiny_sd2_v):
    """The whole guide in its order."""
    pytest.importorskip("onnx")
    pytest.importorskip("bitsandbytes")
    guide = DOCS / "fine_tune.md"
    guides.copy_photographs(place / "photos", sources=("duck", "robot", "car"))
    guides.describing_models(place)
    guides.write_files(guide, place)
    shutil.copy(tiny_sd2_v, "model_768.safetensors")
    lines = guides.ours(guide)
    assert len(lines) > 25
    for line in lines:
        succeed(line, *_size_of_fine_tuning(line))
    entries = json.loads(Path("meta_clean.json").read_text())
    assert sorted(entries) == ["car_00", "car_01", "duck_00", "duck_01", "robot_00", "robot_01"]
    assert all(entry["caption"] and entry["tags"] for entry in entries.values())
    assert tensor_digest("trained/my_model.safetensors") != tensor_digest("model.safetensors")
    page = Path("pictures/index.html").read_text(encoding="utf-8")
    row = next(part for part in page.split("<section>") if "a toy duck on a stone" in part)
    assert "before/im_000001.png" in row and "trained/im_000001.png" in row
    assert "my_model_" in Path("trained/sample/index.html").read_text(encoding="utf-8")


def _size_of_fine_tuning(line: str) -> tuple[str, ...]:
    """One epoch of a few steps; what goes on from a state has a second one."""
    if "fine_tune.py" not in line:
        return ()
    if "--dataset_config" in line:
        return (*TRAINING[3:], "--max_train_epochs=1")
    epochs = 2 if "--resume" in line else 1
    drawn = [f"--sample_every_n_epochs={epochs}"] if "--sample_prompts" in line else []
    return (*TRAINING, f"--max_train_epochs={epochs}", *drawn)


def test_textual_inversion_from_pictures_to_a_picture(place):
    guide = DOCS / "train_textual_inversion.md"
    guides.copy_photographs(place / "photos" / "10_zduck", sources=("duck",))
    guides.copy_photographs(place / "photos" / "duck", sources=("duck",))
    guides.write_files(guide, place)
    lines = guides.ours(guide)
    assert sum("train_textual_inversion.py" in line for line in lines) >= 3
    for line in lines:
        succeed(line, *((*TRAINING, ONE_STEP) if line.startswith(guides.LAUNCHED) else ()))
    assert Path("trained/zduck.pt").exists()


def test_captions_of_every_model_that_can_be_made_small(place):
    from tests.caption_models import make_blip2, make_git, make_llava

    guides.describing_models(place)
    tiny = {"blip2": make_blip2(place / "blip2"), "llava": make_llava(place / "llava")}
    git = make_git(place / "git")
    guides.copy_photographs(place / "pictures", sources=("duck",))
    ran = 0
    for line in guides.ours(DOCS / "captioning.md"):
        kind = next((name for name in tiny if f"/{name}" in line), None)
        if "Florence" in line:
            continue  # there is no small one
        local = git if "by_git" in line else tiny.get(kind or "", place / "blip")
        succeed(re.sub(r"--model_id \S+", "", line), f"--local_model={local}", "--precision=float", "--max_length=40")
        ran += 1
    assert ran >= 4
    assert Path("pictures/duck_00.caption").read_text().strip()


def test_tags_and_metadata(place):
    pytest.importorskip("onnx")
    guides.copy_photographs(place / "photos", sources=("duck", "robot"), captions=True)
    guides.describing_models(place)
    lines = guides.ours(DOCS / "tagging_and_metadata.md")
    assert len(lines) > 8
    for line in lines:
        succeed(line, *(("--local_model=tagger",) if "tagger.py" in line else ()))
    entries = json.loads(Path("meta_tags.json").read_text())
    assert entries["duck_00"]["caption"] == (PHOTOS / "duck" / "00.caption").read_text().strip()
    assert "[[tags.ambiguous]]" in Path("my_rules.toml").read_text()


def test_data_tools(place):
    guides.copy_photographs(place / "photos", sources=("car",), captions=True)
    guides.copy_photographs(place / "photos" / "2_sks duck", sources=("duck",))
    Path("photos/meta_clean.json").write_text(json.dumps({"car_00": {"caption": "a"}, "car_01": {"tags": "b"}}))
    config = (
        '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "photos/2_sks duck"\nclass_tokens = "a"\n'
    )
    Path("photos.toml").write_text(config, encoding="utf-8")
    lines = guides.ours(DOCS / "data_tools.md")
    assert len(lines) > 6
    for line in lines:
        trains = line.startswith(guides.LAUNCHED) and "tools/" not in line
        checks = "check_dataset" in line
        succeed(line, *((*TRAINING, ONE_STEP) if trains else ()), status=(0, 3) if checks else (0,))
    assert Path("photos/meta_lat.json").exists() and list(Path("photos/2_sks duck").glob("*_sd.npz"))


def test_pictures(place, tiny_sd1):
    pytest.importorskip("lycoris")
    _what_pictures_are_made_from(place)
    lines = [line for line in guides.ours(DOCS / "gen_img.md") if "quickstart.py" not in line]
    assert len(lines) > 9
    for number, line in enumerate(lines):
        succeed(line, f"--outdir=pictures/{number}")
        assert list(Path(f"pictures/{number}").glob("*.png")), line


def _what_pictures_are_made_from(place: Path) -> None:
    """The files that docs/gen_img.md takes for granted."""
    import torch
    from safetensors.torch import save_file

    from library.checkpoints.embedding_file import write_embedding
    from tests.control_nets import control_net, original_names

    (place / "quickstart_output").mkdir()
    shutil.copy("model.safetensors", "quickstart_output/tiny_model.safetensors")
    guides.copy_photographs(place / "photos" / "1_sks dog", sources=("duck",), each=1)
    for name, module in (("my_dog", "networks.lora"), ("style", "lycoris.kohya")):
        made = train_network(
            "--pretrained_model_name_or_path=model.safetensors",
            "--train_data_dir=photos",
            "--output_dir=.",
            f"--output_name={name}",
            f"--network_module={module}",
            "--network_train_unet_only",
            *TRAINING,
            ONE_STEP,
        )
        assert made == 0
    shutil.copy("my_dog.safetensors", "my_cat.safetensors")
    (place / "embeddings").mkdir()
    write_embedding(place / "embeddings" / "sks-cat.safetensors", {"clip_l": torch.ones(2, 64)})
    save_file(original_names(control_net()), "control_canny.safetensors")
    for name in ("photo", "mask", "regions"):
        Image.new("RGB", (64, 64)).save(f"{name}.png")
    regions = Image.new("RGB", (64, 64))
    ImageDraw.Draw(regions).rectangle((0, 0, 31, 63), fill=(255, 0, 0))
    ImageDraw.Draw(regions).rectangle((32, 0, 63, 63), fill=(0, 255, 0))
    regions.save("regions.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    Path("prompts.txt").write_text("a cat --d 1\na dog --n blurry", encoding="utf-8")
