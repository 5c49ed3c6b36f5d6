"""networks/resize_lora.py: the best approximation of each module at the new rank, in the same strength."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merge_helpers import delta_of, header_of, run
from safetensors.torch import load_file, save_file

from networks import resize_lora

ROOT = Path(__file__).resolve().parents[3]
LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
POINT = "lora_unet_mid_block_attentions_0_proj_in"
KERNEL = "lora_unet_mid_block_resnets_0_conv1"
SHAPES = {LINEAR: (20, 24), TEXT: (30, 18), POINT: (20, 16, 1, 1), KERNEL: (14, 12, 3, 3)}


def lora_of(rank=8, alpha=2.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, *rest) in SHAPES.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn((rank, *rest), generator=generator).to(dtype)
        tensors[f"{name}.lora_up.weight"] = torch.randn((out, rank, *(1 for _ in rest[1:])), generator=generator).to(
            dtype
        )
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.fixture
def source(tmp_path):
    metadata = {
        "ss_network_dim": "8",
        "ss_network_alpha": "2.0",
        "ss_training_comment": "a duck",
        "ss_network_args": json.dumps({"conv_dim": "8", "conv_alpha": "2", "rank_dropout": "0.1"}),
        "sshs_model_hash": "old",
    }
    path = tmp_path / "lora.safetensors"
    save_file(lora_of(), path, metadata)
    return path


def resize(source, *options):
    target = source.with_name("small.safetensors")
    assert run(resize_lora, "--model", source, "--save_to", target, *options) == 0
    return load_file(target)


def errors_of(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]


def test_each_module_is_the_best_approximation_at_the_same_strength(source):
    small = resize(source, "--new_rank", 3)
    big = load_file(source)
    assert small.keys() == big.keys()
    for name, shape in SHAPES.items():
        assert small[f"{name}.lora_down.weight"].shape == (3, *shape[1:])
        assert small[f"{name}.lora_up.weight"].shape == (shape[0], 3, *(1 for _ in shape[2:]))
        assert float(small[f"{name}.alpha"]) == pytest.approx(2.0 / 8 * 3)
        delta, approximation = (delta_of(tensors, name, shape).flatten(1) for tensors in (big, small))
        dropped = torch.linalg.svdvals(delta)[3:].square().sum().sqrt()
        assert float(torch.linalg.norm(delta - approximation)) == pytest.approx(float(dropped), rel=1e-4)


@pytest.mark.parametrize("rank", [8, 13])
def test_the_old_rank_or_more_changes_nothing(source, rank):
    same = resize(source, "--new_rank", rank)
    big = load_file(source)
    for name, shape in SHAPES.items():
        assert same[f"{name}.lora_down.weight"].shape[0] == rank
        assert torch.allclose(delta_of(same, name, shape), delta_of(big, name, shape), atol=1e-5)


def test_convolutions_have_their_own_rank_1x1_too(source):
    small = resize(source, "--new_rank", 5, "--new_conv_rank", 2)
    ranks = {name: small[f"{name}.lora_down.weight"].shape[0] for name in SHAPES}
    assert ranks == {LINEAR: 5, TEXT: 5, POINT: 2, KERNEL: 2}


def test_metadata_tell_the_new_dimensions(source):
    resize(source, "--new_rank", 5, "--new_conv_rank", 2)
    found = header_of(source.with_name("small.safetensors"))
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("5", "1.25")
    assert found["ss_training_comment"] == "dimension is resized from 8 to 5; a duck"
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "0.5", "rank_dropout": "0.1"}
    assert len(found["sshs_model_hash"]) == 64


def test_dynamic_ranks_follow_the_singular_values(source):
    small = resize(source, "--new_rank", 6, "--dynamic_method", "sv_cumulative", "--dynamic_param", 0.6)
    big = load_file(source)
    for name, shape in SHAPES.items():
        values = torch.linalg.svdvals(delta_of(big, name, shape).flatten(1))[:8]
        needed = int((values.cumsum(0) / values.sum() < 0.6).sum()) + 1
        rank = small[f"{name}.lora_down.weight"].shape[0]
        assert rank == min(6, min(needed, 7) + 1)
        assert float(small[f"{name}.alpha"]) == pytest.approx(0.25 * rank)
    found = header_of(source.with_name("small.safetensors"))
    assert found["ss_network_dim"] == found["ss_network_alpha"] == "Dynamic"
    assert found["ss_training_comment"].startswith("Dynamic resize with sv_cumulative: 0.6 from 8")
    assert json.loads(found["ss_network_args"])["conv_dim"] == "Dynamic"


def test_cp_form_becomes_an_ordinary_lora(tmp_path):
    generator = torch.Generator().manual_seed(3)
    up, mid, down = (torch.randn(shape, generator=generator) for shape in ((14, 6, 1, 1), (6, 6, 3, 3), (6, 12, 1, 1)))
    path = tmp_path / "cp.safetensors"
    names = ("lora_up.weight", "lora_mid.weight", "lora_down.weight")
    save_file({f"{KERNEL}.{name}": tensor for name, tensor in zip(names, (up, mid, down), strict=True)}, path)
    small = resize(path, "--new_rank", 6)
    assert set(small) == {f"{KERNEL}.{name}" for name in ("lora_up.weight", "lora_down.weight", "alpha")}
    # What the three convolutions do one after the other.
    image = torch.randn((1, 12, 7, 7), generator=generator)
    conv = torch.nn.functional.conv2d
    expected = conv(conv(conv(image, down), mid, padding=1), up)
    found = conv(conv(image, small[f"{KERNEL}.lora_down.weight"], padding=1), small[f"{KERNEL}.lora_up.weight"])
    assert torch.allclose(found, expected, atol=1e-3)


def test_what_is_no_lora_module_stays_and_is_named(tmp_path, caplog):
    loha = {f"{TEXT}.hada_{name}": torch.ones(4, 4) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    tensors = {name: tensor for name, tensor in lora_of().items() if not name.startswith(TEXT)}
    tensors |= loha | {"mystery.key": torch.ones(2), f"{LINEAR}.dora_scale": torch.ones(20, 1)}
    path = tmp_path / "mixed.safetensors"
    save_file(tensors, path)
    small = resize(path, "--new_rank", 2)
    for name in (*loha, "mystery.key", f"{LINEAR}.dora_scale"):
        assert torch.equal(small[name], tensors[name])
    assert small[f"{LINEAR}.lora_down.weight"].shape[0] == 2
    for word in ("mystery.key", "loha", "dora_scale"):
        assert word in caplog.text


@pytest.mark.parametrize("style", ["peft", "diffusers"])
def test_other_layouts_become_kohya(tmp_path, style):
    generator = torch.Generator().manual_seed(5)
    down, up = torch.randn((6, 24), generator=generator), torch.randn((20, 6), generator=generator)
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    names = ("lora_A.weight", "lora_B.weight") if style == "peft" else ("lora.down.weight", "lora.up.weight")
    path = tmp_path / "lora.safetensors"
    save_file({f"{module}.{name}": tensor for name, tensor in zip(names, (down, up), strict=True)}, path)
    small = resize(path, "--new_rank", 2)
    assert set(small) == {f"{LINEAR}.{name}" for name in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert float(small[f"{LINEAR}.alpha"]) == 2
    left, values, right = torch.linalg.svd(up @ down)
    assert torch.allclose(delta_of(small, LINEAR, (20, 24)).float(), (left[:, :2] * values[:2]) @ right[:2], atol=1e-4)


def test_pickles_go_in_and_out(tmp_path):
    path, target = tmp_path / "lora.pt", tmp_path / "small.ckpt"
    torch.save(lora_of(), path)
    assert run(resize_lora, "--model", path, "--save_to", target, "--new_rank", 2) == 0
    assert torch.load(target, weights_only=True)[f"{LINEAR}.lora_down.weight"].shape == (2, 24)


def test_precision_is_that_of_the_file_or_as_asked(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(lora_of(dtype=torch.float16), path)
    assert resize(path)[f"{LINEAR}.lora_up.weight"].dtype == torch.float16
    assert resize(path, "--save_precision", "bf16")[f"{LINEAR}.lora_up.weight"].dtype == torch.bfloat16


def test_a_module_of_zeros_is_fine(tmp_path):
    tensors = {name: torch.zeros_like(t) if "lora_up" in name else t for name, t in lora_of().items()}
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    small = resize(path, "--new_rank", 4, "--dynamic_method", "sv_fro", "--dynamic_param", 0.9)
    assert {small[f"{name}.lora_down.weight"].shape[0] for name in SHAPES} == {1}


def test_verbose_shows_every_module(source, capsys):
    resize(source, "--new_rank", 2, "--verbose")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(SHAPES)
    assert all(any(line.startswith(name) for line in lines) for name in SHAPES)


def broken(path, kind):
    if kind == "truncated":
        whole = path.with_name("whole.safetensors")
        save_file(lora_of(), whole)
        path.write_bytes(whole.read_bytes()[:-100])
    elif kind == "nan":
        tensors = lora_of()
        tensors[f"{TEXT}.lora_up.weight"][0, 0] = float("nan")
        save_file(tensors, path)
    elif kind == "no lora":
        save_file({"first_stage_model.encoder.conv_in.weight": torch.ones(2)}, path)
    elif kind == "loha":
        save_file({f"{TEXT}.hada_{name}": torch.ones(4, 4) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}, path)


@pytest.mark.parametrize("kind", ["truncated", "nan", "no lora", "loha", "missing"])
def test_bad_files_are_one_line(tmp_path, capsys, kind):
    path, target = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    broken(path, kind)
    assert run(resize_lora, "--model", path, "--save_to", target) == 2
    (line,) = errors_of(capsys)
    assert "lora.safetensors" in line
    assert not target.exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "--model"),
        (["--dynamic_method", "sv_fro"], "--dynamic_param"),
        (["--dynamic_method", "sv_fro", "--dynamic_param", "2"], "no share"),
        (["--dynamic_method", "sv_ratio", "--dynamic_param", "0.5"], "below 1"),
        (["--dynamic_param", "0.5"], "--dynamic_method"),
        (["--new_rank", "0"], "--new_rank"),
        (["--model", "a.safetensors", "--save_to", "a.safetensors"], "is the file that is read"),
        (["--model", "a.safetensors", "--save_to", "a.txt"], "suffix"),
    ],
)
def test_bad_options(capsys, options, word):
    assert run(resize_lora, *options) == 2
    assert any(word in line for line in errors_of(capsys))


def test_runs_as_a_script_from_anywhere(source, tmp_path):
    command = [
        sys.executable,
        ROOT / "networks" / "resize_lora.py",
        "--model",
        source.name,
        "--save_to",
        "out.safetensors",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.safetensors").is_file()
