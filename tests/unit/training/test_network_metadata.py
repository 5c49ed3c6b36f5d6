"""What saved networks say about their training: the exact keys, their values as text, and nothing private."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass

import pytest
import torch

from library.checkpoints import hashes
from library.contracts import ParamGroup
from library.data.opening import open_data
from library.data.scan import ScanContext
from library.models.specs import stable_diffusion_spec
from library.models.tokenizer import tokenizers_for
from library.option_parser import parse
from library.training import network_metadata as module
from library.training.network_metadata import MINIMAL, BaseHashes, network_metadata
from library.training.optimizers import build_optimizer
from library.training.options_network import NetworkTrainingOptions
from library.training.run_length import resolve_length

ALWAYS = """
    session_id training_started_at training_finished_at output_name learning_rate text_encoder_lr unet_lr
    num_train_images num_validation_images num_reg_images num_batches_per_epoch num_epochs epoch steps
    gradient_checkpointing gradient_accumulation_steps max_train_steps lr_warmup_steps lr_scheduler network_module
    network_dim network_alpha network_dropout mixed_precision full_fp16 v2 base_model_version clip_skip
    max_token_length cache_latents seed lowram noise_offset noise_offset_random_strength multires_noise_iterations
    multires_noise_discount adaptive_noise_scale zero_terminal_snr training_comment sd_scripts_commit_hash optimizer
    max_grad_norm caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate face_crop_aug_range
    prior_loss_weight min_snr_gamma scale_weight_norms ip_noise_gamma ip_noise_gamma_random_strength
    debiased_estimation loss_type huber_schedule huber_scale huber_c fp8_base fp8_base_unet validation_seed
    validation_split max_validation_steps validate_every_n_epochs validate_every_n_steps resize_interpolation
    sd_model_name sd_model_hash new_sd_model_hash
"""
OF_FOLDERS = """
    batch_size_per_device total_batch_size resolution color_aug flip_aug random_crop shuffle_caption enable_bucket
    bucket_no_upscale min_bucket_reso max_bucket_reso keep_tokens dataset_dirs reg_dataset_dirs tag_frequency
    bucket_info
"""
OF_CONFIG = "datasets tag_frequency dataset_dirs"
MODELSPEC = """
    sai_model_spec architecture implementation implementation_version title resolution date prediction_type
