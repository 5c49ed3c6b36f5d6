"""Command lines written for sd-scripts' branch for Stable Cascade: every option of theirs, with its default."""

import importlib
import json

import pytest

from library.option_parser import parse
from library.retired import NO_EFFECT_IN
from tests.conftest import ROOT

GOLDEN = json.loads((ROOT / "tests" / "golden" / "stable_cascade_options.json").read_text(encoding="utf-8"))
OTHER_DEFAULTS = {
    # Networks are not written as pickles.
    "stable_cascade_train_c_network": {"save_model_as": "safetensors"},
    # What they are for need not be said.
    "tools.stable_cascade_cache_latents": {"cache_latents": True, "cache_latents_to_disk": True},
    "tools.stable_cascade_cache_text_encoder_outputs": {
        "cache_text_encoder_outputs": True,
        "cache_text_encoder_outputs_to_disk": True,
    },
}
EMPTY = (None, ())


def options(script):
    return importlib.import_module(script).Options


@pytest.mark.parametrize("script", GOLDEN["scripts"])
def test_every_option_is_there_with_its_default(script):
    offered = {option.name: option for option in options(script).options().values() if option.offered}
    wanted = {}
    for group in GOLDEN["scripts"][script]:
        wanted |= GOLDEN["groups"][group]
    wanted |= OTHER_DEFAULTS.get(script, {})
    for name, default in wanted.items():
        found = offered[name].default
        if default not in (None, []) or found not in EMPTY:
            assert (list(found) if isinstance(found, tuple) else found) == default, name


TRAININGS = [f"stable_cascade_train_{name}" for name in ("stage_c", "stage_b", "c_network", "c_control_net")]
IGNORED_BY_SD_SCRIPTS = (
    *("clip_skip", "mem_eff_attn", "sample_sampler", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"),
    *("vae", "xformers", "zero_terminal_snr"),
)


@pytest.mark.parametrize("script", TRAININGS)
def test_what_cannot_have_an_effect_is_said(script):
    """sd-scripts took these without a word."""
    for name in IGNORED_BY_SD_SCRIPTS:
        assert options(script).options()[name].offered
        assert script in NO_EFFECT_IN[name], name


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("stable_cascade_train_stage_c", "--stage_c_checkpoint_path={0} --output_dir={1}"),
        (
            "stable_cascade_train_c_network",
            "--stage_c_checkpoint_path={0} --output_dir={1} --network_module=networks.lora",
        ),
        ("tools.stable_cascade_cache_latents", "--cache_latents_to_disk --skip_existing"),
    ],
)
def test_the_old_spelling_of_caption_extension_is_understood(tmp_path, script, words):
    file = tmp_path / "model.safetensors"
    file.touch()
    words = words.format(file, tmp_path / "out").split()
    more = [f"--effnet_checkpoint_path={file}", f"--train_data_dir={tmp_path}", "--resolution=768"]
    found = parse(options(script), [*words, *more, "--caption_extention=.txt"])
    assert found.subset.caption_extension == ".txt"
