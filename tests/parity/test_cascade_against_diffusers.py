"""Stages B, C and A compute what diffusers' classes compute, and the text encoder what transformers' does."""

import json
from pathlib import Path

import pytest
import torch

from library.checkpoints.cascade_configs import diffusers_config
from library.checkpoints.cascade_parts import STAGE_A_SCALE, EffNetConfig, MBStage, StageAConfig
from library.checkpoints.save_cascade import file_tensors
from library.contracts import END_ID
from library.models.cascade.effnet import make_features
from library.models.cascade.stage_a import StageA
from library.models.cascade.text import build_projected_text_encoder, encode_chunks
from library.models.cascade.unet import StageInputs
from library.models.cascade.vision import embed_images, make_image_encoder
from library.models.random_cascade import random_part
from tests.cascade_models import SMALL_B, SMALL_C, inputs_b, inputs_c, noise, randomize, small_stage

pytestmark = pytest.mark.compat

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
PHOTO = next(iter(sorted((GOLDEN.parent.parent / "examples" / "photos" / "duck").glob("*.jpg"))))
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def oracle(config, network):
    from diffusers import StableCascadeUNet

    reference = StableCascadeUNet(**diffusers_config(config)).eval()
    part = f"stage_{config.stage}"
    reference.load_state_dict(file_tensors(part, network.state_dict(), "diffusers"), strict=True)
    return reference


def ask(reference, x, ratio, condition):
    return reference(
        x,
        ratio,
        clip_text_pooled=condition.pooled,
        clip_text=condition.text,
        clip_img=condition.image,
        effnet=condition.effnet,
        pixels=condition.pixels,
    ).sample


@pytest.fixture(scope="module")
def stage_c():
    network = small_stage(SMALL_C)
    return network, oracle(SMALL_C, network)


@pytest.fixture(scope="module")
def stage_b():
    network = small_stage(SMALL_B)
    return network, oracle(SMALL_B, network)


@torch.no_grad()
def test_stage_c(stage_c):
    network, reference = stage_c
    x, ratio, condition = inputs_c()
    expected = ask(reference, x, ratio, condition)
    torch.testing.assert_close(network(x, ratio, condition), expected, **CLOSE)
    flat = condition._replace(pooled=condition.pooled[:, 0], image=condition.image[:, 0])
    torch.testing.assert_close(network(x, ratio, flat), expected, **CLOSE)


@torch.no_grad()
def test_no_image_is_an_image_of_zeros(stage_c):
    network, reference = stage_c
    x, ratio, condition = inputs_c()
    zeros = condition._replace(image=torch.zeros(3, 1, 16))
    torch.testing.assert_close(
        network(x, ratio, condition._replace(image=None)), ask(reference, x, ratio, zeros), **CLOSE
    )


@torch.no_grad()
def test_further_time_values_enter_like_the_time(stage_c):
    network, reference = stage_c
    x, ratio, condition = (item[:1] if isinstance(item, torch.Tensor) else item for item in inputs_c())
    condition = StageInputs(*(item if item is None else item[:1] for item in condition))
    values = {"sca": torch.tensor([0.3]), "crp": torch.tensor([0.6])}
    expected = reference(x, ratio, condition.pooled, condition.text, condition.image, **values).sample
    torch.testing.assert_close(network(x, ratio, condition, time_values=values), expected, **CLOSE)
    assert not torch.allclose(network(x, ratio, condition), expected, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (34, 50), (38, 62)])
def test_stage_b_with_repeats_and_sizes_that_do_not_halve(stage_b, size):
    network, reference = stage_b
    x, ratio, condition = inputs_b(size)
    torch.testing.assert_close(network(x, ratio, condition), ask(reference, x, ratio, condition), **CLOSE)


@torch.no_grad()
def test_stage_b_pixels_and_missing_conditions(stage_b):
    network, reference = stage_b
    x, ratio, condition = inputs_b()
    pixels = condition._replace(pixels=noise(2, 3, 8, 8, seed=5))
    torch.testing.assert_close(network(x, ratio, pixels), ask(reference, x, ratio, pixels), **CLOSE)
    zeros = condition._replace(effnet=torch.zeros(2, 16, 4, 4))
    torch.testing.assert_close(
        network(x, ratio, condition._replace(effnet=None)), ask(reference, x, ratio, zeros), **CLOSE
    )


