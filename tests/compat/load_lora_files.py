"""Run by test_lora_loads.py with either set of libraries: loads LoRA files as any program built on diffusers would."""

import json
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file


def weights_of(pipeline):
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return {
        f"{part}.{name.removeprefix('text_model.').removesuffix('.weight')}": tensor
        for part, model in parts.items()
        for name, tensor in model.state_dict().items()
    }


def open_pipeline(folder):
    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, vae=None)


def largest_error(found, expected):
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items())


def fused(folder, path, expected):
    """Largest deviation of the fused weights from what they should be, and how many weights changed."""
    pipeline = open_pipeline(folder)
    before = {name: tensor.clone() for name, tensor in weights_of(pipeline).items()}
    pipeline.load_lora_weights(str(Path(path).parent), weight_name=Path(path).name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = weights_of(pipeline)
    changed = sum(not torch.equal(after[name], tensor) for name, tensor in before.items())
    return {"error": largest_error(after, expected), "changed": changed, "expected": len(expected)}


def in_peft(folder, path, expected):
    """The same for PEFT itself, which is given the U-Net's part of a file."""
    with safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    config = {key.removeprefix("unet."): value for key, value in settings.items() if key.startswith("unet.")}
    model = get_peft_model(open_pipeline(folder).unet, LoraConfig(**config))
    tensors = load_file(path)
    state = {f"base_model.model.{key[5:]}": tensor for key, tensor in tensors.items() if key.startswith("unet.")}
    result = set_peft_model_state_dict(model, state)
    missing = [key for key in result.missing_keys if "lora_" in key]
    merged = model.merge_and_unload().state_dict()
    found = {f"unet.{name.removesuffix('.weight')}": tensor for name, tensor in merged.items()}
    error = largest_error(found, {name: tensor for name, tensor in expected.items() if name.startswith("unet.")})
    return {"error": error, "missing": missing, "unexpected": list(result.unexpected_keys)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, files = sys.argv[1], json.loads(sys.argv[2])
    with torch.no_grad():
        found = {case: fused(folder, path, load_file(expected)) for case, (path, expected) in files.items()}
        found["in peft"] = in_peft(folder, files["peft"][0], load_file(files["peft"][1]))
    print(json.dumps(found))
