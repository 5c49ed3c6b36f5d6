"""Whatever program wrote a LoRA file, reading it gives the same modules with the same strength."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from library.checkpoints.lora_file import inspect_lora, read_lora
from library.checkpoints.lora_layouts import place_of
from library.errors import UserError
from tests.lora_files import delta, peft, respelled, save, small_lora, some

TO_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
MID_PATH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PEFT_SIDES = {"down": "lora_A.weight", "up": "lora_B.weight"}
OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@pytest.fixture(scope="module")
def sd15():
    """Some modules of every sort, with alpha 4 at rank 4, so that files without alpha mean the same."""
    return some(
        small_lora("sd15_conv", alpha=4.0), "mid_block", "layers_0_", "layers_11_", "down_blocks_3", "up_blocks_1"
    )


@pytest.fixture(scope="module")
def sdxl():
    return some(
        small_lora("sdxl_conv", alpha=4.0), "middle_block", "layers_0_", "input_blocks_5", "output_blocks_2", "_op."
    )


def dotted_kohya(component, path, suffix):
    return f"{component}.{path}." + (suffix if suffix == "alpha" else f"lora_{suffix}.weight")


def named_adapter(component, path, suffix):
    return peft(component, path, suffix).replace(".weight", ".default.weight")


def wrapped(component, path, suffix):
    return f"{component}.base_model.model.{path}.{PEFT_SIDES.get(suffix, suffix)}"


def wrapped_first(component, path, suffix):
    return f"base_model.model.{wrapped(component, path, suffix)}"


def bare(component, path, suffix):
    return f"{path}.{PEFT_SIDES.get(suffix, suffix)}"


def flattened_text(component, path, suffix):
    return peft(component, path, suffix).replace("text_model.", "")


def short_to_out(component, path, suffix):
    return peft(component, path, suffix).replace("to_out.0.", "to_out.")


def diffusers(component, path, suffix):
    return f"{component}.{path}.{'lora' if component == 'unet' else 'lora_linear_layer'}.{suffix}.weight"


def attention_processors(component, path, suffix):
    """Diffusers before PEFT: layers hung on the processors of attention, in text encoders too."""
    parent, _, leaf = path.rpartition(".")
    if "attn" not in path:
        return diffusers(component, path, suffix)
    if component != "unet":
        return f"{component}.{parent}.{OLD_TEXT[leaf]}_lora.{suffix}.weight"
    if leaf == "0":
        parent, leaf = parent.rpartition(".")[0], "to_out"
    return f"{component}.{parent}.processor.{leaf}_lora.{suffix}.weight"


def dollars(component, path, suffix):
    return f"{component}.{path}".replace(".", "$$") + f".{PEFT_SIDES.get(suffix, suffix)}"


def new_transformers(component, path, suffix):
    prefix = "lora_unet" if component == "unet" else "lora_te"
    tail = suffix if suffix == "alpha" else f"lora_{suffix}.weight"
    return f"{prefix}_{path.removeprefix('text_model.').replace('.', '_')}.{tail}"


def lycoris_alone(component, path, suffix):
    tail = suffix if suffix == "alpha" else f"lora_{suffix}.weight"
    return f"lycoris_{path.replace('.', '_')}.{tail}"


SPELLINGS = {
    "dotted kohya": (dotted_kohya, "diffusers"),
    "peft": (peft, "peft"),
    "named adapter": (named_adapter, "peft"),
    "wrapped": (wrapped, "peft"),
    "wrapped first": (wrapped_first, "peft"),
    "bare": (bare, "peft"),
    "text encoder without text_model": (flattened_text, "peft"),
    "to_out without 0": (short_to_out, "peft"),
    "diffusers": (diffusers, "diffusers"),
    "attention processors": (attention_processors, "diffusers"),
    "dollars": (dollars, "ai-toolkit"),
    "flat from new transformers": (new_transformers, "kohya"),
    "lycoris alone": (lycoris_alone, "lycoris"),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_every_spelling_means_the_same(tmp_path, sd15, case):
    spell, layout = SPELLINGS[case]
    with_alpha = not case.startswith(("diffusers", "attention"))
    path = save(tmp_path / "lora.safetensors", respelled(sd15, spell, alpha=with_alpha))
    expected = read_lora(save(tmp_path / "kohya.safetensors", sd15))
    found = read_lora(path)
    assert (found.layout, found.base, found.unknown) == (layout, "sd1", ())
    assert found.modules.keys() == expected.modules.keys()
    for name, weights in found.modules.items():
        assert torch.equal(delta(weights), delta(expected.modules[name])), name
    info = inspect_lora(path)
    assert (info.layout, info.base, info.modules, info.ranks) == (layout, "sd1", len(found.modules), {4})
    assert set(info.names) == set(found.modules) and info.has_unet and info.has_text_encoder


@pytest.mark.parametrize("case", ["peft", "wrapped", "diffusers", "flattened", "flat diffusers names"])
def test_sdxl_files_get_the_original_names(tmp_path, sdxl, case):
    def flat(component, path, suffix):
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[component]
        return f"{prefix}_{path.replace('.', '_')}." + (suffix if suffix == "alpha" else f"lora_{suffix}.weight")

    spell = {"peft": peft, "wrapped": wrapped, "diffusers": diffusers, "flattened": flattened_text}.get(case, flat)
    expected = read_lora(save(tmp_path / "kohya.safetensors", sdxl))
    assert set(expected.tensors()) == set(sdxl)
    found = read_lora(save(tmp_path / "lora.safetensors", respelled(sdxl, spell, alpha=case != "diffusers")))
    assert (found.base, found.unknown) == ("sdxl", ())
    assert found.modules.keys() == expected.modules.keys()
    assert all(torch.equal(delta(weights), delta(expected.modules[name])) for name, weights in found.modules.items())


def test_sd15_with_the_names_of_the_original_code(tmp_path):
    tensors = {
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_down.weight": torch.ones(2, 768),
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.lora_up.weight": torch.ones(10, 2),
    }
    found = read_lora(save(tmp_path / "lora.safetensors", tensors))
    assert found.base == "sd1"
    assert list(found.modules) == ["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"]


# Strength ----------------------------------------------------------------------------------------------------------


def pair(prefix=f"unet.{MID_PATH}", rank=4):
    return {f"{prefix}.lora_A.weight": torch.ones(rank, 8), f"{prefix}.lora_B.weight": torch.ones(6, rank)}


def test_without_alpha_the_strength_is_one(tmp_path):
    weights = read_lora(save(tmp_path / "lora.safetensors", pair())).modules[TO_Q]
    assert (weights.rank, weights.alpha, weights.scale) == (4, 4.0, 1.0)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 2}, 0.5),
        ({"r": 4, "lora_alpha": 2, "use_rslora": True}, 1.0),
        ({"r": 8, "lora_alpha": 8, "alpha_pattern": {MID_PATH: 1}}, 0.25),
        ({"r": 8, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 1}}, 0.25),
        ({"r": 8, "lora_alpha": 8, "alpha_pattern": {"^attn1.to_q": 1}}, 2.0),
        ({"r": 8, "lora_alpha": 8, "alpha_pattern": {f"^{MID_PATH}$".replace(".", r"\."): 1}}, 0.25),
    ],
)
def test_alpha_from_the_configuration(tmp_path, config, scale):
    folder = tmp_path / "adapter"
    save(folder / "adapter_model.safetensors", pair(f"base_model.model.{MID_PATH}"))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert read_lora(folder).modules[TO_Q].scale == scale
    header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    assert read_lora(save(tmp_path / "one.safetensors", pair(), header)).modules[TO_Q].scale == scale


def test_each_component_has_its_own_alpha(tmp_path):
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    settings = {"unet.lora_alpha": 8, "text_encoder.lora_alpha": 2, "text_encoder.alpha_pattern": {}}
    header = {"lora_adapter_metadata": json.dumps(settings)}
    found = read_lora(save(tmp_path / "lora.safetensors", {**pair(), **pair(text)}, header))
    assert found.modules.pop(TO_Q).scale == 2.0
    assert [weights.scale for weights in found.modules.values()] == [0.5]


def test_the_configuration_of_another_file_does_not_matter(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 100}')
    tensors = {f"{TO_Q}.lora_down.weight": torch.ones(4, 8), f"{TO_Q}.lora_up.weight": torch.ones(6, 4)}
    assert read_lora(save(tmp_path / "kohya.safetensors", tensors)).modules[TO_Q].scale == 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"lora_alpha": "nan"}', "lora_alpha is 'nan', which is no usable number"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 2}}', "is a regular expression"),
        ("[1]", "not a table of settings"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_configurations(tmp_path, config, message):
    header = {"lora_adapter_metadata": config}
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        read_lora(save(tmp_path / "lora.safetensors", pair(), header))


@pytest.mark.parametrize(
    "key", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"]
)
def test_magnitudes_of_peft_take_the_shape_of_lycoris(tmp_path, key):
    tensors = {**pair(), f"unet.{MID_PATH}.{key}": torch.arange(6.0)}
    conv = "unet.mid_block.resnets.0.conv1"
    tensors |= {
        f"{conv}.lora_A.weight": torch.ones(4, 8, 3, 3),
        f"{conv}.lora_B.weight": torch.ones(6, 4, 1, 1),
        f"{conv}.{key}": torch.ones(1, 6, 1, 1),
    }
    modules = read_lora(save(tmp_path / "lora.safetensors", tensors)).modules
    assert torch.equal(modules[TO_Q].tensors["dora_scale"], torch.arange(6.0)[:, None])
    assert modules["lora_unet_mid_block_resnets_0_conv1"].tensors["dora_scale"].shape == (6, 1, 1, 1)


# Other programs and other kinds --------------------------------------------------------------------------------------


def test_onetrainer_brings_embeddings_and_magnitudes_of_inputs(tmp_path, sd15):
    tensors = {**sd15, "bundle_emb.cat.clip_l": torch.ones(2, 24), f"{TO_Q}.dora_scale": torch.ones(1, 40)}
    found = read_lora(save(tmp_path / "lora.safetensors", tensors))
    assert (found.layout, list(found.bundled), found.unknown) == ("onetrainer", ["bundle_emb.cat.clip_l"], ())
    assert found.modules[TO_Q].tensors["dora_scale"].shape == (1, 40)
    assert "bundle_emb.cat.clip_l" not in found.tensors()


def test_what_nobody_understands_is_listed(tmp_path, sd15):
    strange = {
        "step": torch.ones(1),
        "unet.conv_in.weight": torch.ones(1),
        f"{TO_Q}.lora_sideways.weight": torch.ones(1),
    }
    lonely = {"lora_unet_conv_in.alpha": torch.tensor(1.0)}
    path = save(tmp_path / "lora.safetensors", {**sd15, **strange, **lonely})
    assert set(read_lora(path).unknown) == set(inspect_lora(path).unknown) == {*strange, *lonely}


def test_modules_of_unknown_models_keep_their_names(tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 8), f"{name}.lora_up.weight": torch.ones(6, 4)}
    found = read_lora(save(tmp_path / "lora.safetensors", tensors))
    assert (found.base, list(found.modules)) == ("flux", [name])


def lycoris_suffixes():
    """What LyCORIS' module classes list as their tensors, read from its source, which takes long to import."""
    spec = importlib.util.find_spec("lycoris")
    files = sorted(Path(spec.origin).parent.glob("modules/*.py")) if spec else []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "weight_list":
                yield from ((path.stem, suffix) for suffix in ast.literal_eval(node.value))


