"""The rules hold for any widths and depths, not only for the sizes of the real models."""

import pytest
import torch

from library.checkpoints import key_maps, model_configs
from library.errors import UserError


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_unet_names_go_there_and_back_for_any_depth(levels, layers):
    from diffusers import UNet2DConditionModel

    config = {
        "block_out_channels": [32 * (i + 1) for i in range(levels)],
        "layers_per_block": layers,
        "cross_attention_dim": 24,
        "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1)
        + ["DownBlock2D" if levels > 1 else "CrossAttnDownBlock2D"],
        "up_block_types": ["UpBlock2D" if levels > 1 else "CrossAttnUpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
    }
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = key_maps.unet_to_file(shapes)
    assert len(set(there.values())) == len(shapes)
    starts = ("input_blocks.", "middle_block.", "output_blocks.", "out.", "time_embed.")
    assert all(name.startswith(starts) for name in there.values())
    if levels > 1 or layers == 2:
        back = key_maps.unet_to_memory(there.values())
        assert {name: back[there[name]] for name in shapes} == {name: name for name in shapes}
    derived = model_configs.unet_config(shapes, "sd1")
    assert {name: derived[name] for name in config} == config


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_vae_names_go_there_and_back_for_any_depth(levels):
    from diffusers import AutoencoderKL

    widths = [32 * (i + 1) for i in range(levels)]
    with torch.device("meta"):
        model = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            latent_channels=4,
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = key_maps.vae_to_file(shapes)
    back = key_maps.vae_to_memory(there.values())
    assert {name: back[there[name]] for name in shapes} == {name: name for name in shapes}
    assert not any("blocks" in name or "resnets" in name for name in there.values())
    assert model_configs.vae_config(shapes)["block_out_channels"] == widths
    # Names that are diffusers' already stay as they are.
    assert key_maps.vae_to_memory(shapes) == {name: name for name in shapes}


@pytest.mark.parametrize("layers", [1, 2, 23])
def test_openclip_names_go_there_and_back(layers):
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    names = [
        f"text_model.encoder.layers.{i}.{part}.{kind}"
        for i in range(layers)
        for part in (*parts, "layer_norm1", "layer_norm2")
        for kind in ("weight", "bias")
    ]
    names += ["text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight"]
    names += ["text_model.final_layer_norm.weight", "text_model.final_layer_norm.bias"]
    there = key_maps.openclip_to_file(names)
    assert len(there) == 12 * layers + 4
    assert {name: key_maps.openclip_to_memory(name) for name in there} == there
    assert sorted(name for group in there.values() for name in group) == sorted(names)


@pytest.mark.parametrize("name", ["text_projection", "logit_scale", "attn_mask", "transformer.resblocks.0.new.weight"])
def test_unknown_openclip_names_are_not_used(name):
    assert key_maps.openclip_to_memory(name) == ()


def test_joined_rows_are_split_into_views():
    joined = torch.arange(36.0).reshape(12, 3)
    parts = key_maps.split_rows("x", joined)
    assert torch.equal(torch.cat(parts), joined)
    assert all(part.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr() for part in parts)
    for bad in (torch.ones(4, 3), torch.ones(())):
        with pytest.raises(UserError, match="cannot be split"):
            key_maps.split_rows("x", bad)


def test_matrices_and_kernels():
    kernel = torch.randn(6, 5, 1, 1)
    assert torch.equal(key_maps.as_kernel(key_maps.as_matrix(kernel)), kernel)
    assert key_maps.as_matrix(torch.ones(2, 3, 3, 3)).shape == (2, 3, 3, 3)
    assert key_maps.as_matrix(kernel[..., 0]).shape == (6, 5)


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (128, 2), (24, 1), (768, 12)])
def test_heads_of_text_encoders_follow_their_width(width, heads):
    shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
        "text_model.encoder.layers.0.mlp.fc1.weight": (width * 4, width),
    }
    assert model_configs.text_config(shapes, "sd1")["num_attention_heads"] == heads
