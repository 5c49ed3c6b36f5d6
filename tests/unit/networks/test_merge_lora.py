"""Merging LoRA files: into checkpoints of every layout, and into one LoRA file."""

import json

import merge_helpers as helpers
import pytest
import torch
from merge_helpers import assert_merged, delta_of, header_of, layer_shapes, model_weights, random_lora, run
from safetensors.torch import load_file, save_file

from networks import merge_lora, sdxl_merge_lora

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="session")
def sd1_layers():
    return layer_shapes("sd1", conv=True)


@pytest.fixture(scope="session")
def sd2_layers():
    return layer_shapes("sd2")


@pytest.fixture(scope="session")
def sd1_folder(model_folder):
    from library.models.random_models import make_random_sd

    return make_random_sd(model_folder / "tiny_sd1_folder", layout="diffusers_safetensors")


def changes_of(layers, *files):
    """{(part, path): sum of ratio * delta} of (tensors, ratio) pairs."""
    changes = {}
    for tensors, ratio in files:
        for name, (part, path, shape) in layers.items():
            if f"{name}.lora_up.weight" in tensors:
                delta = ratio * delta_of(tensors, name, shape)
                changes[part, path] = changes.get((part, path), 0) + delta
    return changes


def merge_into(base, target, *argv):
    return run(merge_lora, "--sd_model", base, "--save_to", target, *argv)


# Into a checkpoint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 0.5, -0.25])
def test_weights_change_by_ratio_times_delta(tmp_path, tiny_sd1, sd1_layers, ratio):
    tensors = random_lora(tmp_path / "a.safetensors", sd1_layers)
    out = tmp_path / "out.safetensors"
    assert merge_into(tiny_sd1, out, "--models", tmp_path / "a.safetensors", "--ratios", ratio) == 0
    before, after = model_weights(tiny_sd1, "sd1"), model_weights(out, "sd1")
    assert_merged(before, after, changes_of(sd1_layers, (tensors, ratio)))


def test_taking_it_out_again_gives_the_original(tmp_path, tiny_sd1, sd1_layers):
    lora, merged, back = (tmp_path / f"{name}.safetensors" for name in ("a", "merged", "back"))
    random_lora(lora, sd1_layers)
    merge_into(tiny_sd1, merged, "--models", lora, "--ratios", 0.7)
    merge_into(merged, back, "--models", lora, "--ratios", -0.7)
    original, found = load_file(tiny_sd1), load_file(back)
    assert set(original) == set(found)
    for name, tensor in original.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_several_files_of_different_ranks_add_up(tmp_path, tiny_sd1, sd1_layers):
    names = list(sd1_layers)
    first = random_lora(tmp_path / "a.safetensors", sd1_layers, rank=4, alpha=2, skip=names[:9])
    second = random_lora(tmp_path / "b.safetensors", sd1_layers, rank=8, alpha=None, seed=1, skip=names[5:30])
    out = tmp_path / "out.safetensors"
    files = ["--models", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--ratios", 0.6, 0.4]
    assert merge_into(tiny_sd1, out, *files) == 0
    wanted = changes_of(sd1_layers, (first, 0.6), (second, 0.4))
    assert_merged(model_weights(tiny_sd1, "sd1"), model_weights(out, "sd1"), wanted)


def test_equals_what_diffusers_fuses(tmp_path, sd1_folder, sd1_layers):
    from diffusers import StableDiffusionPipeline

    lora = tmp_path / "a.safetensors"
    random_lora(lora, sd1_layers)
    pipeline = StableDiffusionPipeline.from_pretrained(sd1_folder, local_files_only=True)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    pipeline.fuse_lora(lora_scale=0.8)
    pipeline.unload_lora_weights()
    assert merge_into(sd1_folder, tmp_path / "merged", "--models", lora, "--ratios", 0.8) == 0
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", local_files_only=True)
    for part in ("unet", "text_encoder", "vae"):
        wanted, found = getattr(pipeline, part).state_dict(), getattr(merged, part).state_dict()
        assert set(wanted) == set(found)
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-6)


