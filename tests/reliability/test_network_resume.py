"""A network run that is stopped and resumed ends with the same bits as one that was not, whatever the network is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import tensor_digest, train_network

ROOT = Path(__file__).resolve().parent.parent.parent
FINAL = "duck.safetensors"
SCRIPT = "train_network.py"
DROPOUTS = "--network_dropout=0.2 --network_args rank_dropout=0.2 module_dropout=0.2"


def options(model: Path, photos: Path, out: Path, *more: str) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={photos}",
        f"--output_dir={out}",
        "--output_name=duck",
        "--resolution=64",
        "--enable_bucket",
        "--min_bucket_reso=64",
        "--max_bucket_reso=128",
        "--train_batch_size=2",
        "--flip_aug",
        "--shuffle_caption",
        "--network_module=networks.lora",
        "--network_dim=4",
        "--learning_rate=1e-2",
        "--lr_scheduler=cosine",
        "--max_train_steps=4",
        "--max_data_loader_n_workers=0",
        "--seed=7",
        *more,
    ]


VARIANTS = {
    "lora, all dropouts, convolutions, LoRA+, accumulation": (
        f"{DROPOUTS} conv_dim=2 loraplus_lr_ratio=4 --gradient_accumulation_steps=2 --scale_weight_norms=0.1"
    ),
    "lora, a text layer that never runs, cached latents": "--clip_skip=2 --cache_latents --max_grad_norm=0.01",
    "lora in bfloat16, an alpha that it rounds": (
        "--full_bf16 --mixed_precision=bf16 --network_dim=3 --network_alpha=1.3"
    ),
    "AdamW8bit": "--optimizer_type=AdamW8bit --optimizer_args min_8bit_size=16",
    "Adafactor": "--optimizer_type=Adafactor --lr_scheduler=constant --optimizer_args relative_step=False",
    "Prodigy": "--optimizer_type=Prodigy --learning_rate=1",
    "schedule-free": "--optimizer_type=AdamWScheduleFree --lr_scheduler=constant",
    "checkpointing with dropouts": f"{DROPOUTS} --gradient_checkpointing",
    "dora": "--network_args dora_wd=True dropout=0.2",
    "lora_fa": f"--network_module=networks.lora_fa {DROPOUTS}",
    "dylora": "--network_module=networks.dylora --network_args unit=2 module_dropout=0.2",
    "oft": "--network_module=networks.oft --network_alpha=0.01",
    "loha": "--network_module=networks.loha --network_args rank_dropout=0.2 module_dropout=0.2",
    "lokr": "--network_module=networks.lokr --network_args rank_dropout=0.2 module_dropout=0.2 factor=4",
    **{
        f"lycoris {algo}": f"--network_module=lycoris.kohya {DROPOUTS} preset=attn-only algo={algo}"
        for algo in (
            "locon",
            "loha",
            "lokr",
            "diag-oft",
            "boft",
            "glora",
            "locon use_scalar=True",
            "dylora block_size=2",
        )
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_in_the_middle_of_an_epoch_ends_with_the_same_bits(tiny_sd1, photo_folders, tmp_path, losses, variant):
    if "lycoris" in variant:
        pytest.importorskip("lycoris")
    more = VARIANTS[variant].split()
    straight, again = tmp_path / "straight", tmp_path / "again"
    run = options(tiny_sd1, photo_folders, straight, *more)
    assert train_network(*run, "--save_state", "--save_every_n_steps=2") == 0
    first = losses.copy()
    losses.clear()
    state = straight / "duck-step00000002-state"
    assert train_network(*options(tiny_sd1, photo_folders, again, *more), f"--resume={state}") == 0
    assert losses == first[-len(losses) :] and 0 < len(losses) < len(first)
    assert tensor_digest(again / FINAL) == tensor_digest(straight / FINAL)
    halfway = load_file(straight / "duck-step00000002.safetensors")
    assert any(not torch.equal(value, halfway[name]) for name, value in load_file(again / FINAL).items())


@pytest.mark.parametrize("variant", ["lora", "lycoris"])
def test_observers_leave_no_trace(tiny_sd1, photo_folders, tmp_path, variant):
    """Samples, validation, logs and saves on or off: the same bits."""
    more = DROPOUTS.split()
    if variant == "lycoris":
        pytest.importorskip("lycoris")
        more += ["algo=lokr", "--network_module=lycoris.kohya"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a duck --w 64 --h 64 --s 2\n")
    run = [f"--max_train_steps={3}", "--validation_split=0.4", "--validation_seed=1", *more]
    quiet, busy = tmp_path / "quiet", tmp_path / "busy"
    assert train_network(*options(tiny_sd1, photo_folders, quiet, *run), "--validate_every_n_epochs=99") == 0
    status = train_network(
        *options(tiny_sd1, photo_folders, busy, *run),
        f"--sample_prompts={prompts}",
        "--sample_every_n_steps=1",
        "--sample_at_first",
        "--validate_every_n_steps=1",
        "--save_every_n_steps=1",
        "--save_state",
        f"--logging_dir={tmp_path / 'logs'}",
    )
    assert status == 0
    assert len(list((busy / "sample").glob("*.png"))) == 4
    assert tensor_digest(quiet / FINAL) == tensor_digest(busy / FINAL)


def test_states_hold_the_optimizer_parameter_by_parameter(tiny_sd1, photo_folders, tmp_path, monkeypatch):
    """A run in rows and one without write the same states, and each goes on from the other's."""
    from library.training import setup

    build, more = (
        setup.build_optimizer,
        ("--clip_skip=2", "--max_grad_norm=0", "--save_state", "--save_every_n_steps=2"),
    )

    def run(out: Path, *argv: str, flat: bool) -> None:
        used = build if flat else lambda options, groups, flat: build(options, groups)
        monkeypatch.setattr(setup, "build_optimizer", used)
        assert train_network(*options(tiny_sd1, photo_folders, tmp_path / out, *more, *argv)) == 0

    run("rows", flat=True)
    run("single", flat=False)
    states = [tmp_path / name / "duck-step00000002-state" for name in ("rows", "single")]
    rows, single = (torch.load(state / "optimizer.bin", weights_only=True) for state in states)
    counts = [len(group["params"]) for group in rows["param_groups"]]
    assert counts == [24, 384]
    # The last of two text layers never runs: no values for the two factors of its six layers.
    assert rows["state"].keys() == single["state"].keys() and len(rows["state"]) == sum(counts) - 12
    for number, values in single["state"].items():
        assert all(torch.equal(value, rows["state"][number][name]) for name, value in values.items())
    run("rows_again", f"--resume={states[1]}", flat=True)
    run("single_again", f"--resume={states[0]}", flat=False)
    digests = {tensor_digest(tmp_path / name / FINAL) for name in ("rows", "single", "rows_again", "single_again")}
    assert len(digests) == 1


