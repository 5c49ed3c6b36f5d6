"""Prompts of several parts are composed, or hold in the regions that a picture shows, with their networks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from library.contracts import Condition
from library.errors import UserError
from library.inference.extensions import DenoiserInput, Moment, PictureInputs
from library.inference.prompts import PromptRequest
from library.inference.regional import RegionalPrompts
from library.inference.regions import Regions, grid, region_masks
from library.inference.render import DiffusionRenderer, RenderSettings
from library.models.family import WeightPlan
from library.models.options import MemoryOptions, ModelOptions, TextOptions
from library.models.sd import StableDiffusion
from library.models.specs import stable_diffusion_spec

SIZE = {"width": 64, "height": 64, "steps": 3, "sampler": "ddim", "scale": 5.0, "seed": 3}


def halves(left=(255, 0, 0), right=(0, 255, 0), size=(64, 64)):
    levels = np.zeros((size[1], size[0], 3), np.uint8)
    levels[:, : size[0] // 2], levels[:, size[0] // 2 :] = left, right
    return Image.fromarray(levels)


# Reading regions ---------------------------------------------------------------------------------------------------


def test_channels_are_the_regions_of_the_first_parts():
    masks = region_masks(halves((255, 0, 128), (0, 255, 128)), 5, (32, 16))
    assert masks.shape == (5, 16, 32)
    left, right = masks[:, 8, 4], masks[:, 8, 27]
    torch.testing.assert_close(left, torch.tensor([1, 0, 128 / 255, 1, 1]))
    torch.testing.assert_close(right, torch.tensor([0, 1, 128 / 255, 1, 1]))


def test_colour_codes():
    masks = region_masks(halves((255, 255, 0), (0, 0, 255)), 5, (32, 16), colour_codes=4)
    assert masks[:, 8, 4].tolist() == [1, 1, 1, 0, 1], "empty regions and parts without a code are everywhere"
    assert masks[:, 8, 27].tolist() == [1, 1, 0, 1, 1]


def test_an_empty_region_is_told(caplog):
    assert region_masks(halves((255, 0, 0), (255, 0, 0)), 2, (8, 8))[1].min() == 1
    assert "part 2" in caplog.text


@pytest.mark.parametrize("hw", [(64, 64), (64, 96), (8, 5), (9, 13), (1, 1), (17, 30)])
def test_the_shape_of_a_layer_is_found(hw):
    assert grid(hw[0] * hw[1], hw[0] / hw[1] * 1.03) == hw


def test_weights_and_shares():
    regions = Regions(torch.tensor([[[[1.0, 0, 0]]], [[[1.0, 1, 0]]]]))
    assert regions.weights(torch.zeros(1, 3, 5))[..., 0].tolist() == [[[0.5, 0, 0.5]], [[0.5, 1, 0.5]]]
    places, image, time = torch.zeros(2, 3, 5), torch.zeros(2, 5, 1, 3), torch.zeros(2, 5)
    assert regions.share(0, False, places).shape == (2, 3, 1)
    assert regions.share(0, False, image)[:, 0, 0].tolist() == [[1, 0, 0]] * 2
    assert regions.share(1, False, time) == 1
    assert regions.share(0, True, places) == 0
    with regions.reading(0):
        assert regions.share(0, True, places) == 1
        assert regions.share(1, True, places) == 0


# Composing ---------------------------------------------------------------------------------------------------------


def fake_batch(prompts, branches):
    def encode(texts, chunks):
        return Condition(torch.tensor([float(len(text)) for text in texts])[:, None, None])

    return SimpleNamespace(
        requests=tuple(PromptRequest(prompt=prompt) for prompt in prompts),
        inputs=(PictureInputs(),) * len(prompts),
        branches=branches,
        encode=encode,
    )


def predicted(hooks, rows):
    """The prediction for each row is the length of its text."""
    values = torch.tensor(rows)[:, None, None]
    call = DenoiserInput(torch.zeros(len(rows), 1, 1, 1), torch.zeros(len(rows)), Condition(values))

    def predict(call):
        return call.condition.hidden[..., None] * torch.ones_like(call.noisy)

    return hooks.predict(Moment(0, 1, 999), call, predict).flatten().tolist()


def test_what_parts_add_is_summed():
    extension = RegionalPrompts()
    prompts = ["a AND bbb AND cc", "dddd AND eeeee AND f"]
    assert [extension.prompt(PromptRequest(prompt=one), one) for one in prompts] == ["bbb", "eeeee"]
    # Rows: negatives of length 10 and 20, then the longest parts.
    with extension.begin(fake_batch(prompts, 2)) as hooks:
        assert predicted(hooks, [10.0, 20, 3, 5]) == [10, 20, 10 + (1 - 10) + (3 - 10) + (2 - 10), 20 - 16 - 15 - 19]
    with extension.begin(fake_batch(prompts, 3)) as hooks:
        assert predicted(hooks, [1.0, 2, 10, 20, 3, 5])[4:] == [1 + 0 + 2 + 1, 2 + 2 + 3 - 1]
    with extension.begin(fake_batch(prompts, 1)) as hooks:
        assert predicted(hooks, [3.0, 5]) == [2, pytest.approx(10 / 3)]


def test_a_prompt_of_one_part_is_left_alone():
    with RegionalPrompts().begin(fake_batch(["rock and roll"], 2)) as hooks:
        assert predicted(hooks, [10.0, 3]) == [10, 3]


# Regions -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tiny_sd1):
    model = ModelOptions(pretrained_model_name_or_path=str(tiny_sd1))
    return StableDiffusion.load(
        model, TextOptions(), MemoryOptions(), spec=stable_diffusion_spec(model), weights=WeightPlan()
    )


def drawn(family, prompts, regions=None, networks=(), batch_size=1, **more):
    extension = RegionalPrompts(networks, **more)
    renderer = DiffusionRenderer(family, RenderSettings(batch_size=batch_size), extensions=[extension])
    requests = [PromptRequest(prompt=prompt, negative_prompt="bad", **SIZE) for prompt in prompts]
    latents = renderer.render_latents(requests, [PictureInputs(regions=regions)] * len(requests))
    return torch.stack(latents)


def test_equal_parts_draw_the_picture_of_the_prompt(family):
    plain = drawn(family, ["a fox"])
    torch.testing.assert_close(drawn(family, ["a fox AND a fox"], halves()), plain, rtol=0, atol=1e-4)
    assert (drawn(family, ["a fox AND a duck"], halves()) - plain).abs().max() > 1e-3


def test_parts_go_where_their_colour_is(family):
    one = drawn(family, ["a fox AND a duck on blue ice"], halves())
    other = drawn(family, ["a duck on blue ice AND a fox"], halves((0, 255, 0), (255, 0, 0)))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert (one - drawn(family, ["a duck on blue ice AND a fox"], halves())).abs().max() > 1e-3
    assert not any("forward" in vars(module) for module in family.unet.modules())


@pytest.mark.parametrize("long", [False, True])
def test_batches_do_not_matter(family, long):
    """Not even where a part of one prompt has more chunks than the same part of another."""
    more = " and stones" * 40 if long else ""
    prompts = [f"a fox{more} AND a duck", f"night{more} AND a very long road{more}"]
    single = drawn(family, prompts, halves())
    torch.testing.assert_close(drawn(family, prompts, halves(), batch_size=2), single, rtol=0, atol=1e-4)


@pytest.fixture
def networks(family):
    from networks import lora

    made = []
    for seed in (0, 1):
        network = lora.create_network(1.0, 4, 4, None, family.text_encoder, family.unet)
        network.apply_to(family.text_encoder, family.unet, True, True)
        generator = torch.Generator().manual_seed(seed)
        for parameter in network.parameters():
            parameter.data.normal_(0, 0.05, generator=generator)
        made.append(network.eval())
    yield made
    for network in reversed(made):
        network.set_enabled(False)


def test_networks_act_with_their_part_and_in_its_region(family, networks):
    mask, prompts = halves(), ["a fox AND a duck on ice"]
    both = drawn(family, prompts, mask, networks)
    swapped = drawn(family, ["a duck on ice AND a fox"], halves((0, 255, 0), (255, 0, 0)), networks[::-1])
    torch.testing.assert_close(both, swapped, rtol=0, atol=1e-4)
    assert (both - drawn(family, prompts, mask, networks[::-1])).abs().max() > 1e-3
    everywhere = drawn(family, prompts, mask)
    assert (both - everywhere).abs().max() > 1e-3
    torch.testing.assert_close(drawn(family, prompts, mask), everywhere, rtol=0, atol=0)
    assert all(adapter.region is None for network in networks for adapter in network.adapters)


def test_batches_of_different_regions(family, networks):
    """Every row of a batch, negative prompts included, has the regions of its own picture."""
    prompts, regions = ["a fox AND a duck"] * 2, [halves(), halves((0, 255, 0), (255, 0, 0))]
    requests = [PromptRequest(prompt=prompt, negative_prompt="bad", **SIZE) for prompt in prompts]
    inputs = [PictureInputs(regions=one) for one in regions]
    results = []
    for size in (1, 2):
        renderer = DiffusionRenderer(family, RenderSettings(batch_size=size), extensions=[RegionalPrompts(networks)])
        results.append(torch.stack(renderer.render_latents(requests, inputs)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-4)
    assert (results[0][0] - results[0][1]).abs().max() > 1e-3


def test_text_encoders_read_a_part_with_its_network_only(family, networks):
    for network in networks:
        for adapter in network.unet_adapters:
            adapter.detach()
    mask, prompts = halves(), ["a fox AND a duck"]
    first, second = networks
    with_both = drawn(family, prompts, mask, networks)
    second.set_enabled(False)
    with_first = drawn(family, prompts, mask, [first])
    first.set_enabled(False)
    plain = drawn(family, prompts, mask)
    assert (with_first - plain).abs().max() > 1e-4
    assert (with_both - with_first).abs().max() > 1e-4


def test_a_network_everywhere_is_one_without_regions(family, networks):
    """One part in a region of the whole picture: only the negative prompt's words escape the network."""
    one = networks[0]
    networks[1].set_enabled(False)
    one.set_enabled(False)
    for adapter in one.adapters:
        if not adapter.reads_words:
            adapter.attach()
    red = Image.new("RGB", (64, 64), (255, 0, 0))
    torch.testing.assert_close(drawn(family, ["a fox"], red, [one]), drawn(family, ["a fox"]), rtol=0, atol=1e-4)


def test_what_cannot_be_done_is_refused():
    request, inputs = PromptRequest(prompt="a AND b", where="line 7"), PictureInputs(regions=halves())
    able = SimpleNamespace(limit_to=None)
    assert RegionalPrompts([able, able]).batch_key(request, inputs)[:2] == (2, True)
    with pytest.raises(UserError, match="line 7: 3 networks with regions for 2 parts"):
        RegionalPrompts([able] * 3).batch_key(request, inputs)
    with pytest.raises(UserError, match="network 2 .* cannot be limited to a region"):
        RegionalPrompts([able, object()]).batch_key(request, inputs)
    assert RegionalPrompts([object()] * 3).batch_key(request, PictureInputs())[:2] == (2, False)
