"""Stages C and B as they are trained: what they are conditioned on, in which type, how often, and with what dropout."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from library.contracts import BatchKey, StepKey
from library.draws import Draws
from library.models.cascade.options import CascadeTextOptions, StageBModelOptions, StageCModelOptions
from library.models.cascade.specs import STAGE_B, STAGE_C, check_cascade_files
from library.models.cascade.stage_b import EFFNET, StageB, smaller_size
from library.models.cascade.stage_c import IMAGE, StageC
from library.models.cascade.vision import embed_images
from library.models.family import WeightPlan
from library.models.options import MemoryOptions
from library.option_parser import parse
from library.training.loss import make_loss
from library.training.methods.base import PlainMethod
from library.training.objective_cascade import GDFObjective
from library.training.options import LossOptions, NoiseOptions
from library.training.options_cascade import CascadeLossOptions
from library.training.step import Autocast, TrainStep
from tests.cascade_models import noise

CPU = torch.device("cpu")
MANY = 200


def load(family, files, weights=None, **more):
    common = {"effnet_checkpoint_path": str(files.effnet), "text_model_checkpoint_path": str(files.text)}
    if family is StageB:
        paths = {"stage_b_checkpoint_path": str(files.stage_b), "stage_a_checkpoint_path": str(files.stage_a)}
        model, spec = StageBModelOptions(**common, **paths, **more), STAGE_B
    else:
        model, spec = StageCModelOptions(**common, stage_c_checkpoint_path=str(files.stage_c), **more), STAGE_C
    return family.load(model, CascadeTextOptions(), MemoryOptions(), spec=spec, weights=weights or WeightPlan())


def batch(pixels):
    ids = torch.full((len(pixels), 1, 77), 49407)
    ids[:, 0, 0] = 49406
    return SimpleNamespace(pixels=pixels, text_arrays=None, token_ids=(ids,), token_weights=None)


def draws(rows, step=0):
    return Draws(42, StepKey(step, 0), rows, CPU)


# Stage B -----------------------------------------------------------------------------------------------------------


def test_sides_are_rounded_down_to_whole_latents():
    assert smaller_size((1024, 768), 0.8) == (800, 608)
    assert smaller_size((1024, 1024), 0.5) == (512, 512)
    assert smaller_size((1024, 1024), 0.999999) == (992, 992)
    assert smaller_size((32, 64), 0.5) == (32, 32)


@torch.no_grad()
def test_stage_b_sees_the_picture_at_one_size_for_the_whole_batch(tiny_cascade, monkeypatch):
    family = load(StageB, tiny_cascade, effnet_dropout_rate=0.0)
    seen = []
    model = family.effnet.model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda pixels: seen.append(pixels) or forward(pixels))
    pixels = noise(2, 3, 128, 256).clamp(-1, 1)
    sizes = set()
    for step in range(30):
        found = family.condition(batch(pixels), draws(2, step)).extra[EFFNET]
        height, width = smaller_size((128, 256), 0.5 + 0.5 * draws(2, step).scalar("effnet_size"))
        wanted = functional.interpolate((pixels + 1) / 2, (height, width), mode="nearest")
        assert torch.equal(seen[-1], wanted)
        assert torch.equal(found, forward(wanted))
        sizes.add((height, width))
    # From half the size (64 compressions of a side) to all of it but the last step of 32 pixels.
    assert sizes == {(64, 128), (64, 160), (96, 192), (96, 224)}


@torch.no_grad()
def test_stage_b_is_left_without_latents_at_the_given_rate(tiny_cascade):
    pixels = noise(1, 3, 32, 32).clamp(-1, 1).expand(MANY, -1, -1, -1)
    for rate in (0.0, 0.1, 1.0):
        family = load(StageB, tiny_cascade, effnet_dropout_rate=rate)
        found = family.condition(batch(pixels), draws(MANY)).extra[EFFNET]
        missing = ~found.flatten(1).any(1)
        assert torch.equal(missing, draws(MANY).uniform("effnet_condition") < rate)
        assert abs(missing.float().mean().item() - rate) < 3 * math.sqrt(0.1 * 0.9 / MANY)
    assert StageBModelOptions().effnet_dropout_rate == 0.1


@torch.no_grad()
def test_mixed_precision_rounds_nothing_of_what_stage_b_sees(tiny_cascade):
    """Latents for the condition are made as those in caches: in the type for pictures, --no_half_vae included."""
    family = load(StageB, tiny_cascade, effnet_dropout_rate=0.0)
    given = batch(noise(2, 3, 64, 64).clamp(-1, 1))
    exact = family.condition(given, draws(2)).extra[EFFNET]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(family.condition(given, draws(2)).extra[EFFNET], exact)


# Stage C -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_stage_c_sees_pictures_at_the_given_rate(tiny_cascade):
    pixels = noise(1, 3, 32, 32).clamp(-1, 1).expand(MANY, -1, -1, -1)
    vision = str(tiny_cascade.vision)
    for rate in (0.1, 1.0):
        family = load(StageC, tiny_cascade, clip_image_cond_rate=rate, image_model_checkpoint_path=vision)
        found = family.condition(batch(pixels), draws(MANY)).extra[IMAGE]
        shown = found.any(1)
        assert torch.equal(shown, draws(MANY).uniform("image_condition") < rate)
        assert abs(shown.float().mean().item() - rate) < 3 * math.sqrt(0.1 * 0.9 / MANY)
        whole = embed_images(family.image_encoder.model, (pixels[:1] + 1) / 2)
        torch.testing.assert_close(found[shown][:1], whole)
    assert IMAGE not in load(StageC, tiny_cascade).condition(batch(pixels[:2]), draws(2)).extra
    assert StageCModelOptions().clip_image_cond_rate == 0


def test_the_image_encoder_may_be_named_as_on_hugging_face(tiny_cascade, monkeypatch):
    asked = []

    def resolve(name, option):
        asked.append((name, option))
        return tiny_cascade.vision

    monkeypatch.setattr("library.models.cascade.stage_c.resolve_model", resolve)
    name = "openai/clip-vit-large-patch14"
    family = load(StageC, tiny_cascade, clip_image_cond_rate=0.1, image_model_checkpoint_path=name)
    assert asked == [(name, "--image_model_checkpoint_path")]
    assert family.image_encoder.source is not None


def test_another_file_in_place_of_the_image_encoder_is_told_in_time(tiny_cascade):
    from library.errors import UserError

    model = StageCModelOptions(clip_image_cond_rate=0.1, image_model_checkpoint_path=str(tiny_cascade.previewer))
    with pytest.raises(UserError, match="--image_model_checkpoint_path .*the previewer, not a CLIP image encoder"):
        check_cascade_files(model)


def test_dropout_is_that_of_the_released_models_unless_chosen(tiny_cascade):
    for chosen, wanted in ((None, 0.1), (0.0, 0.0), (0.25, 0.25)):
        network = load(StageC, tiny_cascade, stage_c_dropout=chosen).unet
        blocks = [block for block in network.all_blocks() if hasattr(block, "set_dropout")]
        found = {getattr(getattr(b, "attention", None), "attn", b.channelwise[3] if hasattr(b, "channelwise") else b)
                 for b in blocks}  # fmt: skip
        assert {getattr(part, "dropout", getattr(part, "p", None)) for part in found} == {wanted}


# A whole step ------------------------------------------------------------------------------------------------------


class NeverWaits(TorchDispatchMode):
    """Refuses what has to know a value on the device before it can go on."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*arguments, **(keywords or {}))


