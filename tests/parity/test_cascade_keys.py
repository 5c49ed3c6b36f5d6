"""Names and shapes of every full-size Stable Cascade part, in all layouts and both directions, against stored lists."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from library.checkpoints import key_maps_cascade as keys
from library.checkpoints.cascade_configs import CONFIGS, config_from_shapes, diffusers_config, version_of
from library.checkpoints.cascade_parts import (
    EffNetConfig,
    PreviewerConfig,
    StageAConfig,
    control_net_config,
    default_control_blocks,
    effnet_config,
    previewer_config,
    stage_a_config,
)
from library.checkpoints.detect import classify
from library.checkpoints.detect_cascade import cascade_parts
from library.checkpoints.key_maps import split_rows
from library.checkpoints.save_cascade import file_tensors
from library.checkpoints.single_file import shapes_of
from library.models.cascade.control_net import CascadeControlNet
from library.models.cascade.effnet import EffNetEncoder
from library.models.cascade.previewer import Previewer
from library.models.cascade.stage_a import StageA
from library.models.cascade.unet import CascadeUNet

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
STAGES = {
    "stage_c_3.6B": ("c", "3.6B"),
    "stage_c_1B": ("c", "1B"),
    "stage_b_3B": ("b", "3B"),
    "stage_b_700M": ("b", "700M"),
}


def golden(name):
    return json.loads((GOLDEN / f"cascade_keys_{name}.json").read_text())


def listed(name):
    return {key: tuple(shape) for key, shape in golden(name)["tensors"].items()}


def on_meta(make, *args):
    with torch.device("meta"):
        return make(*args)


def to_memory(shapes, table):
    """Shapes under their memory names, as the loader maps tensors."""
    found = {}
    for name, targets in table.items():
        tensor = torch.empty(shapes[name], device="meta")
        found.update(zip(targets, (tensor,) if len(targets) == 1 else split_rows(name, tensor), strict=True))
    return shapes_of(found)


@pytest.fixture(scope="module", params=STAGES)
def stage(request):
    return request.param, CONFIGS[STAGES[request.param]], on_meta(CascadeUNet, CONFIGS[STAGES[request.param]])


def test_stages_have_the_listed_tensors_in_every_layout_and_direction(stage):
    name, _, network = stage
    memory = network.state_dict()
    part = name[:7]
    for layout, suffix in (("official", ""), ("diffusers", "_diffusers")):
        expected = listed(name + suffix)
        assert shapes_of(file_tensors(part, memory, layout)) == expected
        assert to_memory(expected, keys.stage_to_memory(expected)) == shapes_of(memory)
        assert keys.layout_of(expected) == layout
    assert keys.layout_of(memory) == "split"
    assert to_memory(shapes_of(memory), keys.stage_to_memory(memory)) == shapes_of(memory)
    assert sum(p.numel() for p in network.parameters()) == golden(name)["params"]


def test_sizes_of_stages_follow_from_shapes(stage):
    name, config, network = stage
    assert config_from_shapes(shapes_of(network.state_dict())) == config
    assert version_of(config) == STAGES[name][1]
    assert config.residual_blocks == len(network.residual_blocks())


def test_stages_are_detected_bare_and_inside_a_comfyui_checkpoint(stage):
    name, _, _ = stage
    for suffix, layout in (("", "official"), ("_diffusers", "diffusers")):
        for prefix in ("", keys.UNET_PREFIX):
            shapes = {prefix + key: shape for key, shape in listed(name + suffix).items()}
            (found,) = cascade_parts(shapes).values()
            assert (found.part, found.version, found.layout, found.prefix) == (name[:7], name[8:], layout, prefix)
            assert classify(Path("m"), shapes, {}).family == "cascade"


def test_diffusers_builds_the_same_tensors_from_our_configuration(stage):
    from diffusers import StableCascadeUNet

    name, config, _ = stage
    assert shapes_of(on_meta(lambda: StableCascadeUNet(**diffusers_config(config))).state_dict()) == listed(
        name + "_diffusers"
    )


@pytest.mark.parametrize("version", ["3.6B", "1B"])
def test_layers_that_loras_adapt_have_the_listed_names(version):
    network = on_meta(CascadeUNet, CONFIGS["c", version])
    found = {
        name: tuple(layer.weight.shape[:2])
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
    }
    rows = golden("lora_kohya")[f"stage_c_{version}"]
    assert found == {path: tuple(shape[:2]) for _, path, shape in rows}
    assert [name for name, _, _ in rows] == ["lora_unet_" + path.replace(".", "_") for _, path, _ in rows]


SMALL = {
    "stage_a": (StageA, StageAConfig(), stage_a_config),
    "effnet_encoder": (EffNetEncoder, EffNetConfig(), effnet_config),
    "previewer": (Previewer, PreviewerConfig(), previewer_config),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_parts_have_the_listed_tensors(name):
    make, config, derive = SMALL[name]
    module = on_meta(make, config)
    expected = listed(name)
    assert shapes_of(module.state_dict()) == expected
    assert derive(expected) == config
    assert sum(p.numel() for p in module.parameters()) == golden(name)["params"]
    (part,) = cascade_parts(expected)
    assert part == name.removesuffix("_encoder")


def test_stage_a_in_diffusers_names():
    official, other = listed("stage_a"), listed("stage_a_diffusers")
    tensors = {name: torch.empty(shape, device="meta") for name, shape in official.items()}
    assert shapes_of(file_tensors("stage_a", tensors, "diffusers")) == other
    assert to_memory(other, keys.stage_a_to_memory(other)) == official


@pytest.mark.parametrize(
    ("name", "mode", "c_in", "blocks"),
    [
        ("canny", "effnet", 1, (0, 4, 8, 12, 51, 55, 59, 63)),
        ("inpainting", "effnet", 4, (0, 4, 8, 12, 51, 55, 59, 63)),
        ("identity", "simple", 512, tuple(range(64))),
        ("super_resolution", "large", 16, (0, 4, 8, 12, 51, 55, 59, 63)),
    ],
)
def test_control_nets_have_the_listed_tensors(name, mode, c_in, blocks):
    expected = listed(f"controlnet_{name}")
    config = control_net_config(expected, {}, 64)
    assert (config.mode, config.c_in, config.c_out, config.blocks) == (mode, c_in, 2048, blocks)
    module = on_meta(CascadeControlNet, config)
    assert shapes_of(module.state_dict()) == expected
    assert sum(p.numel() for p in module.parameters()) == golden(f"controlnet_{name}")["params"]
    assert list(cascade_parts(expected)) == ["controlnet"]


def test_usual_control_blocks_lie_alike_in_the_smaller_stage():
    assert default_control_blocks(32) == (0, 2, 4, 6, 25, 27, 29, 31)
