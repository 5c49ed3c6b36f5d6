"""LoRA of stage C: layers, names and the order of the original trainer's matrices equal the lists in tests/golden."""

import json
from pathlib import Path

import pytest
import torch

from library.checkpoints import cascade_lora, lora_names
from library.checkpoints.cascade_configs import CONFIGS
from library.checkpoints.lora_layouts import place_of, sort_keys
from library.models.cascade.unet import CascadeUNet
from networks.targets import base_of, unet_targets

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = ("3.6B", "1B")
OTHER_SPELLINGS = {
    "kohya": lambda path: f"lora_unet_{path.replace('.', '_')}",
    "OneTrainer": lambda path: f"lora_prior_unet_{path.replace('.', '_')}",
    "early kohya": lambda path: f"lora_unet_{path.replace('.', '_')}_",
    "diffusers": lambda path: "unet." + diffusers_path(path),
    "diffusers, prior": lambda path: "prior." + diffusers_path(path),
    "flattened diffusers": lambda path: f"lora_unet_{diffusers_path(path).replace('.', '_')}",
}


def golden(name):
    return json.loads((GOLDEN / f"cascade_keys_{name}.json").read_text(encoding="utf-8"))


def diffusers_path(path):
    return path.replace(".attention.attn.out_proj", ".attention.to_out.0").replace(".attention.attn.", ".attention.")


@pytest.fixture(scope="module")
def targets():
    found = {}
    for version in VERSIONS:
        with torch.device("meta"):
            found[version] = unet_targets(CascadeUNet(CONFIGS["c", version]))
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_linear_layer_and_1x1_convolution_has_its_name(targets, version):
    wanted = {(name, path, tuple(shape)) for name, path, shape in golden("lora_kohya")[f"stage_c_{version}"]}
    found = targets[version]
    assert {(one.name, one.path, tuple(one.layer.weight.shape)[:2]) for one in found} == {
        (name, path, shape[:2]) for name, path, shape in wanted
    }
    assert len(found) == len(wanted)
    assert base_of(found) == base_of(found[-1:]) == "stable_cascade"


@pytest.mark.parametrize("spelling", OTHER_SPELLINGS)
def test_every_spelling_of_a_name_leads_back_to_the_layer(targets, spelling):
    spell = OTHER_SPELLINGS[spelling]
    for target in targets["1B"]:
        place = place_of(f"{spell(target.path)}.lora_down.weight")
        assert place is not None and (place.part, place.path) == (lora_names.UNET, target.path), spell(target.path)


def test_the_family_is_told_by_any_layer(targets):
    for target in targets["1B"]:
        shapes = {f"{target.name}.lora_down.weight": (4, 9), f"{target.name}.lora_up.weight": (9, 4)}
        listing = sort_keys(shapes, {})
        assert listing.base == "stable_cascade"
        assert listing.places == {target.name: ("unet", target.path)}


def test_prefixes_of_the_text_encoder():
    name = "text_model.encoder.layers.31.self_attn.q_proj"
    for prefix in ("lora_te_", "lora_prior_te_"):
        place = place_of(prefix + name.replace(".", "_") + ".lora_up.weight")
        assert place is not None and (place.part, place.path) == (lora_names.TEXT, name)
    key = f"lora_te_{name.replace('.', '_')}"
    shapes = {f"{key}.lora_down.weight": (4, 1280), f"{key}.lora_up.weight": (1280, 4)}
    assert sort_keys(shapes, {}).base == "stable_cascade"  # SD2's encoder has fewer layers, SDXL's has another prefix


@pytest.mark.parametrize("version", VERSIONS)
def test_the_original_trainer_s_order(version):
    walked = cascade_lora.walk(CONFIGS["c", version], cascade_lora.ATTENTION)
    rows = [[entry.module, entry.parameter, [entry.shape[0], 4], [4, entry.shape[1]]] for entry in walked]
    assert rows == golden("lora_official")[f"stage_c_{version}"]
    # Other filters walk through all weights, in the order in which the model registers its modules.
    everything = [tuple(entry) for entry in cascade_lora.walk(CONFIGS["c", version], ("",))]
    weights = [
        (*name.rsplit(".", 1), tuple(shape))
        for name, shape in golden(f"stage_c_{version}")["tensors"].items()
        if name.endswith("weight")
    ]
    assert sorted(everything) == sorted(weights)

    def outside(rows):
        return [row for row in rows if ".attention" not in row[0]]

    assert outside(everything) == outside(weights)


@pytest.mark.parametrize("version", VERSIONS)
def test_original_files_of_the_released_models_explain_themselves(version):
    rows = golden("lora_official")[f"stage_c_{version}"]
    shapes = {f"weights.{place}.lora_up": tuple(up) for place, (_, _, up, _) in enumerate(rows)}
    shapes |= {f"weights.{place}.lora_down": tuple(down) for place, (_, _, _, down) in enumerate(rows)}
    entries = cascade_lora.entries_of(shapes, {}, "x")
    view = cascade_lora.official_view(shapes, entries, "x")
    listing = sort_keys(view.shapes, {})
    assert listing.base == "stable_cascade" and not listing.unknown
    named = {name: path for name, path, _ in golden("lora_kohya")[f"stage_c_{version}"]}
    assert {name: path for name, (_, path) in listing.places.items()} == {
        name: path for name, path in named.items() if "_attn_" in name
    }
