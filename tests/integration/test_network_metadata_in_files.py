"""What a saved network says about itself, read with the safetensors library and checked with its bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save

from tests.support import train_network

SPOKEN_OF = """
    session_id training_started_at training_finished_at output_name learning_rate text_encoder_lr unet_lr
    num_train_images num_validation_images num_reg_images num_batches_per_epoch num_epochs epoch steps
    gradient_checkpointing gradient_accumulation_steps max_train_steps lr_warmup_steps lr_scheduler network_module
    network_dim network_alpha network_dropout network_args mixed_precision full_fp16 v2 base_model_version clip_skip
    max_token_length cache_latents seed lowram noise_offset noise_offset_random_strength multires_noise_iterations
    multires_noise_discount adaptive_noise_scale zero_terminal_snr training_comment sd_scripts_commit_hash optimizer
    max_grad_norm caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range
    prior_loss_weight min_snr_gamma scale_weight_norms ip_noise_gamma ip_noise_gamma_random_strength
    debiased_estimation loss_type huber_schedule huber_scale huber_c fp8_base fp8_base_unet validation_seed
    validation_split max_validation_steps validate_every_n_epochs validate_every_n_steps resize_interpolation
    sd_model_name sd_model_hash new_sd_model_hash batch_size_per_device total_batch_size resolution color_aug flip_aug
    random_crop shuffle_caption enable_bucket bucket_no_upscale min_bucket_reso max_bucket_reso keep_tokens
    dataset_dirs reg_dataset_dirs tag_frequency bucket_info
"""
LITTLE = "v2 base_model_version network_module network_dim network_alpha network_args"
HASHES = {"sshs_model_hash", "sshs_legacy_hash"}


@pytest.fixture
def run(tiny_sd1, photo_folders, tmp_path):
    """Train for an update; returns the saved network and its metadata."""

    def train(*argv: str, module: str = "networks.lora") -> tuple[Path, dict[str, str]]:
        options = {
            "pretrained_model_name_or_path": tiny_sd1,
            "train_data_dir": photo_folders,
            "output_dir": tmp_path / "out",
            "output_name": "net",
            "resolution": 64,
            "max_train_steps": 1,
            "max_data_loader_n_workers": 0,
            "seed": 7,
            "network_module": module,
            "network_dim": 16,
            "training_comment": "a comment",
        }
        status = train_network(*(f"--{key}={value}" for key, value in options.items()), *argv)
        assert status == 0
        saved = tmp_path / "out" / "net.safetensors"
        with safe_open(saved, framework="pt") as file:
            return saved, file.metadata()

    return train


def assert_hashes_true(saved: Path, metadata: dict[str, str]) -> None:
    content = saved.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    told = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    plain = save(load_file(saved), told)
    assert len(plain) > 0x110000, "too small a network for the old hash, which begins at 1 MiB"
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8]


def test_everything_is_told(run, tiny_sd1):
    saved, metadata = run("--network_args", "conv_dim=16")
    assert {name for name in metadata if name.startswith("ss_")} == {f"ss_{name}" for name in SPOKEN_OF.split()}
    assert {name for name in metadata if name.startswith("sshs_")} == HASHES
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_base_model_version"] == "sd_v1"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "16"}
    assert metadata["ss_training_comment"] == "a comment" and metadata["ss_network_dropout"] == "None"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    base = tiny_sd1.read_bytes()
    assert metadata["ss_new_sd_model_hash"] == hashlib.sha256(base).hexdigest()
    assert metadata["ss_sd_model_hash"] == hashlib.sha256(base[0x100000:0x110000]).hexdigest()[:8]
    assert_hashes_true(saved, metadata)
    assert not any(str(saved.parent) in value or str(tiny_sd1.parent) in value for value in metadata.values())


@pytest.mark.parametrize("module", ["networks.lora", "lycoris.kohya"])
def test_little_is_told_with_no_metadata(run, module):
    if module.startswith("lycoris"):
        pytest.importorskip("lycoris")
    more = ("--network_args", "conv_dim=16") if module == "networks.lora" else ("--network_args", "algo=locon")
    saved, metadata = run("--no_metadata", *more, module=module)
    assert {name for name in metadata if name.startswith("ss_")} == {f"ss_{name}" for name in LITTLE.split()}
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert_hashes_true(saved, metadata)


def test_precision_and_hashes_agree(run):
    saved, metadata = run("--save_precision=fp16", "--network_dim=64")
    assert {str(value.dtype) for value in load_file(saved).values()} == {"torch.float16"}
    assert_hashes_true(saved, metadata)
