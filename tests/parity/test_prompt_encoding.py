"""Conditions of prompts equal what diffusers and the text encoder of transformers make of the same tokens."""

import pytest
import torch

from library.inference.prompt_text import PromptEncoder
from library.models.family import WeightPlan
from library.models.options import MemoryOptions, ModelOptions, TextOptions
from library.models.random_models import make_random_sd
from library.models.sd import StableDiffusion
from library.models.specs import stable_diffusion_spec

pytestmark = pytest.mark.compat
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def models(request, tmp_path_factory):
    """Our family and the pipeline of diffusers, from one folder."""
    from diffusers import StableDiffusionPipeline

    kind = request.param
    folder = make_random_sd(tmp_path_factory.mktemp("models") / kind, kind, layout="diffusers_safetensors")
    model = ModelOptions(pretrained_model_name_or_path=str(folder), v2=kind == "sd2")
    family = StableDiffusion.load(
        model, TextOptions(), MemoryOptions(), spec=stable_diffusion_spec(model), weights=WeightPlan()
    )
    return family, StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def ours(family, text, **settings):
    encoder = PromptEncoder(family, **settings)
    tokens = encoder.tokenize(text)
    return encoder.encode([tokens], tokens.chunks, CPU).hidden


@torch.no_grad()
def theirs(pipeline, text):
    return pipeline.encode_prompt(text, CPU, 1, do_classifier_free_guidance=False)[0]


@pytest.mark.parametrize("text", ["", "a photo of a fox", "Ein Bär; l'été: 12 œufs!", "fox " * 75, "a! b!! c"])
def test_plain_prompts(models, text):
    family, pipeline = models
    assert torch.allclose(ours(family, text), theirs(pipeline, text), atol=1e-5)


def test_long_prompts_are_their_pieces_one_after_the_other(models):
    family, pipeline = models
    words = [f"{word} " for word in ("fox", "duck", "bear", "snow", "red", "green", "tall", "small")] * 25
    pieces = ["".join(words[start : start + 75]) for start in range(0, 200, 75)]
    expected = torch.cat([theirs(pipeline, piece) for piece in pieces], dim=1)
    assert torch.allclose(ours(family, "".join(words)), expected, atol=1e-5)


def test_breaks(models):
    family, pipeline = models
    expected = torch.cat([theirs(pipeline, piece) for piece in ("a red fox", "a green duck")], dim=1)
    assert torch.allclose(ours(family, "a red fox BREAK a green duck", breaks=True), expected, atol=1e-5)


def test_weights_are_those_of_the_pieces(models):
    """The formula, written out over the states that diffusers gives; its own tokenizer counts tokens."""
    family, pipeline = models
    pieces = [("a photo of a ", 1.0), ("shining red", 1.3), (" fox in ", 1.0), ("deep", 1.1 * 1.1), (" snow", 1 / 1.1)]
    text = "a photo of a (shining red:1.3) fox in ((deep))[ snow]"
    weights = [1.0]
    for piece, weight in pieces:
        weights += [weight] * len(pipeline.tokenizer(piece, add_special_tokens=False).input_ids)
    weights = torch.tensor(weights + [1.0] * (77 - len(weights)))
    states = theirs(pipeline, "".join(piece for piece, _ in pieces))
    expected = states * weights[None, :, None]
    expected = expected * states.mean() / expected.mean()
    assert torch.allclose(ours(family, text), expected, atol=1e-4, rtol=1e-4)
