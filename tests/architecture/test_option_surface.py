"""The options of all scripts are those that users' command lines were written for, plus ours; each has an effect."""

import re
import shlex
from importlib.util import find_spec

import pytest

import stable_cascade_train_stage_c
import train_db
from library.option_parser import parse
from library.retired import ELSEWHERE, NO_EFFECT_IN, SPELLINGS
from tests.conftest import ROOT
from tests.option_surface import differences, golden, idle, offered, unexplained

OURS = {
    "allow_nan_weights",
    "allow_pipe_urls",
    "bucket_random_ratio",
    "cache_dir",
    "cache_hash",
    "cache_trust_mtime",
    "caption_encoding",
    "caption_field",
    "check_images",
    "dataset_filter",
    "deterministic",
    "fast_resume",
    "log_every_n_steps",
    "max_image_pixels",
    "max_nan_steps",
    "multi_aspect_ratio",
    "no_exif_transpose",
    "no_save_on_interrupt",
    "overwrite",
    "resume_override",
    "save_retry_minutes",
    "skip_bad_files",
    "strict_args",
    "webdataset_cache_dir",
    "webdataset_epoch_size",
    "webdataset_path",
    "webdataset_resampled",
    "webdataset_shuffle",
    "webdataset_streaming",
}

TEXT_CACHES = {"cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_encoder_batch_size"}
OURS_IN: dict[str, set[str]] = {
    "train_db": OURS,
    "fine_tune": OURS | TEXT_CACHES,
    "train_network": OURS | TEXT_CACHES,
    "train_textual_inversion": OURS | TEXT_CACHES | {"save_tensor_name"},
}
_CASCADE = {
    *("backup_every_n_steps", "ema_decay", "ema_device", "ema_every_n_steps", "ema_start_steps", "fsdp"),
    *("global_batch_size", "loss_weighting", "no_text_mask", "no_tf32", "sample_dir", "wandb_entity"),
}
_STAGE_C = {"clip_image_cond_rate", "effnet_scale", "image_model_checkpoint_path", "stage_c_dropout"}
_WORDS = {"embedding_lr", "train_tokens", "train_tokens_init", "train_tokens_limit"}
_WHOLE = {"model_version", "train_text_encoder_only"}
CASCADE_OURS_IN = {
    "stable_cascade_train_stage_c": _CASCADE | _STAGE_C | _WHOLE,
    "stable_cascade_train_stage_b": _CASCADE | _WHOLE | {"effnet_dropout_rate"},
    "stable_cascade_train_c_network": _CASCADE | _STAGE_C | _WORDS | {"model_version"},
    "stable_cascade_train_c_control_net": _CASCADE
    | _STAGE_C
    | {"cache_conditions_to_disk", "controlnet_backbone_path"},
}
"""Beside those that trainings of Stable Diffusion have, too."""
TRAININGS = (*OURS_IN, *CASCADE_OURS_IN)
DRAWING = ("gen_img", "stable_cascade_gen_img")

# What the parser and the runs do for every option, two that are only stored or handed on, one that asks for what always
# happens, and what is refused with a reason.
HONOURED = {
    *("persistent_data_loader_workers", "resume_override", "training_comment", "prompter_module_args", "no_preview"),
    *("clip_vision_strength", "control_net_lllite_models", "config_file", "output_config"),
}
LIBRARY = ROOT / "library"
FILES = {
    "gen_img": [*(LIBRARY / "inference").glob("*.py")],
    "stable_cascade_gen_img": [*(LIBRARY / "inference").glob("*.py"), *(LIBRARY / "models" / "cascade").glob("*.py")],
}
PARSER = [LIBRARY / "option_parser.py", LIBRARY / "cli.py"]

every_script = pytest.mark.parametrize("script", [*TRAININGS, *DRAWING])


@every_script
def test_types_defaults_and_choices_are_those_of_users(script):
    assert differences(script) == []


@pytest.mark.parametrize("script", [*OURS_IN, *DRAWING])
def test_there_are_no_options_but_those_of_users_and_ours(script):
    assert set(offered(script)) == set(golden(script)) | OURS_IN.get(script, set())


