"""What the Stable Cascade scripts save means the same elsewhere: in diffusers, merged by hand, read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import stable_cascade_train_c_network
from library.checkpoints.load_cascade import load_control_net
from library.models.cascade.control_net import build_control_net
from library.models.cascade.options import CascadeTextOptions, StageCModelOptions
from library.models.cascade.specs import STAGE_C
from library.models.cascade.stage_c import StageC
from library.models.cascade.unet import StageInputs
from library.models.family import WeightPlan
from library.models.options import MemoryOptions
from networks import lora
from networks.convert_stable_cascade_lora import main as convert
from tests.cascade_models import noise
from tests.cascade_runs import command_maker, train_stage_c
from tests.control_training import FINAL, control_words, train_control_net
from tests.parity.cascade_reference import write_pictures
from tests.parity.cascade_reference_models import control_residuals, make_stage
from tests.parity.cascade_reference_nets import lora_layers
from tests.support import run_tool

pytestmark = pytest.mark.compat

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
BLOCKS = (1, 2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "1_things"
    write_pictures(folder, {"duck/00": "a duck", "bear/01": "a bear"}, (64, 64))
    return folder.parent


def family_of(files, stage_c: Path | None = None) -> StageC:
    paths = {"stage_c": stage_c or files.stage_c, "effnet": files.effnet, "text_model": files.text}
    options = StageCModelOptions(**{f"{name}_checkpoint_path": str(path) for name, path in paths.items()})
    return StageC.load(options, CascadeTextOptions(), MemoryOptions(), spec=STAGE_C, weights=WeightPlan())


def given() -> tuple[torch.Tensor, torch.Tensor, StageInputs]:
    condition = StageInputs(noise(2, 1, 32, seed=1), noise(2, 77, 32, seed=2), noise(2, 1, 16, seed=3))
    return noise(2, 16, 3, 4), torch.tensor([0.3, 0.8]), condition


@torch.no_grad()
def theirs(stage) -> torch.Tensor:
    x, ratio, condition = given()
    return stage(x, ratio, condition.pooled, condition.text, condition.image).sample


@torch.no_grad()
def ours(family: StageC) -> torch.Tensor:
    return family.unet.eval()(*given())


def test_a_saved_stage_c_in_diffusers(control_cascade, photos, tmp_path):
    assert train_stage_c(*command_maker(control_cascade, photos)(tmp_path, "--learning_rate=1e-2")) == 0
    saved = tmp_path / "duck.safetensors"
    found = theirs(make_stage(saved, blocks=BLOCKS))
    torch.testing.assert_close(found, ours(family_of(control_cascade, saved)), **CLOSE)
    assert (found - theirs(make_stage(control_cascade.stage_c, blocks=BLOCKS))).abs().max() > 0.1


def test_a_saved_lora_merged_by_hand(control_cascade, photos, tmp_path):
    """The file for ComfyUI and the one of the original layout, into weights of diffusers and into official ones."""
    network = ("--network_module=networks.lora", "--network_dim=4", "--network_alpha=2", "--network_train_unet_only",
               "--network_args", "module_filters=.attn", "--learning_rate=3e-2", "--save_precision=float")  # fmt: skip
    command = command_maker(control_cascade, photos)(tmp_path, *network)
    assert run_tool(stable_cascade_train_c_network.main, *command) == 0
    saved = tmp_path / "duck.safetensors"
    family = family_of(control_cascade)
    attached, _ = lora.create_network_from_weights(1.0, str(saved), None, family.text_encoder, family.unet)
    attached.apply_to(family.text_encoder, family.unet, True, True)
    attached.load_weights(str(saved))
    expected = ours(family)

    plain = make_stage(control_cascade.stage_c, blocks=BLOCKS)
    bare, tensors = theirs(plain), load_file(saved)
    for name, layer in lora_layers(plain, None, only=".attention.").items():
        up, down = (tensors.pop(f"{name}.lora_{side}.weight") for side in ("up", "down"))
        layer.weight.data += float(tensors.pop(f"{name}.alpha")) / len(down) * up @ down
    assert not tensors
    torch.testing.assert_close(theirs(plain), expected, **CLOSE)
    assert (bare - expected).abs().max() > 0.05

    official = tmp_path / "official.safetensors"
    assert run_tool(convert, saved, official, "--stage_c_checkpoint_path", control_cascade.stage_c) == 0
    tensors, place = load_file(official), 0
    weights = load_file(control_cascade.stage_c)
    # Down path first, then by level and place: the attention of each group, its output before its input.
    groups = [name.removesuffix("in_proj_weight") for name in weights if name.endswith("attn.in_proj_weight")]
    for group in sorted(groups, key=lambda name: (name.startswith("up_"), *map(int, name.split(".")[1:3]))):
        for end in ("out_proj.weight", "in_proj_weight"):
            up, down = (tensors.pop(f"weights.{place}.lora_{side}") for side in ("up", "down"))
            weights[group + end] += up @ down / len(down)
            place += 1
    assert not tensors and place == 12
    from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers

    plain.load_state_dict(convert_stable_cascade_unet_single_file_to_diffusers(weights), strict=True)
    torch.testing.assert_close(theirs(plain), expected, **CLOSE)


def test_a_saved_control_net_read_again(control_cascade, photos, tmp_path):
    assert (
        train_control_net(*control_words(control_cascade, photos, tmp_path, "--controlnet_blocks", "1", "4", "2")) == 0
    )
    with safe_open(tmp_path / FINAL, framework="pt") as file:
        blocks = json.loads(file.metadata()["stable_cascade.controlnet_blocks"])
    guide = (noise(2, 1, 96, 64) > 1).float()
    loaded = load_control_net(tmp_path / FINAL, 6)
    net = build_control_net(loaded.config, loaded.tensors, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        found, expected = net(guide), control_residuals(guide, load_file(tmp_path / FINAL), tuple(blocks))
    assert sorted(found) == [1, 2, 4]
    for block, residual in expected.items():
        torch.testing.assert_close(found[block], residual, **CLOSE)
        assert residual.abs().max() > 1e-3
