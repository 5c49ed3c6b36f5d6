"""Loading, running and saving Stable Diffusion models through the family."""

import hashlib
import json
import logging
import re
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.models.family import WeightPlan
from library.models.options import MemoryOptions, ModelOptions, TextOptions
from library.models.random_models import make_random_sd, random_parts
from library.models.sd import StableDiffusion
from library.models.sd_attention import CrossAttention
from library.models.specs import SD1, SD2, stable_diffusion_spec

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def parts():
    return random_parts("sd1")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return make_random_sd(tmp_path_factory.mktemp("model") / "tiny")


def load(path, weights=None, memory=None, **options):
    model = ModelOptions(pretrained_model_name_or_path=str(path), **options)
    return StableDiffusion.load(
        model,
        TextOptions(),
        memory or MemoryOptions(),
        spec=stable_diffusion_spec(model),
        weights=weights or WeightPlan(),
    )


def tensors_of(path):
    from library.checkpoints.tensor_files import open_tensors

    return {name: tensor.clone() for name, tensor in open_tensors(path).items()}


class FixedDraws:
    def __init__(self, rows):
        self.rows = rows

    def normal(self, name, shape, dtype=torch.float32):
        assert name == "posterior"
        return torch.full((self.rows, *shape), 0.5, dtype=dtype)


@pytest.mark.parametrize("layout", ["safetensors", "ckpt"])
def test_training_never_writes_to_the_file_it_came_from(tmp_path, layout):
    path = make_random_sd(tmp_path / "model", layout=layout)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    family = load(path)
    with torch.no_grad():
        for part in family.parts().values():
            for parameter in part.parameters():
                parameter.add_(1.0)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert float(load(path).unet.conv_in.weight.mean()) < 0.5


def test_models_arrive_frozen_with_the_names_of_files(model_file):
    family = load(model_file)
    assert list(family.parts()) == ["unet", "text_encoder"]
    assert not any(p.requires_grad for part in family.parts().values() for p in part.parameters())
    assert not any(module.training for part in family.parts().values() for module in part.modules())
    assert all(name.startswith("text_model.") for name in family.text_encoder.state_dict())
    assert [name for name, _ in family.text_encoder.named_children()] == ["text_model"]
    classes = {type(module).__name__ for part in family.parts().values() for module in part.modules()}
    assert {"CrossAttention", "CLIPAttention", "CLIPMLP", "Transformer2DModel", "ResnetBlock2D"} <= classes
    assert "Attention" not in classes
    assert sum(isinstance(module, CrossAttention) for module in family.unet.modules()) == 32
    assert family.text_encoder.text_model.embeddings.position_ids.tolist() == [list(range(77))]


def test_types_follow_the_plan(model_file):
    weights = WeightPlan(trained=("unet",), frozen_dtype=torch.bfloat16, vae_dtype=torch.float16)
    family = load(model_file, weights)
    assert {p.dtype for p in family.unet.parameters()} == {torch.float32}
    assert {p.dtype for p in family.text_encoder.parameters()} == {torch.bfloat16}
    assert not family.vae.loaded
    assert family.vae.model.dtype == torch.float16
    family.release_vae()
    assert not family.vae.loaded


def test_untouched_models_are_saved_bit_for_bit(tmp_path, model_file):
    half = WeightPlan(trained=(), frozen_dtype=torch.bfloat16, vae_dtype=torch.float16)
    family = load(model_file, half)
    saved = family.save(tmp_path / "v1.5", None, None, {"key": "value"}, epoch=1, step=2)
    assert saved == tmp_path / "v1.5.safetensors"
    before, after = tensors_of(model_file), tensors_of(saved)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_trained_weights_are_what_is_saved(tmp_path, model_file):
    family = load(model_file)
    with torch.no_grad():
        family.unet.conv_in.bias.fill_(3.0)
        family.text_encoder.text_model.final_layer_norm.bias.fill_(4.0)
    saved = family.save(tmp_path / "out", "diffusers_safetensors", torch.float16, None, epoch=0, step=0)
    again = load(saved)
    assert set(again.unet.conv_in.bias.tolist()) == {3.0}
    assert set(again.text_encoder.text_model.final_layer_norm.bias.tolist()) == {4.0}


def test_latents_are_the_posterior_sample(parts):
    family = StableDiffusion(SD1, TextOptions(), parts, WeightPlan())
    pixels = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    online = family.encode_images(pixels, FixedDraws(2))
    assert online.shape == (2, 4, 8, 4)
    assert online.dtype == torch.float32
    assert torch.equal(online, family.encode_latents(pixels, torch.full((2, 4, 8, 4), 0.5)))
    assert float(online.std()) > 1


