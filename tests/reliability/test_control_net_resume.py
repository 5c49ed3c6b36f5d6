"""ControlNet training that is stopped or killed and resumed ends with the same bits as a run that was not."""

import pytest

from tests.control_training import FINAL, control_words, train_control_net
from tests.support import tensor_digest

SCRIPT = "stable_cascade_train_c_control_net.py"
SAVING = ("--save_state", "--save_every_n_steps=2", "--lr_scheduler=cosine")
VARIANTS = {
    "random masks, flips, accumulation, tar files": "--controlnet_filter=inpaint --flip_aug "
    "--gradient_accumulation_steps=2",
    "average, adaptive weights": "--ema_decay=0.9 --adaptive_loss_weight --noise_offset=0.1",
    "latents, cached, image checkpointing": "--controlnet_filter=sr_effnet --controlnet_bottleneck_mode=simple "
    "--cache_latents --gradient_checkpointing",
    "bfloat16": "--mixed_precision=bf16 --full_bf16",
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_in_the_middle_ends_with_the_same_bits(
    control_cascade, photo_folders, caption_shards, tmp_path, variant
):
    more = (*VARIANTS[variant].split(), *SAVING)
    data = caption_shards if "tar files" in variant else photo_folders
    straight, again = tmp_path / "straight", tmp_path / "again"
    assert train_control_net(*control_words(control_cascade, data, straight, *more)) == 0
    state = straight / "net-step00000002-state"
    assert train_control_net(*control_words(control_cascade, data, again, *more, f"--resume={state}")) == 0
    for name in (FINAL, *(["net_ema.safetensors"] if "ema" in VARIANTS[variant] else [])):
        assert tensor_digest(again / name) == tensor_digest(straight / name)
    assert tensor_digest(again / FINAL) != tensor_digest(straight / "net-step00000002.safetensors")


def test_another_filter_or_other_blocks_are_no_continuation(control_cascade, photo_folders, tmp_path, capsys):
    words = control_words(control_cascade, photo_folders, tmp_path)
    assert train_control_net(*words, "--save_state") == 0
    for change in (
        ("--controlnet_filter=sr",),
        ("--controlnet_filter_params", "resize=64"),
        ("--controlnet_blocks", "1"),
    ):
        assert train_control_net(*words, "--resume=latest", *change) == 2
        assert change[0].removeprefix("--").partition("=")[0] in capsys.readouterr().err


KILLS = ("step.optimizer_mid:kill9:2", "state.between_files:kill9:3")


def test_killed_again_and_again(fork_server, control_cascade, photo_folders, tmp_path):
    more = ("--save_state", "--save_every_n_steps=1", "--controlnet_filter=inpaint", "--ema_decay=0.9")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train_control_net(*control_words(control_cascade, photo_folders, straight, *more)) == 0
    words = control_words(control_cascade, photo_folders, killed, *more)
    assert fork_server.run_killed(SCRIPT, words, KILLS) == len(KILLS)
    for name in (FINAL, "net_ema.safetensors"):
        assert tensor_digest(killed / name) == tensor_digest(straight / name)
