"""Options of train_db.py that change how a run computes: those that must not change its result, and those that must."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import PHOTOS
from tests.support import tensor_digest, train_db

UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """`2_sks duck`: three photographs with captions."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "2_sks duck").mkdir()
    for name in ("00", "01", "02"):
        for suffix in (".jpg", ".caption"):
            shutil.copy(PHOTOS / "duck" / f"{name}{suffix}", tree / "2_sks duck")
    return tree


class Runs:
    """Runs of two updates whose outputs lie in folders of their own."""

    def __init__(self, model: Path, data: Path, place: Path) -> None:
        self.model, self.data, self.place, self.count = model, data, place, 0

    def __call__(self, *argv: str) -> Path:
        """Train and return the saved model."""
        self.count += 1
        out = self.place / f"out{self.count}"
        options = {
            "pretrained_model_name_or_path": self.model,
            "train_data_dir": self.data,
            "output_dir": out,
            "output_name": "duck",
            "resolution": 64,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "max_train_steps": 2,
            "max_data_loader_n_workers": 0,
            "seed": 7,
        }
        assert train_db(*(f"--{name}={value}" for name, value in options.items()), *argv) == 0
        return out / "duck.safetensors"

    def digest(self, *argv: str) -> str:
        """Train and return the hash of the saved weights."""
        return tensor_digest(self(*argv))


@pytest.fixture
def runs(tiny_sd1, tree, tmp_path) -> Runs:
    return Runs(tiny_sd1, tree, tmp_path)


@pytest.fixture(scope="module")
def plain(tiny_sd1, tree, tmp_path_factory) -> str:
    """Hash of the weights of a run without further options."""
    return Runs(tiny_sd1, tree, tmp_path_factory.mktemp("plain")).digest()


@pytest.fixture(scope="module")
def cached(tiny_sd1, tree, tmp_path_factory) -> str:
    """The same with latents cached in memory."""
    return Runs(tiny_sd1, tree, tmp_path_factory.mktemp("cached")).digest("--cache_latents")


def metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size))["__metadata__"]


def dtypes(path: Path, prefix: str) -> set[torch.dtype]:
    found = load_file(path).items()
    return {value.dtype for name, value in found if name.startswith(prefix) and value.is_floating_point()}


SAME = {
    "checkpointing": "--gradient_checkpointing",
    "memory and loading": "--sdpa --lowram --highvram --no_half_vae --persistent_data_loader_workers "
    "--max_data_loader_n_workers=1 --ddp_timeout=5",
    "off by zero": "--noise_offset=0 --min_snr_gamma=0 --ip_noise_gamma=0 --multires_noise_iterations=0",
    "outputs": "--save_every_n_steps=1 --save_state --save_precision=float --metadata_title=other",
}


@pytest.mark.parametrize("name", SAME)
def test_options_that_change_no_bit(runs, plain, name):
    assert runs.digest(*SAME[name].split()) == plain


@pytest.mark.skipif(torch.cuda.is_available(), reason="xformers may run here")
def test_an_attention_backend_that_cannot_run_is_replaced_and_named(runs, plain, capsys):
    assert runs.digest("--xformers") == plain
    said = [line for line in capsys.readouterr().err.splitlines() if "--xformers" in line]
    assert len(said) == 1 and "WARNING" in said[0]


def test_compiled_blocks_train_alike(runs, plain):
    assert runs.digest("--torch_compile", "--dynamo_backend=eager", "--gradient_checkpointing") == plain


DIFFERENT = {
    "colour": "--color_aug",
    "crop": "--random_crop",
    "mirror": "--flip_aug --seed=3",
    "no captions": "--caption_dropout_rate=1",
    "prefix": "--caption_prefix=oil",
    "tag warm-up": "--token_warmup_step=2 --token_warmup_min=1 --caption_separator=+",
    "bf16": "--mixed_precision=bf16",
}


def test_options_that_change_the_result(runs, plain):
    digests = {
        name: runs.digest(*(word.replace("+", " ") for word in argv.split())) for name, argv in DIFFERENT.items()
    }
    assert len({plain, *digests.values()}) == len(digests) + 1
    assert digests["mirror"] != runs.digest("--seed=3")


def test_caches_in_memory_and_on_disk_give_the_same_bits(runs, cached, tree, tmp_path, monkeypatch):
    """A second run with the files needs no VAE; an edited picture is encoded again."""
    from library.models.vae import ImageCoder

    def never(*_args, **_more):
        raise AssertionError("the VAE was used")

    runs.data = tmp_path / "copy"
    shutil.copytree(tree, runs.data)
    assert runs.digest("--cache_latents_to_disk") == cached
    files = sorted(path.name for path in runs.data.rglob("*.npz"))
    assert len(files) == 3 and all(name.endswith("_sd.npz") for name in files)
    with monkeypatch.context() as context:
        context.setattr(ImageCoder, "encode", never)
        assert runs.digest("--cache_latents", "--cache_latents_to_disk") == cached
        assert runs.digest("--cache_latents_to_disk", "--skip_cache_check") == cached
        assert runs.digest("--cache_latents_to_disk", "--gradient_checkpointing") == cached
    shutil.copy(PHOTOS / "duck" / "03.jpg", runs.data / "2_sks duck" / "00.jpg")
    assert runs.digest("--cache_latents_to_disk", "--max_train_steps=3") != runs.digest("--cache_latents")


