"""convert_stable_cascade.py: there and back gives the same bits, and what cannot be converted is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.headers import read_header
from tools import convert_stable_cascade as tool

PARTS = ("stage_c", "stage_b", "stage_a", "text", "vision")


@pytest.fixture(scope="module")
def files(tiny_cascade):
    return tiny_cascade


def run(*words):
    with pytest.raises(SystemExit) as ended:
        tool.main([str(word) for word in words])
    return int(ended.value.code or 0)


def same(one, two):
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("part", PARTS)
def test_there_and_back_gives_the_same_bits(part, files, tmp_path):
    official = getattr(files, part)
    assert run(official, tmp_path / "folder") == 0
    assert run(tmp_path / "folder", tmp_path / "back.safetensors") == 0
    same(official, tmp_path / "back.safetensors")
    metadata = read_header(tmp_path / "back.safetensors").metadata
    heads = {name: value for name, value in read_header(official).metadata.items() if "stable_cascade" in name}
    assert heads.items() <= metadata.items()


def test_bfloat16_stays_or_is_made(files, tmp_path):
    assert run(files.stage_c, tmp_path / "half", "--save_precision=bf16") == 0
    assert run(tmp_path / "half", tmp_path / "half.safetensors") == 0
    made = load_file(tmp_path / "half.safetensors")
    for name, tensor in load_file(files.stage_c).items():
        assert torch.equal(made[name], tensor.bfloat16())


def test_float16_is_warned_of(files, tmp_path, caplog):
    assert run(files.stage_c, tmp_path / "half.safetensors", "--save_precision=fp16") == 0
    assert "stage C overflows" in caplog.text


def test_a_checkpoint_of_many_parts_becomes_a_folder_of_each_kind(files, tmp_path, caplog):
    tensors = {f"model.diffusion_model.{name}": value for name, value in load_file(files.stage_c).items()}
    tensors |= {f"vae.encoder.{name}": value for name, value in load_file(files.effnet).items()}
    tensors |= {f"clip_l_vision.{name}": value for name, value in load_file(files.vision).items()}
    save_file(tensors, tmp_path / "all.safetensors", dict(read_header(files.stage_c).metadata))
    assert run(tmp_path / "all.safetensors", tmp_path / "official", "--to=official") == 0
    names = {path.name for path in (tmp_path / "official").iterdir()}
    assert names == {"stage_c.safetensors", "effnet_encoder.safetensors", "image_model.safetensors"}
    same(files.effnet, tmp_path / "official" / "effnet_encoder.safetensors")
    assert run(tmp_path / "all.safetensors", tmp_path / "model") == 0
    assert "left out, since diffusers has no place for them: effnet" in caplog.text
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"prior", "image_encoder"}
    assert run(tmp_path / "model", tmp_path / "again", "--to=official") == 0
    same(files.stage_c, tmp_path / "again" / "stage_c.safetensors")
    assert run(tmp_path / "all.safetensors", tmp_path / "one.safetensors", "--part=effnet") == 0
    same(files.effnet, tmp_path / "one.safetensors")


def test_parts_become_a_pipeline_when_all_are_there(files, tmp_path, caplog):
    model = tmp_path / "model"
    assert run(files.stage_c, model / "prior") == 0
    assert not (model / "model_index.json").exists()
    assert run(files.text, model / "text_encoder") == 0
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableCascadePriorPipeline"
    assert index["image_encoder"] == [None, None]
    assert {path.name for path in (model / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
    assert (model / "scheduler" / "scheduler_config.json").is_file()
    assert run(files.vision, model / "image_encoder") == 0
    index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
    assert index["image_encoder"] == ["transformers", "CLIPVisionModelWithProjection"]
    assert (model / "feature_extractor" / "preprocessor_config.json").is_file()
    assert run(files.stage_b, tmp_path / "elsewhere" / "mine") == 0
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"mine"}
    for source, name in ((files.stage_b, "decoder"), (files.stage_a, "vqgan")):
        assert run(source, model / name) == 0
    assert run(model, tmp_path / "again") == 0
    assert "it needs them in folders of their own" in caplog.text


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        ("previewer", ["x"], "diffusers has no place for its previewer"),
        ("stage_c", ["x.safetensors", "--part=stage_b"], "not stage B of Stable Cascade"),
        ("controlnet", ["x.safetensors"], "not stage C of Stable Cascade"),
        ("stage_c", ["x.safetensors", "--to=diffusers"], "is the name of a file"),
    ],
)
def test_what_cannot_be_converted_is_named(source, words, message, files, tmp_path, capsys):
    name, *more = words
    assert run(getattr(files, source), tmp_path / name, *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_several_parts_do_not_go_into_one_file(files, tmp_path, capsys):
    for part, name in (("stage_b", "decoder"), ("stage_a", "vqgan")):
        assert run(getattr(files, part), tmp_path / "model" / name) == 0
    assert run(tmp_path / "model", tmp_path / "x.safetensors") == 2
    assert "holds 2 parts (stage_b, stage_a), which do not go into one file" in capsys.readouterr().err
    assert run(tmp_path / "none", tmp_path / "y") == 2
    assert "no such file or folder" in capsys.readouterr().err
