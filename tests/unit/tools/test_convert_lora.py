"""tools/convert_lora.py: kohya, PEFT and diffusers files of the same LoRA mean the same."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.checkpoints.lora_file import inspect_lora, read_lora
from tests.lora_files import delta, peft, respelled, save, small_lora, some
from tools.convert_lora import main

NAME = "lora_unet_mid_block_attentions_0_proj_in"


def run(*argv):
    with pytest.raises(SystemExit) as ended:
        main([str(item) for item in argv])
    return ended.value.code


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Kohya files of each base with alpha 2 at rank 4, the smallest part of them that tells the base."""
    folder = tmp_path_factory.mktemp("sources")
    chosen = {
        "sd15": ("mid_block", "layers_0_", "conv1"),
        "sd21": ("mid_block", "layers_22_"),
        "sdxl": ("middle_block", "layers_0_", "_op."),
    }
    metadata = {"ss_output_name": "cat", "ss_network_dim": "4"}
    return {
        version: save(folder / f"{version}.safetensors", some(small_lora(f"{version}{suffix}"), *parts), metadata)
        for (version, parts), suffix in zip(chosen.items(), ("_conv", "", "_conv"), strict=True)
    }


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
@pytest.mark.parametrize("version", ["sd15", "sd21", "sdxl"])
def test_there_and_back(tmp_path, sources, version, layout):
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert run(sources[version], there, "--to", layout) == 0
    assert run(there, back, "--to", "kohya") == 0
    first, middle, last = (read_lora(path) for path in (sources[version], there, back))
    assert (middle.layout, middle.base, last.layout) == (layout, first.base, "kohya")
    assert set(last.tensors()) == set(first.tensors())
    assert all(weights.scale == 1 for weights in middle.modules.values())
    for name, weights in first.modules.items():
        assert torch.equal(delta(weights), delta(last.modules[name]))
    assert last.metadata["ss_output_name"] == "cat" and "lora_adapter_metadata" not in last.metadata


def test_names_and_settings_of_a_peft_file(tmp_path, sources):
    assert run(sources["sd15"], tmp_path / "p.safetensors", "--to", "peft") == 0
    keys = set(load_file(tmp_path / "p.safetensors"))
    pattern = r"(unet\.(down|mid|up)_block|text_encoder\.text_model\.encoder\.layers).*\.lora_[AB]\.weight"
    assert keys and all(re.fullmatch(pattern, key) for key in keys)
    metadata = metadata_of(tmp_path / "p.safetensors")
    settings = json.loads(metadata["lora_adapter_metadata"])
    for component in ("unet", "text_encoder"):
        assert settings[f"{component}.r"] == settings[f"{component}.lora_alpha"] == 4
        assert all(not target.startswith("text_model") for target in settings[f"{component}.target_modules"])
    assert metadata["sshs_model_hash"] and metadata["format"] == "pt"


def test_ranks_that_differ_are_written_down(tmp_path):
    tensors = {}
    for number, rank in enumerate((4, 4, 2)):
        tensors[f"lora_unet_mid_block_resnets_0_conv{number}.lora_down.weight"] = torch.ones(rank, 8, 3, 3)
        tensors[f"lora_unet_mid_block_resnets_0_conv{number}.lora_up.weight"] = torch.ones(6, rank, 1, 1)
    source = save(tmp_path / "k.safetensors", {**tensors, **some(small_lora("sd15"), "mid_block")})
    assert run(source, tmp_path / "p.safetensors", "--to", "peft") == 0
    settings = json.loads(metadata_of(tmp_path / "p.safetensors")["lora_adapter_metadata"])
    assert settings["unet.rank_pattern"] == settings["unet.alpha_pattern"] == {"mid_block.resnets.0.conv2": 2}
    assert settings["unet.r"] == 4


