import json
import logging

import pytest

from library.errors import UserError
from library.models import specs
from library.models.options import ModelOptions
from library.models.random_models import make_random_sd
from library.models.specs import stable_diffusion_spec


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "sd1": make_random_sd(folder / "first_model", "sd1"),
        "sd2": make_random_sd(folder / "second", "sd2", layout="diffusers_safetensors"),
        "sd2_v": make_random_sd(folder / "third", "sd2", v_prediction=True),
        "sd2_v_ckpt": make_random_sd(folder / "fourth", "sd2", layout="ckpt", v_prediction=True),
        "sd2_v_folder": make_random_sd(folder / "fifth", "sd2", layout="diffusers", v_prediction=True),
    }


def spec_of(path, **options):
    return stable_diffusion_spec(ModelOptions(pretrained_model_name_or_path=str(path), **options))


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("sd1", {}, specs.SD1),
        ("sd2", {"v2": True}, specs.SD2),
        ("sd2_v", {"v2": True, "v_parameterization": True}, specs.SD2_V),
        ("sd2_v_ckpt", {"v2": True, "v_parameterization": True}, specs.SD2_V),
        ("sd2_v_folder", {"v2": True, "v_parameterization": True}, specs.SD2_V),
    ],
)
def test_right_flags(models, caplog, name, flags, expected):
    with caplog.at_level(logging.WARNING):
        assert spec_of(models[name], **flags) == expected
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("sd1", {"v2": True}, "Remove --v2"),
        ("sd2", {}, "Add --v2"),
        ("sd2_v", {"v2": True}, "Add --v_parameterization"),
        ("sd2_v_folder", {"v2": True}, "Add --v_parameterization"),
        ("sd2", {"v2": True, "v_parameterization": True}, "Remove --v_parameterization"),
        ("sd1", {"v_parameterization": True}, "Remove --v_parameterization"),
    ],
)
def test_wrong_flags_are_named(models, name, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        spec_of(models[name], **flags)
    assert str(models[name]) in str(caught.value)


def test_a_guess_from_weights_only_warns(models, caplog):
    with caplog.at_level(logging.WARNING):
        assert spec_of(models["sd2_v_ckpt"], v2=True) == specs.SD2
    assert "--v_parameterization is missing" in caplog.text


def test_missing_file_names_its_neighbours(models):
    with pytest.raises(UserError, match=r"first_model\.safetensors"):
        spec_of(models["sd1"].with_name("frist_model.safetensors"))


def test_without_a_model_the_flags_decide():
    assert stable_diffusion_spec(ModelOptions(v2=True)) == specs.SD2


def test_hub_ids_are_left_for_later(caplog):
    with caplog.at_level(logging.INFO):
        assert spec_of("somebody/some-model") == specs.SD1
    assert caplog.text == ""


def test_a_hub_id_with_a_similar_path_is_mentioned(tmp_path, monkeypatch, caplog):
    (tmp_path / "models" / "my_model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        assert spec_of("models/my_modell") == specs.SD1
    assert "taken for a hub id. Did you mean my_model?" in caplog.text


def header_only(path, tensors):
    """A safetensors file with the given names and shapes, all zeros."""
    table, position = {}, 0
    for name, shape in tensors.items():
        size = 2
        for length in shape:
            size *= length
        table[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(position))
    return path


UNET = "model.diffusion_model."
ATTENTION = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"conditioner.embedders.1.model.ln_final.weight": (8,), ATTENTION: (8, 2048)}, "sdxl_train"),
        ({"lora_unet_down_blocks_0.lora_up.weight": (8, 4)}, "LoRA"),
        ({"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)}, "ControlNet"),
        (
            {
                UNET + "input_blocks.0.0.weight": (8, 9, 3, 3),
                ATTENTION: (8, 768),
                "cond_stage_model.transformer.text_model.final_layer_norm.bias": (8,),
                "first_stage_model.quant_conv.bias": (8,),
            },
            "inpainting",
        ),
        ({"first_stage_model.quant_conv.bias": (8,)}, "VAE"),
    ],
)
def test_other_kinds_of_models_are_named(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        spec_of(header_only(tmp_path / "model.safetensors", tensors))
