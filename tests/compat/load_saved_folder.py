"""Run by test_saved_folders.py with either set of libraries: opens saved folders as any other program would."""

import json
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer


def report(folder, single):
    text, info = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True, local_files_only=True)
    weights = folder / "text_encoder" / "model.safetensors"
    stored = load_file(weights) if weights.exists() else torch.load(weights.with_name("pytorch_model.bin"))
    loaded = {name.removeprefix("text_model."): tensor for name, tensor in text.state_dict().items()}
    same = [torch.equal(loaded[name.removeprefix("text_model.")], tensor) for name, tensor in stored.items()]
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    ids = tokenizer("a photo of sks dog!", padding="max_length", max_length=12).input_ids
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    found = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "equal": all(same) and len(same) == len(loaded),
        "ids": ids,
        "vocabulary": len(tokenizer),
        "prediction_type": pipeline.scheduler.config.prediction_type,
        "rescaled": bool(pipeline.scheduler.config.rescale_betas_zero_snr),
        "picture": picture(pipeline),
    }
    from_file = StableDiffusionPipeline.from_single_file(single, config=str(folder), local_files_only=True)
    from_file.set_progress_bar_config(disable=True)
    return {**found, "picture of the single file": picture(from_file)}


def picture(pipeline):
    generator = torch.Generator().manual_seed(3)
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np", "generator": generator}
    image = pipeline("a dog", **options).images[0]
    return [float(image.mean()), float(image.std())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    models = json.loads(sys.argv[1])
    print(json.dumps({case: report(Path(folder), single) for case, (folder, single) in models.items()}))
