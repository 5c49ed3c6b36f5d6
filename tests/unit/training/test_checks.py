"""What train_db.py refuses and doubts before it opens anything."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

from library.errors import UserError
from library.option_parser import parse
from library.training.checks import check_output
from library.training.options import TrainingOptions
from library.training.options_full import DreamBoothOptions


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions, script="train_db", leave_out=("dataset_repeats",)):
    """Everything that train_db.py accepts."""

    tune: DreamBoothOptions = field(default_factory=DreamBoothOptions)


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
    ]


@pytest.fixture
def problems(base):
    def read(*words, start=base):
        with pytest.raises(UserError) as caught:
            parse(Options, [*start, *words])
        return [str(problem) for problem in caught.value.problems]

    return read


@pytest.fixture
def warnings(base):
    return lambda *words: [str(warning) for warning in parse(Options, [*base, *words]).warnings]


def test_plain_run_has_nothing_to_complain_about(warnings):
    assert warnings() == []


def test_missing_options_are_listed_together(problems):
    found = problems("--max_train_steps=5", start=[])
    assert [line.split(":")[0] for line in found] == [
        "--pretrained_model_name_or_path",
        "--output_dir",
        "--train_data_dir",
        "--resolution",
    ]


def test_a_dataset_report_needs_neither_model_nor_output(base):
    words = [word for word in base if "train_data_dir" in word or "resolution" in word]
    assert parse(Options, [*words, "--debug_dataset"]).data.debug_dataset


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--adaptive_noise_scale=0.1", "--adaptive_noise_scale: needs --noise_offset."),
        ("--scale_v_pred_loss_like_noise_pred", "--scale_v_pred_loss_like_noise_pred: needs --v_parameterization."),
        ("--v_pred_like_loss=1 --v_parameterization", "--v_pred_like_loss: cannot be combined with"),
        ("--full_fp16", "--full_fp16: needs --mixed_precision fp16."),
        ("--full_bf16 --mixed_precision=fp16", "--full_bf16: needs --mixed_precision bf16."),
        ("--fp8_base", "--fp8_base: has no effect in train_db.py: it stores frozen weights"),
        ("--min_timestep=500 --max_timestep=500", "--min_timestep: 500 is not below --max_timestep 500."),
        ("--min_timestep=1000", "--min_timestep: must be between 0 and 999"),
        ("--max_timestep=0", "--max_timestep: must be between 1 and 1000"),
        ("--cache_latents --color_aug", "--color_aug: cannot be combined with --cache_latents"),
        ("--cache_latents_to_disk --random_crop", "--random_crop: cannot be combined with --cache_latents"),
        ("--log_with=tensorboard", "--log_with tensorboard: needs --logging_dir."),
        ("--sample_every_n_steps=5", "--sample_every_n_steps: needs --sample_prompts."),
        ("--sample_at_first", "--sample_at_first: needs --sample_prompts."),
        ("--sample_at_first --sample_prompts=none.txt", "--sample_prompts: file 'none.txt' not found. Looked for /"),
        ("--reg_data_dir=none", "--reg_data_dir: folder 'none' not found."),
        ("--dataset_config=none.toml", "--dataset_config: file 'none.toml' not found."),
        ("--resume=none", "--resume: folder 'none' not found."),
        ("--vae=./none.pt", "--vae: './none.pt' not found."),
        ("--save_state_to_huggingface", "--save_state_to_huggingface: needs --huggingface_repo_id."),
        ("--resume_from_huggingface", "--resume_from_huggingface: needs --resume."),
        ("--output_name=../x", "--output_name: '../x' contains one of"),
        ("--output_name=a\\b", "--output_name: 'a\\\\b' contains one of"),
        ("--output_name=..", "--output_name: '..' starts with a space, or ends with a dot"),
        ("--output_name=con.x", "--output_name: 'con.x' is a reserved name on Windows."),
        ("--output_name=a.", "--output_name: 'a.' starts with a space, or ends with a dot"),
        ("--dataset_class=os", "--dataset_class: 'os' is not a dotted name."),
        ("--optimizer_type=a;b", "--optimizer_type"),
        ("--caption_encoding=utf9", "--caption_encoding: unknown encoding 'utf9'."),
        ("--torch_compile --dynamo_backend=ofi", "--dynamo_backend ofi: PyTorch no longer has this backend."),
        ("--resume_override lr schedul", "--resume_override: unknown name 'schedul'. Did you mean schedule"),
        ("--max_train_steps=0", "--max_train_steps: must be at least 1, got 0."),
        ("--bucket_no_upscale=2", "--bucket_no_upscale: expected true or false, got '2'."),
        ("--lr_scheduler=cosin", "--lr_scheduler: there is no schedule 'cosin'. Did you mean cosine?"),
        ("--lr_warmup_steps=10", "--lr_warmup_steps"),
        ("--optimizer_type=Adam8", "--optimizer_type"),
        ("--use_8bit_adam --use_lion_optimizer", "--use_8bit_adam and --use_lion_optimizer"),
        ("--use_8bit_adam --optimizer_type=Lion", "--use_8bit_adam and --optimizer_type"),
        ("--max_token_length=100", "--max_token_length: '100' is not one of 150, 225"),
    ],
)
def test_refused(problems, words, message):
    (found,) = problems(*words.split())
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gradient_accumulation_steps=2", "cannot be combined with --gradient_accumulation_steps"),
        ("--mixed_precision=fp16", "cannot be used with float16"),
        ("--optimizer_type=Prodigy", "cannot be used with Prodigy"),
    ],
)
def test_fused_backward_pass(problems, base, words, message):
    if find_spec("prodigyopt") is None:
        pytest.skip("prodigyopt is not installed")
    (found,) = problems("--fused_backward_pass", words)
    assert found.startswith(f"--fused_backward_pass: {message}")


def test_fused_backward_pass_works_alone_but_not_on_two_processes(problems, base, monkeypatch):
    for name in ("", "Adafactor", "SGDNesterov"):
        assert not parse(Options, [*base, "--fused_backward_pass", f"--optimizer_type={name}"]).warnings
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes" in problems("--fused_backward_pass")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--zero_terminal_snr", "--zero_terminal_snr: is meant for models"),
        ("--v2 --clip_skip=2", "--clip_skip: is unusual with --v2"),
        ("--sample_every_n_epochs=0", "--sample_every_n_epochs: 0 switches it off."),
        ("--sample_every_n_steps=-3", "--sample_every_n_steps: -3 switches it off."),
        ("--huber_c=0.2", "--huber_c: has no effect without --loss_type huber or smooth_l1."),
        ("--persistent_data_loader_workers --max_data_loader_n_workers=0", "--persistent_data_loader_workers: has no"),
        ("--conditioning_data_dir=x", "--conditioning_data_dir: has no effect in train_db.py"),
        ("--max_train_steps=10 --max_train_epochs=2", "--max_train_steps: has no effect"),
        ("--save_every_n_epochs=1 --save_n_epoch_ratio=3", "--save_every_n_epochs: has no effect"),
        ("--save_last_n_steps=10", "--save_last_n_steps: has no effect without --save_every_n_steps."),
        ("--xformers --sdpa", "--sdpa: has no effect, since --xformers is given."),
        ("--save_model_as=ckpt --use_safetensors", "--save_model_as: ckpt is written as safetensors"),
        ("--min_bucket_reso=128", "--min_bucket_reso: has no effect without --enable_bucket or --dataset_config."),
        ("--learning_rate_te=1 --stop_text_encoder_training=-1", "--learning_rate_te: has no effect"),
        ("--keep_tokens=2", "--keep_tokens: has no effect without --shuffle_caption"),
        (
            "--max_train_steps=10 --lr_scheduler=linear --lr_warmup_steps=20",
            "--lr_warmup_steps: 20 is longer than the run",
        ),
        ("--face_crop_aug_range=1,2 --enable_bucket", "--face_crop_aug_range: has no effect"),
        ("--wandb_api_key=abc", "--wandb_api_key: has no effect without --log_with wandb or all."),
        ("--torch_compile --dynamo_backend=no", "--torch_compile: has no effect with --dynamo_backend no."),
        ("--zero_stage=3", "--zero_stage: has no effect without --deepspeed."),
    ],
)
def test_doubted(warnings, problems, words, message):
    (found,) = warnings(*words.split())
    assert found.startswith(message)
    (refused,) = problems(*words.split(), "--strict_args")
    assert refused.startswith(message)


@pytest.mark.parametrize(
    "words",
    [
        "--noise_offset=0.1 --adaptive_noise_scale=0.1 --noise_offset_random_strength",
        "--v_parameterization --zero_terminal_snr --scale_v_pred_loss_like_noise_pred",
        "--mixed_precision=bf16 --full_bf16",
        "--save_every_n_epochs=0 --save_last_n_epochs=0 --max_train_epochs=0",
        "--adaptive_noise_scale=0 --huber_c=0.1 --prior_loss_weight=1 --max_token_length=75 --max_train_steps=1600",
        "--cache_latents_to_disk",
        "--lr_scheduler=linear --lr_warmup_steps=5%",
        "--min_timestep=0 --max_timestep=1000",
        "--stop_text_encoder_training=-1",
        "--dynamo_backend=no",
        "--vae_batch_size=0",
        "--pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5",
    ],
)
def test_accepted_without_a_word(warnings, words):
    assert warnings(*words.split()) == []


def test_cache_latents_to_disk_switches_caching_on(base):
    options = parse(Options, [*base, "--cache_latents_to_disk"])
    assert options.cache.cache_latents
    assert options.notices == ("--cache_latents_to_disk switches --cache_latents on",)


def test_augmentation_with_caches_is_left_to_the_dataset_file(base, tmp_path):
    config = tmp_path / "data.toml"
    config.touch()
    parse(Options, [*base, "--color_aug", "--cache_latents", f"--dataset_config={config}"])


def test_the_nearest_name_is_suggested(problems, tmp_path):
    (found,) = problems(f"--pretrained_model_name_or_path={tmp_path / 'modle.safetensors'}")
    assert "model.safetensors'." in found


def test_output_folder(problems, base, tmp_path):
    (tmp_path / "file").touch()
    assert "is a file, not a folder" in problems(f"--output_dir={tmp_path / 'file'}")[0]
    assert "is a file, not a folder" in problems(f"--output_dir={tmp_path / 'file' / 'sub'}")[0]
    inside = tmp_path / "photos" / "out"
    options = parse(Options, [*base, f"--output_dir={inside}"])
    assert [str(warning) for warning in options.warnings] == [
        "--output_dir: lies inside --train_data_dir. Keep what is written apart from the images."
    ]
    assert not inside.exists()
    assert list(check_output(options)) == []
    assert inside.is_dir()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_folder_without_permission(problems, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "cannot be written to" in problems(f"--output_dir={tmp_path / 'closed' / 'out'}")[0]


def test_little_disk_space_is_pointed_out(base, caplog, monkeypatch):
    monkeypatch.setattr("library.files.free_bytes", lambda path: 150)
    with caplog.at_level(logging.WARNING):
        assert list(check_output(parse(Options, base))) == []
        assert not caplog.records
        assert list(check_output(parse(Options, [*base, "--save_state"]))) == []
    assert "a model and a state need about" in caplog.text


def test_groups_can_be_made_alone_and_agree_with_the_parser(base):
    defaults, parsed = Options(), parse(Options, base)
    assert defaults.loss == parsed.loss
    assert defaults.optimizer == parsed.optimizer
    assert Options(save=parsed.save, model=parsed.model, data=parsed.data) == parsed


def test_resume_override_names():
    state = parse(
        Options, ["--resume=latest", "--resume_override", "lr", "noise", "steps", "--debug_dataset", *_data()]
    ).state
    assert state.allows("optimizer", "learning_rate")
    assert state.allows("noise", "noise_offset")
    assert state.allows("length", "max_train_epochs")
    assert not state.allows("length", "seed")
    assert not state.allows("optimizer", "max_grad_norm")


def _data():
    return [f"--train_data_dir={Path(__file__).parent}", "--resolution=64"]


def test_metadata_keys_are_unique():
    keys = [option.notes["metadata_key"] for option in Options.options().values() if "metadata_key" in option.notes]
    assert len(keys) == len(set(keys))
    assert all(key.startswith("ss_") for key in keys)
    golden = Path(__file__).parents[2] / "golden" / "train_db_options.json"
    assert json.loads(golden.read_text(encoding="utf-8"))
