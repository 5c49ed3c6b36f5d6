"""What a network starts from, and how it is computed: files of any layout, merged files, types, checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import tensor_digest, train_network


@pytest.fixture
def methods(monkeypatch):
    """The training methods of the runs, which know their networks."""
    from library.training.methods.adapter import Adapter

    seen = []
    attach = Adapter.attach
    monkeypatch.setattr(Adapter, "attach", lambda self: (attach(self), seen.append(self))[0])
    return seen


@pytest.fixture
def run(tiny_sd1, photo_folders, tmp_path):
    """Train for a few updates; returns the saved network."""

    def train(name: str, *argv: str) -> Path:
        options = {
            "pretrained_model_name_or_path": tiny_sd1,
            "train_data_dir": photo_folders,
            "output_dir": tmp_path / name,
            "output_name": "net",
            "resolution": 64,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "max_train_steps": 2,
            "max_data_loader_n_workers": 0,
            "seed": 7,
            "network_module": "networks.lora",
            "save_precision": "float",
        }
        if any(word.startswith("--dataset_config") for word in argv):
            del options["train_data_dir"]
        assert train_network(*(f"--{key}={value}" for key, value in options.items()), *argv) == 0
        return tmp_path / name / "net.safetensors"

    return train


@pytest.fixture
def trained(run) -> Path:
    """A LoRA with convolutions whose both factors are far from where they began."""
    return run("first", "--network_dim=4", "--network_alpha=3", "--network_args", "conv_dim=2", "conv_alpha=1")


def converted(source: Path, target: Path, to: str) -> Path:
    from tools.convert_lora import ConvertOptions, convert

    return Path(convert(ConvertOptions(src=str(source), dst=str(target), to=to)))


def test_a_warm_start_computes_what_the_file_does_whatever_its_layout(run, trained, tmp_path, losses, methods):
    sizes = ("--network_dim=4", "--network_alpha=3", "--network_args", "conv_dim=2", "conv_alpha=1")
    # Forget the first run; one update from nothing shows what the file is worth.
    losses.clear()
    run("cold", *sizes, "--max_train_steps=1")
    cold = losses[0]
    ckpt = tmp_path / "net.ckpt"
    torch.save(load_file(trained), ckpt)
    starts = {
        "kohya": (trained, sizes),
        "wrong alpha": (trained, ("--network_dim=4", "--network_alpha=1", "--network_args", "conv_dim=2")),
        "dim": (trained, ("--dim_from_weights",)),
        "dim, dropout": (trained, ("--dim_from_weights", "--network_args", "loraplus_lr_ratio=4")),
        "ckpt": (ckpt, ("--dim_from_weights",)),
        "peft": (converted(trained, tmp_path / "peft.safetensors", "peft"), ("--dim_from_weights",)),
        "diffusers": (converted(trained, tmp_path / "diffusers.safetensors", "diffusers"), sizes),
    }
    found = {}
    for name, (file, more) in starts.items():
        losses.clear()
        run(name, f"--network_weights={file}", *more, "--max_train_steps=1")
        found[name] = losses[0]
    assert len(set(found.values())) == 1, found
    assert abs(found["kohya"] - cold) > 1e-3
    ranks = {(adapter.rank, float(adapter.alpha)) for adapter in methods[3].network.adapters}
    assert ranks == {(4, 3.0), (2, 1.0)}


def test_sizes_from_a_file_leave_the_other_arguments_alone(run, trained, methods):
    more = ("--network_dropout=0.2", "--network_args", "module_dropout=0.1", "loraplus_lr_ratio=4")
    run("again", f"--network_weights={trained}", "--dim_from_weights", *more)
    network = methods[-1].network
    assert {(adapter.dropouts.neuron, adapter.dropouts.module) for adapter in network.adapters} == {(0.2, 0.1)}
    rates = {group.name: group.lr for group in methods[-1].param_groups()}
    assert rates == pytest.approx({"textencoder": 1e-2, "textencoder plus": 4e-2, "unet": 1e-2, "unet plus": 4e-2})


def test_base_weights_become_part_of_the_model(run, trained, tmp_path, tiny_sd1, methods):
    """W + 0.5 * scale * up @ down of the first file, then the second (in another layout) at strength 1."""
    from library.checkpoints.load import load_parts
    from library.checkpoints.lora_names import module_names

    second = converted(trained, tmp_path / "peft.safetensors", "peft")
    run("merged", "--network_dim=2", "--base_weights", str(trained), str(second), "--base_weights_multiplier=0.5")
    family, tensors = methods[-1].family, load_file(trained)
    before = {"unet": load_parts(str(tiny_sd1), "sd1").unet, "text_encoder": load_parts(str(tiny_sd1), "sd1").text}
    checked = 0
    for part, module in family.parts().items():
        weights = {name: value for name, value in module.state_dict().items() if name.endswith(".weight")}
        names = module_names([name.removesuffix(".weight") for name in weights], part)
        for name, path in names.items():
            wanted = before[part][f"{path}.weight"].float()
            if f"{name}.alpha" in tensors:
                up, down = (tensors[f"{name}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
                scale = float(tensors[f"{name}.alpha"]) / len(down)
                wanted = wanted + 1.5 * scale * (up @ down).view(wanted.shape)
                checked += 1
            torch.testing.assert_close(weights[f"{path}.weight"], wanted, rtol=1e-5, atol=1e-6)
    assert checked == len({name.partition(".")[0] for name in tensors}) > 200


CHECKPOINTED = {
    "lora": "--network_dropout=0.2 --network_args rank_dropout=0.2 module_dropout=0.2 conv_dim=2",
    "dylora": "--network_module=networks.dylora --network_args unit=1",
    "lycoris": "--network_module=lycoris.kohya --network_args algo=locon dropout=0.2 preset=attn-only",
}


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_changes_no_gradient(run, name):
    if name == "lycoris":
        pytest.importorskip("lycoris")
    more = ("--network_dim=4", *CHECKPOINTED[name].split(), "--max_grad_norm=0")
    digests = {
        tensor_digest(run("plain", *more)),
        tensor_digest(run("checkpointed", *more, "--gradient_checkpointing")),
        tensor_digest(run("offloaded", *more, "--gradient_checkpointing", "--cpu_offload_checkpointing")),
    }
    assert len(digests) == 1


def test_compiled_blocks_train_alike(run):
    more = ("--network_dim=4", "--optimizer_type=SGD", "--learning_rate=10", "--network_args", "conv_dim=2")
    plain, compiled = run("plain", *more), run("compiled", *more, "--torch_compile", "--dynamo_backend=eager")
    left, right = load_file(plain), load_file(compiled)
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_network_in_bfloat16_is_trained_and_saved_in_it(run):
    saved = run("half", "--network_dim=4", "--network_alpha=0.3", "--full_bf16", "--mixed_precision=bf16")
    tensors = load_file(saved)
    # In the middle a picture of 64 pixels is a single token, which needs no attention.
    assert all(value.any() for name, value in tensors.items() if "lora_up" in name and "mid_block" not in name)
    assert {float(value) for name, value in tensors.items() if name.endswith("alpha")} == {float(torch.tensor(0.3))}
    native = load_file(run("native", "--network_dim=4", "--full_bf16", "--mixed_precision=bf16", "--save_precision="))
    assert {value.dtype for name, value in native.items() if not name.endswith("alpha")} == {torch.bfloat16}


@pytest.mark.parametrize("module", ["networks.lora", "networks.lokr"])
def test_frozen_weights_of_8_bits(run, losses, methods, module):
    half = ("--network_dim=4", f"--network_module={module}", "--mixed_precision=bf16", "--max_train_steps=1")
    run("half", *half)
    eighth = run("eighth", *half, "--fp8_base")
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]
    family = methods[-1].family
    assert family.unet.conv_in.weight.dtype == family.text_encoder.layers[0].mlp.fc1.weight.dtype
    assert family.unet.conv_in.weight.dtype == torch.float8_e4m3fn
    assert any(value.any() for name, value in load_file(eighth).items() if "lora_up" in name or "lokr_w2" in name)


@pytest.mark.parametrize("module", ["lora", "lora_fa", "dylora", "oft", "loha", "lokr"])
def test_a_file_of_every_module_goes_on_where_it_ended(run, losses, module):
    """The first loss of a run that starts from a file is that of the run that would have gone on."""
    more = [f"--network_module=networks.{module}", "--network_dim=4", "--max_train_steps=3"]
    more += ["--network_alpha=0.1"] if module == "oft" else []
    more += ["--network_args", "factor=4"] if module == "lokr" else []
    more += ["--save_every_n_steps=2", "--lr_scheduler=constant"]
    saved = run("first", *more).with_name("net-step00000002.safetensors")
    wanted = losses[2]
    for start in ((), ("--dim_from_weights",)):
        losses.clear()
        argv = (f"--network_weights={saved}", "--initial_step=2", "--skip_until_initial_step", *start)
        run(f"again{len(start)}", *more, *argv)
        assert losses == [wanted]
