"""networks/extract_lora_from_models.py and extract_lora_from_dylora.py."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from merge_helpers import delta_of, header_of, layer_shapes, run
from safetensors.torch import load_file, save_file

from networks import extract_lora_from_dylora, extract_lora_from_models

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
TEXT_LAYER = "text_model.encoder.layers.0.mlp.fc1.weight"
UNET_LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"


def errors_of(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]


@cache
def tiny_parts(family):
    from library.models.random_models import random_parts

    return random_parts(family)


def save_model(path, family, unet, text, layout="safetensors", precision=None):
    from dataclasses import replace

    from library.checkpoints.parts import SaveSettings
    from library.checkpoints.save import save_checkpoint
    from library.models.specs import stable_diffusion_family

    parts = replace(tiny_parts(family), unet=unet, text=text)
    settings = SaveSettings(precision=precision, allow_nan=True)
    return save_checkpoint(path, layout, parts, spec=stable_diffusion_family(family), settings=settings)


def changed(tensors, wanted, rank, size=0.1, seed=0):
    """The tensors with a random change of a rank added to those that are wanted, and the changes."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name, tensor in tensors.items():
        if wanted(name):
            factors = (torch.randn((rows, rank), generator=generator) for rows in (len(tensor), tensor[0].numel()))
            left, right = factors
            changes[name] = size * (left @ right.T).reshape(tensor.shape)
    return {name: tensor + changes.get(name, 0) for name, tensor in tensors.items()}, changes


def trainable(name):
    return name.endswith(".weight") and any(word in name for word in (".attentions.", "self_attn", ".mlp."))


