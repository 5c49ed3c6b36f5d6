import json
import struct

import pytest
import torch

from library.checkpoints.ckpt_writer import write_ckpt
from library.checkpoints.detect import inspect
from library.checkpoints.load import load_parts, require_family
from library.checkpoints.parts import SaveSettings
from library.checkpoints.save import save_checkpoint
from library.checkpoints.tensor_files import write_safetensors
from library.errors import UserError

UNET = "model.diffusion_model."
HINT_TENSOR = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"


def unet(context, channels=4, extra=()):
    names = {
        f"{UNET}input_blocks.0.0.weight": torch.ones(8, channels, 3, 3),
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(8, context),
    }
    return names | {name: torch.ones(2) for name in extra}


CASES = {
    "SD1 U-Net without text encoder": (unet(768), "sd1"),
    "SD2 U-Net without text encoder": (unet(1024), "sd2"),
    "SDXL": (
        unet(2048, extra=["conditioner.embedders.1.model.ln_final.weight", f"{UNET}label_emb.0.0.weight"]),
        "sdxl",
    ),
    "SDXL U-Net alone": (unet(2048, extra=[f"{UNET}label_emb.0.0.weight"]), "sdxl"),
    "refiner": (unet(1280, extra=["conditioner.embedders.0.model.ln_final.weight"]), "sdxl-refiner"),
    "kohya LoRA": ({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, "lora"),
    "LoKr": ({"lycoris_x.lokr_w1": torch.ones(2, 2)}, "lora"),
    "peft LoRA": ({"unet.x.lora_A.weight": torch.ones(2, 2)}, "lora"),
    "ControlNet": (unet(768) | {"control_model.x": torch.ones(1)}, "controlnet"),
    "diffusers ControlNet": ({"controlnet_cond_embedding.conv_in.weight": torch.ones(1)}, "controlnet"),
    "embedding": ({"emb_params": torch.ones(1, 768)}, "embedding"),
    "SDXL embedding": ({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, "embedding"),
    "VAE": ({"encoder.down.0.block.0.conv1.weight": torch.ones(1), "decoder.up.0.x": torch.ones(1)}, "vae"),
    "diffusers VAE": ({"encoder.down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, "vae"),
    "diffusers U-Net": (
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(2, 768)},
        "unet",
    ),
    "text encoder": ({"text_model.encoder.layers.0.mlp.fc1.weight": torch.ones(1)}, "text-encoder"),
    "something else": ({"layers.0.weight": torch.ones(1)}, "unknown"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_the_kind_of_model_is_told_from_names_and_shapes(tmp_path, name, kind):
    tensors, family = CASES[name]
    path = tmp_path / "m"
    write_safetensors(path, tensors) if kind == "safetensors" else write_ckpt(path, tensors, {"epoch": 1})
    info = inspect(path)
    assert (info.family, info.kind, info.layout) == (family, kind, "single")
    assert info.label
    if family not in ("sd1", "sd2"):
        with pytest.raises(UserError, match="looks like"):
            require_family(info, "sd1")


def test_small_models_are_told_apart_by_their_text_encoder(tmp_path, small_file):
    for family in ("sd1", "sd2"):
        write_safetensors(tmp_path / "m", small_file(family))
        info = inspect(tmp_path / "m")
        assert info.family == family and not info.missing and info.in_channels == 4
        require_family(info, family)


@pytest.mark.parametrize(("channels", "word"), [(9, "inpainting"), (5, "depth"), (8, "editing"), (7, "7 channels")])
def test_unets_with_other_inputs_are_refused_by_name(tmp_path, channels, word):
    write_safetensors(tmp_path / "m", unet(768, channels))
    info = inspect(tmp_path / "m")
    assert info.in_channels == channels
    with pytest.raises(UserError, match=word):
        require_family(info, "sd1", replaced=("VAE", "text encoder"))


def test_missing_parts_are_named_unless_replaced(tmp_path):
    write_safetensors(tmp_path / "m", unet(768))
    info = inspect(tmp_path / "m")
    assert info.missing == ("text encoder", "VAE")
    with pytest.raises(UserError, match="no text encoder and no VAE"):
        require_family(info, "sd1")
    with pytest.raises(UserError, match=r"has no text encoder\."):
        require_family(info, "sd1", replaced=("VAE",))


@pytest.mark.parametrize(
    ("metadata", "extra", "expected"),
    [
        ({}, [], None),
        ({"modelspec.prediction_type": "v"}, [], "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, ["v_pred"], "epsilon"),
        ({"modelspec.prediction_type": "nonsense"}, [], None),
        ({}, ["v_pred"], "v_prediction"),
    ],
)
def test_the_prediction_type_is_what_the_file_says(tmp_path, metadata, extra, expected):
    write_safetensors(tmp_path / "m", unet(1024, extra=extra), metadata)
    assert inspect(tmp_path / "m").prediction_type == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
@pytest.mark.parametrize(("spread", "hint"), [(0.2, "v_prediction"), (0.02, "epsilon")])
def test_the_prediction_of_sd2_is_guessed_from_one_bias_as_a_hint_only(tmp_path, dtype, kind, spread, hint):
    values = torch.linspace(-1, 1, 320, dtype=torch.float64)
    tensors = unet(1024) | {HINT_TENSOR: (values / values.std() * spread).to(dtype)}
    path = tmp_path / "m"
    write_safetensors(path, tensors) if kind == "safetensors" else write_ckpt(path, tensors, None)
    info = inspect(path)
    assert info.prediction_hint == hint and info.prediction_type is None


def test_nothing_is_guessed_for_sd1_or_when_the_file_says_it(tmp_path):
    tensors = {HINT_TENSOR: torch.linspace(-1, 1, 320)}
    write_safetensors(tmp_path / "a", unet(768) | tensors)
    write_safetensors(tmp_path / "b", unet(1024) | tensors, {"modelspec.prediction_type": "epsilon"})
    assert inspect(tmp_path / "a").prediction_hint is None
    assert inspect(tmp_path / "b").prediction_hint is None


def test_a_bias_of_nan_is_no_hint_of_velocity(tmp_path):
    write_safetensors(tmp_path / "a", unet(1024) | {HINT_TENSOR: torch.full((320,), float("nan"))})
    assert inspect(tmp_path / "a").prediction_hint == "epsilon"


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_folders_tell_family_and_prediction(tmp_path, small_file, spec_of, family, prediction):
    write_safetensors(tmp_path / "m.safetensors", small_file(family))
    parts = load_parts(str(tmp_path / "m.safetensors"), family)
    settings = SaveSettings(zero_terminal_snr=prediction == "v_prediction")
    folder = save_checkpoint(
        tmp_path / "f", "diffusers_safetensors", parts, spec=spec_of(family, prediction), settings=settings
    )
    info = inspect(folder)
    assert (info.family, info.prediction_type, info.layout, info.kind) == (family, prediction, "diffusers", "diffusers")
    assert info.in_channels == 4 and info.cross_attention_dim == (24 if family == "sd1" else 32)
    (folder / "vae" / "config.json").unlink()
    assert inspect(folder).missing == ("VAE",)


def test_folders_of_other_families_are_told(tmp_path):
    def folder(pipeline, **unet_config):
        path = tmp_path / pipeline
        (path / "unet").mkdir(parents=True)
        (path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
        (path / "unet" / "config.json").write_text(json.dumps(unet_config))
        return path

    sdxl = folder("StableDiffusionXLPipeline", addition_embed_type="text_time", cross_attention_dim=2048)
    refiner = folder("StableDiffusionXLImg2ImgPipeline", addition_embed_type="text_time", cross_attention_dim=1280)
    inpainting = folder("StableDiffusionInpaintPipeline", cross_attention_dim=768, in_channels=9)
    assert inspect(sdxl).family == "sdxl"
    assert inspect(refiner).family == "sdxl-refiner"
    assert (inspect(inpainting).family, inspect(inpainting).in_channels) == ("sd1", 9)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_damaged_json_of_a_folder_is_named(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"model_index\.json"):
        inspect(tmp_path)


def test_a_folder_of_pictures_is_no_model(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"without model_index\.json .*photo\.jpg"):
        inspect(tmp_path)


def test_one_component_is_told_as_such(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    assert inspect(tmp_path).family == "vae"


def test_a_header_is_enough(tmp_path):
    """Nothing but the header and one bias is read: a file of 4 GB is judged as fast as a small one."""
    header = {name: list(tensor.shape) for name, tensor in unet(768).items()}
    table, position = {}, 0
    for name, shape in {**header, "model.diffusion_model.out.2.weight": [1000, 1000, 100]}.items():
        size = 4
        for length in shape:
            size *= length
        table[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(table).encode()
    with (tmp_path / "m").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    assert inspect(tmp_path / "m").family == "sd1"
