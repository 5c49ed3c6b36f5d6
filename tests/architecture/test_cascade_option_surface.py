"""The options of the Stable Cascade trainings: those of users' command lines with their defaults, then ours."""

import json
import shlex

import pytest

import stable_cascade_train_stage_b
import stable_cascade_train_stage_c
from library.option_parser import parse
from library.option_values import type_name
from library.retired import ELSEWHERE, NO_EFFECT_IN
from tests.architecture import test_option_surface as others
from tests.conftest import ROOT

SCRIPTS = {
    "stable_cascade_train_stage_c": stable_cascade_train_stage_c.Options,
    "stable_cascade_train_stage_b": stable_cascade_train_stage_b.Options,
}
GOLDEN = {
    script: json.loads((ROOT / "tests" / "golden" / f"{script}_options.json").read_text(encoding="utf-8"))
    for script in SCRIPTS
}
OPTIONS = {
    script: {name: option for name, option in declared.options().items() if option.offered}
    for script, declared in SCRIPTS.items()
}
OURS = {
    *("backup_every_n_steps", "ema_decay", "ema_device", "ema_every_n_steps", "ema_start_steps", "fsdp"),
    *("global_batch_size", "loss_weighting", "model_version", "no_text_mask", "no_tf32", "sample_dir"),
    *("train_text_encoder_only", "wandb_entity", "bucket_random_ratio", "caption_field", "dataset_filter"),
    *("multi_aspect_ratio", "webdataset_cache_dir", "webdataset_epoch_size", "webdataset_path"),
    *("webdataset_shuffle", "webdataset_streaming", "text_encoder_batch_size"),
}
OURS_IN = {
    "stable_cascade_train_stage_c": {
        *("clip_image_cond_rate", "effnet_scale", "image_model_checkpoint_path", "stage_c_dropout"),
    },
    "stable_cascade_train_stage_b": {"effnet_dropout_rate"},
}
READ_BY_PROPERTIES = {
    *("backup_every_n_steps", "clip_image_cond_rate", "global_batch_size", "no_tf32", "sample_dir", "wandb_entity"),
    *("fsdp", "train_text_encoder_only", "stage_c_checkpoint_path", "stage_b_checkpoint_path"),
}
every_script = pytest.mark.parametrize("script", SCRIPTS)


@every_script
def test_the_options_of_users_are_there_with_their_defaults(script):
    for name, golden in GOLDEN[script].items():
        option = OPTIONS[script][name]
        default = list(option.default) if isinstance(option.default, tuple) else option.default
        assert (type_name(option.annotation), default) == (golden["type"], golden["default"]), name
        assert list(option.choices or []) == golden.get("choices", []), name


@every_script
def test_nothing_else_is_there_but_what_is_known_to_be_ours(script):
    shared = set(others.OPTIONS["train_db"]) | set(others.OPTIONS["fine_tune"])
    assert set(OPTIONS[script]) - set(GOLDEN[script]) - shared == (OURS - shared) | OURS_IN[script]


@every_script
def test_explanations_and_conditions(script):
    for option in OPTIONS[script].values():
        text = option.notes["help"]
        assert text[0].isupper() or text.split()[0].strip(":,.`-").islower(), option.flag
        assert text.endswith("."), option.flag
        for note in ("needs", "matters_when", "excludes", "implies", "means"):
            for other in option.notes.get(note, {}):
                assert other in OPTIONS[script], f"{option.flag}: {note} names {other}"


@every_script
def test_every_option_is_used_or_says_that_it_is_not(script):
    words = others._words_of_consumers(script)
    words |= {f"metadata_{word}" for word in words}
    unused = [
        name
        for name, option in OPTIONS[script].items()
        if option.field_name not in words
        and script not in NO_EFFECT_IN.get(name, {})
        and name not in others.HONOURED | READ_BY_PROPERTIES
    ]
    assert not unused


@every_script
def test_tables_of_names_agree_with_the_options(script):
    assert {name for name, owner in ELSEWHERE.items() if f"{script}.py" in owner} <= set(OPTIONS[script])
    assert {name for name, scripts in NO_EFFECT_IN.items() if script in scripts} <= set(OPTIONS[script])


def test_the_documented_command_line_parses(tmp_path):
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