def test_control_residuals_reach_the_unet(parts):
    family = StableDiffusion(SD1, TextOptions(), parts, WeightPlan())
    ids = torch.from_numpy(family.tokenizers[0].encode("a cat")[0])[None]
    condition = family.encode_text((ids,))
    noisy, t = torch.ones(1, 4, 8, 8), torch.tensor([5])
    plain = family.denoise(noisy, t, condition)
    middle = torch.ones(1, 64, 1, 1)
    down = [torch.zeros(1)] * 12
    controlled = family.denoise(
        noisy, t, condition, {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    )
    assert not torch.allclose(plain, controlled)


def test_half_precision_weights_run_with_and_without_autocast(parts):
    weights = WeightPlan(trained_dtype=torch.bfloat16)
    family = StableDiffusion(SD1, TextOptions(), parts, weights)
    ids = torch.from_numpy(family.tokenizers[0].encode("a cat")[0])[None]
    noisy, t = torch.ones(1, 4, 8, 8), torch.tensor([5])
    plain = family.denoise(noisy, t, family.encode_text((ids,)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = family.denoise(noisy, t, family.encode_text((ids,)))
    torch.testing.assert_close(plain.float(), cast.float(), atol=0.1, rtol=0.1)


def test_fingerprint_of_the_vae_is_that_of_its_encoder(parts):
    family = StableDiffusion(SD1, TextOptions(), parts, WeightPlan())
    first = family.fingerprint("vae")
    decoder = {**parts.vae, "decoder.conv_in.bias": parts.vae["decoder.conv_in.bias"] + 1}
    encoder = {**parts.vae, "encoder.conv_in.bias": parts.vae["encoder.conv_in.bias"] + 1}

    def other(vae):
        changed = type(parts)(parts.unet, parts.unet_config, parts.text, parts.text_config, vae, parts.vae_config)
        return StableDiffusion(SD1, TextOptions(), changed, WeightPlan()).fingerprint("vae")

    assert other(decoder) == first
    assert other(encoder) != first
    assert family.fingerprint("unet") != family.fingerprint("text_encoder")


@pytest.mark.parametrize("spec", [SD1, SD2])
def test_captions_without_padding_end_with_the_longest_of_the_batch(parts, spec):
    family, padded = (
        StableDiffusion(spec, TextOptions(no_token_padding=unpadded), parts, WeightPlan()) for unpadded in (True, False)
    )
    texts = ["a cat", "a cat and a dog"]
    ids, full = (
        torch.stack([torch.from_numpy(one.tokenizers[0].encode(text)[0]) for text in texts]) for one in (family, padded)
    )
    hidden = family.encode_text((ids,)).hidden
    assert hidden.shape == (2, 7, 64)
    torch.testing.assert_close(hidden, padded.encode_text((full,)).hidden[:, :7])


@pytest.mark.parametrize("clip_skip", [0, 3])
def test_clip_skip_beyond_the_layers_is_refused(parts, clip_skip):
    with pytest.raises(UserError, match="--clip_skip"):
        StableDiffusion(SD1, TextOptions(clip_skip=clip_skip), parts, WeightPlan())


def test_layers_that_clip_skip_leaves_out_are_named(parts):
    family = StableDiffusion(SD1, TextOptions(clip_skip=2), parts, WeightPlan())
    family.text_encoder.requires_grad_(True)
    family.encode_text((torch.zeros(1, 1, 77, dtype=torch.long),)).hidden.sum().backward()
    without = {id(p) for p in family.text_encoder.parameters() if p.grad is None}
    assert without == {id(p) for p in family.unused_parameters()}
    assert without


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused_by_name(tmp_path, value):
    path = broken_model(tmp_path, "conv_in.bias", value)
    with pytest.raises(UserError, match=r"conv_in\.bias.*--allow_nan_weights"):
        load(path)
    family = load(path, allow_nan_weights=True)
    assert Path(family.save(tmp_path / "again", None, None, None, epoch=0, step=0)).exists()


def test_a_matrix_of_zeros_is_reported(tmp_path, caplog):
    path = broken_model(tmp_path, "conv_in.weight", 0.0)
    with caplog.at_level(logging.WARNING):
        load(path)
    assert "conv_in.weight" in caplog.text


def broken_model(folder, name, value):
    from library.checkpoints.parts import SaveSettings
    from library.checkpoints.save import save_checkpoint

    parts = random_parts("sd1")
    parts.unet[name].fill_(value)
    return save_checkpoint(
        folder / "broken.safetensors", "safetensors", parts, spec=SD1, settings=SaveSettings(allow_nan=True)
    )


def test_equal_seeds_give_equal_files(tmp_path):
    first, second = (make_random_sd(tmp_path / name, seed=3) for name in ("a", "b"))
    other = make_random_sd(tmp_path / "c", seed=4)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(("family", "golden"), [("sd1", "ckpt_keys_sd15.json"), ("sd2", "ckpt_keys_sd21.json")])
def test_tiny_models_have_the_tensors_of_real_ones(tmp_path, family, golden):
    """Layers aside that a shallower text encoder lacks."""
    listed = json.loads((Path(__file__).parents[2] / "golden" / golden).read_text())
    names = set(tensors_of(make_random_sd(tmp_path / "model", family)))
    required = {name for name, entry in listed.items() if not entry.get("optional")}
    deeper = re.compile(r"cond_stage_model\..*\.(layers|resblocks)\.(?![01]\.)\d+\.")
    assert {name for name in required if not deeper.match(name)} <= names
    assert {name for name in names if not deeper.match(name)} <= set(listed)


def test_another_vae_replaces_the_own_one_and_is_saved(tmp_path, model_file):
    other = make_random_sd(tmp_path / "other", seed=9)
    family = load(model_file, vae=str(other))
    saved = tensors_of(family.save(tmp_path / "out", None, None, None, epoch=0, step=0))
    expected = tensors_of(other)
    for name, tensor in saved.items():
        assert torch.equal(tensor, expected[name]) == name.startswith("first_stage_model."), name


def test_xformers_without_a_gpu_gives_one_warning(model_file, caplog):
    with caplog.at_level(logging.WARNING):
        load(model_file, memory=MemoryOptions(xformers=True))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "--xformers" in caplog.text


def test_a_few_steps_lower_the_loss(model_file):
    family = load(model_file)
    parameters = [p.requires_grad_(True) for part in family.parts().values() for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    ids = torch.from_numpy(family.tokenizers[0].encode("a photo of a frog")[0]).expand(2, 1, 77)
    losses = []
    for _ in range(6):
        noisy = (latents + noise) * 0.5**0.5
        prediction = family.denoise(noisy, torch.tensor([300, 600]), family.encode_text((ids,)))
        loss = (prediction - noise).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
