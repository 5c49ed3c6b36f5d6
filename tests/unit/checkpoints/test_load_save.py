"""Loading and saving in every pair of kinds: the same names, shapes and values come back."""

import json
import shutil

import pytest
import torch

from library.checkpoints.ckpt_writer import write_ckpt
from library.checkpoints.load import load_parts, load_vae
from library.checkpoints.parts import SaveSettings
from library.checkpoints.pickles import load_pickle
from library.checkpoints.save import save_checkpoint, save_kind
from library.checkpoints.tensor_files import NonFiniteWeights, open_tensors, read_header, write_safetensors
from library.errors import UserError
from library.files import CannotSave

FAMILIES = ("sd1", "sd2")
OUTPUTS = ("safetensors", "ckpt", "diffusers", "diffusers_safetensors")
INPUTS = (*OUTPUTS, "bare ckpt", "legacy ckpt")
EXTRA_V2 = ("text_projection", "logit_scale", "resblocks.23.")


@pytest.fixture(scope="module")
def source(tmp_path_factory, small_file, spec_of):
    """Return a function: (family, kind) -> path of a model of that kind."""
    folder = tmp_path_factory.mktemp("sources")
    made = {}

    def make(family, kind):
        if (family, kind) not in made:
            made[family, kind] = build(folder, family, kind, small_file(family), spec_of)
        return made[family, kind]

    return make


def build(folder, family, kind, tensors, spec_of):
    path = folder / f"{family}-{kind.replace(' ', '-')}"
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        write_safetensors(path, tensors)
    elif kind == "bare ckpt":
        write_ckpt(path, tensors, None)
    elif kind == "ckpt":
        write_ckpt(path, tensors, {"epoch": 2, "global_step": 100})
    elif kind == "legacy ckpt":
        torch.save({"state_dict": dict(tensors)}, path, _use_new_zipfile_serialization=False)
    else:
        single = build(folder, family, "safetensors", tensors, spec_of)
        save_checkpoint(path, kind, load_parts(str(single), family), spec=spec_of(family))
    return path


def target_of(folder, kind):
    return folder / ("out" if kind.startswith("diffusers") else f"out.{kind}")


def contents(path):
    """All tensors of a model, by component for a folder."""
    if path.is_file():
        return dict(open_tensors(path))
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted(path.rglob("*"))
        if file.suffix in (".safetensors", ".bin")
        for name, tensor in open_tensors(file).items()
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", INPUTS)
def test_a_model_saved_as_it_came_has_the_same_tensors(tmp_path, source, spec_of, family, kind):
    path = source(family, kind)
    parts = load_parts(str(path), family)
    expected = {
        "bare ckpt": "ckpt",
        "legacy ckpt": "ckpt",
        "diffusers_safetensors": "diffusers",
    }.get(kind, kind)
    assert parts.source.kind == expected
    kind = "ckpt" if kind.endswith("ckpt") else kind
    saved = save_checkpoint(target_of(tmp_path, kind), kind, parts, spec=spec_of(family), source=parts.source)
    assert_same(contents(saved), contents(path))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("before", INPUTS)
@pytest.mark.parametrize("after", OUTPUTS)
def test_every_pair_of_kinds_keeps_every_part(tmp_path, source, spec_of, family, before, after):
    parts = load_parts(str(source(family, before)), family)
    saved = save_checkpoint(target_of(tmp_path, after), after, parts, spec=spec_of(family), source=parts.source)
    again = load_parts(str(saved), family)
    for part in ("unet", "text", "vae"):
        assert_same(getattr(again, part), getattr(parts, part))
    # What shapes and families tell is the same whatever way the model has taken.
    for part in ("unet_config", "text_config", "vae_config"):
        own, other = getattr(parts, part), getattr(again, part)
        known = set(own) & set(other) - {"_diffusers_version", "sample_size", "upcast_attention"}
        assert {k: own[k] for k in known} == {k: other[k] for k in known}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_that_went_through_a_folder_is_the_same(tmp_path, source, spec_of, small_file, family):
    first = load_parts(str(source(family, "diffusers_safetensors")), family)
    path = save_checkpoint(tmp_path / "m.safetensors", "safetensors", first, spec=spec_of(family), source=first.source)
    found, original = contents(path), small_file(family)
    lost = set(original) - set(found)
    assert all("position_ids" in name or "." not in name for name in lost), "only what no program needs is lost"
    same = {name for name in set(found) & set(original) if not any(part in name for part in EXTRA_V2)}
    assert_same({name: found[name] for name in same}, {name: original[name] for name in same})
    assert set(found) <= set(original)