def test_magnitudes_of_dora_come_along(tmp_path):
    tensors = some(small_lora("sd15_conv"), "mid_block")
    tensors |= {f"{NAME}.dora_scale": torch.rand(40, 1, 1, 1)}
    tensors |= {f"{NAME.replace('proj_in', 'transformer_blocks_0_attn1_to_q')}.dora_scale": torch.rand(40, 1)}
    source = save(tmp_path / "k.safetensors", tensors)
    assert run(source, tmp_path / "p.safetensors", "--to", "peft") == 0
    made = load_file(tmp_path / "p.safetensors")
    assert made["unet.mid_block.attentions.0.proj_in.lora_magnitude_vector.weight"].shape == (1, 40, 1, 1)
    to_q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert made[f"{to_q}.lora_magnitude_vector.weight"].shape == (40,)
    assert json.loads(metadata_of(tmp_path / "p.safetensors")["lora_adapter_metadata"])["unet.use_dora"] is True
    assert run(tmp_path / "p.safetensors", tmp_path / "back.safetensors", "--to", "kohya") == 0
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items() if key.endswith("dora_scale"))


def test_a_peft_file_gets_alphas_and_metadata(tmp_path):
    tensors = respelled(some(small_lora("sd15"), "mid_block"), peft, alpha=False)
    source = save(tmp_path / "p.safetensors", tensors, {"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.r": 4}'})
    assert run(source, tmp_path / "k.safetensors", "--to", "kohya") == 0
    made = read_lora(tmp_path / "k.safetensors")
    assert {weights.scale for weights in made.modules.values()} == {2.0}
    assert all("alpha" in weights.tensors for weights in made.modules.values())
    expected = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "8.0"}
    assert {**made.metadata, **expected} == made.metadata
    assert made.metadata["ss_base_model_version"] == "sd_v1"


def test_precision(tmp_path, sources):
    assert run(sources["sd15"], tmp_path / "p.safetensors", "--to", "peft", "--save_precision", "fp16") == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "p.safetensors").values()} == {torch.float16}


def test_unmatched_keys_are_listed(tmp_path, capsys):
    tensors = {
        **some(small_lora("sd15"), "mid_block"),
        "what.is.this": torch.ones(1),
        "bundle_emb.cat.clip_l": torch.ones(1, 8),
        "lora_unet_odd_thing.lora_down.weight": torch.ones(2, 3),
        "lora_unet_odd_thing.lora_up.weight": torch.ones(3, 2),
    }
    assert run(save(tmp_path / "k.safetensors", tensors), tmp_path / "p.safetensors", "--to", "peft") == 0
    text = capsys.readouterr().err
    assert "1 tensors that nobody understands are left out: what.is.this" in text
    assert "1 modules that are none of Stable Diffusion's are left out: lora_unet_odd_thing" in text
    assert "1 tensors of bundled embeddings are left out: bundle_emb.cat.clip_l" in text


def test_kinds_that_peft_files_cannot_hold(tmp_path, capsys):
    loha = {f"{NAME}.hada_{part}": torch.ones(4, 4) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
    tucker = {
        f"{NAME.replace('in', 'out')}.lora_{part}.weight": torch.ones(4, 4, 1, 1) for part in ("down", "mid", "up")
    }
    source = save(tmp_path / "k.safetensors", {**loha, **tucker})
    assert run(source, tmp_path / "p.safetensors", "--to", "peft", "--base", "sd1") == 2
    text = capsys.readouterr().err
    assert f"LoHa modules (such as {NAME}) have no place there" in text
    assert "LoRA modules with lora_mid.weight" in text
    assert not (tmp_path / "p.safetensors").exists()


@pytest.mark.parametrize(("base", "prefix"), [("sd1", "lora_te_text"), ("sdxl", "lora_te1_text")])
def test_the_base_is_asked_for_when_nothing_tells_it(tmp_path, capsys, base, prefix):
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    source = save(
        tmp_path / "p.safetensors",
        {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(4, 2)},
    )
    target = tmp_path / "k.safetensors"
    assert run(source, target, "--to", "kohya") == 2
    assert "Add --base with one of sd1, sd2, sdxl" in capsys.readouterr().err
    assert run(source, target, "--to", "kohya", "--base", base) == 0
    assert all(name.startswith(prefix) for name in inspect_lora(target).names)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("{source}", "x.safetensors"), "--to: is required. Give one of kohya, peft, diffusers."),
        (("{source}", "{source}", "--to", "peft"), "is the file that is read. Choose another name."),
        (("{source}", "folder", "--to", "peft"), "folder: is no name of a LoRA file."),
        (("missing.safetensors", "x.safetensors", "--to", "peft"), "missing.safetensors: no such file."),
    ],
)
def test_bad_command_lines(sources, capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    assert run(*(item.format(source=sources["sd15"]) for item in argv)) == 2
    assert message in capsys.readouterr().err
