"""The renderer of Stable Cascade with tiny models: sizes, batches, guidance, and pictures made from pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from library.checkpoints.load_cascade import load_control_net
from library.errors import UserError
from library.inference.cascade import CASCADE_DEFAULTS, CascadeRenderer, CascadeSettings, latent_size
from library.inference.cascade_control import ControlPictures, ControlSource
from library.inference.cascade_decoders import PreviewDecoder, StageBDecoder, StageBSettings
from library.inference.cascade_extensions import CascadeBatch, ImageVariation, StartPictures
from library.inference.cascade_loading import CascadeParts, Placement
from library.inference.cascade_reconstruction import ReconstructionRenderer
from library.inference.cascade_samplers import SAMPLERS
from library.inference.cascade_sampling import SamplingPlan, composed, noised_start, sample_latents, start_noise
from library.inference.diffusion import RenderingStopped, Watch
from library.inference.extensions import PictureInputs
from library.inference.gdf import amplitudes, log_snr, per_picture
from library.inference.options_cascade import CascadeFileOptions
from library.inference.prompt_options import CASCADE_GENERATION, CASCADE_SAMPLES, STAGE_B_SAMPLES
from library.inference.prompts import load_prompts, parse_prompt_line, read_prompts
from library.inference.rendering import HeldPart, NotFinite
from library.models.cascade.control_choice import make_filter
from library.models.cascade.control_filters import PlainFilter
from library.models.cascade.control_net import CascadeControlNet
from library.models.cascade.options import CascadeTextOptions, StageBModelOptions
from library.models.cascade.sources import LazyPart
from library.models.cascade.specs import STAGE_B
from library.models.cascade.stage_b import StageB
from library.models.family import WeightPlan
from library.models.options import MemoryOptions

CPU = torch.device("cpu")
CAT = replace(CASCADE_DEFAULTS, prompt="a cat", width=256, height=192, steps=3, seed=5)


@pytest.fixture(scope="module")
def files(tiny_cascade):
    return tiny_cascade


@pytest.fixture(scope="module")
def parts(files):
    options = CascadeFileOptions(
        stage_c_checkpoint_path=str(files.stage_c),
        stage_b_checkpoint_path=str(files.stage_b),
        stage_a_checkpoint_path=str(files.stage_a),
        effnet_checkpoint_path=str(files.effnet),
        previewer_checkpoint_path=str(files.previewer),
        text_model_checkpoint_path=str(files.text),
        image_model_checkpoint_path=str(files.vision),
    )
    return CascadeParts(options, Placement(CPU, CPU, torch.float32))


@pytest.fixture(scope="module")
def family(parts):
    return parts.stage_c()


@pytest.fixture(scope="module")
def photo():
    steps = np.linspace(0, 255, 96, dtype=np.uint8)
    levels = np.stack([np.tile(steps, (64, 1)), np.full((64, 96), 80, np.uint8), np.tile(steps[::-1], (64, 1))], axis=2)
    return Image.fromarray(levels)


def latents(family, *requests, inputs=None, **settings):
    extensions = settings.pop("extensions", ())
    renderer = CascadeRenderer(family, None, CascadeSettings(**settings), extensions=extensions)
    return [made.latents for made in renderer.render_latents(requests, inputs)]


def picture(parts, family, request, **settings):
    decoder = StageBDecoder(parts.stage_b(), parts.stage_a(), StageBSettings(steps=2, **settings))
    return np.asarray(CascadeRenderer(family, decoder).render([request])[0]).astype(int)


@pytest.mark.parametrize(
    ("side", "size"), [(1024, 24), (768, 18), (1152, 27), (1536, 36), (2048, 48), (1000, 24), (64, 2), (8192, 192)]
)
def test_sizes_of_latents(side, size):
    assert latent_size(side, 1024) == (24, size)
    assert -(-side // 42.67) == size


def test_pictures_have_the_size_that_was_asked_for(parts, family):
    assert picture(parts, family, CAT).shape == (192, 256, 3)
    small = CascadeRenderer(family, PreviewDecoder(parts.previewer())).render([CAT])[0]
    assert small.size == (8 * 6, 8 * 5)


def test_a_picture_does_not_depend_on_its_batch_nor_on_global_generators(parts, family):
    requests = [replace(CAT, seed=seed, prompt=text) for seed, text in ((1, "a cat"), (2, "dogs"), (3, "a bird"))]
    requests.insert(1, replace(CAT, width=128))
    decoder = StageBDecoder(parts.stage_b(), parts.stage_a(), StageBSettings(steps=2, batch_size=4))
    torch.manual_seed(1)
    together = CascadeRenderer(family, decoder, CascadeSettings(batch_size=4)).render(requests)
    torch.manual_seed(2)
    for request, made in zip(requests, together, strict=True):
        alone = picture(parts, family, request)
        assert abs(np.asarray(made).astype(int) - alone).max() <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6},
        {"prompt": "a dog"},
        {"negative_prompt": "blurry"},
        {"scale": 7.0},
        {"shift": 1.0},
        {"steps": 4},
        {"sampler": "ddim"},
        {"sampler": "lcm"},
        {"strength": 0.8},
    ],
)
def test_everything_that_a_prompt_says_matters(family, change):
    assert not torch.equal(*latents(family, CAT, replace(CAT, **change)))


def test_settings_stand_in_where_a_prompt_says_nothing(family):
    (one,) = latents(family, replace(CAT, shift=1.5))
    (two,) = latents(family, CAT, shift=1.5)
    assert torch.equal(one, two)
    assert torch.equal(latents(family, CAT, sampler="ddim")[0], latents(family, replace(CAT, sampler="ddim"))[0])
    assert not torch.equal(one, latents(family, CAT)[0])
    unguided = replace(CAT, scale=1.0)
    assert torch.equal(*latents(family, unguided, replace(unguided, negative_prompt="blurry")))
    assert torch.equal(latents(family, CAT, cfg_t_start=0.0)[0], latents(family, unguided)[0])


@pytest.mark.parametrize("settings", [{"scale": 1.0}, {"shift": 2.0}, {"cfg_rho": 0.0}, {"sampler": "ddim"}])
def test_settings_of_stage_b_matter(parts, family, settings):
    usual = {"scale": 4.0}
    assert (picture(parts, family, CAT, **usual) != picture(parts, family, CAT, **{**usual, **settings})).any()


def test_stage_b_is_guided_away_from_the_negative_prompt(parts, family):
    request = replace(CAT, scale=1.0)  # stage C does not look at it
    changed = replace(request, negative_prompt="blurry")
    assert (picture(parts, family, request, scale=3.0) != picture(parts, family, changed, scale=3.0)).any()
    assert (picture(parts, family, request, scale=1.0) == picture(parts, family, changed, scale=1.0)).all()


def test_a_picture_to_start_from(parts, family, photo):
    encoder = parts.effnet("a test")
    extensions = [StartPictures(encoder)]
    request = replace(CAT, strength=0.05, steps=1, scale=1.0, shift=1.0)
    given = [PictureInputs(image=photo), PictureInputs()]
    near, far = latents(family, request, request, inputs=given, extensions=extensions)
    pixels = torch.from_numpy(np.array(photo.resize((6 * 32, 5 * 32), Image.Resampling.LANCZOS))).permute(2, 0, 1)
    with torch.no_grad():
        wanted = encoder.model(pixels[None] / 255)[0]
    assert (near - wanted).abs().mean() < 0.2 * (far - wanted).abs().mean()


def test_a_picture_to_look_like(parts, family, photo):
    extensions = [ImageVariation(parts.image_encoder())]
    given = [PictureInputs(image=photo), PictureInputs(image=photo.rotate(90)), PictureInputs()]
    one, two, none = latents(family, CAT, CAT, CAT, inputs=given, extensions=extensions)
    assert not torch.equal(one, two)
    assert not torch.equal(one, none)
    assert torch.equal(none, latents(family, CAT)[0])


@pytest.fixture(scope="module")
def control(files, parts, family):
    loaded = load_control_net(files.controlnet, family.unet.config.residual_blocks)
    return LazyPart(loaded, CascadeControlNet, "ControlNet", device=CPU, dtype=torch.float32)


def test_control_nets_act_as_strongly_and_as_long_as_they_are_told(family, control, photo):
    def made(strength=1.0, share=1.0, guide=photo):
        source = ControlSource(control, make_filter("canny"), strength, share)
        given = [PictureInputs(guides=() if guide is None else (guide,))]
        return latents(family, CAT, inputs=given, extensions=[ControlPictures([source])])[0]

    plain, whole = latents(family, CAT)[0], made()
    assert not torch.equal(plain, whole)
    assert not torch.equal(whole, made(share=0.5))
    assert not torch.equal(whole, made(strength=0.5))
    for nothing in (made(strength=0.0), made(share=0.0), made(guide=None)):
        assert torch.equal(plain, nothing)


def test_who_watches_sees_all_steps_and_can_stop(parts, family):
    decoder = StageBDecoder(parts.stage_b(), parts.stage_a(), StageBSettings(steps=2))
    seen = []
    CascadeRenderer(family, decoder).render([CAT], watch=Watch(progress=lambda done, total: seen.append((done, total))))
    assert seen == [(done, 5) for done in (0, 1, 2, 3, 3, 4, 5)]
    with pytest.raises(RenderingStopped):
        CascadeRenderer(family, decoder).render([CAT], watch=Watch(should_stop=lambda: len(seen) > 0))


def test_a_session_frees_what_it_loaded(parts, family):
    previewer = parts.previewer()
    renderer = CascadeRenderer(family, PreviewDecoder(previewer))
    with renderer.session():
        renderer.render([CAT])
        assert previewer.loaded
    assert not previewer.loaded
    assert previewer.model
    with renderer.session():
        renderer.render([CAT])
    assert previewer.loaded


def test_stages_of_another_structure_than_the_wanted_one_are_refused(files, monkeypatch):
    wanted = []

    def load(path, stage, *, version=None):
        wanted.append((stage, version))
        raise UserError("is another one", where=str(path))

    monkeypatch.setattr("library.checkpoints.load_cascade.load_stage", load)
    options = CascadeFileOptions(
        stage_c_checkpoint_path=str(files.stage_c),
        stage_b_checkpoint_path=str(files.stage_b),
        model_version="1B",
        model_version_b="700M",
    )
    opened = CascadeParts(options, Placement(CPU, CPU, torch.float32))
    for open_it in (opened.stage_c, opened.stage_b):
        with pytest.raises(UserError, match="is another one"):
            open_it()
    assert wanted == [("c", "1B"), ("b", "700M")]


def test_values_that_are_no_numbers_are_told(parts, family):
    previewer = parts.previewer()
    previewer.model.blocks[-1].bias.data.fill_(torch.nan)
    with pytest.raises(NotFinite):
        CascadeRenderer(family, PreviewDecoder(previewer)).render([CAT])


def test_bfloat16_weights_make_nearly_the_same(parts, family):
    half = CascadeParts(parts._options, Placement(CPU, CPU, torch.bfloat16)).stage_c()
    exact, near = latents(family, CAT)[0], latents(half, CAT)[0]
    assert near.dtype == torch.float32
    assert (exact - near).norm() < 0.1 * exact.norm()


def test_long_prompts_take_more_chunks(family):
    long = replace(CAT, prompt=" ".join(["cat"] * 100))
    assert not torch.equal(*latents(family, long, replace(CAT, prompt=" ".join(["cat"] * 75))))
    one, two = latents(family, CAT, long, batch_size=2)
    assert torch.equal(one, latents(family, CAT)[0])
    assert torch.equal(two, latents(family, long)[0])


def test_prompt_lines():
    line = "a cat --n a b c --w 512 --h 260 --d 1,2 --l 5 --s 30 --t 0.5 --f 3 --ss DDIM --am 0.5"
    found = parse_prompt_line(line, where="x", defaults=CASCADE_DEFAULTS, place=CASCADE_GENERATION)
    assert (found.negative_prompt, found.width, found.height, found.seeds) == ("a b c", 512, 256, (1, 2))
    assert (found.scale, found.steps, found.strength, found.shift) == (5, 30, 0.5, 3)
    assert (found.sampler, found.multipliers) == ("ddim", (0.5,))


def test_prompts_of_sample_pictures(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --f 3 --t 0.5\na dog\n", encoding="utf-8")
    one, two = load_prompts(path, defaults=CascadeRenderer.sample_defaults, place=CASCADE_SAMPLES)
    assert (one.shift, one.strength, one.width, one.scale, one.steps) == (3, 0.5, 1024, 4, 20)
    assert (two.shift, two.strength, two.sampler) == (None, None, "ddpm")


class Noisy(PlainFilter):
    """A filter that leaves everything to chance."""

    num_channels = 1

    def prepare(self, picture, rng, mask=None):
        return np.zeros((1, 8, 8), np.float32)

    def finish(self, prepared, encode, seed):
        return torch.rand(prepared.shape, generator=torch.Generator().manual_seed(seed))


class Telling(nn.Module):
    """Gives back what it looks at."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, guide):
        return {0: guide * self.scale}