KILLS = ("step.backward:kill9:2", "step.optimizer_mid:kill9:2", "state.between_files:kill9:3", "save.mid:kill9:3")


@pytest.mark.parametrize("variant", ["lora", "lycoris"])
def test_killed_again_and_again(fork_server, tiny_sd1, photo_folders, tmp_path, variant):
    more = [*DROPOUTS.split(), "--save_state", "--save_every_n_steps=1", "--gradient_accumulation_steps=2"]
    if variant == "lycoris":
        pytest.importorskip("lycoris")
        more += ["--network_args", "algo=loha", "preset=attn-only", "dropout=0.2", "--network_module=lycoris.kohya"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train_network(*options(tiny_sd1, photo_folders, straight, *more)) == 0
    argv = options(tiny_sd1, photo_folders, killed, *more)
    assert fork_server.run_killed(SCRIPT, argv, KILLS if variant == "lora" else KILLS[1:2])
    assert tensor_digest(killed / FINAL) == tensor_digest(straight / FINAL)


def test_an_interrupt_saves_state_and_network(fork_server, tiny_sd1, photo_folders, tmp_path):
    out, straight = tmp_path / "out", tmp_path / "straight"
    argv = options(tiny_sd1, photo_folders, out, "--network_dropout=0.2")
    stopped = fork_server.run(SCRIPT, argv, env={"SD_FAULT": "step.forward:int:2"})
    assert stopped.returncode == 130, stopped.output()
    assert "--resume" in stopped.output().strip().splitlines()[-1]
    assert (out / "duck-interrupted.safetensors").exists()
    assert train_network(*argv, "--resume=latest") == 0
    saving = ("--network_dropout=0.2", "--save_every_n_steps=2")
    assert train_network(*options(tiny_sd1, photo_folders, straight, *saving)) == 0
    assert tensor_digest(out / FINAL) == tensor_digest(straight / FINAL)
    halfway = straight / "duck-step00000002.safetensors"
    assert tensor_digest(out / "duck-interrupted.safetensors") == tensor_digest(halfway)


def test_two_processes_do_what_accumulation_does_and_resume_exactly(fork_server, tiny_sd1, photo_folders, tmp_path):
    """Dropouts too: what is drawn follows from the micro-batch, whoever computes it."""
    # Of gradients that are rounding errors AdamW makes whole steps, unless its epsilon is large.
    more = ("--network_dropout=0.2", "--clip_skip=2", "--cache_latents", "--max_grad_norm=0")
    more += ("--optimizer_args", "eps=0.01")

    def in_two_processes(out: Path, *argv: str) -> None:
        fork_server.run_ranks(SCRIPT, options(tiny_sd1, photo_folders, out, *more, *argv))

    two, again, one = tmp_path / "two", tmp_path / "again", tmp_path / "one"
    in_two_processes(two, "--save_state", "--save_every_n_steps=2")
    # Buckets of DDP's own make no difference without clipping, whose norm is summed up in another order then.
    in_two_processes(again, f"--resume={two / 'duck-step00000002-state'}", "--ddp_gradient_as_bucket_view")
    assert tensor_digest(again / FINAL) == tensor_digest(two / FINAL)
    argv = options(tiny_sd1, photo_folders, one, *more, "--gradient_accumulation_steps=2", "--save_every_n_steps=1")
    assert train_network(*argv) == 0
    left, right = load_file(one / FINAL), load_file(two / FINAL)
    first = load_file(one / "duck-step00000001.safetensors")
    for part in ("lora_unet", "lora_te"):
        names = [name for name in left if name.startswith(part) and "lora_up" in name]
        moved = max((left[name] - first[name]).abs().max().item() for name in names)
        assert moved > 1e-4
        assert max((left[name] - right[name]).abs().max().item() for name in names) < 0.02 * moved, part