def test_folder_keeps_its_other_files(tmp_path, sd1_folder, sd1_layers):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(sd1_folder, base)
    (base / "README.md").write_text("about")
    (base / ".cache").mkdir()
    (base / ".cache" / "x").write_text("not mine")
    random_lora(tmp_path / "a.safetensors", {k: v for k, v in sd1_layers.items() if k.startswith("lora_unet")})
    assert merge_into(base, tmp_path / "out", "--models", tmp_path / "a.safetensors") == 0

    def names(folder):
        return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}

    assert names(tmp_path / "out") == {name for name in names(base) if name.parts[0] != ".cache"}
    same = [name for name in names(tmp_path / "out") if name.suffix != ".safetensors" or name.parts[0] != "unet"]
    assert all((base / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in same)
    assert len(same) == len(names(tmp_path / "out")) - 1


def test_folder_in_another_precision_is_converted_as_a_whole(tmp_path, sd1_folder, sd1_layers):
    random_lora(tmp_path / "a.safetensors", sd1_layers)
    argv = ["--models", tmp_path / "a.safetensors", "--save_precision", "bf16"]
    assert merge_into(sd1_folder, tmp_path / "out", *argv) == 0
    after = model_weights(tmp_path / "out", "sd1")
    assert {tensor.dtype for part in after.values() for tensor in part.values()} == {torch.bfloat16}


def test_folder_with_variants_and_shards(tmp_path, sd1_folder, sd1_layers):
    import shutil

    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(sd1_folder, base)
    (base / "text_encoder" / "model.safetensors").rename(base / "text_encoder" / "model.fp16.safetensors")
    whole = base / "unet" / "diffusion_pytorch_model.safetensors"
    unet, index = load_file(whole), {}
    whole.unlink()
    for number in (0, 1):
        shard = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        names = sorted(unet)[number::2]
        save_file({name: unet[name] for name in names}, base / "unet" / shard)
        index.update(dict.fromkeys(names, shard))
    (base / "unet" / f"{whole.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    tensors = random_lora(tmp_path / "a.safetensors", sd1_layers)
    assert merge_into(base, out, "--models", tmp_path / "a.safetensors") == 0
    assert {path.name for path in (out / "unet").iterdir()} == {"config.json", whole.name}
    assert {path.name for path in (out / "text_encoder").iterdir()} == {"config.json", "model.fp16.safetensors"}
    assert_merged(model_weights(base, "sd1"), model_weights(out, "sd1"), changes_of(sd1_layers, (tensors, 1.0)))


@pytest.mark.parametrize("kinds", [("ckpt", "ckpt"), ("safetensors", "ckpt"), ("ckpt", "safetensors")])
def test_pickled_checkpoints_in_and_out(tmp_path, sd1_layers, kinds):
    from library.models.random_models import make_random_sd

    base = make_random_sd(tmp_path / "base", layout=kinds[0])
    tensors = random_lora(tmp_path / "a.safetensors", sd1_layers)
    out = tmp_path / f"out.{kinds[1]}"
    assert merge_into(base, out, "--models", tmp_path / "a.safetensors") == 0
    assert_merged(model_weights(base, "sd1"), model_weights(out, "sd1"), changes_of(sd1_layers, (tensors, 1.0)))
    if kinds == ("ckpt", "ckpt"):
        before, after = (torch.load(path, weights_only=True) for path in (base, out))
        assert set(before) == set(after) and list(before["state_dict"]) == list(after["state_dict"])


def test_sd2_text_encoder_with_joined_rows(tmp_path, tiny_sd2, sd2_layers):
    tensors = random_lora(tmp_path / "a.safetensors", sd2_layers)
    out = tmp_path / "out.safetensors"
    assert merge_into(tiny_sd2, out, "--v2", "--models", tmp_path / "a.safetensors", "--ratios", 0.5) == 0
    before, after = model_weights(tiny_sd2, "sd2"), model_weights(out, "sd2")
    changes = changes_of(sd2_layers, (tensors, 0.5))
    assert any(part == "text" and path.endswith("k_proj") for part, path in changes)
    assert_merged(before, after, changes)
    first, last = load_file(tiny_sd2), load_file(out)
    assert set(first) == set(last) and all(first[name].shape == last[name].shape for name in first)


@pytest.mark.parametrize("given", [(), ("--precision", "fp16"), ("--precision", "float", "--save_precision", "bf16")])
def test_precision_of_the_result(tmp_path, tiny_sd1, sd1_layers, given):
    half = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(tiny_sd1).items()}, half)
    tensors = random_lora(tmp_path / "a.safetensors", sd1_layers)
    out = tmp_path / "out.safetensors"
    assert merge_into(half, out, "--models", tmp_path / "a.safetensors", *given) == 0
    wanted = torch.bfloat16 if "bf16" in given else torch.float16
    found, before = load_file(out), load_file(half)
    assert {tensor.dtype for tensor in found.values()} == {wanted}
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    delta = delta_of(
        tensors, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", before[name].shape
    )
    exact = before[name].double() + delta
    # Half a unit in the last place: summed exactly and rounded once.
    torch.testing.assert_close(found[name].double(), exact, rtol=2**-8 if "bf16" in given else 2**-11, atol=1e-7)