def test_what_sd2_does_not_use_is_made_up_when_there_is_no_source(tmp_path, source, spec_of):
    parts = load_parts(str(source("sd2", "diffusers_safetensors")), "sd2")
    found = contents(save_checkpoint(tmp_path / "m.safetensors", "safetensors", parts, spec=spec_of("sd2")))
    prefix = "cond_stage_model.model."
    for name in ("attn.in_proj_weight", "mlp.c_fc.bias", "ln_2.weight"):
        layers = [found[f"{prefix}transformer.resblocks.{layer}.{name}"] for layer in (22, 23)]
        assert torch.equal(*layers)
    assert torch.equal(found[f"{prefix}text_projection"], torch.ones(32, 32))
    assert found[f"{prefix}logit_scale"].shape == () and found[f"{prefix}logit_scale"] == 1


def test_trained_weights_reach_the_file_and_the_rest_stays(tmp_path, source, spec_of, small_file):
    parts = load_parts(str(source("sd2", "safetensors")), "sd2")
    name = "text_model.encoder.layers.3.self_attn.k_proj.weight"
    changed = dict(parts.text)
    changed[name] = torch.full_like(changed[name], 7.0)
    trained = type(parts)(
        parts.unet, parts.unet_config, changed, parts.text_config, parts.vae, parts.vae_config, parts.source
    )
    path = save_checkpoint(tmp_path / "m.safetensors", "safetensors", trained, spec=spec_of("sd2"), source=parts.source)
    found, original = contents(path), dict(small_file("sd2"))
    joined = original["cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"].clone()
    joined[32:64] = 7.0
    original["cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight"] = joined
    assert_same(found, original)


@pytest.mark.parametrize("change", ["moved", "replaced", "removed"])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "diffusers_safetensors", "diffusers"])
def test_saving_works_whatever_became_of_the_source(tmp_path, source, spec_of, kind, change):
    original = source("sd1", kind)
    path = tmp_path / original.name
    shutil.copytree(original, path) if original.is_dir() else shutil.copy(original, path)
    parts = load_parts(str(path), "sd1")
    if change == "moved":
        path.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if change == "replaced":
            path.write_bytes(b"something else")
    saved = save_checkpoint(target_of(tmp_path, kind), kind, parts, spec=spec_of("sd1"), source=parts.source)
    assert_same(contents(saved), contents(original))


def test_saving_over_the_source_itself_works_again_and_again(tmp_path, source, spec_of, small_file):
    path = tmp_path / "m.safetensors"
    shutil.copy(source("sd1", "safetensors"), path)
    parts = load_parts(str(path), "sd1")
    for _ in range(3):
        save_checkpoint(path, "safetensors", parts, spec=spec_of("sd1"), source=parts.source)
    assert_same(contents(path), small_file("sd1"))


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float32])
def test_one_precision_per_file(tmp_path, source, spec_of, kind, precision):
    parts = load_parts(str(source("sd2", "safetensors")), "sd2")
    settings = SaveSettings(precision=precision)
    saved = save_checkpoint(
        target_of(tmp_path, kind), kind, parts, spec=spec_of("sd2"), source=parts.source, settings=settings
    )
    tensors = contents(saved)
    assert {tensor.dtype for tensor in tensors.values()} == {precision}
    if kind == "safetensors":
        assert torch.equal(tensors["betas"], parts.source.carried["betas"].to(precision))


