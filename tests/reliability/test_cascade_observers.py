"""What looks at a Stable Cascade training (samples, saves, logs, averages, loader processes) leaves no trace in it."""

from __future__ import annotations

import pytest
from PIL import Image, ImageChops

from tests.cascade_runs import train_stage_b, train_stage_c
from tests.control_training import train_control_net
from tests.support import run_tool, tensor_digest

SCRIPTS = {
    "c": "--random_crop --color_aug --caption_dropout_rate=0.3",
    "b": "--random_crop",
    "network": "--train_tokens ^duck</w> --network_module=networks.lora --network_dropout=0.2 --stage_c_dropout=0.2 "
    "--network_train_unet_only --learning_rate=1e-2",
    "control": "--controlnet_filter=inpaint",
}


def train_network(*argv: object) -> int:
    import stable_cascade_train_c_network as script

    return run_tool(script.main, *argv)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_samples_saves_logs_and_averages_change_nothing(cascade_command, tiny_cascade, photo_folders, tmp_path, kind):
    train = {"c": train_stage_c, "b": train_stage_b, "network": train_network, "control": train_control_net}[kind]
    usual = {"stage": "b" if kind == "b" else "c", "max_train_steps": 2}
    more = (*SCRIPTS[kind].split(), "--adaptive_loss_weight")
    picture = next(photo_folders.rglob("*.jpg"))
    (tmp_path / "prompts.txt").write_text(f"a duck --w 128 --h 128 --s 2 --cn {picture}\n")
    observers = (
        "--ema_decay=0.9",
        *(f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_every_n_steps=1", "--sample_at_first"),
        *(() if kind == "b" else (f"--previewer_checkpoint_path={tiny_cascade.previewer}",)),
        *(f"--logging_dir={tmp_path / 'logs'}", "--save_every_n_steps=1", "--save_state"),
        *(("--max_data_loader_n_workers=2",) if kind == "c" else ()),
    )
    assert train(*cascade_command(tmp_path / "quiet", *more, **usual)) == 0
    assert train(*cascade_command(tmp_path / "busy", *more, *observers, **usual)) == 0
    ends = [tensor_digest(tmp_path / run / "duck.safetensors") for run in ("busy", "quiet")]
    assert ends[0] == ends[1] != tensor_digest(tmp_path / "busy" / "duck_ema.safetensors")
    drawn = {path.name.partition("_00_")[0]: path for path in (tmp_path / "busy" / "sample").glob("*_ema.png")}
    assert len(drawn) == 3
    for moment, average in drawn.items():
        (own,) = (
            path for path in average.parent.glob(f"{moment}_00_*.png") if path != average and "_ema" not in path.name
        )
        same = (
            ImageChops.difference(Image.open(own).convert("RGB"), Image.open(average).convert("RGB")).getbbox() is None
        )
        assert same == (moment == "duck_e000000"), moment
