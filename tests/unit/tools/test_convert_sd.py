"""Conversion between single files and Diffusers folders: the same weights come back, and what is wrong is one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from library import cli
from library.checkpoints.ckpt_writer import write_ckpt
from library.checkpoints.pickles import load_pickle
from library.checkpoints.tensor_files import open_tensors, read_header, write_safetensors
from tools.convert_diffusers20_original_sd import Options, kind_of_target, metadata_table
from tools.convert_diffusers20_original_sd import convert as convert_model

FAMILIES = ("sd1", "sd2")
LAST_LAYER = "cond_stage_model.model.transformer.resblocks."


def run(*words: object) -> int:
    return cli.run_script(Options, lambda options: convert_model(options.conversion), [str(word) for word in words])


def convert(*words: object) -> None:
    assert run(*words) == 0


def refused(capsys, *words: object) -> str:
    """Return the one line that a command ends with."""
    capsys.readouterr()
    assert run(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def full(tmp_path_factory, tiny_sd1, tiny_sd2):
    """Single files as they are published: schedule buffers, EMA, and for SD2 a last layer of its own."""
    folder = tmp_path_factory.mktemp("full")
    made = {}
    for family, path in (("sd1", tiny_sd1), ("sd2", tiny_sd2)):
        tensors = dict(open_tensors(path))
        generator = torch.Generator().manual_seed(3)
        tensors["betas"] = torch.rand(1000, generator=generator)
        tensors["model_ema.diffusion_modeltime_embed0bias"] = torch.zeros(4)
        if family == "sd1":
            tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        else:
            for name in tensors:
                if name.startswith(f"{LAST_LAYER}2.") or name.endswith("text_projection"):
                    tensors[name] = torch.rand(tensors[name].shape, generator=generator)
        made[family] = folder / f"{family}.safetensors"
        write_safetensors(made[family], tensors, {"note": "kept", "sshs_model_hash": "stale"})
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory, full):
    target = tmp_path_factory.mktemp("folders")
    for family, path in full.items():
        convert(path, target / family)
    return {family: target / family for family in full}


def without_ema(path):
    return {name: tensor for name, tensor in open_tensors(path).items() if not name.startswith("model_ema.")}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_file_to_folder_and_back_with_a_reference_is_bit_equal(tmp_path, full, folders, family):
    back = tmp_path / "back.safetensors"
    convert(folders[family], back, "--reference_model", full[family])
    assert_same(open_tensors(back), without_ema(full[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_reference_only_what_nothing_uses_differs(tmp_path, full, folders, family):
    back = tmp_path / "back.safetensors"
    convert(folders[family], back)
    found, expected = open_tensors(back), without_ema(full[family])
    unused = ("betas", "position_ids")
    made_up = (f"{LAST_LAYER}2.", "text_projection", "logit_scale")
    assert set(found) == {name for name in expected if not name.endswith(unused)}
    assert_same(
        {name: found[name] for name in found if not any(part in name for part in made_up)},
        {name: expected[name] for name in found if not any(part in name for part in made_up)},
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_file_to_file_keeps_buffers_and_drops_averages(tmp_path, full, family, caplog):
    target = tmp_path / "copy.ckpt"
    convert(full[family], target, "--epoch", 3, "--global_step", 70)
    assert_same(open_tensors(target), without_ema(full[family]))
    assert (load_pickle(target)["epoch"], load_pickle(target)["global_step"]) == (3, 70)
    again = tmp_path / "again.ckpt"
    convert(target, again, "--global_step", 30)
    assert (load_pickle(again)["epoch"], load_pickle(again)["global_step"]) == (3, 100)


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_open_offline_in_diffusers(folders, full, family):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folders[family], local_files_only=True)
    expected = open_tensors(full[family])["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(pipe.unet.state_dict()["conv_in.weight"], expected)
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert len(pipe.tokenizer("a duck").input_ids) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_files_open_in_diffusers(tmp_path, folders, family):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    target = tmp_path / "model.safetensors"
    convert(folders[family], target)
    for part, module in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        from_file = module.from_single_file(
            str(target), config=str(folders[family]), subfolder=part, local_files_only=True
        )
        from_folder = module.from_pretrained(folders[family], subfolder=part)
        assert_same(from_file.state_dict(), from_folder.state_dict())


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        (["--fp16"], torch.float16),
        (["--bf16"], torch.bfloat16),
        (["--save_precision_as", "fp16"], torch.float16),
        (["--fp16", "--save_precision_as=fp16"], torch.float16),
        (["--float"], torch.float32),
    ],
)
def test_one_precision_per_file(tmp_path, full, words, dtype):
    target = tmp_path / "out.safetensors"
    convert(full["sd2"], target, *words)
    assert {tensor.dtype for tensor in open_tensors(target).values()} == {dtype}
    for file in (tmp_path / "out").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in open_tensors(file).values()} == {dtype}


def test_a_reference_takes_the_precision_of_the_model(tmp_path, full, folders):
    half = tmp_path / "half"
    convert(folders["sd2"], half, "--fp16")
    convert(half, tmp_path / "out.safetensors", "--reference_model", full["sd2"])
    found = open_tensors(tmp_path / "out.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert torch.equal(found["betas"], open_tensors(full["sd2"])["betas"].half())


def test_metadata_of_the_source_ours_and_the_users(tmp_path, full):
    target = tmp_path / "named.safetensors"
    convert(full["sd1"], target, "--metadata", "{'name': 'my model', 'resolution': 512, 'modelspec.title': 'T'}")
    found = read_header(target).metadata
    assert (found["note"], found["name"], found["resolution"]) == ("kept", "my model", "512")
    assert (found["modelspec.title"], found["modelspec.architecture"]) == ("T", "stable-diffusion-v1")
    assert "sshs_model_hash" not in found


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ('{"a": "b"}', {"a": "b"}),
        ("{'a': True, 'b': None}", {"a": "true", "b": "null"}),
        ('{"a": [1, 2]}', {"a": "[1, 2]"}),
        ("", None),
    ],
)
def test_metadata_is_json_or_a_literal(text, table):
    assert metadata_table(text) == table


@pytest.mark.parametrize("text", ["__import__('os').getcwd()", "[1]", "{1: 2}", "x", "{'a': open('b')}", "(" * 9000])
def test_metadata_is_never_executed(capsys, tmp_path, full, text):
    assert "expected a table" in refused(capsys, full["sd1"], tmp_path / "o.safetensors", "--metadata", text)


def test_variant_of_a_folder(capsys, tmp_path, folders):
    source = tmp_path / "both"
    shutil.copytree(folders["sd1"], source)
    half = tmp_path / "half"
    convert(source, half, "--fp16")
    for file in half.rglob("*.safetensors"):
        shutil.copy(file, source / file.parent.name / f"{file.stem}.fp16.safetensors")
    convert(source, tmp_path / "variant.safetensors", "--variant", "fp16")
    convert(source, tmp_path / "plain.safetensors")
    name = "model.diffusion_model.out.2.weight"
    assert open_tensors(tmp_path / "variant.safetensors")[name].dtype == torch.float16
    assert open_tensors(tmp_path / "plain.safetensors")[name].dtype == torch.float32
    assert "no weights of the variant 'ema'" in refused(capsys, source, tmp_path / "x.ckpt", "--variant", "ema")


def test_scheduler_and_tokenizer_of_a_reference_folder(tmp_path, full, folders):
    reference = tmp_path / "reference"
    shutil.copytree(folders["sd2"], reference)
    scheduler = reference / "scheduler" / "scheduler_config.json"
    table = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**table, "prediction_type": "v_prediction", "steps_offset": 7}))
    (reference / "unet" / "config.json").write_text(
        json.dumps({**json.loads((reference / "unet" / "config.json").read_text()), "sample_size": 999})
    )
    convert(full["sd2"], tmp_path / "out", "--reference_model", reference)
    written = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (written["prediction_type"], written["steps_offset"]) == ("v_prediction", 7)
    unet = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert (unet["sample_size"], unet["upcast_attention"]) == (96, True)


def test_prediction_type_survives_both_ways(tmp_path, tiny_sd2_v):
    convert(tiny_sd2_v, tmp_path / "folder", "--v2")
    table = json.loads((tmp_path / "folder" / "scheduler" / "scheduler_config.json").read_text())
    assert table["prediction_type"] == "v_prediction"
    convert(tmp_path / "folder", tmp_path / "file.safetensors")
    assert read_header(tmp_path / "file.safetensors").metadata["modelspec.prediction_type"] == "v"


def test_linear_projections_of_sd2(tmp_path, full, folders):
    kernels = tmp_path / "kernels"
    shutil.copytree(folders["sd2"], kernels)
    config = kernels / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_linear_projection": False}))
    weights = kernels / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {
        name: tensor[:, :, None, None].clone() if name.endswith(("proj_in.weight", "proj_out.weight")) else tensor
        for name, tensor in open_tensors(weights).items()
    }
    write_safetensors(weights, tensors)
    convert(kernels, tmp_path / "file.safetensors", "--reference_model", full["sd2"])
    assert_same(open_tensors(tmp_path / "file.safetensors"), without_ema(full["sd2"]))
    convert(kernels, tmp_path / "as_it_was")
    convert(kernels, tmp_path / "linear", "--unet_use_linear_projection")
    name = "down_blocks.0.attentions.0.proj_in.weight"
    shapes = {
        folder: read_header(tmp_path / folder / "unet" / weights.name).shapes[name]
        for folder in ("as_it_was", "linear")
    }
    assert shapes == {"as_it_was": (64, 64, 1, 1), "linear": (64, 64)}
    assert json.loads((tmp_path / "linear" / "unet" / "config.json").read_text())["use_linear_projection"] is True


def test_kind_of_a_destination(tmp_path):
    (tmp_path / "v1.5").mkdir()
    found = {name: kind_of_target(name) for name in ("a.ckpt", "a.SAFETENSORS", "a", "b/v1.5/", "b/v1.5")}
    folder = "diffusers_safetensors"
    assert found == {"a.ckpt": "ckpt", "a.SAFETENSORS": "safetensors", "a": folder, "b/v1.5/": folder, "b/v1.5": None}
    assert kind_of_target(str(tmp_path / "v1.5")) == folder


def test_wrong_flags_are_refused_before_anything_is_read(capsys, tmp_path, full, folders):
    out = tmp_path / "out.safetensors"
    assert "looks like Stable Diffusion 2.x, but --v1 was given" in refused(capsys, full["sd2"], out, "--v1")
    assert "looks like Stable Diffusion 1.x, but --v2 was given" in refused(capsys, folders["sd1"], out, "--v2")
    assert "--v1: cannot be combined with --v2" in refused(capsys, full["sd1"], out, "--v1", "--v2")
    assert "bf16 and fp16 are both" in refused(capsys, full["sd1"], out, "--bf16", "--save_precision_as=fp16")
    assert "only .safetensors files hold metadata" in refused(capsys, full["sd1"], tmp_path / "o", "--metadata={'a':1}")
    assert "'.5' is no suffix of a model file" in refused(capsys, full["sd1"], tmp_path / "v1.5")
    assert "missing: model_to_save" in refused(capsys, full["sd1"])
    assert "is Stable Diffusion 1.x, and the model is" in refused(
        capsys, full["sd2"], out, "--reference_model", full["sd1"]
    )
    assert list(tmp_path.iterdir()) == []


def test_bad_models_are_refused_in_one_line(capsys, tmp_path, full, folders):
    out = tmp_path / "out"
    sdxl = tmp_path / "sdxl.safetensors"
    write_safetensors(sdxl, {"conditioner.embedders.1.model.ln_final.weight": torch.zeros(2)})
    assert "looks like SDXL base. This tool converts Stable Diffusion 1.x and 2.x" in refused(capsys, sdxl, out)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(full["sd1"].read_bytes()[:-1000])
    assert "incomplete: expected" in refused(capsys, broken, out)
    (tmp_path / "pictures").mkdir()
    assert "a folder without model_index.json" in refused(capsys, tmp_path / "pictures", out)
    assert "no such file" in refused(capsys, tmp_path / "nothing.safetensors", out)
    cut = tmp_path / "cut"
    shutil.copytree(folders["sd1"], cut)
    (cut / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "no weights in this folder" in refused(capsys, cut, out)
    alone = tmp_path / "unet.ckpt"
    whole = open_tensors(full["sd1"])
    write_ckpt(alone, {name: whole[name] for name in whole if not name.startswith("first_stage_model.")}, None)
    assert "has no VAE. Give a complete model" in refused(capsys, alone, out)
    nan = dict(open_tensors(full["sd1"]))
    nan["first_stage_model.quant_conv.bias"] = torch.full((8,), float("nan"))
    write_safetensors(tmp_path / "nan.safetensors", nan)
    assert "not converted: NaN or infinity in the weights" in refused(capsys, tmp_path / "nan.safetensors", out)
    assert not out.exists()


def test_a_folder_with_other_things_in_it_is_not_replaced(capsys, tmp_path, full):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    assert "holds something else than a model" in refused(capsys, full["sd1"], home)
    assert (home / "thesis.txt").read_text() == "years of work"


def test_options_without_effect_are_named(tmp_path, full, folders, caplog):
    convert(full["sd1"], tmp_path / "a", "--epoch=1", "--variant=fp16", "--unet_use_linear_projection")
    convert(full["sd1"], tmp_path / "b.ckpt", "--use_safetensors", "--reference_model", folders["sd1"])
    text = caplog.text
    for word in (
        "only .ckpt files store them",
        "--variant: has no effect",
        "--unet_use_linear_projection has no effect",
    ):
        assert word in text
    assert "the suffix of a file decides" in text and "files take from files" in text
