"""stable_cascade_gen_img.py as users run it, with tiny models: command lines in, pictures and messages out."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import networks.lora
import stable_cascade_gen_img
from library.checkpoints.cascade_lora import stated, walk
from library.checkpoints.cascade_parts import control_filter_metadata
from library.checkpoints.embedding_file import write_embedding
from library.checkpoints.headers import read_header
from library.checkpoints.load_cascade import load_stage, load_text
from library.models.cascade.text import build_projected_text_encoder
from library.models.cascade.unet import build_stage
from library.models.random_cascade import TINY_C, make_random_cascade
from tools import convert_stable_cascade as tool

CPU = torch.device("cpu")
SMALL = ("--steps=2", "--steps_b=2", "--W=128", "--H=128")
CAT = "--prompt=a cat --d 1"


@pytest.fixture(scope="module")
def files(tiny_cascade):
    return tiny_cascade


def named(files, **other):
    """The options for all parts, or the given ones."""
    paths = {
        "stage_c": files.stage_c,
        "stage_b": files.stage_b,
        "stage_a": files.stage_a,
        "effnet": files.effnet,
        "previewer": files.previewer,
        "text_model": files.text,
        "image_model": files.vision,
    }
    return [f"--{name}_checkpoint_path={path}" for name, path in {**paths, **other}.items() if path is not None]


@pytest.fixture
def draw(files, tmp_path, capsys):
    """Run the script with the tiny models; returns (exit status, pictures by name, standard error)."""

    def run(*words, model=None, options=SMALL):
        folder = tmp_path / "out"
        before = set(folder.rglob("*")) if folder.exists() else set()
        argv = [*(named(files) if model is None else model), f"--outdir={folder}", *options, *map(str, words)]
        with pytest.raises(SystemExit) as ended:
            stable_cascade_gen_img.main(argv)
        made = sorted(set(folder.rglob("*.png")) - before, key=lambda path: path.stat().st_mtime_ns)
        return int(ended.value.code or 0), [Image.open(path) for path in made], capsys.readouterr().err

    return run


def only(result):
    """The levels of the one picture of a run that went well."""
    code, pictures, error = result
    assert code == 0, error
    assert len(pictures) == 1
    return np.asarray(pictures[0].convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def cat(files, tmp_path_factory):
    """What `CAT` draws without anything else."""
    folder = tmp_path_factory.mktemp("cat")
    with pytest.raises(SystemExit):
        stable_cascade_gen_img.main([*named(files), f"--outdir={folder}", *SMALL, CAT])
    return np.asarray(Image.open(next(folder.glob("*.png"))).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    levels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(levels).resize((160, 128), Image.Resampling.BICUBIC).save(path)
    return path


def test_a_picture_tells_how_it_was_made(draw):
    code, (picture,), _ = draw("--prompt=a cat --n a b c --w 192 --h 128 --d 7 --l 5 --s 3 --t 0.9 --f 3")
    assert code == 0
    assert picture.size == (192, 128)
    texts = picture.text
    assert (texts["prompt"], texts["negative-prompt"], texts["seed"]) == ("a cat", "a b c", "7")
    assert (texts["scale"], texts["steps"], texts["shift"], texts["sampler"]) == ("5.0", "3", "3.0", "ddpm")
    assert "Shift: 3" in texts["parameters"]


@pytest.mark.parametrize("words", [["--lowvram"], ["--sdpa"], ["--xformers"], ["--batch_size=3"]])
def test_what_changes_speed_alone_changes_no_picture(draw, cat, words):
    assert abs(only(draw(CAT, *words)) - cat).max() <= 1


@pytest.mark.parametrize(
    "words",
    [
        ["--scale=7"],
        ["--shift=1"],
        ["--steps=3"],
        ["--sampler=ddim"],
        ["--t_start=0.7"],
        ["--cfg_rho=0"],
        ["--cfg_t_start=0.6"],
        ["--cfg_t_stop=0.6"],
        ["--steps_b=3"],
        ["--scale_b=4"],
        ["--no_text_mask"],
        ["--bf16"],
    ],
)
def test_every_setting_has_an_effect(draw, cat, words):
    assert (only(draw(CAT, *words)) != cat).any()


def test_the_previewer_makes_small_pictures(draw):
    picture = only(draw(CAT, "--decoder=previewer"))
    assert picture.shape == (24, 24, 3)
    assert picture.std() > 5


def test_batches_and_prompt_files(draw, tmp_path, cat):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --d 1\na dog --d 2 --w 192\na bird --d 3,4 --l 1\na cat --d 1 --zz 3\n", encoding="utf-8")
    code, pictures, error = draw(f"--from_file={path}", "--batch_size=2", "--images_per_prompt=2")
    assert code == 2
    assert "unknown '--zz'" in error
    assert [picture.size for picture in pictures] == [(128, 128)] * 2 + [(192, 128)] * 2 + [(128, 128)] * 2
    assert abs(np.asarray(pictures[0]).astype(int) - cat).max() <= 1


def test_prompts_are_read_from_standard_input_without_a_word_about_it(draw, monkeypatch, cat):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a cat --d 1\n"))
    assert abs(only(draw()) - cat).max() == 0


def test_an_empty_prompt_is_a_prompt(draw, monkeypatch, cat):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a cat --d 1\n"))
    assert (only(draw("--prompt=", "--seed=1")) != cat).any()


def prefixed(path, prefix):
    return {prefix + name: tensor for name, tensor in load_file(path).items()}


def test_checkpoints_for_comfyui_and_folders_of_diffusers_draw_the_same(draw, files, tmp_path, cat):
    text = load_file(files.text)
    projection = text.pop("text_projection.weight")
    all_c = {
        **prefixed(files.stage_c, "model.diffusion_model."),
        **prefixed(files.effnet, "vae.encoder."),
        **prefixed(files.previewer, "vae.previewer."),
        **{f"text_encoder.clip_g.transformer.{name}": tensor for name, tensor in text.items()},
        "text_encoder.clip_g.text_projection": projection.t().contiguous(),
    }
    all_b = {**prefixed(files.stage_b, "model.diffusion_model."), **prefixed(files.stage_a, "vae.")}
    # Heads of tiny models are fewer features wide than those of real ones, which files need not tell.
    told = {**read_header(files.stage_c).metadata, **read_header(files.text).metadata}
    save_file(all_c, tmp_path / "c.safetensors", told)
    save_file(all_b, tmp_path / "b.safetensors", dict(read_header(files.stage_b).metadata))
    model = [f"--stage_{name}_checkpoint_path={tmp_path / name}.safetensors" for name in "cb"]
    assert abs(only(draw(CAT, model=model)) - cat).max() <= 1
    assert only(draw(CAT, "--decoder=previewer", model=model[:1])).shape == (24, 24, 3)
    for source, target in (("c", "prior"), ("b", "decoder")):
        tool.convert(tool.ConvertOptions(src=f"{tmp_path / source}.safetensors", dst=str(tmp_path / target)))
    model = [f"--stage_c_checkpoint_path={tmp_path / 'prior'}", f"--stage_b_checkpoint_path={tmp_path / 'decoder'}"]
    assert abs(only(draw(CAT, model=model)) - cat).max() <= 1


def test_pictures_from_pictures(draw, photograph, cat):
    start = only(draw(CAT, f"--image={photograph}"))
    assert start.shape == cat.shape
    assert (start != cat).any()
    assert only(draw("--prompt=a cat --d 1", f"--image={photograph}", options=SMALL[:2])).shape == (128, 160, 3)
    near, nearer = (only(draw(f"{CAT} --t {t}", f"--image={photograph}", "--decoder=previewer")) for t in (0.5, 0.02))
    assert (near != nearer).any()
    looks = only(draw(CAT, f"--image={photograph}", "--image_mode=variation"))
    assert (looks != cat).any()
    assert (looks != start).any()
    assert (only(draw("--seed=1", f"--image={photograph}", "--image_mode=variation")) != looks).any()


@pytest.fixture(scope="module")
def lora(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    stage, text = load_stage(files.stage_c, "c"), load_text(files.text)
    unet = build_stage(stage.config, stage.tensors, device=CPU, dtype=torch.float32)
    encoder = build_projected_text_encoder(text.config, text.tensors, device=CPU, dtype=torch.float32)
    network = networks.lora.create_network(1.0, 2, 1.0, None, encoder, unet)
    network.apply_to(encoder, unet, True, True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    network.save_weights(str(path), torch.float32, {"ss_base_model_version": "stable_cascade"})
    return path


def test_networks_attached_merged_and_with_strengths(draw, cat, lora):
    whole = only(draw(CAT, f"--network_weights={lora}"))
    assert (whole != cat).any()
    for words in (["--network_merge"], ["--network_pre_calc"], ["--lowvram"], ["--lowvram", "--network_pre_calc"]):
        assert abs(only(draw(CAT, f"--network_weights={lora}", *words)) - whole).max() <= 2
    assert (only(draw(f"{CAT} --am 0", f"--network_weights={lora}")) == cat).all()
    half = only(draw(f"{CAT} --am 0.5", f"--network_weights={lora}"))
    assert (half == only(draw(CAT, f"--network_weights={lora}", "--network_mul=0.5"))).all()
    assert (half != whole).any()


def test_words_from_embedding_files(draw, tmp_path):
    path = tmp_path / "zorgle.safetensors"
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    write_embedding(path, {"clip_g": rows}, {})
    words = ["--textual_inversion_embeddings", path]
    plain, known = only(draw("--prompt=zorgle --d 1")), only(draw("--prompt=zorgle --d 1", *words))
    assert (plain != known).any()
    assert (only(draw("--prompt=zorgle --d 1", "--lowvram", *words)) == known).all()


@pytest.fixture
def net(files, tmp_path):
    path = tmp_path / "net.safetensors"
    save_file(load_file(files.controlnet), path, control_filter_metadata("canny", ["resize=64"]))
    return path


def test_control_nets(draw, cat, net, photograph):
    words = ["--controlnet_checkpoint_path", net, "--controlnet_image", photograph]
    guided = only(draw(CAT, *words))
    assert (guided != cat).any()
    assert (only(draw(f"{CAT} --cn {photograph}", *words[:2])) == guided).all()
    named_again = ["--controlnet_filter", "canny", "--controlnet_filter_params", "resize=64"]
    assert (only(draw(CAT, *words, *named_again)) == guided).all()
    assert (only(draw(CAT, *words, "--controlnet_multipliers", 0)) == cat).all()
    assert (only(draw(CAT, *words, "--lowvram")) == guided).all()
    assert (only(draw(CAT, *words, "--controlnet_ratios", 0.4)) != guided).any()
    prompt_only = only(draw(CAT, *words, "--controlnet_cond_only"))
    assert (prompt_only != guided).any()
    assert (prompt_only != cat).any()
    unguided = [f"{CAT} --l 1", *words]
    assert (only(draw(*unguided, "--controlnet_cond_only")) == only(draw(*unguided))).all()


def test_what_a_file_is_for_is_told_before_anything_is_drawn(draw, files, net, tmp_path, photograph):
    for model, words, message in (
        (named(files, stage_c=files.stage_b), [], "is Stable Cascade: stage B, not stage C"),
        (named(files, stage_b=files.stage_c), [], "not stage B of Stable Cascade"),
        (named(files, stage_b=None, stage_a=None), [], "--stage_b_checkpoint_path: is required for --decoder stage_b"),
        (named(files, stage_a=None), [], "--stage_a_checkpoint_path: is required for --decoder stage_b"),
        (named(files, previewer=None), ["--decoder=previewer"], "--previewer_checkpoint_path: is required"),
        (named(files, effnet=None), [f"--image={photograph}"], "--effnet_checkpoint_path: is required for --image"),
        (named(files, effnet=files.previewer), [f"--image={photograph}"], "--effnet_checkpoint_path"),
        (named(files), [f"--controlnet_checkpoint_path={files.controlnet}"], "which filter it was trained with"),
        (named(files), [f"--controlnet_checkpoint_path={net}", "--controlnet_filter=sr"], "the filter sr gives 3"),
        (named(files), [f"--controlnet_checkpoint_path={net}", f"--controlnet_mask={photograph}"], "paints anything"),
        (named(files), [f"--network_weights={files.stage_b}"], "not a LoRA but Stable Cascade"),
    ):
        code, pictures, error = draw(CAT, *words, model=model)
        assert (code, pictures) == (2, []), error
        assert message in error.splitlines()[-1]


def test_a_control_net_for_another_stage_c(draw, files, tmp_path):
    wide = replace(TINY_C, c_hidden=(64, 64), heads=(2, 2))
    other = make_random_cascade(tmp_path / "wide", config_c=wide)
    code, _, error = draw(CAT, f"--controlnet_checkpoint_path={other.controlnet}", "--controlnet_filter=canny")
    assert code == 2
    assert "is for a stage C with 64 features, and this one has 32" in error


def test_parts_of_a_prompt_are_drawn_together(draw, cat):
    both = only(draw("--prompt=a cat AND a dog --d 1"))
    assert (both != cat).any()
    assert abs(only(draw("--prompt=a dog AND a cat --d 1")) - both).max() <= 1
    code, pictures, _ = draw("--prompt=a cat AND a dog --d 1,2", "--images_per_prompt=2", "--batch_size=2")
    assert code == 0
    assert abs(np.asarray(pictures[0]).astype(int) - both).max() <= 1
    # Without guidance: the mean of what is predicted for each.
    alike, single = only(draw("--prompt=a cat AND a cat --d 1 --l 1")), only(draw("--prompt=a cat --d 1 --l 1"))
    assert abs(alike - single).max() <= 1


def test_guidance_that_changes_on_the_way(draw, cat):
    changing = only(draw(CAT, "--scale=4", "--scale_end=1"))
    assert (changing != cat).any()
    assert (only(draw(f"{CAT} --l 4 --le 1")) == changing).all()
    assert (only(draw(f"{CAT} --le none", "--scale_end=1")) == cat).all()
    code, (picture,), _ = draw(f"{CAT} --le 1")
    assert code == 0
    assert picture.text["scale-end"] == "1.0"
    assert "CFG scale at the end: 1" in picture.text["parameters"]
    assert "Stage B steps: 2" in picture.text["parameters"]


def with_words(files, path, **tensors):
    """A LoRA that changes nothing but words."""
    zero = {"lora_unet_clf_1.lora_down.weight": torch.zeros(1, 32, 1, 1)}
    zero["lora_unet_clf_1.lora_up.weight"] = torch.zeros(16, 1, 1, 1)
    save_file({**zero, **tensors}, path, {"ss_base_model_version": "stable_cascade"})
    return f"--network_weights={path}"


CATS = {"embeddings.indices": torch.tensor([2368]), "embeddings.embeddings": torch.full((1, 32), 0.3)}
"""A change to the vector of ``cat``."""


def test_words_in_networks(draw, files, cat, tmp_path):
    row = 0.1 * torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    new = with_words(files, tmp_path / "new.safetensors", **{"bundle_emb.[felix].clip_g": row})
    felix = "--prompt=a [felix] --d 1"
    known, unknown = only(draw(felix, new)), only(draw(felix))
    assert (known != unknown).any()
    assert (only(draw("--prompt=a [FELIX] --d 1", new, "--network_merge")) == known).all()
    assert (only(draw(CAT, new)) == cat).all()
    again = with_words(files, tmp_path / "again.safetensors", **{"bundle_emb.[felix].clip_g": -row})
    code, _, error = draw(felix, *new.split("="), again.split("=")[1])
    assert code == 0
    assert "its word [felix] is left out" in error
    wide = with_words(files, tmp_path / "wide.safetensors", **{"bundle_emb.[felix].clip_g": torch.zeros(1, 16)})
    code, _, error = draw(felix, wide)
    assert code == 2
    assert "holds vectors of 16 values" in error


def test_changed_vectors_of_known_words_are_as_strong_as_their_network(draw, files, cat, tmp_path):
    changed = with_words(files, tmp_path / "cats.safetensors", **CATS)
    whole = only(draw(CAT, changed))
    assert (whole != cat).any()
    assert (only(draw(f"{CAT} --am 0", changed)) == cat).all()
    for words in (["--network_merge"], ["--network_pre_calc"], ["--lowvram"]):
        assert abs(only(draw(CAT, changed, *words)) - whole).max() <= 1
    half = {**CATS, "embeddings.embeddings": CATS["embeddings.embeddings"] / 2}
    halved = with_words(files, tmp_path / "half.safetensors", **half)
    assert abs(only(draw(f"{CAT} --am 0.5", changed)) - only(draw(CAT, halved))).max() <= 1
    assert (only(draw("--prompt=a dog --d 1", changed)) == only(draw("--prompt=a dog --d 1"))).all()


@pytest.fixture
def original(files, tmp_path):
    """A LoRA of the original trainer, which does not say what its word is."""
    stage = load_stage(files.stage_c, "c")
    entries = walk(stage.config, (".attn",))
    tensors = {"embeddings.indices": torch.tensor([49408]), "embeddings.embeddings": torch.full((1, 32), 0.2)}
    for number, entry in enumerate(entries):
        tensors[f"weights.{number}.lora_up"] = torch.full((entry.shape[0], 2), 0.1)
        tensors[f"weights.{number}.lora_down"] = torch.full((2, entry.shape[1]), 0.1)
    path = tmp_path / "fernando.safetensors"
    save_file(tensors, path, stated(entries))
    return path


def test_loras_of_the_original_trainer(draw, files, cat, original):
    fernando, words = "--prompt=a [fernando] --d 1", [f"--network_weights={original}"]
    assert (only(draw(CAT, *words)) != cat).any()
    code, (plain,), error = draw(fernando, *words)
    assert code == 0
    assert "it is not known what 1 new words in it are; give --train_tokens" in error
    told = only(draw(fernando, *words, "--train_tokens", "[fernando]=^cat</w>"))
    assert (told != np.asarray(plain)).any()
    code, _, error = draw(CAT, "--train_tokens", "[fernando]=^cat</w>")
    assert code == 2
    assert "--train_tokens: needs --network_weights" in error


def test_yaml_files_of_the_original_program(draw, files, cat, net, original, photograph, tmp_path):
    stage_c = {
        "model_version": "3.6B",
        "effnet_checkpoint_path": str(files.effnet),
        "previewer_checkpoint_path": str(files.previewer),
        "generator_checkpoint_path": str(files.stage_c),
        "clip_text_model_name": str(files.text),
    }
    stage_b = {
        "model_version": "3B",
        "batch_size": 4,
        "image_size": 1024,
        "webdataset_path": "file:inference/imagenet_1024.tar",
        "stage_a_checkpoint_path": str(files.stage_a),
        "generator_checkpoint_path": str(files.stage_b),
    }
    control = {
        "controlnet_filter": "CannyFilter",
        "controlnet_filter_params": {"resize": 64},
        "controlnet_checkpoint_path": str(net),
    }
    tokens = {"train_tokens": [["[fernando]", "^cat</w>"]], "lora_checkpoint_path": str(original)}
    paths = {}
    for name, keys in {"c": stage_c, "b": stage_b, "control": stage_c | control, "lora": stage_c | tokens}.items():
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(json.dumps(keys), encoding="utf-8")
    assert (only(draw(CAT, model=[str(paths["c"]), str(paths["b"])])) == cat).all()
    both = ["--config_file", str(paths["b"]), "--config_file_b", str(paths["c"])]
    code, _, error = draw(CAT, model=both)
    assert code == 0
    assert "keys that only trainings need are passed over: batch_size, image_size, webdataset_path" in error
    guided = only(draw(CAT, f"--controlnet_image={photograph}", model=[str(paths["control"]), str(paths["b"])]))
    words = [f"--controlnet_checkpoint_path={net}", f"--controlnet_image={photograph}"]
    assert (guided == only(draw(CAT, *words))).all()
    fernando = "--prompt=a [fernando] --d 1"
    words = [f"--network_weights={original}", "--train_tokens", "[fernando]=^cat</w>"]
    learnt = only(draw(fernando, model=[str(paths["lora"]), str(paths["b"])]))
    assert (learnt == only(draw(fernando, *words))).all()
    for model, message in (
        ([str(paths["c"]), str(paths["c"])], "is for stage C, as"),
        ([str(paths["b"])], "--stage_c_checkpoint_path: is required"),
        (["--config_file_b", str(paths["b"])], "--config_file_b: needs --config_file"),
        ([str(paths["c"]), "--model_version=2B"], "--model_version: '2B' is not one of 3.6B, 1B"),
    ):
        code, _, error = draw(CAT, model=model)
        assert code == 2
        assert message in error


def test_what_is_typed_wins_over_yaml_files(draw, files, tmp_path, cat):
    keys = {"generator_checkpoint_path": "nowhere", "dtype": "bfloat16", "scale": 7}
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(keys), encoding="utf-8")
    assert (only(draw(CAT, "--scale=4", model=[str(path), *named(files)])) != cat).any()  # bfloat16
    keys.pop("dtype")
    path.write_text(json.dumps(keys), encoding="utf-8")
    assert (only(draw(CAT, "--scale=4", model=[str(path), *named(files)])) == cat).all()
    assert (only(draw(CAT, model=[str(path), *named(files)])) == only(draw(CAT, "--scale=7"))).all()


def test_guides_without_a_control_net_are_told_of(draw, cat):
    code, _, error = draw(f"{CAT} --cn nowhere.png")
    assert code == 0
    assert "--prompt: --cn has no effect: there is no --controlnet_checkpoint_path" in error
