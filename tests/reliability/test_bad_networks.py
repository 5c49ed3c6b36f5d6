"""Wrong networks for train_network.py: one clear line each, exit status 2, and no model loaded or file written."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lora_files import save, small_lora, some
from tests.support import train_network

MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


# Files ---------------------------------------------------------------------------------------------------------------


def hostile(path: Path, _source: Path) -> None:
    """A pickle that would make a file beside it."""

    class Payload:
        def __reduce__(self):
            return (Path.touch, (path.with_name("executed"),))

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({f"{MODULE}.alpha": Payload()}, protocol=2))
        archive.writestr("archive/version", "3")


def changed(change):
    """Return a writer of the trained LoRA with `change(tensors)`."""

    def write(path: Path, source: Path) -> None:
        tensors = load_file(source)
        change(tensors)
        save_file(tensors, path)

    return write


def spoil(value: float, suffix: str):
    def change(tensors: dict) -> None:
        tensors[f"{MODULE}.{suffix}"].fill_(value)

    return changed(change)


def other_modules(path: Path, source: Path) -> None:
    """The layers of a LoRA under names that no Stable Diffusion model has."""
    tensors = load_file(source)
    save_file({key.replace("_blocks_", "_towers_"): tensors[key] for key in tensors if "_down_blocks_" in key}, path)


def without_rank(tensors: dict) -> None:
    tensors[f"{MODULE}.lora_down.weight"] = tensors[f"{MODULE}.lora_down.weight"][:0].contiguous()
    tensors[f"{MODULE}.lora_up.weight"] = tensors[f"{MODULE}.lora_up.weight"][:, :0].contiguous()


def copy_tensors(version: str, *parts: str):
    return lambda path, _: save(path, some(small_lora(version), *parts))


FILES = {
    "sd2": ("x.safetensors", copy_tensors("sd21", "mid_block"), ["made for Stable Diffusion 2", "Use a LoRA for"]),
    "sdxl": ("x.safetensors", copy_tensors("sdxl", "middle_block"), ["made for SDXL"]),
    "a checkpoint": ("x.safetensors", "model", ["not a LoRA but Stable Diffusion 1", "Give a LoRA file"]),
    "an embedding": (
        "x.safetensors",
        lambda path, _: save_file({"emb_params": torch.ones(1, 768)}, path),
        ["not a LoRA but", "embedding"],
    ),
    "cut": ("x.safetensors", lambda path, source: path.write_bytes(source.read_bytes()[:-100]), ["incomplete"]),
    "empty": ("x.safetensors", lambda path, _: path.write_bytes(b""), ["empty"]),
    "a web page": ("x.safetensors", lambda path, _: path.write_text("<html>404</html>"), ["HTML"]),
    "a folder": ("x.safetensors", lambda path, _: path.mkdir(), ["a folder without LoRA weights"]),
    "missing": ("x.safetensors", lambda path, _: None, ["not found"]),
    "rank 0": ("x.safetensors", changed(without_rank), ["rank 0", f"{MODULE}.lora_"]),
    "half a pair": (
        "x.safetensors",
        changed(lambda tensors: tensors.pop(f"{MODULE}.lora_up.weight")),
        ["half of the module is missing", MODULE, "lora_up.weight"],
    ),
    "another module's ranks": (
        "x.safetensors",
        changed(lambda tensors: tensors.update({f"{MODULE}.lora_up.weight": torch.ones(32, 7)})),
        ["does not fit", f"{MODULE}.lora_up.weight"],
    ),
    "no layer of the model": (
        "x.safetensors",
        other_modules,
        ["none of its", "layer of the model", "lora_unet_down_towers_0"],
    ),
    "NaN": ("x.safetensors", spoil(float("nan"), "lora_up.weight"), ["NaN", f"{MODULE}.lora_up.weight"]),
    "alpha NaN": ("x.safetensors", spoil(float("nan"), "alpha"), ["NaN", f"{MODULE}.alpha"]),
    "alpha 0": ("x.safetensors", spoil(0.0, "alpha"), ["is 0", f"{MODULE}.alpha"]),
    "hostile pickle": ("x.pt", hostile, ["refused", "pathlib", "safetensors"]),
    "cut pickle": ("x.pt", lambda path, _: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)[:-3]), ["x.pt"]),
}


@pytest.mark.parametrize("option", ["network_weights", "base_weights"])
@pytest.mark.parametrize("name", FILES)
def test_wrong_files(refused, trained_lora, tiny_sd1, tmp_path, no_loading, name, option):
    file, make, words = FILES[name]
    path = tmp_path / file
    if make == "model":
        shutil.copy(tiny_sd1, path)
    else:
        make(path, trained_lora)
    before = path.read_bytes() if path.is_file() else None
    said = refused(**{option: path})
    for word in (f"--{option}", str(path), *words):
        assert word in said, said
    assert (path.read_bytes() if path.is_file() else None) == before
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("option", ["network_weights", "base_weights"])
def test_names_that_no_file_can_have(refused, no_loading, option):
    assert "characters is too long for a file" in refused(**{option: "n" * 300})


def test_all_wrong_files_are_named_together(refused, tmp_path, no_loading):
    made = [save(tmp_path / f"{name}.safetensors", {"emb_params": torch.ones(1, 768)}) for name in "abc"]
    said = refused("--base_weights", made[1], made[2], lines=3, network_weights=made[0])
    assert all(str(path) in said for path in made)


@pytest.mark.parametrize("way", [(), ("--dim_from_weights",)])
def test_a_file_of_another_kind_of_network(refused, network_command, tmp_path, no_loading, way):
    """A LoHa file for networks.lora: none of its modules can be continued."""
    loha = {f"{MODULE}.hada_{part}": torch.ones(4, 4) for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
    path = save(tmp_path / "loha.safetensors", {**loha, f"{MODULE}.alpha": torch.tensor(1.0)})
    said = refused(*way, network_weights=path)
    for word in ("--network_weights", str(path), "loha", "--network_module"):
        assert word in said, said


def test_a_file_of_another_rank_is_known_before_anything_is_loaded_or_cached(refused, trained_lora, no_loading):
    said = refused(network_weights=trained_lora, network_dim=8)
    for word in ("--network_weights", str(trained_lora), "rank 4", "--network_dim", "--dim_from_weights"):
        assert word in said, said


# Options -------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "both parts left out": (
        "--network_train_unet_only --network_train_text_encoder_only",
        ["--network_train_unet_only", "--network_train_text_encoder_only", "nothing would be trained"],
    ),
    "rates of 0": ("--unet_lr=0 --text_encoder_lr=0", ["nothing is trained", "--unet_lr"]),
    "rate of 0": ("--learning_rate=0", ["nothing is trained", "--learning_rate"]),
    "rate of the only part": ("--network_train_unet_only --unet_lr=0", ["nothing is trained"]),
    "rank 0": ("--network_dim=0", ["--network_dim", "at least 1"]),
    "no equals sign": ("--network_args conv_dim conv_alpha=4", ["--network_args", "without spaces"]),
    "ranks of no file": ("--dim_from_weights", ["--dim_from_weights", "--network_weights"]),
    "float8 in full precision": ("--fp8_base", ["--fp8_base", "--mixed_precision"]),
    "float8 U-Net in full precision": ("--fp8_base_unet", ["--fp8_base_unet", "--mixed_precision"]),
    "float8 with LyCORIS": (
        "--fp8_base --mixed_precision=bf16 --network_module=lycoris.kohya",
        ["--fp8_base", "bypass_mode=True"],
    ),
    "cached texts of a trained encoder": (
        "--cache_text_encoder_outputs",
        ["--cache_text_encoder_outputs", "--network_train_unet_only"],
    ),
    "cached texts that are shuffled": (
        "--cache_text_encoder_outputs --network_train_unet_only --shuffle_caption",
        ["--cache_text_encoder_outputs", "shuffle_caption"],
    ),
    "cached texts that are dropped": (
        "--cache_text_encoder_outputs --network_train_unet_only --caption_tag_dropout_rate=0.1",
        ["--cache_text_encoder_outputs", "caption_tag_dropout_rate"],
    ),
    "share for validation": ("--validation_split=2", ["--validation_split", "between 0 and 1"]),
    "a file path": ("--network_module=networks/lora.py", ["--network_module", "networks.lora?"]),
    "no such module of ours": ("--network_module=networks.lorra", ["networks.lorra", "networks.lora?"]),
    "no such package": ("--network_module=surely_absent.net", ["--network_module", "surely_absent", "not installed"]),
    "no such module in a package": ("--network_module=json.network", ["--network_module", "json.network"]),
    "no network module": ("--network_module=json", ["--network_module", "json", "create_network"]),
    "block list": (
        "--network_args block_dims=1,2,3",
        ["--network_args", "block_dims has 3 numbers, not 25"],
    ),
    "block alphas without ranks": (
        f"--network_args conv_block_alphas={','.join('1' * 25)}",
        ["--network_args", "conv_block_alphas needs conv_block_dims"],
    ),
    "DyLoRA's unit": (
        "--network_module=networks.dylora --network_dim=4 --network_args unit=3",
        ["--network_args", "unit", "3", "4"],
    ),
    "OFT's blocks": ("--network_module=networks.oft --network_dim=7", ["--network_dim", "7 blocks", "Choose one of"]),
    "OFT's dropout": ("--network_module=networks.oft --network_dropout=0.1", ["--network_dropout", "OFT"]),
    "LoKr's factor": ("--network_module=networks.lokr --network_args factor=0", ["--network_args", "factor"]),
    "a pattern": (
        "--network_module=networks.loha --network_args exclude_patterns=['(']",
        ["--network_args", "exclude_patterns"],
    ),
    "LyCORIS' algorithm": (
        "--network_module=lycoris.kohya --network_args algo=lokon",
        ["--network_args", "algo", "lokon", "Did you mean locon?"],
    ),
    "LyCORIS' preset": (
        "--network_module=lycoris.kohya --network_args preset=atn-only",
        ["--network_args", "preset", "Did you mean attn-only?"],
    ),
    "LyCORIS' numbers": (
        "--network_module=lycoris.kohya --network_args conv_dim=four",
        ["--network_args", "conv_dim", "four"],
    ),
    "a format": ("--save_model_as=diffusers", ["--save_model_as", "safetensors"]),
    "the beginning after the end": ("--initial_step=1", ["--initial_step", "--max_train_steps"]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options(refused, no_loading, name):
    words, expected = OPTIONS[name]
    if "lycoris" in words:
        pytest.importorskip("lycoris")
    said = refused(*words.split())
    for word in expected:
        assert word in said, said


def test_more_strengths_than_files(refused, trained_lora, no_loading):
    said = refused("--base_weights_multiplier", "1", "0.5", base_weights=trained_lora)
    assert "--base_weights_multiplier: 2 values for 1 of --base_weights" in said


KNOWN = {
    "networks.lora": ("con_dim=4", "conv_dim"),
    "networks.lora_fa": ("rank_drop=0.1", "rank_dropout"),
    "networks.dylora": ("units=2", "unit"),
    "networks.oft": ("enable_convs=1", "enable_conv"),
    "networks.loha": ("use_tuker=1", "use_tucker"),
    "networks.lokr": ("factr=4", "factor"),
    "lycoris.kohya": ("alog=lora", "algo"),
}


@pytest.mark.parametrize("module", KNOWN)
def test_unknown_arguments_and_the_nearest_known_one(refused, no_loading, module):
    if module.startswith("lycoris"):
        pytest.importorskip("lycoris")
    given, near = KNOWN[module]
    said = refused("--network_args", given, network_module=module)
    assert "--network_args" in said
    assert repr(given.partition("=")[0]) in said
    assert f"Did you mean {near}?" in said


VALUES = {
    "conv_dim": ("four", "expected a whole number"),
    "conv_alpha": ("-1", "must be at least 0"),
    "module_dropout": ("1", "must be less than 1"),
    "loraplus_lr_ratio": ("much", "expected a number"),
}


@pytest.mark.parametrize("key", VALUES)
def test_unreadable_values(refused, no_loading, key):
    value, message = VALUES[key]
    assert f"--network_args: {key}: {message}" in refused("--network_args", f"{key}={value}")


def test_all_wrong_arguments_are_named_together(refused, no_loading):
    said = refused("--network_args", "conv_dim=x", "cov_alpha=1", "rank_dropout=2", lines=3)
    assert all(word in said for word in ("conv_dim", "cov_alpha", "rank_dropout"))


def test_a_strength_of_the_data_set_that_is_no_number(refused, few_photos, tmp_path, no_loading):
    config = tmp_path / "data.toml"
    config.write_text(
        "[[datasets]]\nresolution = 64\nnetwork_multiplier = 'half'\n"
        f"[[datasets.subsets]]\nimage_dir = '{few_photos / '1_sks duck'}'\n"
    )
    said = refused(train_data_dir=None, dataset_config=config)
    for word in ("data.toml", "network_multiplier", "number", "half"):
        assert word in said, said


def test_layers_that_only_a_deeper_model_has(refused, trained_lora, tmp_path):
    """Their names could be those of Stable Diffusion: only the model in memory tells."""
    tensors = {key.replace("mid_block_attentions_0", "mid_block_attentions_7"): tensor
               for key, tensor in load_file(trained_lora).items() if "mid_block_attentions_0" in key}  # fmt: skip
    path = save(tmp_path / "deep.safetensors", tensors)
    for option, more in (("network_weights", ()), ("network_weights", ("--dim_from_weights",)), ("base_weights", ())):
        said = refused(*more, **{option: path})
        assert str(path) in said and "none of its" in said, said


def test_validation_options_without_anything_to_validate_are_pointed_out(network_command, tmp_path, capsys):
    more = ("--validate_every_n_steps=1", "--max_validation_steps=1", "--validation_seed=3")
    assert train_network(*network_command(tmp_path / "out", *more)) == 0
    said = capsys.readouterr().err
    for option in more:
        assert f"{option.partition('=')[0]}: has no effect" in said, said