def test_without_a_precision_every_tensor_keeps_its_own(tmp_path, source, spec_of):
    parts = load_parts(str(source("sd1", "safetensors")), "sd1")
    half = {name: tensor.half() for name, tensor in parts.unet.items()}
    mixed = type(parts)(
        half, parts.unet_config, parts.text, parts.text_config, parts.vae, parts.vae_config, parts.source
    )
    found = contents(save_checkpoint(tmp_path / "m.ckpt", "ckpt", mixed, spec=spec_of("sd1"), source=parts.source))
    assert found["model.diffusion_model.out.2.weight"].dtype == torch.float16
    assert found["first_stage_model.quant_conv.weight"].dtype == torch.float32
    assert found["cond_stage_model.transformer.text_model.embeddings.position_ids"].dtype == torch.int64


def test_counters_of_a_ckpt_go_on_from_those_of_its_source(tmp_path, source, spec_of):
    parts = load_parts(str(source("sd1", "ckpt")), "sd1")
    settings = SaveSettings(epoch=3, step=50)
    path = save_checkpoint(
        tmp_path / "m.ckpt", "ckpt", parts, spec=spec_of("sd1"), source=parts.source, settings=settings
    )
    found = load_pickle(path)
    assert set(found) == {"state_dict", "epoch", "global_step"}
    assert (found["epoch"], found["global_step"]) == (5, 150)
    fresh = load_pickle(save_checkpoint(path, "ckpt", parts, spec=spec_of("sd1"), settings=settings))
    assert (fresh["epoch"], fresh["global_step"]) == (3, 50)


def test_metadata_goes_into_single_safetensors_files_only(tmp_path, source, spec_of):
    parts = load_parts(str(source("sd1", "safetensors")), "sd1")
    settings = SaveSettings(metadata={"modelspec.title": "a title", "ss_steps": "5"})
    path = save_checkpoint(tmp_path / "m.safetensors", "safetensors", parts, spec=spec_of("sd1"), settings=settings)
    assert read_header(path).metadata == {"modelspec.title": "a title", "ss_steps": "5"}
    for kind in ("ckpt", "diffusers", "diffusers_safetensors"):
        saved = save_checkpoint(target_of(tmp_path, kind), kind, parts, spec=spec_of("sd1"), settings=settings)
        files = [saved] if saved.is_file() else [file for file in saved.rglob("*") if file.is_file()]
        assert not any(b"modelspec" in file.read_bytes() for file in files)
        shutil.rmtree(saved) if saved.is_dir() else saved.unlink()


def test_averaged_weights_are_dropped_with_a_notice(tmp_path, source, spec_of, small_file, caplog):
    tensors = {
        **small_file("sd1"),
        "model_ema.decay": torch.tensor(0.9),
        "model_ema.diffusion_modelout2weight": torch.ones(3),
    }
    write_safetensors(tmp_path / "m.safetensors", tensors)
    with caplog.at_level("INFO"):
        parts = load_parts(str(tmp_path / "m.safetensors"), "sd1")
    assert "2 EMA tensors" in caplog.text
    saved = save_checkpoint(tmp_path / "o.safetensors", "safetensors", parts, spec=spec_of("sd1"), source=parts.source)
    assert_same(contents(saved), small_file("sd1"))