"""


def keys(*groups, prefix="ss_"):
    return {f"{prefix}{name}" for group in groups for name in group.split()}


DESCRIBED = keys(MODELSPEC, prefix="modelspec.")


@dataclass(frozen=True, kw_only=True)
class Options(NetworkTrainingOptions, script="train_network"):
    """Everything that train_network.py accepts."""


@pytest.fixture
def made(tiny_sd1, photo_folders, tmp_path, monkeypatch):
    """Make the metadata of a run with some options more; returns what makes them for a save."""
    monkeypatch.setenv("SD_FINETUNE_CACHE", str(tmp_path / "cache"))

    def make(*words, where=None):
        data_words = [f"--train_data_dir={photo_folders}"] if where is None else [f"--dataset_config={where}"]
        opts = parse(
            Options,
            [
                f"--pretrained_model_name_or_path={tiny_sd1}",
                f"--output_dir={tmp_path / 'out'}",
                "--resolution=64",
                "--network_module=networks.lora",
                *data_words,
                *words,
            ],
        )
        family = stable_diffusion_spec(opts.model)
        data = open_data(
            opts.data,
            opts.subset,
            opts.cache,
            spec=family,
            kinds=("dreambooth", "finetuning"),
            tokenizers=tokenizers_for(family, opts.text),
            context=ScanContext(0),
        )
        built = build_optimizer(opts.optimizer, [ParamGroup("unet", (torch.nn.Parameter(torch.ones(2)),), 1e-4)])
        length = resolve_length(opts.length, batches_per_epoch=data.batch_count())
        return network_metadata(opts, family=family, data=data, built=built, length=length, seed=42)

    return make


@pytest.fixture
def config(photo_folders, tmp_path):
    path = tmp_path / "data.toml"
    path.write_text(
        "[[datasets]]\nresolution = [96, 64]\nbatch_size = 2\n"
        f"[[datasets.subsets]]\nimage_dir = '{photo_folders / '2_sks duck'}'\nnum_repeats = 3\n"
        f"[[datasets.subsets]]\nimage_dir = '{photo_folders / '1_sks bear'}'\nclass_tokens = 'sks bear'\n"
    )
    return path


def test_keys_for_folders(made):
    metadata = made("--network_args", "conv_dim=4")(1, 10)
    assert set(metadata) == keys(ALWAYS, OF_FOLDERS, "network_args") | DESCRIBED
    assert all(isinstance(value, str) for value in metadata.values())


def test_keys_for_a_configuration(made, config):
    metadata = made(where=config)(1, 10)
    assert set(metadata) == keys(ALWAYS, OF_CONFIG) | DESCRIBED


def test_keys_with_another_vae_and_without_arguments(made, tiny_sd1):
    metadata = made(f"--vae={tiny_sd1}")(1, 10)
    assert set(metadata) == keys(ALWAYS, OF_FOLDERS, "vae_name vae_hash new_vae_hash") | DESCRIBED
    assert metadata["ss_vae_name"] == tiny_sd1.name


def test_without_metadata_only_what_loading_needs_is_left(made, monkeypatch):
    monkeypatch.setattr(module, "BaseHashes", None)  # and nothing is hashed for it
    metadata = made("--no_metadata", "--network_dropout=0.1", "--training_comment=secret")(1, 10)
    assert set(metadata) == set(MINIMAL) | DESCRIBED
    assert json.loads(metadata["ss_network_args"]) == {"dropout": "0.1"}
    assert "ss_network_args" not in made("--no_metadata")(1, 10)


def test_values(made, tiny_sd1):
    words = [
        "--network_dim=8",
        "--network_alpha=4",
        "--unet_lr=1e-4",
        "--text_encoder_lr",
        "5e-5",
        "--max_train_steps=20",
    ]
    words += ["--network_args", "conv_dim=4", "preset=full", "--min_snr_gamma=5", "--gradient_accumulation_steps=2"]
    words += [
        "--train_batch_size=2",
        "--training_comment=ducks",
        "--optimizer_args",
        "weight_decay=0.1",
        "--clip_skip=2",
    ]
    metadata = made(*words)(2, 10)
    shown = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "ss_network_dropout": "None",
        "ss_network_args": '{"conv_dim": "4", "preset": "full"}',
        "ss_learning_rate": "2e-06",
        "ss_unet_lr": "0.0001",
        "ss_text_encoder_lr": "5e-05",
        "ss_lr_scheduler": "constant",
        "ss_num_train_images": "8",
        "ss_num_validation_images": "0",
        "ss_num_reg_images": "0",
        "ss_num_batches_per_epoch": "4",
        "ss_total_batch_size": "4",
        "ss_batch_size_per_device": "2",
        "ss_resolution": "(64, 64)",
        "ss_bucket_info": "null",
        "ss_num_epochs": "10",
        "ss_max_train_steps": "20",
        "ss_epoch": "2",
        "ss_steps": "10",
        "ss_seed": "42",
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_clip_skip": "2",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "ss_min_snr_gamma": "5.0",
        "ss_training_comment": "ducks",
        "ss_output_name": "None",
        "ss_sd_model_name": tiny_sd1.name,
        "ss_sd_model_hash": hashes.legacy_hash(tiny_sd1),
        "ss_new_sd_model_hash": hashes.file_sha256(tiny_sd1),
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.resolution": "64x64",
        "modelspec.encoder_layer": "2",
    }
    assert {key: metadata[key] for key in shown} == shown
    assert json.loads(metadata["ss_dataset_dirs"]) == {
        "1_sks bear": {"n_repeats": 1, "img_count": 2},
        "2_sks duck": {"n_repeats": 2, "img_count": 3},
    }
    assert float(metadata["ss_training_started_at"]) <= float(metadata["ss_training_finished_at"])


def test_values_of_a_configuration(made, config):
    metadata = made("--validation_split=0.4", where=config)(1, 10)
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert (dataset["resolution"], dataset["batch_size_per_device"]) == ([96, 64], 2)
    assert [subset["image_dir"] for subset in dataset["subsets"]] == ["2_sks duck", "1_sks bear"]
    assert metadata["ss_num_validation_images"] == "1"
    assert metadata["modelspec.resolution"] == "96x64"


def test_an_optimizer_that_sets_its_rate_has_none(made):
    metadata = made("--optimizer_type=Adafactor", "--learning_rate=1e-3", "--unet_lr=1e-4")(1, 10)
    assert {metadata[f"ss_{name}"] for name in ("learning_rate", "unet_lr", "text_encoder_lr")} == {"None"}
    assert metadata["ss_lr_scheduler"] == "adafactor:0.001"


def test_the_last_save_has_all_epochs(made):
    make = made("--max_train_steps=10")
    assert make.length.epochs == 2
    assert make(1, 9)["ss_epoch"] == "1"
    assert make(1, 10)["ss_epoch"] == "2"


def test_each_run_is_another_session_and_each_save_another_moment(made):
    one, other = made(), made()
    assert one(1, 1)["ss_session_id"] != other(1, 1)["ss_session_id"]
    assert one(1, 1)["ss_session_id"] == one(2, 2)["ss_session_id"]


def test_no_place_on_this_machine_is_told(made, config, tmp_path, tiny_sd1):
    preset = tmp_path / "preset.toml"
    preset.write_text("")
    picture = tmp_path / "thumb.png"
    picture.write_bytes(b"png")
    words = ["--network_args", f"preset={preset}", "home=~/x/y.toml", f"--metadata_thumbnail={picture}"]
    for where in (None, config):
        metadata = made(*words, f"--vae={tiny_sd1}", where=where)(1, 10)
        assert json.loads(metadata["ss_network_args"]) == {"preset": "preset.toml", "home": "y.toml"}
        told = {key for key, value in metadata.items() if str(tmp_path) in value or str(tiny_sd1.parent) in value}
        assert told == set()


class TestHashes:
    def test_nobody_waits_before_the_first_save(self, monkeypatch):
        gate = threading.Event()

        def slow(name):
            gate.wait(10)
            return {"sd_model_name": name}

        monkeypatch.setattr(module, "model_hashes", slow)
        found = BaseHashes("model")
        assert threading.active_count() > 1
        gate.set()
        assert found.wait() == {"ss_sd_model_name": "model"}
        assert found.wait() == {"ss_sd_model_name": "model"}

    def test_a_folder_and_an_id_have_none(self, tmp_path):
        assert BaseHashes(str(tmp_path)).wait() == {
            "ss_sd_model_name": tmp_path.name,
            "ss_sd_model_hash": "IsADirectory",
            "ss_new_sd_model_hash": "IsADirectory",
        }
        assert BaseHashes("user/model").wait()["ss_new_sd_model_hash"] == "NOFILE"

    def test_a_file_that_cannot_be_read_costs_its_hash_only(self, monkeypatch, caplog):
        def fail(name):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(module, "model_hashes", fail)
        assert BaseHashes("/secret/model.safetensors").wait() == {}
        assert "no hash of model.safetensors in the metadata: Permission denied" in caplog.text

    def test_the_home_folder_is_found(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("SD_FINETUNE_CACHE", str(tmp_path / "cache"))
        (tmp_path / "m.safetensors").write_bytes(b"x")
        assert BaseHashes("~/m.safetensors").wait()["ss_sd_model_name"] == "m.safetensors"
