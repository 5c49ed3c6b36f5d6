"""The names in our LoRA files are those of the golden lists, whatever diffusers and transformers call things."""

import pytest
import torch

from library.checkpoints import lora_names
from library.errors import UserError
from tests.lora_files import golden_keys

CONV = ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {
    "sd15": {"cross_attention_dim": 768},
    "sd21": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "sdxl": SDXL_UNET,
}
TEXTS = {
    "sd15": {"text_encoder": (768, 12)},
    "sd21": {"text_encoder": (1024, 23)},
    "sdxl": {"text_encoder_1": (768, 12), "text_encoder_2": (1280, 32)},
}


def leaves(model):
    return {name: m for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv2d")}


@pytest.fixture(scope="module")
def unets():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return {version: leaves(UNet2DConditionModel(**config)) for version, config in UNETS.items()}


@pytest.fixture(scope="module")
def text_encoders():
    from transformers import CLIPTextConfig, CLIPTextModel

    def make(width, layers):
        sizes = {"hidden_size": width, "intermediate_size": width * 4, "num_attention_heads": width // 64}
        with torch.device("meta"):
            return leaves(CLIPTextModel(CLIPTextConfig(num_hidden_layers=layers, **sizes)))

    return {v: {part: make(*size) for part, size in parts.items()} for v, parts in TEXTS.items()}


def shapes_of(version, prefix):
    keys = golden_keys(version)
    return {
        name.removesuffix(".lora_down.weight"): (keys[name.replace("lora_down", "lora_up")][0], *shape[1:])
        for name, shape in keys.items()
        if name.startswith(prefix) and name.endswith(".lora_down.weight")
    }


def is_target(path, conv):
    return ".attentions." in path or (conv and path.endswith(CONV))


@pytest.mark.parametrize("version", ["sd15", "sd15_conv", "sd21", "sdxl", "sdxl_conv"])
def test_unet_modules_have_the_names_of_the_golden_list(unets, version):
    modules = unets[version.removesuffix("_conv")]
    names = lora_names.module_names(modules, "unet")
    chosen = {n: p for n, p in names.items() if is_target(p, version.endswith("_conv"))}
    expected = shapes_of(version, "lora_unet_")
    assert {name: tuple(modules[path].weight.shape) for name, path in chosen.items()} == expected


@pytest.mark.parametrize("version", TEXTS)
def test_text_modules_have_the_names_of_the_golden_list(text_encoders, version):
    found = {}
    for part, modules in text_encoders[version].items():
        names = lora_names.module_names([path for path in modules if "layers" in path], part)
        found |= {name: tuple(modules[path].weight.shape) for name, path in names.items()}
    assert found == shapes_of(version, "lora_te")


@pytest.mark.parametrize("version", UNETS)
def test_names_lead_back_to_paths_without_the_model(unets, version):
    for name, path in lora_names.module_names(unets[version], "unet").items():
        in_file = lora_names.dotted_path(name.removeprefix("lora_unet_"))
        assert lora_names.unet_memory_paths([in_file])[in_file] == path
        assert lora_names.is_known_path("unet", path)


def test_a_part_of_the_sdxl_unet_gets_the_names_of_the_whole(unets):
    whole = {path: name for name, path in lora_names.module_names(unets["sdxl"], "unet").items()}
    paths = ["up_blocks.0.upsamplers.0.conv", "down_blocks.1.downsamplers.0.conv", "down_blocks.0.resnets.0.conv1"]
    in_file = lora_names.unet_file_paths(paths, sdxl=True)
    assert {path: f"lora_unet_{in_file[path].replace('.', '_')}" for path in paths} == {p: whole[p] for p in paths}


def test_our_text_encoder_and_a_flattened_one_have_equal_names():
    path = "encoder.layers.3.self_attn.q_proj"
    for given in (path, f"text_model.{path}"):
        names = lora_names.module_names([given], "text_encoder")
        assert names == {"lora_te_text_model_encoder_layers_3_self_attn_q_proj": given}


def test_two_modules_of_one_name_are_an_error():
    with pytest.raises(UserError, match=r"'a\.b' and 'a_b' would both be called 'lora_unet_a_b'"):
        lora_names.module_names(["a.b", "a_b"], "unet")
