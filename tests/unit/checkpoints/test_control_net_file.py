"""ControlNet files of every layout are read as the same model; what is no ControlNet for this family is refused."""

import json

import pytest
import torch
from control_nets import control_net, original_names, write_control_net
from safetensors.torch import save_file

from library.checkpoints.control_net_file import control_net_to_memory, read_control_net
from library.errors import UserError
from library.models.control_net import load_control_net

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def nets(one_torch_thread):
    return {family: control_net(family) for family in ("sd1", "sd2")}


@pytest.mark.parametrize("layout", ["folder", "diffusers", "original", "bare", "ckpt"])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_every_layout_gives_the_same_tensors_and_structure(nets, tmp_path, family, layout):
    net = nets[family]
    found = read_control_net(str(write_control_net(net, tmp_path / f"net.{layout}", layout)), family)
    wanted = net.state_dict()
    assert set(found.tensors) == set(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.tensors.items())
    for name in ("block_out_channels", "attention_head_dim", "conditioning_embedding_out_channels", "down_block_types"):
        mine, theirs = found.config[name], net.config[name]
        assert mine == theirs or list(mine) == list(theirs), name


def test_names_of_the_original_layout_are_those_that_diffusers_reads(nets):
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    # Their table ends at the four stages that published files have, as these have.
    names = original_names(nets["sd1"])
    theirs = convert_controlnet_checkpoint(dict(names), {"layers_per_block": 2})
    mine = control_net_to_memory(names)
    assert {mine[name]: tensor.data_ptr() for name, tensor in names.items()} == {
        name: tensor.data_ptr() for name, tensor in theirs.items() if tensor is not None
    }


def test_a_whole_model_may_lie_beside_its_control_net(nets, tmp_path):
    tensors = {f"control_model.{name}": tensor for name, tensor in original_names(nets["sd1"]).items()}
    save_file({**tensors, "model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "whole.safetensors")
    found = read_control_net(str(tmp_path / "whole.safetensors"), "sd1")
    assert set(found.tensors) == set(nets["sd1"].state_dict())


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lllite_unet_input_blocks_4_1.depth1"], "LLLite works with SDXL"),
        (["lora_controlnet", "input_blocks.0.0.down"], "Control-LoRA"),
        (["adapter.body.0.block1.weight"], "T2I-Adapter"),
        (["difference", "control_model.time_embed.0.weight"], "only the difference"),
        (["control_model.label_emb.0.0.weight", "control_model.input_hint_block.0.weight"], "SDXL"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "no ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight"], "0 stages"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, names, words):
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(1, 1) for name in names}, path)
    with pytest.raises(UserError, match=words) as caught:
        read_control_net(str(path), "sd1")
    assert str(caught.value).startswith(f"--control_net_models {path}")
    assert "\n" not in str(caught.value)


def test_a_net_for_the_other_family_is_refused(nets, tmp_path):
    path = write_control_net(nets["sd2"], tmp_path / "net.safetensors", "original")
    with pytest.raises(UserError, match=r"for Stable Diffusion 2\.x, and the model is Stable Diffusion 1\.x"):
        read_control_net(str(path), "sd1")


def test_a_folder_whose_configuration_contradicts_its_weights_is_refused(nets, tmp_path):
    folder = write_control_net(nets["sd1"], tmp_path / "net", "folder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "block_out_channels": [64, 32, 64, 640]}))
    with pytest.raises(UserError, match="says block_out_channels"):
        read_control_net(str(folder), "sd1")


def test_folders_of_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(UserError, match="is a folder of UNet2DConditionModel"):
        read_control_net(str(tmp_path), "sd1")


class Unet:
    def __init__(self, net, **changes):
        self.config = {**net.config, **changes}


def load(path, unet):
    return load_control_net(str(path), "sd1", unet, device=torch.device("cpu"), dtype=torch.float32)


@torch.no_grad()
def test_the_loaded_net_computes_what_diffusers_does(nets, tmp_path):
    net = nets["sd1"]
    loaded = load(write_control_net(net, tmp_path / "net.safetensors", "original"), Unet(net))
    generator = torch.Generator().manual_seed(2)
    noisy, text, guide = (
        torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 7, 64), (2, 3, 64, 64))
    )
    mine, theirs = (model(noisy, torch.tensor(500), text, guide, return_dict=False) for model in (loaded, net))
    assert (
        max(abs(one - two).max() for one, two in zip((*mine[0], mine[1]), (*theirs[0], theirs[1]), strict=True)) < 1e-4
    )
    assert abs(theirs[1]).max() > 0.1
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_net_that_does_not_fit_the_model_is_refused(nets, tmp_path):
    path = write_control_net(nets["sd1"], tmp_path / "net.safetensors", "diffusers")
    with pytest.raises(UserError, match="text width 64, and the U-Net has 768"):
        load(path, Unet(nets["sd1"], cross_attention_dim=768))


def test_a_damaged_net_is_refused(nets, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in nets["sd1"].state_dict().items()}
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match="NaN"):
        load(tmp_path / "nan.safetensors", Unet(nets["sd1"]))
    del tensors["conv_in.bias"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(UserError, match="1 tensors are missing"):
        load(tmp_path / "short.safetensors", Unet(nets["sd1"]))