class WholeStage(PlainMethod):
    """Trains all of a stage."""

    def __init__(self, family):
        self.family = family
        family.unet.requires_grad_(True).train()

    def trainable(self):
        return torch.nn.ModuleDict({"unet": self.family.unet})

    def condition(self, batch, draws):
        return self.family.condition(batch, draws)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="")]),
    ],
)
@pytest.mark.parametrize("stage", [StageC, StageB])
def test_a_step_never_waits_for_the_device(tiny_cascade, stage, device):
    place = torch.device(device)
    family = load(stage, tiny_cascade, WeightPlan(place, trained=("unet",)))
    objective = GDFObjective(
        NoiseOptions(noise_offset=0.1, ip_noise_gamma=0.1),
        LossOptions(min_snr_gamma=5.0),
        CascadeLossOptions(adaptive_loss_weight=True),
        place,
        pyramid=stage is StageB,
    )
    method = WholeStage(family)
    step = TrainStep(
        family, method, objective, make_loss(LossOptions()), seed=1, autocast=Autocast(place, torch.bfloat16)
    )
    given = batch(noise(2, 3, 64, 64).clamp(-1, 1).to(place))
    given.token_ids = tuple(ids.to(place) for ids in given.token_ids)
    given.latents, given.mask, given.size, given.loss_weight = None, None, 2, torch.ones(2, device=place)

    def update(number):
        given.key = BatchKey(StepKey(number, 0), 0, 0, True, False, 1.0, ())
        loss, _ = step(given)
        loss.backward()
        objective.after_update(lambda tensor: tensor)
        return loss

    update(0)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NeverWaits():
            loss = update(1)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in family.unet.parameters())


# Options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["c", "b"])
def test_half_precision_is_for_stage_b_alone(stage, tmp_path):
    from library.errors import UserError

    import_name = f"stable_cascade_train_stage_{stage}"
    options = __import__(import_name).Options
    words = [f"--stage_{stage}_checkpoint_path=x", "--effnet_checkpoint_path=e", "--stage_a_checkpoint_path=a"]
    words = [word for word in words if stage == "b" or "stage_a" not in word]
    words += [f"--train_data_dir={tmp_path}", "--resolution=64", "--debug_dataset", "--mixed_precision=fp16"]
    told = [str(warning) for warning in parse(options, words).warnings]
    assert any("fp16 makes stage C overflow" in line for line in told) == (stage == "c")
    if stage == "b":
        assert parse(options, [*words, "--full_fp16"]).precision.full_fp16
        return
    with pytest.raises(UserError, match="--full_fp16: the weights of stage C overflow in float16"):
        parse(options, [*words, "--full_fp16"])
