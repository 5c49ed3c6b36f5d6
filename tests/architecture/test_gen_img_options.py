"""The options of gen_img.py: those that users' command lines were written for, each with an effect or a reason."""

import pytest

import gen_img
import sdxl_gen_img
from library.cli import run_script
from library.option_parser import parse
from library.retired import ELSEWHERE, SPELLINGS

OPTIONS = gen_img.Options.options()
START = ["--ckpt=m.safetensors", "--prompt=a cat"]


def test_the_script_for_sdxl_has_the_same_options():
    assert set(OPTIONS) == set(sdxl_gen_img.Options.options())
    assert SPELLINGS["control_net_weights"] in OPTIONS


@pytest.mark.parametrize(
    "words",
    [
        ["--sdxl"],
        ["--clip_vision_strength=1"],
        ["--original_height=512"],
        ["--crop_top=0"],
        ["--control_net_lllite_models", "m.safetensors"],
    ],
)
def test_what_only_sdxl_has_is_refused_with_a_reason(words, capsys):
    assert run_script(gen_img.Options, lambda opts: pytest.fail("it was to be refused"), [*START, *words]) == 2
    error = capsys.readouterr().err
    assert words[0].partition("=")[0] in error
    assert "come with a later release" in error


def test_the_script_for_sdxl_says_that_it_is_not_there_yet(capsys):
    assert run_script(sdxl_gen_img.Options, lambda opts: pytest.fail("it was to be refused"), START) == 2
    assert capsys.readouterr().err == (
        "error: --sdxl: SDXL models come with a later release. "
        "gen_img.py draws with Stable Diffusion 1.x and 2.x models.\n"
    )


def test_old_names_and_options_of_older_scripts(tmp_path):
    for name in ("net", "guide.png", "m.safetensors"):
        (tmp_path / name).touch()
    words = ["--control_net_models", str(tmp_path / "net"), "--guide_image_path", str(tmp_path / "guide.png")]
    assert parse(gen_img.Options, [*START, *words, "--control_net_weights", "0.5"]).control.control_net_multipliers == (
        0.5,
    )
    assert "XTI" in ELSEWHERE["XTI_embeddings"]
    assert "VGG16" in ELSEWHERE["vgg16_guidance_scale"]


def test_an_empty_prompt_is_a_prompt():
    assert parse(gen_img.Options, ["--ckpt=m", "--prompt="]).source.prompt == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ckpt=m"], "there is no prompt"),
        (["--prompt=a cat"], "--ckpt: is required"),
        ([*START, "--from_file=none.txt"], "--from_file: cannot be combined with --prompt"),
        ([*START, "--network_mul", "0.5"], "--network_mul: 1 values for 0 of --network_weights. Give the files"),
        ([*START, "--network_weights", "none.safetensors"], "--network_weights none.safetensors: no such file"),
        ([*START, "--network_merge"], "--network_merge: needs --network_weights"),
        ([*START, "--mask_path=."], "--mask_path: is a mask of --image_path, or of the regions"),
        ([*START, "--image_path=none.png"], "--image_path none.png: no such file or folder"),
        ([*START, "--W=63"], "--W: must be between 64 and 8192 pixels"),
        ([*START, "--sampler=euler_b"], "did you mean 'euler"),
        ([*START, "--fp16", "--bf16"], "--fp16: cannot be combined with --bf16"),
        ([*START, "--v1", "--v2"], "--v1: cannot be combined with --v2"),
        ([*START, "--pyramid_noise_prob=0.5"], "--pyramid_noise_discount_range: needs two numbers"),
        ([*START, "--XTI_embeddings", "x"], "which gen_img.py does without"),
        ([*START, "--from=x"], "options may not be abbreviated. Write --from_file or --from_module"),
    ],
)
def test_mistakes_are_told_in_one_line_each(words, message, capsys):
    assert run_script(gen_img.Options, lambda opts: pytest.fail("it was to be refused"), words) == 2
    assert message in capsys.readouterr().err