def matrices(tensors):
    return lambda name: name.endswith(".weight") and tensors[name].dim() >= 2 and "embeddings" not in name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Per family: the original, a tuned one with changes of rank 4 everywhere, and those changes."""
    folder = tmp_path_factory.mktemp("pairs")

    @cache
    def make(family):
        parts = tiny_parts(family)
        original = save_model(folder / f"{family}.safetensors", family, parts.unet, parts.text)
        unet, unet_changes = changed(parts.unet, matrices(parts.unet), 4)
        text, text_changes = changed(parts.text, matrices(parts.text), 4, seed=1)
        tuned = save_model(folder / f"{family}-tuned.safetensors", family, unet, text)
        return original, tuned, {"unet": unet_changes, "text": text_changes}

    return make


def extract(original, tuned, target, *options):
    words = ("--model_org", original, "--model_tuned", tuned, "--save_to", target)
    return run(extract_lora_from_models, *words, *options)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_changes_of_low_rank_are_recovered(models, tmp_path, family):
    original, tuned, changes = models(family)
    target = tmp_path / "lora.safetensors"
    options = ["--conv_dim", 4, *(["--v2"] if family == "sd2" else [])]
    assert extract(original, tuned, target, *options) == 0
    tensors = load_file(target)
    layers = layer_shapes(family, conv=True)
    assert {name.partition(".")[0] for name in tensors} == set(layers)
    for name, (part, path, shape) in layers.items():
        expected = changes[part][f"{path}.weight"].double()
        assert torch.allclose(delta_of(tensors, name, shape), expected, atol=2e-5 * float(expected.abs().max()) + 1e-6)
        assert float(tensors[f"{name}.alpha"]) == 4


def test_without_conv_dim_only_attention_is_in_it(models, tmp_path):
    original, tuned, _ = models("sd1")
    target = tmp_path / "lora.safetensors"
    assert extract(original, tuned, target, "--dim", 2) == 0
    tensors = load_file(target)
    assert {name.partition(".")[0] for name in tensors} == set(layer_shapes("sd1"))
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_down" in name} == {2}


@pytest.mark.parametrize(
    ("golden", "family", "conv"), [("sd15", "sd1", False), ("sd15_conv", "sd1", True), ("sd21", "sd2", False)]
)
def test_layers_are_those_of_networks_lora(golden, family, conv):
    # Real names and numbers of dimensions, without data; the golden list of the checkpoint has diffusers' names.
    version = golden.removesuffix("_conv")
    names = json.loads((GOLDEN / f"lora_keys_{golden}.json").read_text())
    wanted = {name.partition(".")[0] for name in names}
    rows = json.loads((GOLDEN / f"ckpt_keys_{version}.json").read_text()).values()
    found = set()
    for part, component in (("unet", "unet"), ("text_encoder", "text_encoder")):
        weights = {}
        for row in rows:
            if row["component"] != component or row.get("optional"):
                continue
            keys = row["diffusers"] if isinstance(row["diffusers"], list) else [row["diffusers"]]
            shape = row.get("diffusers_shape") or row["shape"]
            weights.update({key: torch.empty(shape, device="meta") for key in keys if key})
        found |= set(extract_lora_from_models.lora_layers(weights, part, conv=conv))
    assert found == wanted


def test_merged_file_gives_the_tuned_model(tmp_path):
    from merge_helpers import model_weights

    from networks import merge_lora

    parts = tiny_parts("sd1")
    original = save_model(tmp_path / "a.safetensors", "sd1", parts.unet, parts.text)
    unet, _ = changed(parts.unet, trainable_matrix(parts.unet), 4)
    text, _ = changed(parts.text, trainable_matrix(parts.text), 4, seed=1)
    tuned = save_model(tmp_path / "b.safetensors", "sd1", unet, text)
    lora, merged = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    assert extract(original, tuned, lora) == 0
    words = ("--sd_model", original, "--models", lora, "--ratios", "1", "--save_to", merged)
    assert run(merge_lora, *words) == 0
    found, expected = model_weights(merged, "sd1"), model_weights(tuned, "sd1")
    for part in ("unet", "text"):
        for name, tensor in expected[part].items():
            assert torch.allclose(found[part][name], tensor, atol=1e-5), name


def trainable_matrix(tensors):
    return lambda name: trainable(name) and tensors[name].dim() >= 2


@pytest.mark.parametrize("layout", ["ckpt", "diffusers", "diffusers_safetensors"])
def test_models_of_every_format(models, tmp_path, layout):
    original, _, changes = models("sd1")
    parts = tiny_parts("sd1")
    unet, _ = changed(parts.unet, matrices(parts.unet), 4)
    text, _ = changed(parts.text, matrices(parts.text), 4, seed=1)
    name = "tuned" if layout.startswith("diffusers") else f"tuned.{layout}"
    tuned = save_model(tmp_path / name, "sd1", unet, text, layout)
    target = tmp_path / "lora.safetensors"
    assert extract(original, tuned, target) == 0
    name, (part, path, shape) = next(iter(layer_shapes("sd1").items()))
    assert torch.allclose(delta_of(load_file(target), name, shape).float(), changes[part][f"{path}.weight"], atol=1e-4)


@pytest.mark.parametrize(("options", "has_text"), [([], False), (["--min_diff", "0.001"], True)])
def test_text_encoder_is_left_out_below_min_diff(tmp_path, caplog, options, has_text):
    parts = tiny_parts("sd1")
    original = save_model(tmp_path / "a.safetensors", "sd1", parts.unet, parts.text)
    unet, _ = changed(parts.unet, lambda name: name == UNET_LAYER, 2)
    text = {**parts.text, TEXT_LAYER: parts.text[TEXT_LAYER] + 0.005}
    tuned = save_model(tmp_path / "b.safetensors", "sd1", unet, text)
    target = tmp_path / "lora.safetensors"
    assert extract(original, tuned, target, *options) == 0
    assert any(name.startswith("lora_te") for name in load_file(target)) == has_text
    assert ("--min_diff" in caplog.text) != has_text


def test_factors_are_clamped_only_when_asked(models, tmp_path):
    original, tuned, _ = models("sd1")
    largest = {}
    for quantile in ("1", "0.9"):
        target = tmp_path / f"lora-{quantile}.safetensors"
        assert extract(original, tuned, target, "--clamp_quantile", quantile) == 0
        tensors = load_file(target)
        name = "lora_unet_mid_block_attentions_0_proj_in"
        factors = [tensors[f"{name}.lora_{side}.weight"].flatten() for side in ("up", "down")]
        values = torch.cat(factors)
        largest[quantile] = (values == values.max()).sum()
    assert largest["1"] == 1
    assert largest["0.9"] > 10


def test_precision_and_metadata(models, tmp_path):
    original, tuned, _ = models("sd1")
    target = tmp_path / "my lora.safetensors"
    assert extract(original, tuned, target, "--dim", 3, "--conv_dim", 2, "--save_precision", "fp16") == 0
    assert {tensor.dtype for tensor in load_file(target).values()} == {torch.float16}
    found = header_of(target)
    assert found["ss_base_model_version"] == "sd_v1"
    assert (found["ss_v2"], found["ss_network_dim"], found["ss_network_alpha"]) == ("False", "3", "3.0")
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2.0"}
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["modelspec.title"] == "my lora"
    assert extract(original, tuned, target, "--no_metadata") == 0
    assert not any(name.startswith("modelspec") for name in header_of(target))


def test_options_without_effect_are_named(models, tmp_path, caplog):
    original, tuned, _ = models("sd1")
    words = ("--load_original_model_to", "cpu", "--load_precision", "fp16", "--device", "cpu")
    assert extract(original, tuned, tmp_path / "lora.safetensors", *words) == 0
    assert "--load_original_model_to" in caplog.text
    assert "--load_precision" not in caplog.text


def test_bad_models_are_one_line(models, tmp_path, capsys):
    original, tuned, _ = models("sd1")
    target = tmp_path / "lora.safetensors"
    parts = tiny_parts("sd1")
    unet = {**parts.unet, UNET_LAYER: torch.full_like(parts.unet[UNET_LAYER], float("nan"))}
    nan = save_model(tmp_path / "nan.safetensors", "sd1", unet, parts.text)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tuned.read_bytes()[:-10])
    other = models("sd2")[0]
    cases = {
        "NaN": (original, nan),
        "is the same": (original, original),
        "cut.safetensors": (original, cut),
        "Add --v2": (original, other),
        "absent": (original, tmp_path / "absent.safetensors"),
    }
    for word, (first, second) in cases.items():
        assert extract(first, second, target) == 2
        (line,) = errors_of(capsys)
        assert word in line
    assert extract(original, tuned, target, "--sdxl") == 2
    assert "--sdxl" in errors_of(capsys)[0]
    assert not target.exists()


# DyLoRA --------------------------------------------------------------------------------------------------------------


def dylora(path, rank=6, metadata=None):
    generator = torch.Generator().manual_seed(0)
    name = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {
        f"{name}.lora_down.weight": torch.randn((rank, 5, 3, 3), generator=generator),
        f"{name}.lora_up.weight": torch.randn((7, rank, 1, 1), generator=generator),
        f"{name}.alpha": torch.tensor(3.0),
    }
    save_file(tensors, path, metadata)
    return tensors, name


@pytest.mark.parametrize(("options", "unit"), [(["--unit", "2"], "1"), ([], "2")])
def test_dylora_is_cut_into_its_first_ranks(tmp_path, options, unit):
    metadata = {"ss_network_dim": "6", "ss_network_args": json.dumps({"unit": unit})}
    tensors, name = dylora(tmp_path / "dy.safetensors", metadata=metadata)
    words = ("--model", tmp_path / "dy.safetensors", "--save_to", tmp_path / "out.safetensors")
    assert run(extract_lora_from_dylora, *words, *options) == 0
    assert {path.name for path in tmp_path.glob("out*")} == {"out-0002.safetensors", "out-0004.safetensors"}
    cut = load_file(tmp_path / "out-0004.safetensors")
    assert torch.equal(cut[f"{name}.lora_down.weight"], tensors[f"{name}.lora_down.weight"][:4])
    assert torch.equal(cut[f"{name}.lora_up.weight"], tensors[f"{name}.lora_up.weight"][:, :4])
    assert float(cut[f"{name}.alpha"]) == 3
    found = header_of(tmp_path / "out-0004.safetensors")
    assert found["ss_network_dim"] == "4"
    assert found["ss_training_comment"] == "split from DyLoRA, rank 6 to 4"


@pytest.mark.parametrize(
    ("options", "word"), [(["--unit", "6"], "nothing to cut"), ([], "--unit"), (["--unit", "0"], "--unit")]
)
def test_dylora_that_cannot_be_cut(tmp_path, capsys, options, word):
    dylora(tmp_path / "dy.safetensors")
    words = ("--model", tmp_path / "dy.safetensors", "--save_to", tmp_path / "out.safetensors")
    assert run(extract_lora_from_dylora, *words, *options) == 2
    (line,) = errors_of(capsys)
    assert word in line
    assert not list(tmp_path.glob("out*"))
