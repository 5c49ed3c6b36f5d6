"""Run by test_embedding_loads.py with either set of libraries: uses embedding files as programs on diffusers do."""

import json
import sys

import torch
from diffusers import StableDiffusionPipeline


def encoded(folder, path, word, prompt):
    """Return what the text encoder makes of a prompt with the word of a file; None: the file names it."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, vae=None)
    pipeline.load_textual_inversion(path, **({"token": word} if word else {}))
    text = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
    ids = pipeline.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
    return {"ids": ids[0, :12].tolist(), "hidden": pipeline.text_encoder(ids)[0][0].flatten().tolist()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        print(json.dumps({case: encoded(sys.argv[1], *item) for case, item in json.loads(sys.argv[2]).items()}))