def test_mirrored_latents_are_cached_too(runs, cached, tree, tmp_path):
    runs.data = tmp_path / "copy"
    shutil.copytree(tree, runs.data)
    flip = ("--flip_aug", "--train_batch_size=6")
    on_disk = runs.digest(*flip, "--cache_latents_to_disk")
    assert on_disk == runs.digest(*flip, "--cache_latents")
    assert on_disk != runs.digest("--train_batch_size=6", "--cache_latents")


def test_the_cache_folder_keeps_the_pictures_folder_clean(runs, cached, tree, tmp_path):
    before = sorted(tree.rglob("*"))
    assert runs.digest("--cache_latents_to_disk", f"--cache_dir={tmp_path / 'caches'}") == cached
    assert sorted(tree.rglob("*")) == before
    assert len(list((tmp_path / "caches").rglob("*.npz"))) == 3


def test_number_formats_of_weights(runs):
    """Trained weights are float32 under mixed precision, bfloat16 with --full_bf16; the VAE is saved as read."""
    mixed = runs("--mixed_precision=bf16")
    assert dtypes(mixed, UNET) == dtypes(mixed, TEXT) == {torch.float32}
    full = runs("--mixed_precision=bf16", "--full_bf16")
    assert dtypes(full, UNET) == dtypes(full, TEXT) == {torch.bfloat16}
    assert dtypes(full, VAE) == {torch.float32}
    saved = runs("--mixed_precision=bf16", "--full_bf16", "--save_precision=fp16")
    assert dtypes(saved, "") == {torch.float16}


def test_a_frozen_text_encoder_is_saved_as_it_was_read(runs, tiny_sd1):
    path = runs("--mixed_precision=bf16", "--stop_text_encoder_training=-1")
    before, after = load_file(tiny_sd1), load_file(path)
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name.startswith((TEXT, VAE)))


def test_the_vae_keeps_float32_when_asked_with_and_without_caches(runs, monkeypatch):
    from library.models.vae import ImageCoder

    used = []
    encode = ImageCoder._encode

    def spy(self, pixels, noise):
        used.append(self.model.dtype)
        return encode(self, pixels, noise)

    monkeypatch.setattr(ImageCoder, "_encode", spy)
    for cache in ((), ("--cache_latents",)):
        for flag, dtype in ((), torch.bfloat16), (("--no_half_vae",), torch.float32):
            runs("--mixed_precision=bf16", *flag, *cache)
            assert set(used) == {dtype}
            used.clear()


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion", "Adafactor"])
def test_fused_backward_pass_gives_the_same_bits(runs, name):
    argv = (f"--optimizer_type={name}", "--max_grad_norm=0")
    assert runs.digest(*argv, "--fused_backward_pass") == runs.digest(*argv)


OPTIMIZERS = {
    "adamw8bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "Lion8bit": "bitsandbytes.optim.lion.Lion8bit",
    "SGDNesterov": "torch.optim.sgd.SGD(momentum=0.9)",
    "Adafactor": "transformers.optimization.Adafactor(relative_step=True)",
    "DAdaptAdam": "dadaptation.dadapt_adam.DAdaptAdam",
    "Prodigy": "prodigyopt.prodigy.Prodigy",
    "AdamWScheduleFree": "schedulefree.adamw_schedulefree.AdamWScheduleFree",
    "bitsandbytes.optim.AdEMAMix8bit": "bitsandbytes.optim.ademamix.AdEMAMix8bit",
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_by_name(runs, tiny_sd1, name):
    pytest.importorskip(OPTIMIZERS[name].partition(".")[0])
    path = runs(f"--optimizer_type={name}", "--learning_rate=1")
    before, after = load_file(tiny_sd1), load_file(path)
    trained = [key for key in before if key.startswith((UNET, TEXT)) and before[key].is_floating_point()]
    assert any(not torch.equal(before[key], after[key]) for key in trained)
    assert all(bool(after[key].isfinite().all()) for key in trained)
    assert metadata(path)["ss_optimizer"] == OPTIMIZERS[name]


def test_optimizer_arguments_and_older_spellings(runs):
    path = runs("--optimizer_args", "weight_decay=0.1", "betas=0.9,0.99")
    assert metadata(path)["ss_optimizer"] == "torch.optim.adamw.AdamW(weight_decay=0.1,betas=(0.9, 0.99))"
    assert runs.digest("--use_8bit_adam") == runs.digest("--optimizer_type=adamw8bit")
    assert runs.digest("--use_lion_optimizer") == runs.digest("--optimizer_type=Lion")


def test_masks_without_any_mask_are_refused(runs, capsys):
    argv = [f"--pretrained_model_name_or_path={runs.model}", f"--train_data_dir={runs.data}", "--resolution=64"]
    argv += [f"--output_dir={runs.place / 'out'}", "--masked_loss"]
    assert train_db(*argv, f"--conditioning_data_dir={runs.data}") == 2
    said = capsys.readouterr().err
    assert "--masked_loss: there are no masks" in said
    assert said.count("--conditioning_data_dir: has no effect") == 1