@pytest.mark.parametrize("bad_part", ["unet", "carried"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_model_with_nan_is_not_saved_and_the_old_one_stays(tmp_path, source, spec_of, kind, bad_part):
    parts = load_parts(str(source("sd1", "safetensors")), "sd1")
    spec, target = spec_of("sd1"), target_of(tmp_path, kind)
    save_checkpoint(target, kind, parts, spec=spec, source=parts.source)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    table = dict(parts.unet)
    table["conv_in.bias"] = table["conv_in.bias"] * float("nan")
    broken = type(parts)(
        table, parts.unet_config, parts.text, parts.text_config, parts.vae, parts.vae_config, parts.source
    )
    if bad_part == "unet":
        with pytest.raises(NonFiniteWeights, match=f"^{target}: not saved: NaN or infinity"):
            save_checkpoint(target, kind, broken, spec=spec, source=parts.source)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    save_checkpoint(target, kind, broken, spec=spec, source=parts.source, settings=SaveSettings(allow_nan=True))


def test_a_folder_replaces_an_older_one_as_a_whole(tmp_path, source, spec_of):
    parts = load_parts(str(source("sd1", "safetensors")), "sd1")
    target = tmp_path / "model"
    (target / "unet").mkdir(parents=True)
    (target / "unet" / "left over.bin").write_bytes(b"x")
    save_checkpoint(target, "diffusers_safetensors", parts, spec=spec_of("sd1"))
    assert not (target / "unet" / "left over.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


REAL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.fixture
def downloaded(tmp_path, source):
    """A folder as people download them: another scheduler, a safety checker, and traces of somebody's disk."""
    folder = tmp_path / "downloaded"
    shutil.copytree(source("sd1", "diffusers_safetensors"), folder)
    (folder / "model_index.json").write_text(json.dumps(REAL_INDEX))
    additions = {
        "unet/config.json": {"_name_or_path": "/home/somebody/unet"},
        "text_encoder/config.json": {"_name_or_path": "/home/somebody/text", "torch_dtype": "float16"},
        "tokenizer/tokenizer_config.json": {"name_or_path": "/home/somebody/tokenizer", "model_max_length": 77},
        "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler", "prediction_type": "epsilon", "mark": 1},
    }
    for name, table in additions.items():
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **table}))
    return folder


def test_the_small_files_of_a_folder_are_kept_where_they_still_hold(tmp_path, downloaded, spec_of):
    parts = load_parts(str(downloaded), "sd1")
    out = save_checkpoint(tmp_path / "o", "diffusers", parts, spec=spec_of("sd1"), source=parts.source)
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    assert json.loads((out / "scheduler/scheduler_config.json").read_text())["mark"] == 1
    assert "torch_dtype" not in json.loads((out / "text_encoder/config.json").read_text())
    assert not any(b"/home/somebody" in path.read_bytes() for path in out.rglob("*.json"))
    assert (out / "tokenizer/vocab.json").read_bytes() == (downloaded / "tokenizer/vocab.json").read_bytes()


