"""Every key of the original trainer's files sets an option of ours; what is typed wins; wrong files are explained."""

from __future__ import annotations

import logging
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch

import stable_cascade_train_c_control_net as control_net
import stable_cascade_train_c_network as network
import stable_cascade_train_stage_b as stage_b
import stable_cascade_train_stage_c as stage_c
from library.cascade_yaml import MAX_BYTES, _keys, read_config
from library.errors import UserError
from library.option_parser import parse
from tests.lora_files import save

SCRIPTS = {"c": stage_c, "b": stage_b, "n": network, "k": control_net}
FILES = ("effnet", "stage", "a", "previewer", "text", "vision", "net")
LEAST = {
    "experiment_id": "run",
    "checkpoint_path": "trained",
    "effnet_checkpoint_path": "effnet.safetensors",
    "generator_checkpoint_path": "stage.safetensors",
    "webdataset_path": "data.tar",
    "image_size": "64",
    "updates": "10",
}
MORE = {
    "c": {},
    "b": {"stage_a_checkpoint_path": "a.safetensors"},
    "n": {"module_filters": "['.attn']", "rank": "4"},
    "k": {"controlnet_filter": "CannyFilter"},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, with all files that keys may name; most of them are empty, since only options are read."""
    for name in FILES:
        (tmp_path / f"{name}.safetensors").touch()
    for name in ("data.tar", "a.tar"):
        (tmp_path / name).touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "prompts.txt").write_text("a duck")
    name = "lora_unet_down_blocks_0_2_attention_attn_to_q"
    save(tmp_path / "net.safetensors", {f"{name}.lora_{side}.weight": torch.ones(4, 4) for side in ("down", "up")})
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    monkeypatch.setattr("wandb.__spec__", ModuleSpec("wandb", None))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options(script: str, text: str = "", *words: str, without: tuple[str, ...] = ()):
    """Return the options of a script for a small file with further lines, and typed words."""
    lines = {**LEAST, **MORE[script]}
    rows = [f"{key}: {value}" for key, value in lines.items() if key not in without]
    Path("run.yaml").write_text("\n".join([*rows, text, ""]), encoding="utf-8")
    return parse(SCRIPTS[script].Options, ["run.yaml", *words])


# (script, key and value, options that they make); a key of the smallest file is written anew.
KEYS = [
    ("c", "experiment_id: other", {"output_name": "other", "output_dir": "trained/other"}),
    ("c", "checkpoint_path: far/", {"output_dir": "far/run", "output_name": "run"}),
    ("c", "output_path: seen", {"sample_dir": "seen"}),
    ("c", "checkpoint_extension: safetensors", {"save_model_as": "safetensors"}),
    ("c", "dist_file_subfolder: x", {}),
    ("c", "allow_tf32: false", {"no_tf32": True}),
    ("c", "allow_tf32: true", {"no_tf32": False}),
    ("c", "model_version: 1B", {"model_version": "1B"}),
    ("c", "model_version: 3.6B", {"model_version": "3.6B"}),
    ("b", "model_version: 700M", {"model_version": "700M"}),
    ("c", "dtype: bfloat16", {"full_bf16": True, "mixed_precision": "bf16"}),
    ("c", "dtype: float32", {"full_bf16": False, "mixed_precision": "bf16"}),
    ("c", "dtype:", {"full_bf16": False, "mixed_precision": "bf16"}),
    ("c", "wandb_project: p", {"log_with": "wandb", "log_tracker_name": "p"}),
    ("c", "wandb_project: p\nwandb_entity: me", {"wandb_entity": "me"}),
    ("c", "lr: 1e-4", {"learning_rate": 1e-4}),
    ("c", "lr: 2.0e-5", {"learning_rate": 2e-5}),
    ("c", "batch_size: 12\ngrad_accum_steps: 3", {"global_batch_size": 12, "train_batch_size": 4}),
    ("c", "grad_accum_steps: 4\nbatch_size: 8", {"gradient_accumulation_steps": 4, "train_batch_size": 2}),
    ("c", "image_size: 96", {"resolution": "96"}),
    ("c", "multi_aspect_ratio: [1/1, 9/16]", {"multi_aspect_ratio": ("1/1", "9/16"), "enable_bucket": True}),
    ("c", "multi_aspect_ratio: [1/1]", {"bucket_random_ratio": 0.05}),
    ("c", "multi_aspect_ratio: [1/1]\nbucketeer_random_ratio: 0.2", {"bucket_random_ratio": 0.2}),
    ("c", "updates: 1e3", {"max_train_steps": 1000}),
    ("c", "warmup_updates: 7", {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 7}),
    ("c", "save_every: 5", {"save_every_n_steps": 5, "save_last_n_steps": 5, "save_state": True}),
    ("c", "save_every: 5", {"sample_every_n_steps": None}),
    ("c", "backup_every: 20", {"backup_every_n_steps": 20}),
    ("c", "use_fsdp: false", {"fsdp": False}),
    ("c", "use_fsdp: true", {"fsdp": True}),
    ("c", "ema_start_iters: 50\nema_iters: 10\nema_beta: 0.9", {"ema_start_steps": 50, "ema_every_n_steps": 10}),
    (
        "c",
        "ema_start_iters: 50\nema_iters: 10\nema_beta: 0.9\ngrad_accum_steps: 4",
        {"ema_start_steps": 13, "ema_every_n_steps": 3, "ema_decay": 0.9},
    ),
    ("c", "adaptive_loss_weight: True", {"adaptive_loss_weight": True}),
    ("b", "shift: 4", {}),
    ("k", "offset_noise: 0.05", {"noise_offset": 0.05}),
    ("c", "captions_getter: ['txt', identity]", {"caption_field": ("txt", "identity")}),
    ("c", "captions_getter: ['json', \"lambda x: x['text']\"]", {"caption_field": ("json", "lambda x: x['text']")}),
    ("c", "dataset_filters: [['s', 'lambda s: s > 4']]", {"dataset_filter": ("s: lambda s: s > 4",)}),
    (
        "c",
        "dataset_filters: [[['w', 'h'], 'lambda w, h: w*h >= 9'], ['s', 's > 4']]",
        {"dataset_filter": ("w,h: lambda w, h: w*h >= 9", "s: s > 4")},
    ),
    ("c", "webdataset_path: data.tar", {"webdataset_path": ("data.tar",)}),
    ("c", "webdataset_path: [a.tar, 's3://b/{00..03}.tar']", {"webdataset_path": ("a.tar", "s3://b/{00..03}.tar")}),
    ("c", "effnet_checkpoint_path: effnet.safetensors", {"effnet_checkpoint_path": "effnet.safetensors"}),
    ("c", "previewer_checkpoint_path: previewer.safetensors", {"previewer_checkpoint_path": "previewer.safetensors"}),
    ("b", "stage_a_checkpoint_path: a.safetensors", {"stage_a_checkpoint_path": "a.safetensors"}),
    ("c", "generator_checkpoint_path: stage.safetensors", {"stage_c_checkpoint_path": "stage.safetensors"}),
    ("b", "generator_checkpoint_path: stage.safetensors", {"stage_b_checkpoint_path": "stage.safetensors"}),
    ("c", "clip_text_model_name: text.safetensors", {"text_model_checkpoint_path": "text.safetensors"}),
    ("c", "clip_image_model_name: vision.safetensors", {"image_model_checkpoint_path": "vision.safetensors"}),
    ("c", "clip_image_model_name: vision.safetensors", {"clip_image_cond_rate": 0.1}),
    ("n", "module_filters: ['.attn', 'mapper']", {"network_args": ("module_filters=.attn,mapper",)}),
    ("n", "rank: 8", {"network_dim": 8, "network_alpha": 1.0, "network_module": "networks.lora"}),
    ("n", "train_tokens: [['[x]', '^dog</w>'], ['^cat', null]]", {"train_tokens": ("[x]=^dog</w>", "^cat")}),
    ("n", "train_tokens: []", {"train_tokens": ()}),
    ("n", "train_tokens: null", {"train_tokens": ()}),
    ("n", "lora_checkpoint_path: net.safetensors", {"network_weights": "net.safetensors"}),
    ("k", "controlnet_blocks: [0, 4, 63]", {"controlnet_blocks": (0, 4, 63)}),
    ("k", "controlnet_filter: CannyFilter", {"controlnet_filter": "CannyFilter"}),
    ("k", "controlnet_filter_params: {resize: 224}", {"controlnet_filter_params": ("resize=224",)}),
    ("k", "controlnet_filter_params: {resize: null}", {"controlnet_filter_params": ("resize=null",)}),
    ("k", "controlnet_bottleneck_mode: simple", {"controlnet_bottleneck_mode": "simple"}),
    ("k", "controlnet_checkpoint_path: net.safetensors", {"controlnet_checkpoint_path": "net.safetensors"}),
    # What the original trainer does without a key for it, and keys of our own.
    ("c", "", {"caption_dropout_rate": 0.05, "mixed_precision": "bf16", "resume": "auto"}),
    ("c", "optimizer_type: Lion\nema_decay: 0.5", {"optimizer_type": "Lion", "ema_decay": 0.5}),
]


def test_every_key_stands_in_the_table():
    said = {line.partition(":")[0] for _, text, _ in KEYS for line in text.splitlines()}
    assert {*_keys("c"), *_keys("b")} - said == {"edm_objective"}


@pytest.mark.parametrize(("script", "text", "expected"), KEYS, ids=[f"{row[0]}: {row[1]}"[:50] for row in KEYS])
def test_keys_become_options(place, script, text, expected):
    keys = tuple(line.partition(":")[0] for line in text.splitlines())
    found = options(script, text, without=keys).values()
    assert {name: found[_field(SCRIPTS[script], name)] for name in expected} == expected


def _field(script, name):
    found = script.Options.options()
    return name if name in found else next(key for key, option in found.items() if option.field_name == name)


TYPED = [
    ("c", "lr: 1e-4", "--learning_rate=5e-5", "learning_rate", 5e-5),
    ("c", "batch_size: 12", "--train_batch_size=3", "train_batch_size", 3),
    ("c", "batch_size: 12", "--global_batch_size=6", "train_batch_size", 6),
    ("c", "", "--train_data_dir=photos", "webdataset_path", ()),
    ("c", "dtype: bfloat16", "--full_bf16=false", "full_bf16", False),
    ("c", "", "--output_dir=there", "output_dir", "there"),
    ("c", "", "--resume=", "resume", None),
    ("c", "warmup_updates: 5", "--lr_scheduler=cosine", "lr_scheduler", "cosine"),
    ("c", "", "--caption_dropout_rate=0", "caption_dropout_rate", 0.0),
    ("c", "save_every: 5", "--sample_prompts=prompts.txt", "sample_every_n_steps", 5),
    ("n", "rank: 4", "--network_dim=16", "network_dim", 16),
    ("n", "", "--network_train_text_encoder_only", "network_train_unet_only", False),
    ("k", "controlnet_blocks: [1]", "--controlnet_blocks=0", "controlnet_blocks", (0,)),
]


@pytest.mark.parametrize(("script", "text", "word", "name", "value"), TYPED, ids=[row[2] for row in TYPED])
def test_what_is_typed_wins(place, script, text, word, name, value):
    (place / "previewer.safetensors").touch()
    words = [word, "--previewer_checkpoint_path=previewer.safetensors"] if "prompts" in word else [word]
    without = tuple(line.partition(":")[0] for line in text.splitlines())
    assert options(script, text, *words, without=without).value(name) == value


NOTES = [
    ("c", "shift: 4", (), "shift: is not used in training"),
    ("c", "dist_file_subfolder: x", (), "dist_file_subfolder: is not needed"),
    (
        "c",
        "ema_iters: 10\nema_beta: 0.9\ngrad_accum_steps: 2",
        (),
        "ema_iters: updates are counted here, 2 batches each: --ema_every_n_steps=5",
    ),
    ("c", "batch_size: 12", ("--train_batch_size=3",), "batch_size: has no effect, since --train_batch_size is given"),
    ("c", "", ("--train_data_dir=photos",), "webdataset_path: has no effect, since --train_data_dir is given"),
    ("c", "save_every: 5", (), "no sample pictures are drawn without --sample_prompts"),
    ("n", "", ("--network_args", "rank_dropout=0.1"), "module_filters: has no effect, since --network_args is given"),
]


@pytest.mark.parametrize(("script", "text", "words", "expected"), NOTES, ids=[row[3][:40] for row in NOTES])
def test_what_a_user_should_know_is_said(place, caplog, script, text, words, expected):
    with caplog.at_level(logging.INFO):
        found = options(script, text, *words)
    assert expected in "\n".join([*caplog.messages, *map(str, (*found.warnings, *found.notices))])


WRONG = [
    ("c", "lr: fast", "lr: expected a number, got 'fast'"),
    ("c", "lr: .nan", "lr: learning_rate: expected a finite number"),
    ("c", "lr: -1", "lr: learning_rate: must be at least 0"),
    ("c", "updates: 1.5", "updates: expected a whole number"),
    ("c", "updates: 0", "updates: max_train_steps: must be at least 1"),
    ("c", "updates: 1e400", "updates: expected a whole number"),
    ("c", "use_fsdp: 1", "use_fsdp: expected true or false"),
    ("c", "adaptive_loss_weight: 'True'", "adaptive_loss_weight: expected true or false"),
    ("c", "experiment_id: 2024", "experiment_id: expected a text, got 2024: put it in quotes"),
    ("c", "experiment_id: 2024-01-01", "put it in quotes"),
    ("c", "dtype: float16", "dtype: expected bfloat16 or float32"),
    ("c", "model_version: 3B", "model_version: '3B' is no structure of stage C"),
    ("b", "model_version: 1B", "model_version: '1B' is no structure of stage B"),
    ("c", "edm_objective: True", "edm_objective: no version of the original trainer knows this key"),
    ("c", "edm_objective: False", "edm_objective: no version"),
    ("c", "multi_aspect_ratio: 16:9", "multi_aspect_ratio: expected a list"),
    ("c", "multi_aspect_ratio: [1/0]", "'1/0' is no ratio"),
    (
        "c",
        "bucketeer_random_ratio: 2\nmulti_aspect_ratio: [1/1]",
        "bucketeer_random_ratio: bucket_random_ratio: must be between 0 and 1",
    ),
    ("c", "ema_beta: 1", "1.0 would never let the average change"),
    ("c", "ema_iters: 100", "ema_iters: needs ema_beta"),
    ("c", "save_every: often", "save_every: expected a number"),
    ("c", "batch_size: 0", "batch_size: must be at least 1"),
    ("c", "batch_size: 7\ngrad_accum_steps: 2", "7 samples cannot be shared evenly"),
    ("c", "checkpoint_extension: bin", "checkpoint_extension: save_model_as: 'bin' is not one of"),
    ("c", "dataset_filters: [['s', '().__class__']]", "an attribute that is not called is not allowed"),
    ("c", "dataset_filters: ['s']", "dataset_filters"),
    ("c", "captions_getter: ['txt', 'open']", "there is no getter 'open'"),
    ("c", "captions_getter: ['txt', identiy]", "Did you mean identity?"),
    ("c", "webdataset_path: [1]", "webdataset_path: expected a text"),
    ("c", "effnet_checkpoint_pth: x", "unknown key. Did you mean effnet_checkpoint_path?"),
    ("c", "learning_rat: 1", "unknown key. Did you mean learning_rate?"),
    ("c", "rank: 4", "rank: has no effect in this script"),
    ("c", "controlnet_blocks: [1]", "controlnet_blocks: has no effect in this script"),
    ("b", "previewer_checkpoint_path: previewer.safetensors", "previewer_checkpoint_path: has no effect"),
    ("n", "rank: 0", "rank: network_dim: must be at least 1"),
    ("n", "module_filters: 3", "module_filters: expected a text"),
    ("n", "train_tokens: [dog]", "train_tokens: expected a list of [token, pattern or null]"),
    ("n", "train_tokens: [['^dog', 'x']]", "stands for known tokens"),
    ("k", "controlnet_blocks: 4", "controlnet_blocks: expected a list"),
    ("k", "controlnet_blocks: [-1]", "controlnet_blocks: must be at least 0"),
    ("k", "controlnet_filter: 'os:getcwd'", "code of your own, which files may not name"),
    ("k", "controlnet_filter: PidiFilter", "there is no filter 'PidiFilter'"),
    ("k", "controlnet_filter_params: [1]", "controlnet_filter_params: expected keys and values"),
    ("k", "controlnet_filter_params: {rezise: 1}", "no such parameter. Did you mean resize?"),
    ("k", "controlnet_bottleneck_mode: big", "controlnet_bottleneck_mode: 'big' is not one of"),
]


@pytest.mark.parametrize(("script", "text", "expected"), WRONG, ids=[f"{row[0]}: {row[1]}"[:40] for row in WRONG])
def test_wrong_values_are_explained_with_their_key(place, script, text, expected):
    keys = tuple(line.partition(":")[0] for line in text.splitlines())
    with pytest.raises(UserError) as refused:
        options(script, text, without=keys)
    said = str(refused.value)
    assert expected in said, said
    assert len(said.splitlines()) == 1, said


FILES_OF_OTHER_FORMS = {
    "a.yaml": [
        ("lr: 1\nlr: 2", "the key 'lr' occurs twice"),
        ("a: &x [1]\nlr: *x", "aliases"),
        ("a: &a {b: 1}\nc:\n  <<: *a", "aliases"),
        ("lr: !!python/object/apply:os.getcwd []", "YAML error"),
        ("lr: !secret x", "YAML error"),
        ("? [a, b]\n: 1", "YAML error"),
        ("- lr: 1", "is not a list of key: value"),
        ("just words", "is not a list of key: value"),
        ("", "is not a list of key: value"),
        ("1: 2", "is not a list of key: value"),
        ("lr: 1\n---\nlr: 2", "YAML error"),
        ("lr: [1, 2", "YAML error, line"),
        ("lr:\t1\n\tb: 2", "YAML error"),
        ("lr: " + "[" * 3000, "YAML error"),
        ("lr: " + "9" * 5000, "YAML error"),
    ],
    "a.json": [
        ('{"lr": 1, "lr": 2}', "the key 'lr' occurs twice"),
        ("[1]", "is not a list of key: value"),
        ('{"lr": 1', "JSON error"),
        ("[" * 100_000, "JSON error"),
    ],
}


@pytest.mark.parametrize("name", FILES_OF_OTHER_FORMS)
def test_files_that_are_no_configuration(tmp_path, name):
    path = tmp_path / name
    for text, expected in FILES_OF_OTHER_FORMS[name]:
        path.write_text(text)
        with pytest.raises(UserError) as refused:
            read_config(path)
        assert expected in str(refused.value) and "\n" not in str(refused.value), (text, str(refused.value))
        assert name in str(refused.value)


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.yaml"
    for content in (b"lr: " + b"1" * MAX_BYTES, b"lr: \xff\xfe1"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="a.yaml"):
            read_config(path)
    with pytest.raises(UserError, match="not found|no such file"):
        read_config(tmp_path / "b.yaml")
    with pytest.raises(UserError, match="is not a file"):
        read_config(tmp_path.with_suffix(""))


def test_json_may_be_indented_with_tabs(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n\t"lr": 1e-4,\n\t"webdataset_path": "a\\/b.tar"\n}')
    assert read_config(path) == {"lr": 1e-4, "webdataset_path": "a/b.tar"}


def test_a_key_typed_as_an_option_is_answered_with_the_option(place):
    with pytest.raises(UserError) as refused:
        options("c", "", "--updates=4", "--batch_size", "8", "--generator_checkpoint_path=x")
    said = str(refused.value)
    for option in ("--max_train_steps", "--global_batch_size", "--stage_c_checkpoint_path"):
        assert f"it is called {option}." in said


def test_a_local_tar_file_that_is_not_there_is_missed_at_once(place):
    with pytest.raises(UserError, match=r"--webdataset_path: file 'nope\.tar' not found"):
        options("c", "", "--webdataset_path", "nope.tar", "data-{0..3}.tar", "s3://b/a.tar", "da*.tar")
