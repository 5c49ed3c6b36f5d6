"""Files of the original trainer become options; every key of theirs is known, and slips are named."""

from __future__ import annotations

import pytest

from library.cascade_yaml import batch_per_process, parse_yaml, read_config, to_options
from library.data.aspect_list import aspect_sizes, read_ratio
from library.errors import UserError

STAGE_C = """
experiment_id: stage_c_3b_finetuning
checkpoint_path: /somewhere/checkpoints
output_path: /somewhere/samples
model_version: 3.6B
dtype: bfloat16
wandb_project: StableCascade
wandb_entity: me
lr: 1e-4
batch_size: 512
image_size: 768
multi_aspect_ratio: [1/1, 1/2, 1/3, 2/3, 3/4, 1/5, 2/5, 3/5, 4/5, 1/6, 5/6, 9/16]
grad_accum_steps: 4
updates: 100000
backup_every: 20000
save_every: 2000
warmup_updates: 1
use_fsdp: True
ema_start_iters: 5000
ema_iters: 100
ema_beta: 0.9
adaptive_loss_weight: True
webdataset_path: s3://bucket/data/0001.tar
effnet_checkpoint_path: models/effnet_encoder.safetensors
previewer_checkpoint_path: models/previewer.safetensors
generator_checkpoint_path: models/stage_c_bf16.safetensors
dataset_filters:
  - ['aesthetic', 'lambda s: s > 4.5']
  - [['width', 'height'], 'lambda w, h: w * h >= 589824']
"""


def converted(text, **more):
    return to_options(parse_yaml(text, "c.yaml"), **{"stage": "c", "where": "c.yaml", **more})


def test_stage_c():
    found = converted(STAGE_C)
    assert found.options == {
        "output_name": "stage_c_3b_finetuning",
        "output_dir": "/somewhere/checkpoints/stage_c_3b_finetuning",
        "sample_dir": "/somewhere/samples",
        "model_version": "3.6B",
        "full_bf16": True,
        "mixed_precision": "bf16",
        "log_with": "wandb",
        "log_tracker_name": "StableCascade",
        "wandb_entity": "me",
        "learning_rate": 1e-4,
        "global_batch_size": 512,
        "resolution": 768,
        "multi_aspect_ratio": ("1/1", "1/2", "1/3", "2/3", "3/4", "1/5", "2/5", "3/5", "4/5", "1/6", "5/6", "9/16"),
        "gradient_accumulation_steps": 4,
        "max_train_steps": 100000,
        "backup_every_n_steps": 20000,
        "save_every_n_steps": 2000,
        "sample_every_n_steps": 2000,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 1,
        "fsdp": True,
        "ema_start_steps": 1250,
        "ema_every_n_steps": 25,
        "ema_decay": 0.9,
        "adaptive_loss_weight": True,
        "webdataset_path": ("s3://bucket/data/0001.tar",),
        "effnet_checkpoint_path": "models/effnet_encoder.safetensors",
        "previewer_checkpoint_path": "models/previewer.safetensors",
        "stage_c_checkpoint_path": "models/stage_c_bf16.safetensors",
        "dataset_filter": (["aesthetic", "lambda s: s > 4.5"], [["width", "height"], "lambda w, h: w * h >= 589824"]),
        "caption_dropout_rate": 0.05,
        "bucket_random_ratio": 0.05,
        "resume": "auto",
    }
    assert found.sources["sample_every_n_steps"] == "save_every"
    assert found.sources["resume"] == ""