def test_chance_in_filters_does_not_depend_on_the_batch(photo):
    control = ControlPictures([ControlSource(HeldPart(Telling()), Noisy())])

    def guides(*seeds):
        requests = tuple(replace(CAT, seed=seed) for seed in seeds)
        inputs = tuple(PictureInputs(guides=(photo,)) for _ in seeds)
        return control.control(CascadeBatch(requests, inputs, (6, 6), CPU))(0.0)[0]

    assert torch.equal(guides(1, 2, 3), torch.cat([guides(1), guides(2), guides(3)]))
    assert not torch.equal(guides(1), guides(2))


def test_samples_of_stage_b_follow_their_prompt(files, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    paths = {"stage_b_checkpoint_path": str(files.stage_b), "stage_a_checkpoint_path": str(files.stage_a)}
    paths |= {"effnet_checkpoint_path": str(files.effnet), "text_model_checkpoint_path": str(files.text)}
    family = StageB.load(
        StageBModelOptions(**paths), CascadeTextOptions(), MemoryOptions(), spec=STAGE_B, weights=WeightPlan()
    )
    renderer = ReconstructionRenderer(family)
    plain = replace(CAT, width=64, height=64, controlnet_image=str(tmp_path / "photo.png"))
    different = [plain, *(replace(plain, **{name: value}) for name, value in (("sampler", "ddim"), ("shift", 3.0)))]
    made = {np.asarray(picture).tobytes() for picture in renderer.render(different)}
    assert len(made) == 3


def test_options_of_stage_c_do_nothing_in_prompts_of_stage_b(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat --ss lcm --cn a.png\na dog --cn a.png --t 0.5\na bird\n", encoding="utf-8")
    found = read_prompts(path, defaults=CASCADE_DEFAULTS, place=STAGE_B_SAMPLES)
    assert [(request.sampler, request.strength) for request in found.requests] == [("lcm", None), ("ddpm", None)]
    assert [note.partition("--")[2] for note in found.notes] == ["t has no effect on this kind of model"]
    assert [problem.what for problem in found.problems] == ["names no picture to make again"]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_every_sampler_arrives_at_what_an_exact_network_knows(sampler, shift):
    """The network is only told the noise condition: that, the steps and the shift must fit each other."""
    wanted = torch.randn(2, 16, 3, 4, generator=torch.Generator().manual_seed(0))

    def denoise(latents, ratio):
        a, b = amplitudes(per_picture(log_snr(ratio)))
        towards = (latents[:2] - a[:2] * wanted) / b[:2]
        # What it says without condition is led away from, back to the exact answer at a scale of 2.
        return torch.cat([(towards + latents[2:]) / 2, latents[2:]]) if len(latents) > 2 else towards

    plan = SamplingPlan(steps=12, cfg=2.0, cfg_rho=0.0, shift=shift, sampler=sampler)
    for one in (plan, replace(plan, cfg=None), replace(plan, t_start=0.5)):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        if one.t_start < 1:
            start = noised_start(wanted, one, generators)
        else:
            start = start_noise(generators, (16, 3, 4), CPU)
        made = sample_latents(denoise, one, generators, start)
        # The last noise, a hundredth or with a shift of 2 two, is never taken away.
        assert 0 < (made - wanted).abs().max() < 0.1


def test_parts_add_up():
    parts = torch.randn(2, 3, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    away = torch.randn(3, 16, 2, 2, generator=torch.Generator().manual_seed(1))
    every = torch.cat([*parts, away])

    def denoise(latents, ratio):
        assert len(ratio) == len(latents)
        return every[: len(latents)]

    guided = composed(denoise, 2, 3)(torch.zeros(6, 16, 2, 2), torch.full((6,), 0.5))
    torch.testing.assert_close(guided, torch.cat([parts[0] + parts[1] - away, away]))
    torch.testing.assert_close(composed(denoise, 2, 3)(torch.zeros(3, 16, 2, 2), torch.full((3,), 0.5)), parts.mean(0))