def test_metadata_say_where_it_comes_from(tmp_path, tiny_sd1, sd1_layers):
    lora = tmp_path / "style.safetensors"
    random_lora(lora, sd1_layers)
    base = tmp_path / "base.safetensors"
    save_file(load_file(tiny_sd1), base, {"modelspec.license": "CC0", "modelspec.title": "old", "note": "kept"})
    merge_into(base, tmp_path / "out.safetensors", "--models", lora)
    found = header_of(tmp_path / "out.safetensors")
    assert found["modelspec.merged_from"] == "base, style" and found["modelspec.title"] == "out"
    assert found["modelspec.architecture"] == "stable-diffusion-v1"
    assert (found["modelspec.license"], found["note"]) == ("CC0", "kept")
    merge_into(base, tmp_path / "bare.safetensors", "--models", lora, "--no_metadata")
    assert header_of(tmp_path / "bare.safetensors") == {}


def test_block_weights(tmp_path, tiny_sd1, sd1_layers):
    tensors = random_lora(tmp_path / "a.safetensors", sd1_layers)
    # BASE 0.5, MID 0, OUT03 2, the others 1.
    weights = json.dumps([0.5, 1, 1, 1, 1, 1, 1, 0, 2, 1, 1, 1, 1, 1, 1, 1, 1])
    out = tmp_path / "out.safetensors"
    merge_into(tiny_sd1, out, "--models", tmp_path / "a.safetensors", "--ratios", 0.8, "--lbws", weights)
    changes = {}
    for name, (part, path, shape) in sd1_layers.items():
        factor = 0.5 if part == "text" else 0 if "mid_block" in name else 1
        factor = 2 if any(f"up_blocks_1_{kind}_0" in name for kind in ("resnets", "attentions")) else factor
        if factor:
            changes[part, path] = 0.8 * factor * delta_of(tensors, name, shape)
    assert_merged(model_weights(tiny_sd1, "sd1"), model_weights(out, "sd1"), changes)