def test_lora_and_control_net_and_stage_b():
    lora = converted(
        "module_filters: ['.attn']\nrank: 4\ntrain_tokens:\n  - ['[fernando]', '^dog</w>']\n  - ['^cat', null]\n"
        "lora_checkpoint_path: a.safetensors\n"
    ).options
    assert lora["network_args"] == ("module_filters=.attn",)
    assert (lora["network_dim"], lora["network_alpha"]) == (4, 1.0)
    assert lora["train_tokens"] == (("[fernando]", "^dog</w>"), ("^cat", None))
    assert lora["network_weights"] == "a.safetensors"
    net = converted(
        "controlnet_blocks: [0, 4, 8, 12, 51, 55, 59, 63]\ncontrolnet_filter: CannyFilter\noffset_noise: 0.05\n"
        "controlnet_filter_params:\n  resize: 224\ncaptions_getter: ['txt', identity]\n"
    ).options
    assert net["controlnet_blocks"] == (0, 4, 8, 12, 51, 55, 59, 63)
    assert net["controlnet_filter_params"] == ("resize=224",)
    assert net["caption_field"] == ("txt", "identity")
    assert net["noise_offset"] == 0.05
    b = converted("shift: 4\ngenerator_checkpoint_path: b.safetensors\nstage_a_checkpoint_path: a\n", stage="b")
    assert b.options["stage_b_checkpoint_path"] == "b.safetensors"
    assert "shift" not in b.options
    assert any("shift" in note for note in b.notes)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'", "1/10000"])
def test_rates_are_numbers_however_they_are_written(text):
    assert converted(f"lr: {text}").options["learning_rate"] == pytest.approx(1e-4)
    assert converted("updates: 1e5").options["max_train_steps"] == 100_000


def test_everything_wrong_is_said_at_once():
    text = (
        "updatess: 3\nlr: fast\nuse_fsdp: 1\nedm_objective: True\nrank: 1.5\ntrain_tokens: [dog]\nzzzz: 1\ndtype: int8"
    )
    with pytest.raises(UserError) as refused:
        converted(text)
    lines = str(refused.value).splitlines()
    assert len(lines) == 8
    assert "c.yaml: updatess: unknown key. Did you mean updates?" in lines
    assert any("edm_objective: no version of the original trainer knows this key" in line for line in lines)
    assert "c.yaml: zzzz: unknown key." in lines


def test_absent_values_and_own_options():
    found = converted("dtype: null\nnetwork_dropout: 0.1\n", own={"network_dropout"})
    assert found.options["network_dropout"] == 0.1
    assert "full_bf16" not in found.options


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "YAML error, line"),
        ("a: 1\na: 2", "the key 'a' occurs twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.system ['true']", "YAML error"),
        ("[" * 3000, "YAML error"),
        ("a: \x00", "YAML error"),
    ],
)
def test_damaged_and_hostile_files(text, words, tmp_path):
    with pytest.raises(UserError, match="c.yaml") as refused:
        parse_yaml(text, "c.yaml")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(STAGE_C, encoding="utf-8")
    assert read_config(path)["updates"] == 100000
    path.write_text('{"lr": 1e-4, "updates": 5}', encoding="utf-8")
    assert to_options(read_config(path), stage="c").options["learning_rate"] == 1e-4
    for wrong in ("- a\n- b", "3: 4", ""):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(UserError, match="key: value"):
            read_config(path)


def test_batches():
    assert batch_per_process(512, 8, 4) == 16
    for total, world, accumulation in ((30, 4, 1), (3, 4, 1), (8, 3, 2)):
        with pytest.raises(UserError, match="batch_size: .* cannot be shared evenly"):
            batch_per_process(total, world, accumulation)


def test_sizes_of_the_original_list():
    ratios = ["1/1", "1/2", "1/3", "2/3", "3/4", "1/5", "2/5", "3/5", "4/5", "1/6", "5/6", "9/16"]
    upright = [(288, 1856), (320, 1696), (416, 1312), (480, 1184), (512, 1056), (576, 960), (576, 1024), (608, 928)]
    upright += [(640, 864), (672, 832)]
    wanted = {*upright, (768, 768), *((h, w) for w, h in upright)}
    sizes = aspect_sizes(768, ratios)
    assert len(sizes) == 21
    assert set(sizes) == wanted
    assert sizes == tuple(sorted(sizes))


def test_ratios():
    assert float(read_ratio("9/16")) == 0.5625
    assert float(read_ratio("16:9")) == pytest.approx(16 / 9)
    assert float(read_ratio(1.5)) == 1.5
    for wrong in (969, "a/b", "1/0", -1, "0", True, None, [1], "1" * 50):
        with pytest.raises(UserError, match="multi_aspect_ratio"):
            read_ratio(wrong)
