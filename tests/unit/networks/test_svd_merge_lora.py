"""svd_merge_lora.py: the best LoRA of a chosen rank for the sum of several."""

import json

import pytest
import torch
from merge_helpers import delta_of, header_of, layer_shapes, random_lora, run
from safetensors.torch import load_file, save_file

from library.checkpoints.lora_blocks import BLOCK_LISTS, block_of
from networks import svd_merge_lora

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="session")
def layers():
    """Some layers of every kind: text encoder, matrices, 1x1 and 3x3 convolutions."""
    rows = layer_shapes("sd1", conv=True)
    return {name: row for index, (name, row) in enumerate(rows.items()) if index % 12 == 0 or index % 7 == 1}


@pytest.fixture
def files(tmp_path, layers):
    tensors = [
        random_lora(tmp_path / "a.safetensors", layers, rank=4, alpha=1),
        random_lora(tmp_path / "b.safetensors", layers, rank=6, alpha=None, seed=1, skip=list(layers)[:2]),
    ]
    return [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tensors


def merged(tmp_path, *argv):
    out = tmp_path / "out.safetensors"
    assert run(svd_merge_lora, "--save_to", out, *argv) == 0
    return load_file(out)


def exact_sum(layers, name, tensors, ratios):
    shape = layers[name][2]
    return sum(
        r * delta_of(t, name, shape) for t, r in zip(tensors, ratios, strict=True) if f"{name}.lora_up.weight" in t
    )


def test_enough_ranks_give_the_sum(tmp_path, layers, files):
    paths, tensors = files
    found = merged(tmp_path, "--models", *paths, "--ratios", 0.5, -1.5, "--new_rank", 16)
    for name, (_, _, shape) in layers.items():
        wanted = exact_sum(layers, name, tensors, (0.5, -1.5))
        torch.testing.assert_close(delta_of(found, name, shape), wanted, rtol=0, atol=2e-6)


def test_fewer_ranks_give_the_best_approximation(tmp_path, layers, files):
    paths, tensors = files
    found = merged(tmp_path, "--models", *paths, "--ratios", 0.7, 0.3, "--new_rank", 5, "--new_conv_rank", 3)
    ranks = set()
    for name, (_, _, shape) in layers.items():
        rank = found[f"{name}.lora_down.weight"].shape[0]
        assert rank == (3 if len(shape) == 4 and shape[2] == 3 else 5)
        assert float(found[f"{name}.alpha"]) == rank
        exact = exact_sum(layers, name, tensors, (0.7, 0.3)).flatten(1)
        left = (delta_of(found, name, shape).flatten(1) - exact).norm()
        torch.testing.assert_close(left, torch.linalg.svdvals(exact)[rank:].norm(), rtol=1e-4, atol=1e-5)
        ranks.add(rank)
    assert ranks == {3, 5}
    header = header_of(tmp_path / "out.safetensors")
    assert header["ss_network_dim"] == "Dynamic" and header["modelspec.merged_from"] == "a, b"


def test_clamping_is_off_unless_asked_for(tmp_path, layers, files):
    paths, _ = files
    free = merged(tmp_path, "--models", *paths)
    clamped = merged(tmp_path, "--models", *paths, "--clamp_quantile", 0.9)
    name = next(iter(layers))
    up, down = (free[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
    limit = float(torch.quantile(torch.cat([up.flatten(), down.flatten()]), 0.9))
    torch.testing.assert_close(clamped[f"{name}.lora_up.weight"], up.clamp(-limit, limit), rtol=0, atol=0.02)
    assert not torch.equal(clamped[f"{name}.lora_up.weight"], up)


@pytest.mark.parametrize("length", [17, 26])
def test_block_weights_by_name(tmp_path, layers, files, length):
    paths, tensors = files
    blocks = BLOCK_LISTS[length]
    given = {block: 0.1 * index for index, block in enumerate(blocks)}
    lists = json.dumps([given[block] for block in blocks])
    found = merged(tmp_path, "--models", paths[0], "--lbws", lists, "--new_rank", 4)
    for name, (_, _, shape) in layers.items():
        wanted = given.get(block_of(name), 1.0) * delta_of(tensors[0], name, shape)
        torch.testing.assert_close(delta_of(found, name, shape), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", "BASE"),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "BASE"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "IN01"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "IN03"),
        ("lora_unet_down_blocks_2_resnets_1_conv1", "IN08"),
        ("lora_unet_down_blocks_3_resnets_1_conv1", "IN11"),
        ("lora_unet_mid_block_attentions_0_proj_in", "MID"),
        ("lora_unet_up_blocks_0_resnets_0_conv1", "OUT00"),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", "OUT02"),
        ("lora_unet_up_blocks_1_attentions_0_proj_in", "OUT03"),
        ("lora_unet_up_blocks_3_attentions_2_proj_in", "OUT11"),
        ("lora_unet_input_blocks_4_1_proj_in", "IN04"),
        ("lora_unet_middle_block_1_proj_in", "MID"),
        ("lora_unet_output_blocks_5_1_proj_in", "OUT05"),
        ("lora_unet_time_embedding_linear_1", None),
    ],
)
def test_blocks(name, block):
    assert block_of(name) == block


def test_full_deltas_of_lycoris_are_reduced(tmp_path, layers, capsys):
    rows = [(name, shape) for name, (_, _, shape) in layers.items() if name.startswith("lora_unet")]
    flat = next((name, shape) for name, shape in rows if len(shape) == 2)
    conv = next((name, shape) for name, shape in rows if len(shape) == 4 and shape[2] == 3)
    torch.manual_seed(0)
    tensors, wanted = {}, {}
    for name, shape in (flat, conv):
        columns = torch.Size(shape[1:]).numel()
        a, b, c, d = (
            torch.randn(shape[0], 2),
            torch.randn(2, columns),
            torch.randn(shape[0], 2),
            torch.randn(2, columns),
        )
        parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(1.0)}
        tensors.update({f"{name}.{key}": tensor * (0.3 if tensor.dim() else 1) for key, tensor in parts.items()})
        wanted[name] = (0.5 * 0.3**4 * (a @ b) * (c @ d)).double()
    save_file(tensors, tmp_path / "loha.safetensors")
    lora = random_lora(tmp_path / "lora.safetensors", {flat[0]: layers[flat[0]]}, rank=2, alpha=2)
    wanted[flat[0]] += delta_of(lora, flat[0], (flat[1][0], flat[1][1]))
    paths = [tmp_path / "loha.safetensors", tmp_path / "lora.safetensors"]
    found = merged(tmp_path, "--models", *paths, "--new_rank", 6)
    assert "2 modules are no LoRA" in capsys.readouterr().err
    for name, shape in (flat, conv):
        assert found[f"{name}.lora_down.weight"].shape[1:] == shape[1:]
        # A product of two matrices of rank 2 has rank 4, with another of rank 2 that is 6.
        torch.testing.assert_close(
            delta_of(found, name, shape), wanted[name].reshape(shape), rtol=1e-4, atol=1e-4 * float(wanted[name].max())
        )


def test_kernels_with_a_core_become_ordinary_ones(tmp_path, layers):
    name, (_, _, shape) = next((n, row) for n, row in layers.items() if len(row[2]) == 4 and row[2][2] == 3)
    up, mid, down = torch.randn(shape[0], 2, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(2, shape[1], 1, 1)
    tensors = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, "alpha": torch.tensor(1.0)}
    save_file({f"{name}.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    found = merged(tmp_path, "--models", tmp_path / "a.safetensors", "--new_rank", 2)
    wanted = 0.5 * torch.einsum("omxx,mnhw,nixx->oihw", up, mid, down)
    torch.testing.assert_close(delta_of(found, name, shape).float(), wanted, rtol=1e-4, atol=1e-4)


def test_sizes_that_disagree(tmp_path, layers, files, capsys):
    name, (part, path, shape) = next((n, row) for n, row in layers.items() if len(row[2]) == 2)
    random_lora(tmp_path / "c.safetensors", {name: (part, path, (shape[0], shape[1] * 2))})
    out = tmp_path / "never.safetensors"
    argv = ["--save_to", out, "--models", files[0][0], tmp_path / "c.safetensors"]
    assert run(svd_merge_lora, *argv) == 2
    printed = capsys.readouterr().err
    assert f"disagree about the size of {name}" in printed and "Traceback" not in printed and not out.exists()
