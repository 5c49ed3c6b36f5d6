"""What network training accepts, refuses and doubts before it opens a model."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import save_file

from library.data.dataset_config import load_dataset_specs
from library.errors import UserError
from library.option_groups import loggable, resume_fingerprint
from library.option_parser import parse
from library.training.options_network import NetworkTrainingOptions


@dataclass(frozen=True, kw_only=True)
class Options(NetworkTrainingOptions, script="train_network", leave_out=("use_safetensors",)):
    """Everything that train_network.py accepts."""


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "photos" / "1_dog").mkdir(parents=True)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    return [
        f"--pretrained_model_name_or_path={tmp_path / 'model.safetensors'}",
        f"--train_data_dir={tmp_path / 'photos'}",
        f"--output_dir={tmp_path / 'out'}",
        "--resolution=512",
        "--network_module=networks.lora",
    ]


@pytest.fixture
def options(base):
    return lambda *words: parse(Options, [*base, *words])


@pytest.fixture
def problems(base):
    def read(*words, start=base):
        with pytest.raises(UserError) as caught:
            parse(Options, [*start, *words])
        return [str(problem) for problem in caught.value.problems]

    return read


@pytest.fixture
def warnings(options):
    return lambda *words: [str(warning) for warning in options(*words).warnings]


@pytest.fixture
def lora(tmp_path):
    """Write a LoRA file of one module."""

    def write(name="lora.safetensors", *, rank=4, width=768, module="lora_unet_down_blocks_0_attentions_0_"):
        module += "transformer_blocks_0_attn2_to_k"
        down, up = torch.zeros(rank, width), torch.zeros(320, rank)
        tensors = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        path = tmp_path / name
        save_file({**tensors, f"{module}.alpha": torch.tensor(1.0)}, path)
        return path

    return write


def test_a_usual_command_has_nothing_to_complain_about(warnings):
    assert warnings("--network_dim=16", "--network_alpha=8", "--network_args", "conv_dim=4", "conv_alpha=1") == []


def test_command_lines_that_people_have_run_unchanged(options):
    pytest.importorskip("bitsandbytes")
    command = """
        --network_dim=32 --network_alpha=16 --text_encoder_lr=5e-5 --unet_lr=0.0001 --lr_scheduler=cosine_with_restarts
        --lr_scheduler_num_cycles=1 --lr_warmup_steps=80 --train_batch_size=2 --max_train_steps=800
        --save_every_n_epochs=1 --save_precision=fp16 --seed=1234 --mixed_precision=bf16 --caption_extension=.txt
        --cache_latents --optimizer_type=AdamW8bit --max_data_loader_n_workers=1 --enable_bucket --min_bucket_reso=256
        --max_bucket_reso=1024 --bucket_reso_steps=64 --bucket_no_upscale --clip_skip=2 --xformers
        --gradient_checkpointing --prior_loss_weight=1.0 --no_half_vae --keep_tokens=1 --shuffle_caption
    """
    read = options(*command.split())
    assert (read.network.network_dim, read.network.text_rate, read.save.save_model_as) == (32, 5e-5, "safetensors")
    assert not read.warnings


def test_a_module_is_required_and_the_known_ones_are_listed(problems, base):
    (found,) = problems(start=base[:-1])
    assert found.startswith("--network_module: is required")
    assert "networks.lora, networks.lora_fa, networks.dylora" in found
    assert "lycoris.kohya" in found


def test_a_report_on_the_data_needs_no_network(base):
    words = [word for word in base if "train_data_dir" in word or "resolution" in word]
    assert parse(Options, [*words, "--debug_dataset"]).data.debug_dataset


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--network_module=networks/lora.py", "did you mean networks.lora?"),
        ("--network_module=networks.lorra", "there is no module networks.lorra. Did you mean networks.lora?"),
        ("--network_module=my-net", "is not a dotted name"),
        ("--network_module=surely_absent.net", "the module surely_absent is not installed"),
        ("--network_dim=0", "--network_dim: must be at least 1, got 0"),
        ("--network_alpha=-1", "--network_alpha: must be at least 0"),
        ("--network_dropout=1.5", "--network_dropout: must be between 0 and 1, got 1.5"),
        ("--network_train_unet_only --network_train_text_encoder_only", "nothing would be trained"),
        ("--dim_from_weights", "--dim_from_weights: needs --network_weights"),
        ("--network_weights=none.safetensors", "--network_weights: file 'none.safetensors' not found"),
        ("--base_weights a.safetensors", "--base_weights: file 'a.safetensors' not found"),
        ("--network_args conv_dim", "--network_args: 'conv_dim' has no =. Write name=value"),
        ("--network_args =4", "--network_args: '=4' has no name"),
        ("--network_args conv_dim=4 conv_dim=8", "--network_args: 'conv_dim' is given twice"),
        ("--text_encoder_lr 1e-4 1e-5", "--text_encoder_lr: 2 values, but the model has one text encoder"),
        ("--learning_rate=0", "--learning_rate: is 0 for all that the network covers"),
        ("--unet_lr=0 --network_train_unet_only", "so nothing is trained"),
        ("--unet_lr=0 --text_encoder_lr 0", "so nothing is trained"),
        ("--text_encoder_lr 0 --network_train_text_encoder_only", "so nothing is trained"),
        ("--fp8_base", "--fp8_base: needs --mixed_precision fp16 or bf16"),
        ("--fp8_base_unet", "--fp8_base_unet: needs --mixed_precision fp16 or bf16"),
        ("--fp8_base --mixed_precision=bf16 --deepspeed", "--fp8_base: cannot be combined with --deepspeed"),
        ("--cpu_offload_checkpointing", "--cpu_offload_checkpointing: needs --gradient_checkpointing"),
        ("--save_model_as=diffusers", "'diffusers' is not one of ckpt, pt, safetensors"),
        ("--max_train_steps=10 --initial_step=10", "--initial_step: 10 is not below --max_train_steps 10"),
        ("--max_train_epochs=2 --initial_epoch=3", "--initial_epoch: 3 is above --max_train_epochs 2"),
        ("--cache_text_encoder_outputs", "cannot be combined with a text encoder that is trained"),
        ("--initial_epoch=0", "--initial_epoch: must be at least 1"),
        ("--network_module=networks.oft --network_train_text_encoder_only", "networks.oft is for the U-Net alone"),
        ("--validation_split=1.5", "--validation_split: must be between 0 and 1"),
        ("--in_json=absent.json", "--in_json: file 'absent.json' not found"),
        ("--use_safetensors", "it belongs to training whole models (train_db.py, fine_tune.py)"),
        ("--stop_text_encoder_training=5", "it belongs to DreamBooth (train_db.py)"),
        ("--network_dims=4", "Did you mean --network_dim?"),
    ],
)
def test_refused(problems, words, message):
    found = problems(*words.split())
    assert any(message in line for line in found), found


@pytest.mark.parametrize("words", ["--network_train_unet_only", "--text_encoder_lr=0", "--network_module=networks.oft"])
def test_texts_may_be_cached_where_they_do_not_change(options, words):
    assert options(words, "--cache_text_encoder_outputs").cache.cache_text_encoder_outputs


def test_more_multipliers_than_files(problems, lora):
    path = lora()
    found = problems("--base_weights", str(path), "--base_weights_multiplier", "1", "0.5")
    assert found == ["--base_weights_multiplier: 2 values for 1 of --base_weights. Give at most one for each file."]


def test_a_module_of_a_missing_package_names_what_to_install(problems, monkeypatch):
    monkeypatch.setattr(
        "library.training.checks_network.find_spec", lambda name: None if name == "lycoris" else find_spec(name)
    )
    (found,) = problems("--network_module=lycoris.kohya")
    assert found.endswith("Run: pip install lycoris_lora")


def test_all_problems_come_together(problems):
    found = problems("--network_dim=0", "--learning_rate=0", "--network_args", "x", "--base_weights", "a", "b")
    assert [line.split(":")[0] for line in found] == [
        "--network_dim",
        "--base_weights",
        "--base_weights",
        "--learning_rate",
        "--network_args",
    ]


@pytest.mark.parametrize("option", ["--network_weights", "--base_weights"])
def test_files_that_do_not_fit_are_known_by_their_headers(problems, lora, tmp_path, option):
    (found,) = problems(f"{option}={lora(width=1024)}")
    assert found.startswith(option)
    assert "this LoRA was made for Stable Diffusion 2" in found

    (found,) = problems(f"{option}={lora(rank=0)}")
    assert found.startswith(f"{option} {tmp_path}")
    assert "rank" in found

    cut = lora()
    cut.write_bytes(cut.read_bytes()[:-100])
    (found,) = problems(f"{option}={cut}")
    assert found.startswith(f"{option} {tmp_path}")


def test_sd2_takes_what_sd1_refuses(options, lora):
    path = lora(width=1024)
    assert options("--v2", f"--network_weights={path}", "--dim_from_weights").network.dim_from_weights


def test_files_of_foreign_modules_are_their_own_business(options, lora):
    options("--network_module=json.decoder", f"--network_weights={lora(rank=0)}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fused_backward_pass", "--fused_backward_pass: has no effect"),
        ("--network_train_unet_only --text_encoder_lr 1e-4", "--text_encoder_lr: has no effect"),
        ("--network_train_text_encoder_only --unet_lr=1e-4", "--unet_lr: has no effect"),
        ("--base_weights_multiplier 0.5", "--base_weights_multiplier: has no effect without --base_weights"),
        ("--fp8_base --fp8_base_unet --mixed_precision=bf16", "--fp8_base_unet: has no effect"),
        ("--validate_every_n_steps=5", "--validate_every_n_steps: has no effect without --validation_split"),
        ("--max_validation_steps=5", "--max_validation_steps: has no effect without --validation_split"),
        ("--validation_seed=5", "--validation_seed: has no effect without --validation_split"),
        ("--initial_epoch=2 --initial_step=5", "--initial_epoch: has no effect, since --initial_step is given"),
        ("--skip_until_initial_step", "--skip_until_initial_step: has no effect without --initial_epoch"),
        ("--lowram", "--lowram: has no effect in train_network.py"),
        ("--network_module=networks.oft --text_encoder_lr 1e-4", "--text_encoder_lr: has no effect: networks.oft"),
    ],
)
def test_doubted(warnings, words, message):
    found = warnings(*words.split())
    assert any(line.startswith(message) for line in found), found


def test_a_position_replaces_that_of_the_state(warnings, tmp_path):
    (tmp_path / "s-state").mkdir()
    found = warnings(f"--resume={tmp_path / 's-state'}", "--initial_step=5")
    assert found == ["--initial_step: replaces the position that the state of --resume has recorded."]


def test_the_file_decides_rank_and_alpha(warnings, lora):
    found = warnings(f"--network_weights={lora()}", "--dim_from_weights", "--network_dim=8", "--network_alpha=2")
    names = ("--network_alpha", "--network_dim")
    assert sorted(found) == [f"{name}: has no effect with --dim_from_weights: the file decides." for name in names]


def test_the_backward_pass_is_never_fused(options):
    assert not options("--fused_backward_pass").optimizer.fused_backward_pass


def test_arguments_of_the_module(options):
    network = options("--network_args", "conv_dim=4", "preset=a=b", "--network_dropout=0.25").network
    assert network.arguments == {"conv_dim": "4", "preset": "a=b", "dropout": "0.25"}
    own = options("--network_args", "dropout=0.5", "--network_dropout=0.25").network
    assert own.arguments == {"dropout": "0.5"}
    assert options().network.arguments == {}


def test_missing_strengths_are_one(options, lora):
    one, other = lora("one.safetensors"), lora("other.safetensors")
    network = options("--base_weights", str(one), str(other), "--base_weights_multiplier", "0.5").network
    assert network.base_networks == ((str(one), 0.5), (str(other), 1.0))
    assert options().network.base_networks == ()


def test_parts_and_rates(options):
    both = options().network
    assert (both.trains_unet, both.trains_text_encoder, both.text_rate) == (True, True, None)
    unet = options("--network_train_unet_only").network
    assert (unet.trains_unet, unet.trains_text_encoder) == (True, False)
    text = options("--network_train_text_encoder_only", "--text_encoder_lr", "5e-5").network
    assert (text.trains_unet, text.trains_text_encoder, text.text_rate) == (False, True, 5e-5)


def test_a_configuration_file_may_give_numbers_alone(base, tmp_path):
    text = "text_encoder_lr = 1e-5\nnetwork_args = ['conv_dim=4']\nunet_lr = 1e-4\n[more]\nnetwork_dim = 8\n"
    (tmp_path / "c.toml").write_text(text)
    read = parse(Options, [*base, f"--config_file={tmp_path / 'c.toml'}"]).network
    assert (read.text_encoder_lr, read.network_args, read.network_dim) == ((1e-5,), ("conv_dim=4",), 8)


def test_metadata_files_by_option(options, tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    data = options(f"--in_json={tmp_path / 'meta.json'}", "--dataset_repeats=3")
    (spec,) = load_dataset_specs(
        data.data,
        data.subset,
        kinds=("dreambooth", "finetuning"),
        bucket_step_multiple=64,
        in_json=data.data.in_json,
    )
    assert (spec.kind, spec.subsets[0].num_repeats) == ("finetuning", 3)


def test_the_validation_flags_reach_the_data_sets(options):
    read = options("--validation_split=0.25", "--validation_seed=9")
    (spec,) = load_dataset_specs(read.data, read.subset, kinds=("dreambooth",), bucket_step_multiple=64)
    assert (spec.subsets[0].validation_split, spec.validation_seed) == (0.25, 9)


def test_paths_stay_here_and_what_may_change_may(options, lora):
    path = str(lora())
    read = options(f"--network_weights={path}", "--base_weights", path, "--training_comment=first try")
    assert path not in str(loggable(read))
    exact = {name for values in resume_fingerprint(read).values() for name in values}
    assert {
        "network_module",
        "network_dim",
        "network_alpha",
        "network_args",
        "unet_lr",
        "base_weights_multiplier",
    } <= exact
    free = {
        "network_weights",
        "base_weights",
        "training_comment",
        "no_metadata",
        "initial_step",
        "validate_every_n_steps",
    }
    assert not free & exact


def test_merged_networks_belong_to_what_a_state_remembers(options, lora):
    read = options("--base_weights", str(lora()))
    assert set(read.base_files()) == {"", "base weights 1"}