@pytest.mark.parametrize("form", ["autocast", "weights"])
@torch.no_grad()
def test_bfloat16_stays_close(stage_c, form):
    network, reference = stage_c
    x, ratio, condition = inputs_c()
    expected = ask(reference, x, ratio, condition)
    if form == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = network(x, ratio, condition)
    else:
        found = small_stage(SMALL_C).to(torch.bfloat16)(x, ratio, condition)
    assert (found.float() - expected).norm() / expected.norm() < 2e-2


@torch.no_grad()
def test_control_residuals_equal_hooks_on_the_blocks(stage_c):
    from diffusers.models.unets.unet_stable_cascade import SDCascadeResBlock

    network, reference = stage_c
    x, ratio, condition = inputs_c()
    control = {0: noise(3, 64, 3, 4, seed=6), 2: noise(3, 64, 6, 8, seed=7), 5: noise(3, 64, 7, 7, seed=8)}
    places = [block for block in reference.modules() if isinstance(block, SDCascadeResBlock)]
    handles = []
    for number, residual in control.items():

        def add(_, inputs, residual=residual):
            size = inputs[0].shape[-2:]
            resized = torch.nn.functional.interpolate(residual, size, mode="bilinear", align_corners=True)
            return (inputs[0] + resized, *inputs[1:])

        handles.append(places[number].register_forward_pre_hook(add))
    steered = ask(reference, x, ratio, condition)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(network(x, ratio, condition, control=control), steered, **CLOSE)
    assert (steered - ask(reference, x, ratio, condition)).abs().max() > 0.1


def test_gradients_are_those_of_diffusers(stage_c):
    network, reference = stage_c
    x, ratio, condition = inputs_c()
    for module, predict in ((network, network), (reference, lambda *given: ask(reference, *given))):
        module.zero_grad()
        predict(x, ratio, condition).square().mean().backward()
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    renamed = file_tensors("stage_c", found, "diffusers")
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(renamed[name], parameter.grad, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_stage_a():
    try:
        from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    except ImportError:  # before 0.36
        from diffusers.pipelines.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    config = StageAConfig(features=16, bottleneck=2, codebook=8)
    module = randomize(StageA(config)).eval()
    norm = module.down_blocks[3][1]
    norm.running_mean.copy_(noise(4))
    norm.running_var.copy_(noise(4).abs() + 0.5)
    reference = PaellaVQModel(bottleneck_blocks=2, embed_dim=16, num_vq_embeddings=8, scale_factor=STAGE_A_SCALE).eval()
    reference.load_state_dict(file_tensors("stage_a", module.state_dict(), "diffusers"), strict=True)
    pixels = noise(2, 3, 36, 52).sigmoid()
    latents = module.encode(pixels)
    torch.testing.assert_close(latents * 0.43, reference.encode(pixels, return_dict=False)[0], **CLOSE)
    (expected,) = reference.decode(latents * 0.43, return_dict=False)
    torch.testing.assert_close(module.decode(latents), expected.clamp(0, 1), **CLOSE)


@torch.no_grad()
def test_efficientnet_computes_what_torchvision_stored():
    """The stored output was computed by torchvision from the same weights, which follow from names and places."""
    stored = json.loads((GOLDEN / "cascade_effnet_output.json").read_text())
    sizes = ((8, 1, 1, True), (8, 2, 2, True), (8, 1, 2, True), (16, 1, 2, False), (16, 2, 3, False), (16, 1, 2, False))
    features = make_features(EffNetConfig(stem=8, stages=tuple(MBStage(*row) for row in sizes), width=24)).double()
    for name, tensor in features.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(formula(name, tensor.shape))
    pixels = torch.sin(torch.arange(3 * 70 * 50, dtype=torch.float64) * 0.013).reshape(1, 3, 70, 50)
    found = features.train()(pixels)
    assert list(found.shape) == stored["shape"]
    torch.testing.assert_close(found.flatten(), torch.tensor(stored["values"], dtype=torch.float64), atol=1e-7, rtol=0)


def formula(name, shape):
    wave = torch.sin(torch.arange(shape.numel(), dtype=torch.float64) * 0.7 + len(name)).reshape(shape)
    if name.endswith("running_var"):
        return 1 + 0.3 * wave
    if len(shape) <= 1:
        return 0.1 * wave + (1 if name.endswith("weight") else 0)
    return wave * (2 / shape[1:].numel()) ** 0.5 * 1.5


# Text --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    made = random_part("text")
    encoder = build_projected_text_encoder(made.config, made.tensors, device=torch.device("cpu"), dtype=torch.float32)
    reference = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(made.config))).eval()
    reference.load_state_dict(made.tensors, strict=True)
    return encoder, reference


