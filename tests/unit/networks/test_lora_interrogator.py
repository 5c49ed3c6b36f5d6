"""networks/lora_interrogator.py: the tokens that a LoRA was made to change come out first."""

import pytest
import torch
from merge_helpers import layer_shapes, random_lora, run
from safetensors.torch import save_file

from networks import lora_interrogator

LAYER = "lora_te_text_model_encoder_layers_1_mlp_fc1"


@pytest.fixture(scope="module")
def text_lora(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    layers = {name: row for name, row in layer_shapes("sd1").items() if row[0] == "text"}
    random_lora(path, layers)
    return path


def errors_of(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]


def build(tensors, config):
    from library.models.clip_text import build_text_encoder

    return build_text_encoder(config, tensors, device=torch.device("cpu"), dtype=torch.float32)


def test_changes_are_those_of_whole_prompts(tiny_sd1, text_lora):
    # A prompt of 77 tokens as the trainer encodes it, with the LoRA's formula written out.
    from library.checkpoints.load import load_parts
    from library.checkpoints.lora_file import read_lora

    parts = load_parts(str(tiny_sd1), "sd1")
    lora = read_lora(text_lora)
    weights = dict(parts.text)
    for name, (part, path, _) in layer_shapes("sd1").items():
        if part == "text":
            factors = lora.modules[name].tensors
            delta = factors["lora_up.weight"] @ factors["lora_down.weight"]
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + delta * float(factors["alpha"]) / 4
    before, after = build(parts.text, parts.text_config), build(weights, parts.text_config)
    found = lora_interrogator.token_changes(before, after, skip=0, batch_size=3, tokens=7)
    for token in range(7):
        ids = torch.tensor([[49406, token, *[49407] * 75]])
        expected = (before(ids)[0, 1] - after(ids)[0, 1]).abs().mean()
        assert float(found[token]) == pytest.approx(float(expected), rel=1e-4)


def test_batch_size_changes_nothing(tiny_sd1, text_lora):
    from library.models.tokenizer import VOCABULARY_SIZE

    options = {"sd_model": str(tiny_sd1), "model": str(text_lora)}
    found = lora_interrogator.interrogate(lora_interrogator.InterrogateOptions(**options, batch_size=4096))
    assert len(found) == 100
    changes = [change for _, _, change in found]
    assert changes == sorted(changes, reverse=True)
    assert all(0 <= token < VOCABULARY_SIZE and isinstance(text, str) for token, text, _ in found)


def test_the_list_has_the_form_of_other_tools(tiny_sd1, text_lora, capsys):
    words = ("--sd_model", tiny_sd1, "--model", text_lora, "--batch_size", 8192, "--clip_skip", 2)
    assert run(lora_interrogator, *words) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "top 100:"
    assert second.startswith("[  0]: ")


def test_tokens_read_as_text():
    texts = lora_interrogator._token_texts()
    assert len(texts) == 49408
    assert texts[1929] == "dog"
    assert any("é" in text for text in texts)


def test_a_lora_of_the_unet_alone_is_refused(tiny_sd1, tmp_path, capsys):
    path = tmp_path / "unet.safetensors"
    random_lora(path, {name: row for name, row in layer_shapes("sd1").items() if row[0] == "unet"})
    assert run(lora_interrogator, "--sd_model", tiny_sd1, "--model", path) == 2
    (line,) = errors_of(capsys)
    assert "nothing for the text encoder" in line


def test_a_lora_for_another_model_is_refused(tiny_sd1, tmp_path, capsys):
    path = tmp_path / "other.safetensors"
    names = {side: f"lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_{side}.weight" for side in ("down", "up")}
    save_file({names["down"]: torch.ones(2, 1280), names["up"]: torch.ones(5120, 2)}, path)
    assert run(lora_interrogator, "--sd_model", tiny_sd1, "--model", path) == 2
    (line,) = errors_of(capsys)
    assert "SDXL" in line


def test_modules_that_fit_nothing_are_named(tiny_sd1, tmp_path, caplog, text_lora):
    from safetensors.torch import load_file

    path = tmp_path / "deep.safetensors"
    tensors = load_file(text_lora)
    deep = {key.replace("layers_1_", "layers_7_"): tensor.clone() for key, tensor in tensors.items() if LAYER in key}
    save_file({**tensors, **deep}, path)
    words = ("--sd_model", tiny_sd1, "--model", path, "--batch_size", 8192)
    assert run(lora_interrogator, *words) == 0
    assert "encoder_layers_7_mlp_fc1" in caplog.text


def test_clip_skip_beyond_the_encoder(tiny_sd1, text_lora, capsys):
    assert run(lora_interrogator, "--sd_model", tiny_sd1, "--model", text_lora, "--clip_skip", 9) == 2
    assert "--clip_skip" in errors_of(capsys)[0]