def test_what_training_changed_is_said_by_the_scheduler(tmp_path, downloaded, spec_of):
    parts = load_parts(str(downloaded), "sd1")
    spec = spec_of("sd1", "v_prediction")
    out = save_checkpoint(tmp_path / "o", "diffusers", parts, spec=spec, source=parts.source)
    scheduler = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["mark"]) == ("v_prediction", 1)
    settings = SaveSettings(zero_terminal_snr=True)
    out = save_checkpoint(tmp_path / "o", "diffusers", parts, spec=spec, source=parts.source, settings=settings)
    scheduler = json.loads((out / "scheduler/scheduler_config.json").read_text())
    assert scheduler["rescale_betas_zero_snr"] and scheduler["_class_name"] == "DDIMScheduler"
    assert json.loads((out / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]


def test_a_damaged_settings_file_is_found_when_the_model_is_loaded(downloaded):
    (downloaded / "tokenizer" / "special_tokens_map.json").write_text("{")
    with pytest.raises(UserError, match=r"special_tokens_map\.json: not valid JSON"):
        load_parts(str(downloaded), "sd1")


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_full_disk_leaves_the_model_that_was_there(tmp_path, source, spec_of, monkeypatch, kind):
    parts = load_parts(str(source("sd1", "safetensors")), "sd1")
    target = target_of(tmp_path, kind)
    save_checkpoint(target, kind, parts, spec=spec_of("sd1"), source=parts.source)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for hit in (1, 5, 900):
        monkeypatch.setenv("SD_FAULT", f"save.mid:enospc:{hit}")
        with pytest.raises(CannotSave, match="disk full"):
            save_checkpoint(target, kind, parts, spec=spec_of("sd1"), source=parts.source)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        monkeypatch.delenv("SD_FAULT")


def test_save_kind():
    assert save_kind(None, False, "safetensors") == "safetensors"
    assert save_kind(None, False, "ckpt") == "ckpt"
    assert save_kind(None, False, "diffusers") == "diffusers_safetensors"
    assert save_kind("ckpt", False, "safetensors") == "ckpt"
    assert save_kind("ckpt", True, "ckpt") == "safetensors"
    assert save_kind("diffusers", True, "ckpt") == "diffusers_safetensors"
    assert save_kind("diffusers", False, "ckpt") == "diffusers"


# Odd but known forms -----------------------------------------------------------------------------------------------


def changed_file(path, tensors, rename):
    write_safetensors(path, {new: tensor for name, tensor in tensors.items() for new in [rename(name)] if new})
    return path


def test_text_encoders_without_their_prefix_load(tmp_path, small_file, spec_of):
    def rename(name):
        return name.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")

    path = changed_file(tmp_path / "m.safetensors", small_file("sd1"), rename)
    parts = load_parts(str(path), "sd1")
    saved = save_checkpoint(tmp_path / "o.safetensors", "safetensors", parts, spec=spec_of("sd1"), source=parts.source)
    expected = dict(small_file("sd1"))
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    expected[rename(ids)] = expected.pop(ids)
    assert_same(contents(saved), expected)


def test_stray_position_ids_and_projections_are_carried(tmp_path, small_file, spec_of):
    odd = {
        "cond_stage_model.transformer.text_model.encoder.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.transformer.text_projection.weight": torch.ones(2, 2),
        "cond_stage_model.logit_scale": torch.tensor(4.6),
        "first_stage_model.loss.logvar": torch.tensor(0.5),
        "something.else": torch.ones(3),
    }
    write_safetensors(tmp_path / "m.safetensors", {**small_file("sd1"), **odd})
    parts = load_parts(str(tmp_path / "m.safetensors"), "sd1")
    assert not any("projection.weight" in name or "position_ids" in name for name in parts.text)
    saved = save_checkpoint(tmp_path / "o.safetensors", "safetensors", parts, spec=spec_of("sd1"), source=parts.source)
    assert_same(contents(saved), {**small_file("sd1"), **odd})


def test_an_sd2_file_that_lost_its_unused_layer_loads_whole(tmp_path, small_file):
    path = changed_file(
        tmp_path / "m.safetensors", small_file("sd2"), lambda name: None if "resblocks.23." in name else name
    )
    parts = load_parts(str(path), "sd2")
    assert parts.text_config["num_hidden_layers"] == 23


def test_older_diffusers_names_of_the_vae_load(tmp_path, source):
    folder = tmp_path / "model"
    shutil.copytree(source("sd1", "diffusers"), folder)
    weights = folder / "vae" / "diffusion_pytorch_model.bin"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in load_pickle(weights).items():
        for new, before in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        old[name] = tensor
    assert any("query" in name for name in old)
    write_ckpt(weights, old, None)
    first, again = load_parts(str(source("sd1", "diffusers")), "sd1"), load_parts(str(folder), "sd1")
    assert_same(again.vae, first.vae)


def test_a_folder_written_by_recent_transformers_loads(tmp_path, source):
    folder = tmp_path / "model"
    shutil.copytree(source("sd1", "diffusers_safetensors"), folder)
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in open_tensors(weights).items()}
    write_safetensors(weights, {**tensors, "embeddings.position_ids": torch.arange(77)[None]})
    first = load_parts(str(source("sd1", "diffusers_safetensors")), "sd1")
    assert_same(load_parts(str(folder), "sd1").text, first.text)


