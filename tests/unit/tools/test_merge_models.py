"""Merging checkpoints: a weighted sum tensor by tensor, and what is done where models differ."""

from __future__ import annotations

import pytest
import torch

from library import cli
from library.checkpoints.ckpt_writer import write_ckpt
from library.checkpoints.tensor_files import open_tensors, read_header, write_safetensors
from tools.merge_models import Options
from tools.merge_models import merge as merge_files

UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
TO_K = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
VAE = "first_stage_model.quant_conv.bias"


def tensors_of(seed: int, width: int = 768) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {TEXT: (5,), TO_K: (4, width), VAE: (3,), f"{UNET}out.2.bias": (4,)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**found, IDS: torch.arange(77)[None] + seed}


@pytest.fixture
def models(tmp_path):
    found = []
    for seed, name in enumerate("abc"):
        write_safetensors(tmp_path / f"{name}.safetensors", tensors_of(seed))
        found.append(tmp_path / f"{name}.safetensors")
    return found


def run(*words: object) -> int:
    return cli.run_script(Options, lambda options: merge_files(options.merging), [str(word) for word in words])


def merge(target, *words: object):
    assert run("--output", target, *words) == 0
    return open_tensors(target)


def refused(capsys, *words: object) -> list[str]:
    capsys.readouterr()
    assert run(*words) == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def test_weighted_sum(tmp_path, models):
    found = merge(tmp_path / "m.safetensors", "--models", *models, "--ratios", 0.5, 0.7, -0.2)
    expected = [tensors_of(seed) for seed in range(3)]
    for name in (TEXT, TO_K, VAE):
        assert torch.allclose(found[name], 0.5 * expected[0][name] + 0.7 * expected[1][name] - 0.2 * expected[2][name])
    assert torch.equal(found[IDS], expected[0][IDS])


def test_equal_shares_and_metadata(tmp_path, models):
    found = merge(tmp_path / "blend.safetensors", "--models", *models[:2])
    assert torch.allclose(found[TO_K], (tensors_of(0)[TO_K] + tensors_of(1)[TO_K]) / 2)
    metadata = read_header(tmp_path / "blend.safetensors").metadata
    assert metadata["modelspec.title"] == "blend"
    assert metadata["modelspec.merged_from"] == "a, b"
    assert metadata["modelspec.description"] == "Weighted sum: 0.5 * a + 0.5 * b"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"


def test_only_the_unet(tmp_path, models):
    found = merge(tmp_path / "m.safetensors", "--models", *models[:2], "--ratios", 0, 1, "--unet_only")
    assert torch.equal(found[TO_K], tensors_of(1)[TO_K])
    for name in (TEXT, VAE, IDS):
        assert torch.equal(found[name], tensors_of(0)[name])


def test_first_model_takes_the_share_of_what_others_lack(tmp_path, models, caplog):
    lacking = {name: tensor for name, tensor in tensors_of(1).items() if name != VAE}
    extra = {f"{UNET}extra{number}.weight": torch.ones(2) for number in range(8)}
    write_safetensors(models[1], {**lacking, **extra})
    words = ("--models", *models, "--ratios", 0.2, 0.3, 0.5)
    found = merge(tmp_path / "m.safetensors", *words)
    assert set(found) == set(tensors_of(0))
    assert torch.allclose(found[VAE], 0.5 * tensors_of(0)[VAE] + 0.5 * tensors_of(2)[VAE])
    assert f"lacks 1 tensors; the first model's take its share: {VAE}" in caplog.text
    assert "8 tensors are not in the first model and are left out" in caplog.text
    assert "extra7" not in caplog.text
    merge(tmp_path / "m.safetensors", *words, "--show_skipped")
    assert "extra7" in caplog.text


def test_averaged_weights_are_left_out(tmp_path, models):
    write_safetensors(models[0], {**tensors_of(0), "model_ema.diffusion_modelout2bias": torch.ones(4)})
    assert set(merge(tmp_path / "m.safetensors", "--models", *models)) == set(tensors_of(0))


@pytest.mark.parametrize(("precision", "dtype"), [("float", torch.float32), ("fp16", torch.float16)])
def test_precisions(tmp_path, models, precision, dtype):
    write_safetensors(models[1], tensors_of(1), precision=torch.bfloat16)
    words = ("--models", *models[:2], "--saving_precision", precision, "--precision", "fp16")
    found = merge(tmp_path / "m.safetensors", *words)
    halves = [tensors_of(0)[TO_K].half(), tensors_of(1)[TO_K].bfloat16().half()]
    expected = (0.5 * halves[0]).add(halves[1], alpha=0.5)
    assert found[TO_K].dtype == dtype
    assert found[IDS].dtype == torch.int64
    assert torch.equal(found[TO_K], expected.to(dtype))


