"""Run by test_lora_keys.py with either set of libraries: names and shapes of LoRA networks on full-size models."""

import json
import sys
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from library.checkpoints.single_file import text_part, unet_part
from library.models.assemble import from_config
from library.models.clip_text import make_text_encoder
from networks import lora, lora_fa

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
MODELS = {"sd15": "sd1", "sd21": "sd2"}


def models_of(version):
    """U-Net and text encoder of a real checkpoint, on the meta device."""
    table = json.loads((GOLDEN / f"ckpt_keys_{version}.json").read_text())
    with torch.device("meta"):
        tensors = {name: torch.empty(row["shape"]) for name, row in table.items()}
        used = set()
        unet = from_config(UNet2DConditionModel, unet_part(tensors, MODELS[version], used)[1])
        text = make_text_encoder(text_part(tensors, MODELS[version], used)[1])
    return text, unet


def names_of(module, models, **arguments):
    network = module.create_network(1.0, 4, 1.0, None, *models, **arguments)
    network.apply_to(*models, True, True)
    names = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    network.set_enabled(False)
    return names


if __name__ == "__main__":
    sd15, sd21 = (models_of(version) for version in MODELS)
    found = {
        "sd15": names_of(lora, sd15),
        "sd15_conv": names_of(lora, sd15, conv_dim="4"),
        "sd21": names_of(lora, sd21),
        "sd15 lora_fa": names_of(lora_fa, sd15),
    }
    Path(sys.argv[1]).write_text(json.dumps(found))