@pytest.mark.parametrize(("module", "suffix"), lycoris_suffixes())
def test_every_tensor_that_lycoris_writes_is_known(module, suffix):
    place = place_of(f"{TO_Q}.{suffix}")
    assert place is not None and (place.path, place.suffix) == (MID_PATH, suffix)


KINDS = {
    "loha": {"hada_w1_a": (6, 3), "hada_w1_b": (3, 8), "hada_w2_a": (6, 3), "hada_w2_b": (3, 8), "alpha": ()},
    "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 4), "alpha": ()},
    "glora": {"a1.weight": (8, 2), "a2.weight": (2, 8), "b1.weight": (6, 2), "b2.weight": (2, 8), "alpha": ()},
    "diag-oft": {"oft_blocks": (2, 3, 3), "alpha": ()},
    "boft": {"oft_blocks": (2, 2, 3, 3), "alpha": ()},
    "full": {"diff": (6, 8), "diff_b": (6,)},
    "ia3": {"weight": (1, 8), "on_input": ()},
}
RANKS = {"loha": 3, "lokr": 2, "glora": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_and_ranks(tmp_path, kind):
    tensors = {f"{TO_Q}.{suffix}": torch.ones(shape) for suffix, shape in KINDS[kind].items()}
    path = save(tmp_path / "lora.safetensors", tensors)
    weights = read_lora(path).modules[TO_Q]
    rank = RANKS.get(kind, 0)
    assert (weights.kind, weights.rank, weights.scale) == (kind, rank, 1 / rank if rank else 1.0)
    assert inspect_lora(path).kinds == {kind: 1} and inspect_lora(path).ranks == {rank}
    assert set(read_lora(path).tensors()) == set(tensors)


def test_networks_oft_has_a_prefix_of_its_own(tmp_path):
    tensors = {f"oft{TO_Q[4:]}.oft_blocks": torch.zeros(4, 3, 3), f"oft{TO_Q[4:]}.alpha": torch.tensor(0.0)}
    found = read_lora(save(tmp_path / "oft.safetensors", tensors))
    assert found.modules[TO_Q].kind == "oft"
    assert set(found.tensors()) == set(tensors)


# Which base ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "base"), [("sd15", "sd1"), ("sd21", "sd2"), ("sdxl", "sdxl")])
@pytest.mark.parametrize("parts", [("attn2_to_k",), ("proj_in",), ("lora_te",), ("",)])
def test_the_base_is_told_by_sizes_and_names(tmp_path, version, base, parts):
    path = save(tmp_path / "lora.safetensors", some(small_lora(version), *parts))
    expected = None if (version, parts) == ("sd15", ("lora_te",)) else base
    assert inspect_lora(path).base == expected


@pytest.mark.parametrize(
    ("metadata", "base"),
    [
        ({"ss_base_model_version": "sd_v1"}, "sd1"),
        ({"ss_base_model_version": "sd_v2_v"}, "sd2"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        ({"ss_v2": "True"}, "sd2"),
        ({"ss_v2": "False"}, "sd1"),
        ({}, None),
    ],
)
def test_the_base_is_told_by_metadata_where_sizes_do_not(tmp_path, metadata, base):
    assert inspect_lora(save(tmp_path / "lora.safetensors", pair(), metadata)).base == base


def test_sizes_count_more_than_metadata(tmp_path):
    path = save(tmp_path / "lora.safetensors", some(small_lora("sd15"), "attn2"), {"ss_base_model_version": "sd_v2"})
    assert inspect_lora(path).base == "sd1"
