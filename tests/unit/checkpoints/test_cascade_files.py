"""Stable Cascade files: every layout that users have, exact round trips, and one clear line for every wrong file."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.cascade_configs import CONFIGS, HEADS_KEY
from library.checkpoints.detect import inspect
from library.checkpoints.detect_cascade import inspect_cascade
from library.checkpoints.key_maps_cascade import UNET_PREFIX
from library.checkpoints.load_cascade import (
    load_control_net,
    load_effnet,
    load_previewer,
    load_stage,
    load_stage_a,
    load_text,
    load_vision,
)
from library.checkpoints.parts import SaveSettings
from library.checkpoints.save_cascade import file_tensors, save_component, save_part
from library.checkpoints.tensor_files import NonFiniteWeights
from library.errors import UserError
from library.models.assemble import build_module
from library.models.cascade.control_net import build_control_net
from library.models.cascade.effnet import EffNetEncoder
from library.models.cascade.previewer import Previewer
from library.models.cascade.stage_a import StageA
from library.models.cascade.unet import build_stage
from library.models.cascade.vision import make_image_encoder
from library.models.random_cascade import (
    TINY_A,
    TINY_B,
    TINY_C,
    TINY_CONTROL,
    TINY_EFFNET,
    TINY_PREVIEWER,
    TINY_TEXT,
    TINY_VISION,
    make_random_cascade,
    random_part,
)

LOADERS = {
    "stage_c": lambda path: load_stage(path, "c"),
    "stage_b": lambda path: load_stage(path, "b"),
    "stage_a": load_stage_a,
    "effnet": load_effnet,
    "previewer": load_previewer,
    "text": load_text,
    "vision": load_vision,
    "controlnet": lambda path: load_control_net(path, TINY_C.residual_blocks),
}
CONFIGURED = {
    "stage_c": TINY_C,
    "stage_b": TINY_B,
    "stage_a": TINY_A,
    "effnet": TINY_EFFNET,
    "previewer": TINY_PREVIEWER,
    "text": TINY_TEXT,
    "vision": TINY_VISION,
    "controlnet": TINY_CONTROL,
}
STAGES = {"stage_c": TINY_C, "stage_b": TINY_B}


@pytest.fixture(scope="module")
def files(tiny_cascade):
    return tiny_cascade


def same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def prefixed(tensors, prefix):
    return {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}


def written(part, layout="official"):
    """The tensors of a tiny part as a file of that layout has them."""
    rows = file_tensors(part, random_part(part).tensors, layout)
    return {name: row.make() if hasattr(row, "make") else row.contiguous() for name, row in rows.items()}


# Round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", LOADERS)
def test_official_files_give_back_every_bit_and_the_sizes(part, files):
    path = getattr(files, part)
    loaded = LOADERS[part](path)
    same(loaded.tensors, random_part(part).tensors)
    assert loaded.config == CONFIGURED[part]
    again = save_part(path.with_name(f"again_{part}.safetensors"), part, loaded.tensors, loaded.config)
    same(load_file(again), load_file(path))


@pytest.mark.parametrize("part", STAGES)
def test_official_stages_pack_queries_keys_and_values(part, files):
    tensors, memory = load_file(getattr(files, part)), random_part(part).tensors
    level = STAGES[part].levels.index("CTA")
    start = f"down_blocks.{level}.2.attention.attn."
    rows = [memory[f"{start}to_{kind}.weight"] for kind in "qkv"]
    assert torch.equal(tensors[f"{start}in_proj_weight"], torch.cat(rows))
    assert not any(".to_q" in name for name in tensors)


@pytest.mark.parametrize("part", STAGES)
def test_stages_in_other_layouts_and_wrappers(part, tmp_path):
    config, memory = STAGES[part], random_part(part).tensors
    heads = {HEADS_KEY: json.dumps(list(config.heads))}
    for layout in ("official", "split", "diffusers"):
        for prefix in ("", UNET_PREFIX):
            path = tmp_path / f"{layout}{len(prefix)}.safetensors"
            save_file(prefixed(written(part, layout), prefix), path, heads)
            loaded = LOADERS[part](path)
            same(loaded.tensors, memory)
            assert loaded.config == config
    torch.save({"state_dict": written(part)}, tmp_path / "wrapped.ckpt")
    same(LOADERS[part](tmp_path / "wrapped.ckpt").tensors, memory)


@pytest.mark.parametrize("part", ["stage_c", "stage_b", "stage_a", "text"])
def test_components_of_diffusers_models(part, tmp_path):
    memory = random_part(part).tensors
    names = {"stage_c": "prior", "stage_b": "decoder", "stage_a": "vqgan", "text": "text_encoder"}
    folder = save_component(tmp_path / names[part], part, memory, CONFIGURED[part])
    for path in (tmp_path, folder):
        loaded = LOADERS[part](path)
        same(loaded.tensors, memory)
        assert loaded.config == CONFIGURED[part]


def test_diffusers_opens_our_components(tmp_path):
    from diffusers import StableCascadeUNet

    part = random_part("stage_b")
    folder = save_component(tmp_path / "decoder", "stage_b", part.tensors, part.config)
    model = StableCascadeUNet.from_pretrained(folder)
    assert torch.equal(model.clip_txt_pooled_mapper.weight, part.tensors["clip_mapper.weight"])


def test_transformers_opens_our_text_encoder(tmp_path):
    from transformers import CLIPTextModelWithProjection

    part = random_part("text")
    model = CLIPTextModelWithProjection.from_pretrained(
        save_component(tmp_path / "text_encoder", "text", part.tensors, part.config)
    )
    assert torch.equal(model.text_projection.weight, part.tensors["text_projection.weight"])
    assert model.config.eos_token_id == 49407


def test_all_in_one_checkpoint_of_stage_c(tmp_path):
    text = dict(random_part("text").tensors)
    projection = text.pop("text_projection.weight")
    constants = {"vae.encoder.mean": torch.zeros(3), "vae.encoder.std": torch.ones(3)}
    path = tmp_path / "stable_cascade_stage_c.safetensors"
    tensors = {
        **prefixed(written("stage_c"), UNET_PREFIX),
        **prefixed(random_part("effnet").tensors, "vae.encoder."),
        **prefixed(random_part("previewer").tensors, "vae.previewer."),
        **constants,
        **prefixed(text, "text_encoder.clip_g.transformer."),
        "text_encoder.clip_g.text_projection": projection.t().contiguous(),
        "text_encoder.clip_g.logit_scale": torch.ones(()),
        **prefixed(random_part("vision").tensors, "clip_l_vision."),
        "clip_l_vision.vision_model.embeddings.position_ids": torch.arange(5),
    }
    save_file(tensors, path)
    assert set(inspect_cascade(path).parts) == {"stage_c", "effnet", "previewer", "text", "vision"}
    same(load_vision(path).tensors, random_part("vision").tensors)
    same(load_effnet(path).tensors, random_part("effnet").tensors)
    same(load_previewer(path).tensors, random_part("previewer").tensors)
    same(load_text(path).tensors, random_part("text").tensors)
    same(load_stage(path, "c").tensors, random_part("stage_c").tensors)


def test_all_in_one_checkpoint_of_stage_b(tmp_path):
    path = tmp_path / "b.safetensors"
    save_file({**prefixed(written("stage_b"), UNET_PREFIX), **prefixed(written("stage_a"), "vae.")}, path)
    same(load_stage_a(path).tensors, random_part("stage_a").tensors)
    same(load_stage(path, "b").tensors, random_part("stage_b").tensors)


def test_text_encoders_with_position_ids_or_in_the_names_of_newer_transformers(tmp_path):
    tensors = dict(random_part("text").tensors)
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, tmp_path / "old.safetensors")
    same(load_text(tmp_path / "old.safetensors").tensors, random_part("text").tensors)


# Sizes -------------------------------------------------------------------------------------------------------------


def test_heads_follow_the_width_unless_the_file_says_otherwise(tmp_path):
    config = replace(TINY_C, c_hidden=(128, 128), c_cond=64, heads=(2, 2))
    part = random_part("stage_c", config)
    path = save_part(tmp_path / "c.safetensors", "stage_c", part.tensors, config)
    with safe_open(path, "pt") as file:
        assert file.metadata() is None
    assert load_stage(path, "c").config == config
    other = replace(config, heads=(4, 8))
    save_part(path, "stage_c", part.tensors, other)
    assert load_stage(path, "c").config == other
    save_file(load_file(path), path, {HEADS_KEY: "[3, 2]"})
    with pytest.raises(UserError, match="128 features cannot be shared out among 3"):
        load_stage(path, "c")
    save_file(load_file(path), path, {HEADS_KEY: '"two"'})
    with pytest.raises(UserError, match="not a list of 2 numbers"):
        load_stage(path, "c")


def test_a_narrow_model_counts_as_the_version_whose_blocks_it_has(tmp_path):
    config = replace(CONFIGS["c", "1B"], c_hidden=(8, 8), heads=(1, 1), c_cond=8, c_text=4, c_pooled=4, c_image=4)
    part = random_part("stage_c", config)
    path = save_part(tmp_path / "narrow.safetensors", "stage_c", part.tensors, config)
    assert load_stage(path, "c", version="1B").version == "1B"
    assert inspect_cascade(path).label == "Stable Cascade: stage C (1B)"
    with pytest.raises(UserError, match=r"is stage C \(1B\), but --model_version says 3.6B"):
        load_stage(path, "c", version="3.6B")


def test_a_tiny_model_fits_no_released_version(files):
    assert load_stage(files.stage_c, "c").version == ""


def test_control_net_blocks_come_from_the_user_the_file_or_the_usual_eight(files, tmp_path):
    assert load_control_net(files.controlnet, 4, [1, 2]).config.blocks == (1, 2)
    path = tmp_path / "bare.safetensors"
    save_file(load_file(files.controlnet), path)
    assert load_control_net(path, 4).config.blocks == (0, 3)
    with pytest.raises(UserError, match="--controlnet_blocks"):
        load_control_net(path, 64)
    with pytest.raises(UserError, match="1 block numbers for a ControlNet that has 2 projections"):
        load_control_net(path, 4, [1])
    with pytest.raises(UserError, match="residual blocks 0 to 3, not 9"):
        load_control_net(path, 4, [1, 9])


# Saving ------------------------------------------------------------------------------------------------------------


def test_saving_converts_marks_and_refuses(tmp_path):
    part = random_part("stage_b")
    settings = SaveSettings(precision=torch.bfloat16, metadata={"modelspec.title": "t"})
    path = save_part(tmp_path / "b.safetensors", "stage_b", part.tensors, part.config, settings)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"modelspec.title": "t", HEADS_KEY: "[0, 0, 2, 2]"}
        assert file.get_tensor("clf.1.weight").dtype == torch.bfloat16
    part.tensors["down_blocks.2.2.attention.attn.to_k.bias"][0] = float("nan")
    before = path.read_bytes()
    with pytest.raises(NonFiniteWeights):
        save_part(path, "stage_b", part.tensors, part.config, settings)
    assert path.read_bytes() == before


def test_pickled_saves_load_again(tmp_path):
    part = random_part("stage_c")
    path = save_part(tmp_path / "c.ckpt", "stage_c", part.tensors, part.config)
    same(load_stage(path, "c").tensors, part.tensors)


# Wrong files -------------------------------------------------------------------------------------------------------

WRONG = [
    ("stage_c", "stage_b", "is Stable Cascade: stage B, not stage C", "--stage_b_checkpoint_path takes stage B"),
    ("stage_b", "stage_c", "is Stable Cascade: stage C, not stage B", "--stage_c_checkpoint_path takes stage C"),
    ("stage_a", "effnet", "the EfficientNet encoder, not stage A", "--effnet_checkpoint_path"),
    ("effnet", "previewer", "the previewer, not the EfficientNet encoder", "--previewer_checkpoint_path"),
    ("controlnet", "stage_a", "stage A, not a ControlNet for stage C", "--stage_a_checkpoint_path"),
    ("text", "stage_c", "stage C, not a text encoder with projection", "--stage_c_checkpoint_path"),
]


@pytest.mark.parametrize(("asked", "given", "words", "hint"), WRONG)
def test_another_part_is_named(asked, given, words, hint, files):
    with pytest.raises(UserError, match=words) as caught:
        LOADERS[asked](getattr(files, given))
    assert hint in str(caught.value)
    assert str(getattr(files, given)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stable_diffusion_checkpoint_is_named(tiny_sd1, files):
    with pytest.raises(UserError, match=r"is Stable Diffusion 1.x, not stage C of Stable Cascade"):
        load_stage(tiny_sd1, "c")
    assert inspect(files.stage_b).family == "cascade"
    assert inspect(files.previewer).family == "cascade"


def test_the_encoder_of_an_older_model_is_refused(tmp_path):
    tensors = {**random_part("effnet").tensors, "mapper.1.weight": torch.ones(16), "mapper.1.bias": torch.zeros(16)}
    save_file(tensors, tmp_path / "e.safetensors")
    with pytest.raises(UserError, match="Würstchen v2"):
        load_effnet(tmp_path / "e.safetensors")


@pytest.mark.parametrize(
    ("part", "lost"),
    [
        ("stage_c", "clip_img_mapper.weight"),
        ("stage_c", "down_blocks.0.0.depthwise.weight"),
        ("stage_c", "up_blocks.1.1.mapper.weight"),
        ("stage_b", "pixels_mapper.0.weight"),
        ("stage_b", "embedding.1.weight"),
        ("stage_a", "in_block.1.weight"),
        ("effnet", "backbone.3.0.block.0.0.weight"),
        ("effnet", "mapper.0.weight"),
        ("previewer", "blocks.0.weight"),
        ("controlnet", "backbone.7.0.weight"),
        ("text", "text_model.encoder.layers.0.mlp.fc1.weight"),
    ],
)
def test_damaged_files_give_one_line(part, lost, files, tmp_path):
    tensors = load_file(getattr(files, part))
    del tensors[lost]
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(UserError) as caught:
        LOADERS[part](tmp_path / "damaged.safetensors")
    assert "\n" not in str(caught.value)


def builder(make):
    return lambda config, tensors, **place: build_module(lambda: make(config), tensors, what="part", **place)


BUILDERS = {
    "stage_c": build_stage,
    "stage_b": build_stage,
    "stage_a": builder(StageA),
    "effnet": builder(EffNetEncoder),
    "previewer": builder(Previewer),
    "controlnet": build_control_net,
    "vision": builder(make_image_encoder),
}


@pytest.mark.parametrize("part", BUILDERS)
def test_tensors_of_other_shapes_are_refused_whichever_they_are(part, tmp_path):
    tensors = written(part)
    names = [name for name in tensors if not name.endswith("num_batches_tracked")]
    for number, name in enumerate(names[:: max(1, len(names) // 25)]):
        for shape in ((), (0,) * tensors[name].dim(), (3, 2), (5, 1, 2, 2))[number % 2 :: 2]:
            save_file({**tensors, name: torch.zeros(shape)}, tmp_path / "odd.safetensors")
            with pytest.raises(UserError) as caught:
                loaded = LOADERS[part](tmp_path / "odd.safetensors")
                BUILDERS[part](loaded.config, loaded.tensors, device=torch.device("cpu"), dtype=torch.float32)
            assert "\n" not in str(caught.value)


def test_folders_without_the_part(tmp_path):
    (tmp_path / "vae").mkdir()
    with pytest.raises(UserError, match=r"no stage C of Stable Cascade in this folder \(it holds vae\)"):
        load_stage(tmp_path, "c")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(UserError, match="holds a UNet2DConditionModel"):
        load_stage(tmp_path, "c")


def test_a_folder_whose_settings_contradict_its_weights(tmp_path):
    part = random_part("stage_c")
    folder = save_component(tmp_path / "prior", "stage_c", part.tensors, part.config)
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, "block_out_channels": [64, 64]}))
    with pytest.raises(UserError, match="block_out_channels is"):
        load_stage(folder, "c")


def test_headers_are_judged_without_torch(files):
    import subprocess
    import sys

    code = (
        "import sys; from library.checkpoints.detect_cascade import inspect_cascade;"
        f"print(inspect_cascade({str(files.stage_c)!r}).label, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "Stable Cascade: stage C False"


def test_equal_seeds_give_equal_files(files, tmp_path):
    again, other = make_random_cascade(tmp_path / "a"), make_random_cascade(tmp_path / "b", seed=1)
    for part in LOADERS:
        assert getattr(again, part).read_bytes() == getattr(files, part).read_bytes()
        assert getattr(other, part).read_bytes() != getattr(files, part).read_bytes()
