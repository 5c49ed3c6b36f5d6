"""Names and shapes of full-size SD1.5 and SD2.1 checkpoints, in both directions, against lists of the real files."""

import json
from pathlib import Path

import pytest
import torch

from library.checkpoints.parts import ModelParts, SourceInfo
from library.checkpoints.save import file_tensors
from library.checkpoints.single_file import shapes_of, text_part, unet_part, vae_part

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def golden(version):
    return json.loads((GOLDEN / f"ckpt_keys_{version}.json").read_text())


def meta_file(table):
    """The tensors of a checkpoint without their data."""
    dtype = {"int64": torch.int64}
    return {
        name: torch.empty(row["shape"], dtype=dtype.get(row.get("dtype"), torch.float32), device="meta")
        for name, row in table.items()
    }


def split(tensors, family):
    used = set()
    unet, text = unet_part(tensors, family, used), text_part(tensors, family, used)
    vae = vae_part(tensors, "file", used)
    carried = {name: tensor for name, tensor in tensors.items() if name not in used}
    return ModelParts(*unet, *text, *vae), carried


@pytest.fixture(scope="module", params=[("sd15", "sd1"), ("sd21", "sd2")], ids=["sd15", "sd21"])
def case(request):
    version, family = request.param
    table = golden(version)
    parts, carried = split(meta_file(table), family)
    return table, family, parts, carried


def expected_memory_names(table, component):
    names = {}
    for row in table.values():
        if row["component"] == component and row["diffusers"]:
            for name in row["diffusers"] if isinstance(row["diffusers"], list) else [row["diffusers"]]:
                names[name] = tuple(row.get("diffusers_shape", row["shape"]))
    return names


def test_loading_gives_the_listed_memory_names_and_shapes(case):
    table, _, parts, _ = case
    assert shapes_of(parts.unet) == expected_memory_names(table, "unet")
    assert shapes_of(parts.vae) == expected_memory_names(table, "vae")
    assert shapes_of(parts.text) == expected_memory_names(table, "text_encoder")


def test_what_is_not_loaded_is_exactly_what_the_list_calls_optional(case):
    table, _, _, carried = case
    assert set(carried) == {name for name, row in table.items() if not row["diffusers"]}


def test_saving_with_the_source_gives_every_name_and_shape_of_the_list(case):
    table, family, parts, carried = case
    source = SourceInfo("m", Path("m"), "safetensors", carried=carried)
    saved = {name: tuple(tensor.shape) for name, tensor in file_tensors(parts, family, source).items()}
    assert saved == {name: tuple(row["shape"]) for name, row in table.items()}


def test_saving_without_a_source_gives_every_required_name(case):
    table, family, parts, _ = case
    saved = {name: tuple(tensor.shape) for name, tensor in file_tensors(parts, family, None).items()}
    required = {name: tuple(row["shape"]) for name, row in table.items() if not row.get("optional")}
    assert required.items() <= saved.items()
    extra = set(saved) - set(required)
    if family == "sd1":
        assert not extra
    else:
        listed = {name: tuple(row["shape"]) for name, row in table.items()}
        assert all(saved[name] == listed[name] for name in extra)
        assert "cond_stage_model.model.text_projection" in extra
        assert "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight" in extra


def test_the_derived_configurations_build_the_real_models(case):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    _, family, parts, _ = case
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(parts.unet_config))
        vae = AutoencoderKL.from_config(dict(parts.vae_config))
    assert shapes_of(unet.state_dict()) == shapes_of(parts.unet)
    assert shapes_of(vae.state_dict()) == shapes_of(parts.vae)
    heads = parts.unet_config["attention_head_dim"]
    assert heads == (8 if family == "sd1" else [5, 10, 20, 20])


def test_the_text_configuration_is_that_of_the_family(case):
    _, family, parts, _ = case
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "vocab_size")
    found = tuple(parts.text_config[name] for name in names)
    if family == "sd1":
        assert found == (768, 3072, 12, 12, "quick_gelu", 49408)
    else:
        assert found == (1024, 4096, 23, 16, "gelu", 49408)


def test_diffusers_own_converter_agrees_about_the_unet(case):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    table, _, parts, _ = case
    unet = convert_ldm_unet_checkpoint(meta_file(table), dict(parts.unet_config))
    assert shapes_of(unet) == shapes_of(parts.unet)
    vae = convert_ldm_vae_checkpoint(meta_file(table), dict(parts.vae_config))
    assert shapes_of(vae) == shapes_of(parts.vae)