def test_sd2_folders_with_convolutions_become_files_with_matrices_and_back(tmp_path, source, spec_of, small_file):
    folder = tmp_path / "model"
    shutil.copytree(source("sd2", "diffusers_safetensors"), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {
        n: t[:, :, None, None] if "proj_in.weight" in n or "proj_out.weight" in n else t
        for n, t in open_tensors(weights).items()
    }
    write_safetensors(weights, tensors)
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["use_linear_projection"] = False
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    parts = load_parts(str(folder), "sd2")
    assert parts.unet["mid_block.attentions.0.proj_in.weight"].dim() == 4
    single = contents(save_checkpoint(tmp_path / "m.safetensors", "safetensors", parts, spec=spec_of("sd2")))
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    assert torch.equal(single[name], small_file("sd2")[name])
    again = save_checkpoint(
        tmp_path / "again", "diffusers_safetensors", parts, spec=spec_of("sd2"), source=parts.source
    )
    assert_same(contents(again), contents(folder))


def test_half_precision_variants_and_shards_are_found(tmp_path, source):
    original = source("sd1", "diffusers_safetensors")
    folder = tmp_path / "model"
    shutil.copytree(original, folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(
        folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    )
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = dict(open_tensors(weights))
    names = sorted(tensors)
    shards = {
        "diffusion_pytorch_model-00001-of-00002.safetensors": names[::2],
        "diffusion_pytorch_model-00002-of-00002.safetensors": names[1::2],
    }
    for shard, own in shards.items():
        write_safetensors(folder / "unet" / shard, {name: tensors[name] for name in own})
    table = {name: shard for shard, own in shards.items() for name in own}
    weights.with_name(weights.name + ".index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    weights.unlink()
    first, again = load_parts(str(original), "sd1"), load_parts(str(folder), "sd1")
    assert_same(again.unet, first.unet)
    assert_same(again.vae, first.vae)
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="shard .* is missing"):
        load_parts(str(folder), "sd1")


def test_safetensors_are_preferred_to_pickles_and_plain_files_to_variants():
    from library.checkpoints.folders import choose_weights

    names = [
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.fp16.bin",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.non_ema.safetensors",
        "config.json",
    ]
    assert choose_weights(names) == "diffusion_pytorch_model.safetensors"
    assert choose_weights([n for n in names if n != "diffusion_pytorch_model.safetensors"]) == names[2]
    assert choose_weights(["pytorch_model.bin", "flax_model.msgpack"]) == "pytorch_model.bin"
    index = "model.safetensors.index.fp16.json"
    assert choose_weights([index, "model.fp16-00001-of-00002.safetensors"]) == index
    assert choose_weights(["model.fp16.safetensors.index.json", "x.bin"]) == "model.fp16.safetensors.index.json"
    assert choose_weights(["config.json", "my.safetensors"]) is None


# --vae -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae_forms(tmp_path_factory, source, small_file):
    """Another VAE in every form in which users have one."""
    folder = tmp_path_factory.mktemp("vaes")
    tensors = {name: tensor + 1 for name, tensor in small_file("sd1").items() if name.startswith("first_stage_model.")}
    bare = {name.removeprefix("first_stage_model."): tensor for name, tensor in tensors.items()}
    write_safetensors(folder / "full.safetensors", {**small_file("sd1"), **tensors})
    write_safetensors(folder / "prefixed.safetensors", tensors)
    write_safetensors(folder / "bare.safetensors", bare)
    write_ckpt(folder / "bare.pt", bare, None)
    write_ckpt(folder / "wrapped.ckpt", {**bare, "loss.logvar": torch.ones(1)}, {"epoch": 1})
    shutil.copytree(source("sd1", "diffusers_safetensors"), folder / "pipeline")
    expected, _ = load_vae(str(folder / "bare.safetensors"))
    write_safetensors(folder / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors", expected)
    shutil.copytree(folder / "pipeline" / "vae", folder / "vae-folder")
    write_ckpt(folder / "diffusers.bin", expected, None)
    write_safetensors(folder / "diffusers.safetensors", expected)
    return folder, expected, tensors


VAES = ("full.safetensors", "prefixed.safetensors", "bare.safetensors", "bare.pt", "wrapped.ckpt", "pipeline",
        "vae-folder", "diffusers.bin", "diffusers.safetensors")  # fmt: skip


@pytest.mark.parametrize("form", VAES)
@pytest.mark.parametrize("kind", ["safetensors", "diffusers_safetensors"])
def test_another_vae_in_any_form_replaces_the_own_one_and_is_saved(
    tmp_path, source, spec_of, vae_forms, small_file, form, kind
):
    folder, expected, in_file = vae_forms
    parts = load_parts(str(source("sd1", kind)), "sd1", vae=str(folder / form))
    assert_same(parts.vae, expected)
    saved = save_checkpoint(tmp_path / "o.safetensors", "safetensors", parts, spec=spec_of("sd1"), source=parts.source)
    found = contents(saved)
    assert_same({name: found[name] for name in in_file}, in_file)
    assert set(found) <= set(small_file("sd1"))


def test_a_model_without_vae_works_with_another_one_only(tmp_path, small_file, vae_forms):
    tensors = {name: tensor for name, tensor in small_file("sd1").items() if not name.startswith("first_stage")}
    path = tmp_path / "m.safetensors"
    write_safetensors(path, tensors)
    with pytest.raises(UserError, match="has no VAE.*--vae"):
        load_parts(str(path), "sd1")
    assert load_parts(str(path), "sd1", vae=str(vae_forms[0] / "bare.safetensors")).vae


def test_a_file_without_vae_as_vae_is_refused(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", {"lora_unet_x.lora_down.weight": torch.ones(2, 2)})
    with pytest.raises(UserError, match="holds no VAE"):
        load_vae(str(tmp_path / "m.safetensors"))


# What does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "other", "hint"), [("sd1", "sd2", "Remove --v2"), ("sd2", "sd1", "Add --v2")])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "diffusers_safetensors"])
def test_the_wrong_version_flag_is_named(source, family, other, hint, kind):
    with pytest.raises(UserError, match=hint):
        load_parts(str(source(family, kind)), other)


def test_a_configuration_of_another_size_is_refused(tmp_path, source):
    for part, field, value in (
        ("unet", "block_out_channels", [2**40] * 4),
        ("unet", "layers_per_block", 10**9),
        ("unet", "cross_attention_dim", 768),
        ("text_encoder", "num_hidden_layers", 10**8),
        ("text_encoder", "vocab_size", 10**12),
        ("vae", "latent_channels", 16),
    ):
        folder = tmp_path / f"{part}-{field}"
        shutil.copytree(source("sd1", "diffusers_safetensors"), folder)
        config = folder / part / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
        with pytest.raises(UserError, match=f"config.json: says {field}"):
            load_parts(str(folder), "sd1")


def test_incomplete_parts_are_named(tmp_path, small_file):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    write_safetensors(tmp_path / "m.safetensors", {k: v for k, v in small_file("sd1").items() if k != name})
    with pytest.raises(UserError, match="U-Net is incomplete: 'conv_in.weight' is missing"):
        load_parts(str(tmp_path / "m.safetensors"), "sd1")


def test_a_folder_that_lacks_weights_is_named(tmp_path, source):
    folder = tmp_path / "m"
    shutil.copytree(source("sd1", "diffusers_safetensors"), folder)
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="text_encoder: no weights in this folder"):
        load_parts(str(folder), "sd1")


def test_quantized_weights_are_named(tmp_path, small_file):
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    tensors = dict(small_file("sd1"))
    write_safetensors(tmp_path / "m.safetensors", {**tensors, name: tensors[name].to(torch.int8)})
    with pytest.raises(UserError, match="1 weights are int8, such as down_blocks.0.attentions.0"):
        load_parts(str(tmp_path / "m.safetensors"), "sd1")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.bfloat16])
def test_other_floating_point_types_load_and_keep_their_type(tmp_path, small_file, spec_of, dtype):
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in small_file("sd2").items()}
    write_safetensors(tmp_path / "m.safetensors", tensors)
    parts = load_parts(str(tmp_path / "m.safetensors"), "sd2")
    saved = save_checkpoint(tmp_path / "o.safetensors", "safetensors", parts, spec=spec_of("sd2"), source=parts.source)
    found = contents(saved)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in tensors.items()}
    assert all(torch.equal(found[n].view(torch.uint8), t.view(torch.uint8)) for n, t in tensors.items() if t.dim())
