"""Options of train_network.py: what each changes in the network, its file or the curves; and what changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.conftest import PHOTOS
from tests.support import tensor_digest, train_network

NAMES = ("00", "01", "02")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """`2_sks duck`: three photographs with captions; `meta.json` about the same."""
    tree = tmp_path_factory.mktemp("tree")
    folder = tree / "2_sks duck"
    folder.mkdir()
    for name in NAMES:
        for suffix in (".jpg", ".caption"):
            shutil.copy(PHOTOS / "duck" / f"{name}{suffix}", folder)
    entries = {str(folder / f"{name}.jpg"): {"caption": f"a duck {name}"} for name in NAMES}
    (tree / "meta.json").write_text(json.dumps(entries))
    return tree


class Runs:
    """Runs of two updates, each with an output folder of its own; the last one's name is in `out`."""

    def __init__(self, model: Path, data: Path, place: Path) -> None:
        self.model, self.data, self.place, self.count = model, data, place, 0

    def __call__(self, *argv: object) -> Path:
        """Train and return the saved network."""
        self.count += 1
        self.out = self.place / f"out{self.count}"
        options = {
            "pretrained_model_name_or_path": self.model,
            "train_data_dir": self.data,
            "output_dir": self.out,
            "output_name": "duck",
            "resolution": 64,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "max_train_steps": 2,
            "max_data_loader_n_workers": 0,
            "seed": 7,
            "network_module": "networks.lora",
        }
        assert train_network(*(f"--{name}={value}" for name, value in options.items()), *argv) == 0
        return self.out / "duck.safetensors"

    def digest(self, words: str = "") -> str:
        """Train and return the hash of the saved tensors."""
        return tensor_digest(self(*words.split()))

    def curves(self, *argv: object) -> dict[str, dict[int, float]]:
        """Train with a log and return its curves: name -> step -> value."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logs = self.place / f"logs{self.count}"
        self(*argv, f"--logging_dir={logs}")
        (events,) = logs.glob("*/network_train/events*")
        found = EventAccumulator(str(events)).Reload()
        return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


@pytest.fixture
def runs(tiny_sd1, tree, tmp_path) -> Runs:
    return Runs(tiny_sd1, tree, tmp_path)


@pytest.fixture(scope="module")
def plain(tiny_sd1, tree, tmp_path_factory) -> Path:
    """The network of a run without further options."""
    return Runs(tiny_sd1, tree, tmp_path_factory.mktemp("plain"))()


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


DIFFERENT = {
    "rank": "--network_dim=2",
    "alpha": "--network_alpha=2",
    "dropout": "--network_dropout=0.5",
    "arguments": "--network_args conv_dim=2",
    "more arguments": "--network_args rank_dropout=0.5",
    "LoRA+": "--network_args loraplus_lr_ratio=4",
    "module": "--network_module=networks.lora_fa",
    "another module": "--network_module=networks.loha",
    "U-Net": "--network_train_unet_only",
    "text encoder": "--network_train_text_encoder_only",
    "U-Net's rate": "--unet_lr=1e-3",
    "text encoder's rate": "--text_encoder_lr=1e-3",
    "norms": "--scale_weight_norms=0.001",
    "beginning": "--initial_step=1",
    "beginning in the data": "--initial_step=1 --skip_until_initial_step",
    "validation": "--validation_split=0.4",
    "types": "--full_bf16 --mixed_precision=bf16",
    "bf16": "--mixed_precision=bf16",
    "float8 U-Net": "--fp8_base_unet --mixed_precision=bf16",
    "float8": "--fp8_base --mixed_precision=bf16",
    "metadata file": "--in_json={meta}",
    "warm start": "--network_weights={plain}",
    "ranks of a file": "--network_weights={small} --dim_from_weights",
    "merged": "--base_weights {plain}",
    "merged by half": "--base_weights {plain} --base_weights_multiplier 0.5",
    "merged twice": "--base_weights {plain} {plain} --base_weights_multiplier 0.5",
}


def test_options_that_change_the_network(runs, plain, tree):
    small = runs("--network_dim=2")
    places = {"meta": tree / "meta.json", "plain": plain, "small": small}
    digests = {name: runs.digest(words.format(**places)) for name, words in DIFFERENT.items()}
    every = {"nothing": tensor_digest(plain), **digests}
    same = [(one, other) for one in every for other in every if one < other and every[one] == every[other]]
    assert not same


SAME = {
    "checkpointing": "--gradient_checkpointing",
    "checkpoints elsewhere": "--gradient_checkpointing --cpu_offload_checkpointing",
    "metadata": "--no_metadata --training_comment=mine",
    "nothing merged": "--base_weights {plain} --base_weights_multiplier 0",
    "off by zero": "--scale_weight_norms=0 --network_dropout=0 --validation_split=0 --validate_every_n_steps=0",
    "the first ranks": "--initial_step=0",
}


def test_options_that_change_no_value(runs, plain):
    found = {name: runs.digest(words.format(plain=plain)) for name, words in SAME.items()}
    assert {name for name, digest in found.items() if digest != tensor_digest(plain)} == set()


def test_what_checkpointing_keeps_lies_in_main_memory(runs, monkeypatch):
    kept = []
    save_on_cpu = torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", lambda **more: kept.append(more) or save_on_cpu(**more))
    runs("--gradient_checkpointing")
    assert not kept
    runs("--gradient_checkpointing", "--cpu_offload_checkpointing")
    assert kept


def test_weights_kept_in_8_bits(runs, monkeypatch):
    """Of the U-Net, or of both; what is trained has none."""
    from library.training.methods.adapter import Adapter

    seen = {}
    before = Adapter.before_micro_step

    def spy(self, batch):
        for name, part in self.family.parts().items():
            seen[name] = {weight.dtype for weight in part.parameters()}
        before(self, batch)

    monkeypatch.setattr(Adapter, "before_micro_step", spy)
    for option, parts in (("--fp8_base_unet", {"unet"}), ("--fp8_base", {"unet", "text_encoder"})):
        saved = load_file(runs(option, "--mixed_precision=bf16"))
        assert {name for name in seen if torch.float8_e4m3fn in seen[name]} == parts
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_ranks_and_alphas_of_what_is_saved(runs, plain):
    def sizes(path):
        tensors = load_file(path)
        ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith("lora_down.weight")}
        return ranks, {float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")}

    assert sizes(plain) == ({4}, {1.0})
    small = runs("--network_dim=2", "--network_alpha=0.5")
    assert sizes(small) == ({2}, {0.5})
    again = runs("--network_dim=16", f"--network_weights={small}", "--dim_from_weights")
    assert sizes(again) == ({2}, {0.5})


def test_metadata_and_comments(runs, plain):
    assert "ss_learning_rate" in metadata(plain) and metadata(plain)["ss_training_comment"] == "None"
    assert metadata(runs("--training_comment=mine"))["ss_training_comment"] == "mine"
    least = metadata(runs("--no_metadata", "--training_comment=mine", "--network_args", "conv_dim=2"))
    assert {name for name in least if name.startswith("ss_")} == {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
    }


@pytest.fixture
def encoded(monkeypatch):
    """The number of captions in each call of the text encoder."""
    from library.models.clip_text import TextEncoder

    sizes = []
    forward = TextEncoder.forward

    def spy(self, ids, *more, **named):
        sizes.append(len(ids))
        return forward(self, ids, *more, **named)

    monkeypatch.setattr(TextEncoder, "forward", spy)
    return sizes


def test_cached_texts(runs, tree, tmp_path, encoded):
    """Encoded once, in batches of the size asked for, with the same result; trained ones in every step."""
    data = tmp_path / "copy"
    shutil.copytree(tree, data)
    runs.data = data
    runs("--network_train_text_encoder_only")
    assert encoded == [2, 2]
    digests, calls = set(), {}
    for size in (1, 3):
        encoded.clear()
        argv = f"--network_train_unet_only --cache_text_encoder_outputs --text_encoder_batch_size={size}"
        digests.add(runs.digest(argv))
        calls[size] = max(encoded)
    assert calls == {1: 1, 3: 3}
    assert not list(data.rglob("*_te*"))
    encoded.clear()
    to_disk = "--network_train_unet_only --cache_text_encoder_outputs_to_disk"
    digests.add(runs.digest(to_disk))
    files = [path for path in data.rglob("*") if path.suffix not in (".jpg", ".caption", ".json") and path.is_file()]
    assert len(files) == 3 and encoded
    encoded.clear()
    digests.add(runs.digest(to_disk))
    assert encoded == [1, 1]  # the empty caption alone: no file is for it, and it tells sizes
    assert len(digests) == 1


DATA = """
[[datasets]]
resolution = 64
batch_size = 2
{dataset}
[[datasets.subsets]]
image_dir = '{folder}'
num_repeats = 2
{subset}
"""


def test_what_data_sets_ask_of_the_network(runs, tree, tmp_path):
    """Strength, and pictures that shall come out as the bare model draws them."""
    saved = {}
    for number, (name, dataset, subset) in enumerate(
        (
            ("plain", "", ""),
            ("full", "network_multiplier = 1.0", ""),
            ("half", "network_multiplier = 0.5", ""),
            ("preserved", "", "custom_attributes = {diff_output_preservation = true}"),
        )
    ):
        config = tmp_path / f"{number}.toml"
        config.write_text(DATA.format(dataset=dataset, subset=subset, folder=tree / "2_sks duck"))
        saved[name] = runs(f"--dataset_config={config}")
    digests = {name: tensor_digest(path) for name, path in saved.items()}
    assert digests["plain"] == digests["full"]
    assert len(set(digests.values())) == 3
    moved = {
        name: max(float(tensor.abs().max()) for key, tensor in load_file(path).items() if "lora_up" in key)
        for name, path in saved.items()
    }
    assert moved["preserved"] == 0 < moved["plain"]


def test_names_of_curves(runs):
    """As tools and people know them; groups that do not train have none."""
    argv = ("--network_args", "loraplus_unet_lr_ratio=4", "--scale_weight_norms=0.001", "--validation_split=0.4")
    curves = runs.curves(*argv, "--text_encoder_lr=1e-3", "--unet_lr=2e-3", "--validate_every_n_steps=1")
    both = {
        "loss/current",
        "loss/average",
        "lr/textencoder",
        "lr/unet",
        "lr/unet plus",
        "max_norm/keys_scaled",
        "max_norm/max_key_norm",
        "norm/avg_key_norm",
        "loss/validation/step_average",
        "loss/validation/step_divergence",
    }
    epoch = {"loss/epoch_average", "loss/validation/epoch_average", "loss/validation/epoch_divergence"}
    assert {name: sorted(curves[name]) for name in both} == dict.fromkeys(both, [1, 2])
    assert {name: sorted(curves[name]) for name in epoch} == dict.fromkeys(epoch, [1])
    assert [curves[f"lr/{name}"][1] for name in ("textencoder", "unet", "unet plus")] == pytest.approx(
        [1e-3, 2e-3, 8e-3]
    )
    assert curves["max_norm/keys_scaled"][2] > 0
    assert curves["max_norm/max_key_norm"][2] == pytest.approx(0.001, rel=1e-3)
    assert curves["norm/avg_key_norm"][2] <= 0.001 * 1.001

    alone = runs.curves("--network_train_unet_only", "--max_train_steps=1")
    assert [name for name in alone if name.startswith(("lr/", "max_norm", "norm", "loss/validation"))] == ["lr/unet"]
    text = runs.curves("--network_train_text_encoder_only", "--max_train_steps=1", "--optimizer_type=Prodigy")
    assert sorted(name for name in text if name.startswith("lr/")) == ["lr/d*lr/textencoder", "lr/textencoder"]