def token_ids():
    ids = torch.full((3, 77), END_ID)
    ids[:, 0] = 49406
    for row, length in enumerate((4, 30, 75)):
        ids[row, 1 : length + 1] = torch.arange(length) * 37 + 320
    return ids


@torch.no_grad()
def test_masked_text_states_and_pooled_vector(text):
    encoder, reference = text
    ids = token_ids()
    mask = torch.arange(77) <= (ids == END_ID).int().argmax(-1, keepdim=True)
    expected = reference(ids, attention_mask=mask.long(), output_hidden_states=True)
    found = encoder(ids)
    torch.testing.assert_close(found.hidden, expected.hidden_states[-1], **CLOSE)
    torch.testing.assert_close(found.pooled, expected.text_embeds, **CLOSE)


@torch.no_grad()
def test_unmasked_text_differs_in_the_padding_alone(text):
    encoder, reference = text
    ids = token_ids()
    found, masked = encoder(ids, masked=False), encoder(ids)
    torch.testing.assert_close(found.hidden, reference(ids, output_hidden_states=True).hidden_states[-1], **CLOSE)
    torch.testing.assert_close(found.pooled, masked.pooled, **CLOSE)
    torch.testing.assert_close(found.hidden[0, :6], masked.hidden[0, :6], **CLOSE)
    assert (found.hidden[0, 7:] - masked.hidden[0, 7:]).abs().max() > 0.05


@torch.no_grad()
def test_states_are_those_before_the_final_norm(text):
    encoder, reference = text
    states = reference(token_ids(), output_hidden_states=True)
    last = states.hidden_states[-1]
    assert torch.equal(encoder.text_model.final_layer_norm(last), states.last_hidden_state)
    assert not torch.allclose(last, states.last_hidden_state, atol=0.1)


@torch.no_grad()
def test_pooling_ignores_larger_ids_of_new_words():
    made = random_part("text")
    config = {**made.config, "vocab_size": 49409}
    tensors = dict(made.tensors)
    name = "text_model.embeddings.token_embedding.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    encoder = build_projected_text_encoder(config, tensors, device=torch.device("cpu"), dtype=torch.float32)
    ids = token_ids()
    ids[0, 2] = 49408
    plain = ids.clone()
    plain[0, 2] = 0
    torch.testing.assert_close(encoder(ids).pooled, encoder(plain).pooled)


@torch.no_grad()
def test_chunks_are_joined_and_the_first_one_is_pooled(text):
    encoder, _ = text
    ids = token_ids()[:2].unsqueeze(0)
    hidden, pooled = encode_chunks(encoder, ids)
    each = encoder(ids[0])
    assert hidden.shape == (1, 152, 32)
    torch.testing.assert_close(hidden[0, :76], each.hidden[0, :76])
    torch.testing.assert_close(hidden[0, 76:], each.hidden[1, 1:][:76])
    torch.testing.assert_close(pooled, each.pooled[:1])
    weights = torch.ones(1, 2, 77)
    weights[0, 0, 3] = 2.0
    torch.testing.assert_close(encode_chunks(encoder, ids, weights).hidden[0, 3], hidden[0, 3] * 2)


@torch.no_grad()
def test_image_embeddings_follow_the_usual_preprocessing():
    from PIL import Image
    from transformers import CLIPImageProcessor

    made = random_part("vision")
    encoder = make_image_encoder(made.config).eval()
    encoder.load_state_dict(made.tensors)
    picture = Image.open(PHOTO).convert("RGB").resize((300, 220))
    usual = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = encoder(usual(picture, return_tensors="pt")["pixel_values"]).image_embeds
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(220, 300, 3)
    found = embed_images(encoder, pixels.permute(2, 0, 1)[None] / 255)
    assert (found - expected).norm() / expected.norm() < 0.02
