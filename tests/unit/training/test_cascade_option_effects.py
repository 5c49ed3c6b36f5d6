"""Shared options in the Stable Cascade scripts: each changes what is trained on, or says that it does not."""

from __future__ import annotations

import logging

import pytest
import torch

import stable_cascade_train_c_control_net as control_net
import stable_cascade_train_c_network as network
import stable_cascade_train_stage_b as stage_b
import stable_cascade_train_stage_c as stage_c
from library.contracts import StepKey
from library.draws import Draws
from library.models.cascade.specs import STAGE_B, STAGE_C
from library.models.tokenizer import tokenizers_for
from library.option_parser import parse
from library.training.loss import make_loss

SCRIPTS = {"c": stage_c, "b": stage_b, "n": network, "k": control_net}
MORE = {"c": "", "b": "", "n": "--network_module=networks.lora", "k": "--controlnet_filter=canny"}
CPU = torch.device("cpu")
CAPTION = "a (duck:1.5) on a lake"


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Return what reads a command line of a script, with files that need not be read."""
    for name in ("stage", "effnet", "a", "vae"):
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "p.txt").write_text("a duck")
    monkeypatch.chdir(tmp_path)

    def parsed(script: str, words: str = ""):
        stage = "b" if script == "b" else "c"
        files = f"--stage_{stage}_checkpoint_path=stage.safetensors --effnet_checkpoint_path=effnet.safetensors"
        files += " --stage_a_checkpoint_path=a.safetensors" if stage == "b" else ""
        data = "--train_data_dir=photos --output_dir=out --resolution=64 --learning_rate=1e-4"
        return parse(SCRIPTS[script].Options, f"{files} {data} {MORE[script]} {words}".split())

    return parsed


def trained_on(options, spec) -> tuple[str, ...]:
    """Return the loss of each sample for a fixed prediction, what the model is shown, and the tokens of a caption."""
    noise = torch.Generator().manual_seed(0)
    latents, prediction = (torch.randn(4, spec.latent_channels, 6, 4, generator=noise) for _ in range(2))
    aim = options.objective(spec, CPU)
    noised = aim.noise(latents, Draws(7, StepKey(1, 0), 4, CPU))
    losses = make_loss(options.loss)(prediction, noised.target, None, noised.huber_c)
    weight = 1.0 if noised.weight is None else noised.weight
    (tokenizer,) = tokenizers_for(spec, options.text)
    tokens = [None if part is None else part.tolist() for part in tokenizer.encode(CAPTION)]
    return tuple(map(repr, ((losses * weight).tolist(), noised.noisy.sum().item(), noised.t.tolist(), tokens)))


DIFFERENT = (
    "--noise_offset=0.1",
    "--noise_offset=0.1 --adaptive_noise_scale=0.1",
    "--noise_offset=0.1 --noise_offset_random_strength",
    "--multires_noise_iterations=5",
    "--multires_noise_iterations=5 --multires_noise_discount=0.8",
    "--ip_noise_gamma=0.1",
    "--min_timestep=500",
    "--max_timestep=500",
    "--min_snr_gamma=1",
    "--debiased_estimation_loss",
    "--loss_type=huber",
    "--loss_type=huber --huber_c=0.5",
    "--loss_type=smooth_l1",
    "--loss_type=l1",
    "--loss_weighting=constant",
    "--loss_weighting=snr",
    "--loss_weighting=sech",
    "--weighted_captions",
    "--max_token_length=150",
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_of_noise_loss_and_captions_have_their_effect(opened, script):
    spec = STAGE_B if script == "b" else STAGE_C
    # The scripts for networks and ControlNets have the objective of the one for stage C: samples are enough.
    chosen = DIFFERENT if script in ("c", "b") else DIFFERENT[::5]
    found = {words: trained_on(opened(script, words), spec) for words in ("", *chosen)}
    assert [(a, b) for a in found for b in found if a < b and found[a] == found[b]] == []


SAID = {
    "--zero_terminal_snr": "ends in pure noise as it is",
    "--clip_skip=2": "the last layer of the text encoder",
    "--vae=vae.safetensors": "encoded by EfficientNet",
    "--scale_v_pred_loss_like_noise_pred": "never velocity",
    "--v_pred_like_loss=0.5": "never velocity",
    "--xformers": "the attention of PyTorch",
    "--mem_eff_attn": "the attention of PyTorch",
    "--lowram": "always mapped",
    "--prior_loss_weight=0.5": "has no effect without --reg_data_dir",
    "--bucket_random_ratio=0.1": "has no effect without --multi_aspect_ratio",
    "--webdataset_shuffle=9": "has no effect without --webdataset_streaming",
    "--multires_noise_discount=0.5": "has no effect without --multires_noise_iterations",
    "--huber_c=0.5": "has no effect without --loss_type",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_without_effect_are_pointed_out_once(opened, script, caplog):
    for words, reason in SAID.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            told = [*map(str, opened(script, words).warnings), *caplog.messages]
        name = words.partition("=")[0]
        about = [line for line in told if line.startswith(f"{name}:")]
        assert len(about) == 1 and reason in about[0], (words, told)