def test_lycoris_kinds_are_merged(tmp_path, tiny_sd1, sd1_layers):
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    path, shape = sd1_layers[name][1:]
    a, b, c, d = torch.randn(4, shape[0], 2) * 0.1
    tensors = {"hada_w1_a": a, "hada_w1_b": b.T, "hada_w2_a": c, "hada_w2_b": d.T, "alpha": torch.tensor(1.0)}
    tensors = {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    tensors["lora_unet_mid_block_resnets_0_norm1.w_norm"] = torch.full((64,), 0.25)
    tensors["lora_unet_mid_block_resnets_0_norm1.b_norm"] = torch.full((64,), -0.5)
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    assert merge_into(tiny_sd1, out, "--models", tmp_path / "a.safetensors", "--ratios", 2) == 0
    before, after = model_weights(tiny_sd1, "sd1")["unet"], model_weights(out, "sd1")["unet"]
    wanted = before[f"{path}.weight"] + 2 * 0.5 * (a @ b.T) * (c @ d.T)
    torch.testing.assert_close(after[f"{path}.weight"], wanted, rtol=0, atol=1e-6)
    norm = "mid_block.resnets.0.norm1"
    torch.testing.assert_close(after[f"{norm}.weight"], before[f"{norm}.weight"] + 0.5)
    torch.testing.assert_close(after[f"{norm}.bias"], before[f"{norm}.bias"] - 1)


def test_sdxl_file_names_are_those_of_the_checkpoint(tmp_path):
    unet = "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight"
    text = "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight"
    base = {unet: torch.randn(8, 2048), text: torch.randn(24, 8), "first_stage_model.encoder.x": torch.randn(3)}
    save_file(base, tmp_path / "xl.safetensors")
    layers = {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (0, 0, (8, 2048)),
        "lora_te2_text_model_encoder_layers_3_self_attn_v_proj": (0, 0, (8, 8)),
    }
    tensors = random_lora(tmp_path / "a.safetensors", layers)
    argv = ["--sd_model", tmp_path / "xl.safetensors", "--models", tmp_path / "a.safetensors", "--ratios", "0.5"]
    assert run(sdxl_merge_lora, *argv, "--save_to", tmp_path / "out.safetensors") == 0
    found = load_file(tmp_path / "out.safetensors")
    deltas = [0.5 * delta_of(tensors, name, row[2]).float() for name, row in layers.items()]
    torch.testing.assert_close(found[unet], base[unet] + deltas[0])
    torch.testing.assert_close(found[text][16:], base[text][16:] + deltas[1])
    assert torch.equal(found[text][:16], base[text][:16])
    assert header_of(tmp_path / "out.safetensors")["modelspec.architecture"] == "stable-diffusion-xl-v1-base"


def test_modules_without_a_counterpart_are_listed(tmp_path, tiny_sd1, sd1_layers, capsys):
    layers = dict(list(sd1_layers.items())[:3])
    lost = {f"lora_te_text_model_encoder_layers_{n}_mlp_fc1": ("text", "", (4, 4)) for n in (10, 11)}
    tensors = random_lora(tmp_path / "a.safetensors", {**layers, **lost})
    save_file({**tensors, "lora_unet_x.strange": torch.zeros(2)}, tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    assert merge_into(tiny_sd1, out, "--models", tmp_path / "a.safetensors") == 0
    printed = capsys.readouterr().err
    assert all(name in printed for name in (*lost, "lora_unet_x.strange"))
    assert_merged(model_weights(tiny_sd1, "sd1"), model_weights(out, "sd1"), changes_of(layers, (tensors, 1.0)))


# Refused -----------------------------------------------------------------------------------------------------------


def refused(capsys, status, *words):
    printed = capsys.readouterr().err
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    assert status == 2 and errors and "Traceback" not in printed
    assert all(word in "\n".join(errors) for word in words), errors


def test_a_file_without_any_match_is_an_error(tmp_path, tiny_sd1, capsys):
    lost = {"lora_te_text_model_encoder_layers_11_mlp_fc1": ("text", "", (4, 4))}
    random_lora(tmp_path / "a.safetensors", lost)
    status = merge_into(tiny_sd1, tmp_path / "out.safetensors", "--models", tmp_path / "a.safetensors")
    refused(capsys, status, "a.safetensors", "none of its 1 modules exists")
    assert not (tmp_path / "out.safetensors").exists()


def test_lora_of_another_base(tmp_path, tiny_sd1, tiny_sd2, sd1_layers, capsys):
    xl = {"lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (0, 0, (8, 2048))}
    random_lora(tmp_path / "xl.safetensors", xl)
    status = merge_into(tiny_sd1, tmp_path / "out.safetensors", "--models", tmp_path / "xl.safetensors")
    refused(capsys, status, "xl.safetensors", "SDXL", "Stable Diffusion 1.x")
    status = merge_into(tiny_sd1, tmp_path / "out.safetensors", "--v2", "--models", tmp_path / "xl.safetensors")
    refused(capsys, status, "--sd_model", "Remove --v2")
    random_lora(tmp_path / "one.safetensors", sd1_layers)
    status = merge_into(tiny_sd2, tmp_path / "out.safetensors", "--models", tmp_path / "one.safetensors")
    refused(capsys, status, "one.safetensors")


def damaged(path, how):
    if how == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "NaN":
        tensors = load_file(path)
        next(tensor for name, tensor in tensors.items() if "up" in name)[0] = float("nan")
        save_file(tensors, path)


@pytest.mark.parametrize("how", ["cut short", "NaN"])
def test_damaged_files(tmp_path, tiny_sd1, sd1_layers, how, capsys):
    random_lora(tmp_path / "a.safetensors", dict(list(sd1_layers.items())[:2]))
    damaged(tmp_path / "a.safetensors", how)
    status = merge_into(tiny_sd1, tmp_path / "out.safetensors", "--models", tmp_path / "a.safetensors")
    refused(capsys, status, "a.safetensors")


def test_command_lines_that_cannot_be_meant(tmp_path, tiny_sd1, sd1_folder, sd1_layers, capsys):
    lora = tmp_path / "a.safetensors"
    random_lora(lora, dict(list(sd1_layers.items())[:2]))
    out = tmp_path / "out.safetensors"
    refused(capsys, merge_into(tiny_sd1, out, "--models", lora, "--ratios", 1, 2), "--ratios", "2 values for 1 files")
    refused(capsys, merge_into(tiny_sd1, out), "--models", "required")
    refused(capsys, run(merge_lora, "--models", lora), "--save_to", "required")
    refused(capsys, merge_into(tiny_sd1, out, "--models", lora, "--lbws", "[1,2]"), "--lbws", "has 2 numbers")
    refused(capsys, merge_into(tiny_sd1, out, "--models", lora, "--lbws", "1;2"), "--lbws", "JSON")
    twelve = json.dumps([1] * 12)
    refused(capsys, merge_into(tiny_sd1, out, "--models", lora, "--lbws", twelve), "--lbws", "for SDXL")
    refused(capsys, merge_into(tiny_sd1, tmp_path / "out", "--models", lora), "--save_to", "suffix")
    refused(capsys, merge_into(sd1_folder, out, "--models", lora), "--save_to", "folder")
    refused(capsys, merge_into(lora, out, "--models", lora), "--sd_model", "LoRA")
    refused(capsys, run(sdxl_merge_lora, "--sd_model", tiny_sd1, "--models", lora, "--save_to", out), "SDXL")
    assert not out.exists()


# Into one LoRA file ------------------------------------------------------------------------------------------------


def combined(tmp_path, files, *argv):
    out = tmp_path / "combined.safetensors"
    assert run(merge_lora, "--save_to", out, "--models", *files, *argv) == 0
    return helpers.read(out)


def wanted_delta(files, name, shape):
    return sum(ratio * delta_of(tensors, name, shape) for tensors, ratio in files if f"{name}.alpha" in tensors)


@pytest.fixture
def two(tmp_path, sd1_layers):
    """Two files of different ranks and alphas that share some modules only, over all kinds of layers."""
    layers = {name: row for index, (name, row) in enumerate(sd1_layers.items()) if index % 9 == 0 or len(row[2]) == 4}
    names = list(layers)
    first = random_lora(tmp_path / "a.safetensors", layers, rank=4, alpha=4, skip=names[:2])
    second = random_lora(tmp_path / "b.safetensors", layers, rank=8, alpha=2, seed=1, skip=names[-2:])
    return layers, first, second, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def test_concat_is_exact(tmp_path, two):
    layers, first, second, files = two
    found = combined(tmp_path, files, "--concat", "--ratios", 0.7, -0.4)
    for name, (_, _, shape) in layers.items():
        wanted = wanted_delta([(first, 0.7), (second, -0.4)], name, shape)
        torch.testing.assert_close(delta_of(found, name, shape), wanted, rtol=0, atol=1e-6)
    ranks = {found[f"{name}.lora_down.weight"].shape[0] for name in layers}
    assert ranks == {4, 8, 12}
    assert all(float(found[f"{name}.alpha"]) == found[f"{name}.lora_down.weight"].shape[0] for name in layers)


def test_without_concat_it_is_the_best_of_the_first_rank(tmp_path, two):
    layers, first, second, files = two
    found = combined(tmp_path, files, "--ratios", 0.7, -0.4)
    for name, (_, _, shape) in layers.items():
        exact = wanted_delta([(first, 0.7), (second, -0.4)], name, shape).flatten(1)
        rank = found[f"{name}.lora_down.weight"].shape[0]
        assert rank == (4 if f"{name}.alpha" in first else 8)
        left = (delta_of(found, name, shape).flatten(1) - exact).norm()
        best = torch.linalg.svdvals(exact)[rank:].norm()
        torch.testing.assert_close(left, best, rtol=1e-4, atol=1e-5)


def test_one_file_alone_comes_out_at_its_ratio(tmp_path, two):
    layers, first, _, files = two
    found = combined(tmp_path, files[:1], "--ratios", 0.5)
    for name, (_, _, shape) in layers.items():
        if f"{name}.alpha" in first:
            wanted = 0.5 * delta_of(first, name, shape)
            torch.testing.assert_close(delta_of(found, name, shape), wanted, rtol=0, atol=1e-6)


def test_shuffled_ranks_add_the_same(tmp_path, two):
    layers, _, _, files = two
    plain = combined(tmp_path, files, "--concat")
    shuffled = combined(tmp_path, files, "--concat", "--shuffle")
    again = combined(tmp_path, files, "--concat", "--shuffle")
    assert all(torch.equal(shuffled[name], again[name]) for name in again)
    assert any(not torch.equal(shuffled[name], plain[name]) for name in plain)
    for name, (_, _, shape) in layers.items():
        torch.testing.assert_close(delta_of(shuffled, name, shape), delta_of(plain, name, shape), rtol=0, atol=1e-6)


def test_legacy_ratio_squares(tmp_path, sd1_layers):
    layers = dict(list(sd1_layers.items())[:4])
    first = random_lora(tmp_path / "a.safetensors", layers, alpha=4)
    second = random_lora(tmp_path / "b.safetensors", layers, alpha=1, seed=1)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    found = combined(tmp_path, files, "--legacy_ratio", "--ratios", 0.5, -0.5)
    key = next(iter(layers))
    # The second file's alpha is a quarter of the first's: both factors count half, and the sign goes to one of them.
    up = 0.5 * first[f"{key}.lora_up.weight"] + 0.25 * second[f"{key}.lora_up.weight"]
    down = 0.5 * first[f"{key}.lora_down.weight"] - 0.25 * second[f"{key}.lora_down.weight"]
    torch.testing.assert_close(found[f"{key}.lora_up.weight"], up)
    torch.testing.assert_close(found[f"{key}.lora_down.weight"], down)
    assert float(found[f"{key}.alpha"]) == 4
    stacked = combined(tmp_path, files, "--legacy_ratio", "--concat", "--ratios", 1, 1)
    assert stacked[f"{key}.lora_down.weight"].shape[0] == 8 and float(stacked[f"{key}.alpha"]) == 4
    alone = combined(tmp_path, files[:1], "--legacy_ratio", "--ratios", 0.5)
    torch.testing.assert_close(
        delta_of(alone, key, layers[key][2]), 0.25 * delta_of(first, key, layers[key][2]), rtol=0, atol=1e-6
    )


def test_legacy_ratio_needs_equal_ranks(tmp_path, two, capsys):
    files = two[3]
    out = tmp_path / "out.safetensors"
    status = run(merge_lora, "--save_to", out, "--models", *files, "--legacy_ratio")
    refused(capsys, status, "b.safetensors", "--concat")


def test_metadata_of_the_new_lora(tmp_path, sd1_layers):
    layers = dict(list(sd1_layers.items())[:4])
    given = {"ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_tag_frequency": "{}"}
    random_lora(tmp_path / "a.safetensors", layers, metadata=given)
    random_lora(tmp_path / "b.safetensors", layers, seed=1)
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    combined(tmp_path, files)
    found = header_of(tmp_path / "combined.safetensors")
    assert found["ss_network_module"] == "networks.lora" and found["ss_base_model_version"] == "sd_v1"
    assert (found["ss_v2"], found["ss_network_dim"], found["ss_network_alpha"]) == ("False", "4", "4.0")
    assert found["modelspec.merged_from"] == "a, b"
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora" and len(found["sshs_model_hash"]) == 64
    assert "ss_tag_frequency" not in found
    combined(tmp_path, files, "--no_metadata")
    assert not any(key.startswith("modelspec") for key in header_of(tmp_path / "combined.safetensors"))


def test_precision_of_the_new_lora(tmp_path, two):
    files = two[3]
    assert {tensor.dtype for tensor in combined(tmp_path, files).values()} == {torch.float32}
    found = combined(tmp_path, files, "--precision", "float", "--save_precision", "fp16")
    assert found[next(name for name in found if "up" in name)].dtype == torch.float16


def test_adapters_that_no_lora_can_hold(tmp_path, sd1_layers, capsys):
    name, (_, _, shape) = next((name, row) for name, row in sd1_layers.items() if name.endswith("attn1_to_q"))
    out = tmp_path / "out.safetensors"
    save_file({f"{name}.oft_blocks": torch.zeros(4, shape[0] // 4, shape[0] // 4)}, tmp_path / "oft.safetensors")
    status = run(merge_lora, "--save_to", out, "--models", tmp_path / "oft.safetensors")
    refused(capsys, status, "oft.safetensors", "--sd_model")
    save_file({f"{name}.diff": torch.randn(shape)}, tmp_path / "full.safetensors")
    status = run(merge_lora, "--save_to", out, "--concat", "--models", tmp_path / "full.safetensors")
    refused(capsys, status, "full.safetensors", "Leave out --concat")


def test_files_for_different_models(tmp_path, sd1_layers, sd2_layers, capsys):
    random_lora(tmp_path / "a.safetensors", sd1_layers)
    xl = {"lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (0, 0, (8, 2048))}
    random_lora(tmp_path / "b.safetensors", xl)
    files = [tmp_path / "b.safetensors", tmp_path / "a.safetensors"]
    status = run(merge_lora, "--save_to", tmp_path / "out.safetensors", "--models", *files)
    refused(capsys, status, "a.safetensors")