@pytest.mark.parametrize("script", CASCADE_OURS_IN)
def test_stable_cascade_shares_all_else_with_other_trainings(script):
    shared = set().union(*map(offered, OURS_IN))
    assert set(offered(script)) - set(golden(script)) - shared == CASCADE_OURS_IN[script]
    assert not {"pretrained_model_name_or_path", "v2", "v_parameterization", "no_token_padding"} & set(offered(script))


@every_script
def test_every_option_is_explained_and_names_known_others(script):
    assert unexplained(script) == []


@every_script
def test_tables_of_names_agree_with_the_options(script):
    options = set(offered(script))
    assert {name for name, scripts in NO_EFFECT_IN.items() if script in scripts} <= options
    listed = re.compile(rf"[( ]{script}\.py[,)]")
    assert {name for name, owner in ELSEWHERE.items() if listed.search(owner)} <= options
    if script in OURS_IN:
        # What is an option here never belongs to other scripts alone.
        assert {name for name in options & set(ELSEWHERE) if f"{script}.py" not in ELSEWHERE[name]} == set()
        assert set(SPELLINGS.values()) - set(offered("gen_img")) <= options


@every_script
def test_every_option_is_used_or_says_that_it_is_not(script):
    files = [*FILES[script], *PARSER] if script in FILES else [*LIBRARY.rglob("*.py")]
    assert idle(script, [*files, ROOT / f"{script}.py"], HONOURED) == []


@pytest.fixture
def places(tmp_path):
    (tmp_path / "T" / "10_sks dog").mkdir(parents=True)
    (tmp_path / "R" / "1_dog").mkdir(parents=True)
    (tmp_path / "M").mkdir()
    return {name: str(tmp_path / name) for name in "TRMO"}


def test_documented_command_lines_parse(places, monkeypatch):
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    start = [
        f"--pretrained_model_name_or_path={places['M']}",
        f"--train_data_dir={places['T']}",
        f"--reg_data_dir={places['R']}",
        f"--output_dir={places['O']}",
        "--prior_loss_weight=1.0",
    ]
    first = parse(
        train_db.Options,
        start
        + shlex.split(
            "--resolution=512 --train_batch_size=1 --learning_rate=1e-6 --max_train_steps=1600 --use_8bit_adam "
            "--xformers --mixed_precision=bf16 --cache_latents --gradient_checkpointing"
        ),
    )
    assert first.optimizer.learning_rate == 1e-6
    assert not first.warnings
    second = parse(
        train_db.Options,
        start
        + shlex.split(
            "--resolution=768,512 --train_batch_size=20 --learning_rate=5e-6 --max_train_steps=800 --use_8bit_adam "
            "--xformers --mixed_precision=bf16 --save_every_n_epochs=1 --save_state --save_precision=bf16 "
            "--logging_dir=logs --enable_bucket --min_bucket_reso=384 --max_bucket_reso=1280 --color_aug --flip_aug "
            "--gradient_checkpointing --seed 42"
        ),
    )
    assert second.data.resolution == "768,512"
    assert (second.length.seed, second.data.batch_size) == (42, 20)
    assert not second.warnings


def test_a_documented_command_line_of_stable_cascade_parses(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("stage_c", "effnet", "text", "preview"):
        (tmp_path / f"{name}.safetensors").touch()
    line = (
        f"--mixed_precision bf16 --save_precision bf16 --max_data_loader_n_workers 2 --persistent_data_loader_workers "
        f"--gradient_checkpointing --learning_rate 1e-4 --optimizer_type adafactor --optimizer_args "
        f'"scale_parameter=False" "relative_step=False" "warmup_init=False" --max_train_epochs 10 --sdpa '
        f"--save_every_n_epochs 1 --output_dir {tmp_path}/out --output_name duck --train_data_dir {tmp_path}/photos "
        f"--resolution 1024 --stage_c_checkpoint_path {tmp_path}/stage_c.safetensors "
        f"--effnet_checkpoint_path {tmp_path}/effnet.safetensors "
        f"--previewer_checkpoint_path {tmp_path}/preview.safetensors "
        f"--text_model_checkpoint_path {tmp_path}/text.safetensors --adaptive_loss_weight"
    )
    found = parse(stable_cascade_train_stage_c.Options, shlex.split(line))
    assert found.cascade.adaptive_loss_weight
    assert found.optimizer.learning_rate == 1e-4
    # It names a previewer, and no prompts that it could show.
    assert [warning.where for warning in found.warnings] == ["--previewer_checkpoint_path"]