def test_pickled_checkpoints_go_in_and_out(tmp_path, models):
    write_ckpt(tmp_path / "p.ckpt", tensors_of(1), {"epoch": 1, "global_step": 2})
    found = merge(tmp_path / "m.ckpt", "--models", models[0], tmp_path / "p.ckpt")
    assert torch.allclose(found[TO_K], (tensors_of(0)[TO_K] + tensors_of(1)[TO_K]) / 2)


def test_result_may_replace_a_source(models):
    found = merge(models[0], "--models", *models[:2], "--ratios", 0, 1)
    assert torch.equal(found[TO_K], tensors_of(1)[TO_K])


def test_sdxl_models_merge(tmp_path):
    for seed, name in enumerate(("x", "y")):
        marker = {"v_pred": torch.empty(0), "conditioner.embedders.1.model.logit_scale": torch.tensor(float(seed))}
        write_safetensors(tmp_path / f"{name}.safetensors", {**tensors_of(seed, 2048), **marker})
    found = merge(tmp_path / "m.safetensors", "--models", tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    assert found["conditioner.embedders.1.model.logit_scale"] == 0.5
    assert found["v_pred"].numel() == 0
    metadata = read_header(tmp_path / "m.safetensors").metadata
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.prediction_type"] == "v"


def test_ratios_that_do_not_add_up_are_warned_about(tmp_path, models, caplog):
    found = merge(tmp_path / "m.safetensors", "--models", *models[:2], "--ratios", 1, 1)
    assert "--ratios: they add up to 2, not 1" in caplog.text
    assert torch.allclose(found[TO_K], tensors_of(0)[TO_K] + tensors_of(1)[TO_K])


def test_bad_command_lines(capsys, tmp_path, models):
    out = ("--output", tmp_path / "m.safetensors")
    assert refused(capsys) == [
        "error: --models: is required. See --help.",
        "error: --output: is required. See --help.",
    ]
    assert refused(capsys, "--models", models[0], *out) == [
        "error: --models: one model is nothing to merge. Name two or more."
    ]
    assert refused(capsys, "--models", *models, "--ratios", 1, 2, *out)[0].startswith(
        "error: --ratios: 2 ratios for 3 models."
    )
    assert "is no name of a checkpoint file" in refused(capsys, "--models", *models, "--output", tmp_path)[0]
    assert "--device quantum: cannot be used" in refused(capsys, "--models", *models, *out, "--device=quantum")[0]
    assert not (tmp_path / "m.safetensors").exists()


def test_bad_models_are_all_named(capsys, tmp_path, models):
    write_safetensors(
        tmp_path / "two.safetensors", {"cond_stage_model.model.ln_final.bias": torch.ones(2)} | unet(1024)
    )
    write_safetensors(tmp_path / "lora.safetensors", {"lora_unet_x.lora_up.weight": torch.ones(2)})
    (tmp_path / "cut.safetensors").write_bytes(models[1].read_bytes()[:-8])
    (tmp_path / "folder").mkdir()
    names = ("two.safetensors", "lora.safetensors", "cut.safetensors", "folder", "none.safetensors")
    paths = [models[0], *(tmp_path / name for name in names)]
    lines = refused(capsys, "--models", *paths, "--output", tmp_path / "m.safetensors")
    assert [any(word in line for line in lines) for word in names] == [True] * 5
    assert len(lines) == 5
    assert "is Stable Diffusion 2.x, but a.safetensors is Stable Diffusion 1.x" in lines[0]
    assert "looks like a LoRA" in lines[1]
    assert "incomplete" in lines[2]


def unet(width: int) -> dict[str, torch.Tensor]:
    return {TO_K: torch.ones(4, width)}


def test_other_shapes_and_nan_are_refused(capsys, tmp_path, models):
    target = tmp_path / "m.safetensors"
    changed = {**tensors_of(1), f"{UNET}out.2.bias": torch.ones(9)}
    write_safetensors(models[1], changed)
    (line,) = refused(capsys, "--models", *models, "--output", target)
    assert f"1 tensors have other shapes than in the first model, such as {UNET}out.2.bias (9,) instead of (4,)" in line
    write_safetensors(models[1], {**tensors_of(1), VAE: torch.full((3,), float("inf"))})
    (line,) = refused(capsys, "--models", *models, "--output", target)
    assert f"not merged: NaN or infinity in the weights ({VAE})" in line
    assert not target.exists()
