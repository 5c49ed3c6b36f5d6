"""What ControlNets of stage C look at: edges, masks, small pictures, faces, folders, and filters of the user's own."""

import pickle
import random
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from library.data.images import load_image
from library.errors import UserError
from library.models.cascade.control_choice import filter_problems, make_filter
from library.models.cascade.control_masks import MaskShapes, random_mask
from library.models.cascade.control_names import filter_params
from library.models.cascade.control_saliency import _make
from library.option_values import BadValue
from tests.conftest import PHOTOS


@pytest.fixture(scope="module")
def photo():
    import cv2

    return cv2.resize(load_image(PHOTOS / "bear" / "00.jpg"), (160, 96), interpolation=cv2.INTER_AREA)


def prepared(name, picture, *params, seed=0, mask=None):
    return make_filter(name, params).prepare(picture, random.Random(seed), mask)


def nothing(pixels):
    raise AssertionError("nothing is encoded")


def step_picture(width=64, height=64):
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, width // 2 :] = 255
    return picture


# Edges -------------------------------------------------------------------------------------------------------------


def test_edges_are_where_the_picture_changes():
    edges = prepared("canny", step_picture(), "resize=null")
    assert edges.shape == (1, 64, 64)
    assert set(np.unique(edges)) == {0, 1}
    columns = np.flatnonzero(edges[0].any(0))
    assert set(columns) <= {30, 31, 32, 33}
    assert edges[0][:, columns].any(1).mean() > 0.9


def test_edges_are_looked_for_in_a_square_of_224(photo):
    edges = prepared("CannyFilter", photo)
    assert edges.shape == (1, 96, 160)
    assert edges.dtype == np.float32
    assert edges.min() >= 0 and edges.max() <= 1
    assert not np.array_equal(edges, prepared("canny", photo, "resize=null"))
    assert np.array_equal(edges, prepared("canny", photo, "resize=224"))


def test_kept_edges_must_be_those_of_the_picture_s_size():
    for resize, size in (("null", (64, 61)), ("224", (96, 160))):
        maker = make_filter("canny", (f"resize={resize}",))
        found = maker.find(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8))
        assert maker.accepts(found, size)
        edges = found["edges"]
        for wrong in ({}, {"edges": edges[:-1]}, {"edges": edges[:, :-1]}, {"edges": edges.astype(np.float32)}):
            assert not maker.accepts(wrong, size)
        assert maker.accepts(found, (32, 32)) == (resize == "224")
    assert make_filter("canny").kept != make_filter("canny", ("resize=null",)).kept
    assert not any(make_filter(name).kept for name in ("inpaint", "sr", "sr_effnet", "folder"))


# Masks -------------------------------------------------------------------------------------------------------------


def test_the_chosen_part_is_white_and_told(photo):
    made = prepared("inpaint", photo, "p_outpaint=0", seed=3)
    colours, mask = made[:3], made[3]
    assert made.shape == (4, 96, 160)
    assert set(np.unique(mask)) == {0, 1}
    assert (colours[:, mask == 1] == 1).all()
    levels = photo.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    assert np.array_equal(colours[:, mask == 0], levels[:, mask == 0])


def test_outpainting_turns_the_part_round(photo):
    inside, outside = (prepared("inpaint", photo, f"p_outpaint={p}", seed=3)[3] for p in (0, 1))
    assert np.array_equal(inside, 1 - outside)


def test_masks_follow_from_the_generator_and_vary(photo):
    masks = [prepared("inpaint", photo, seed=seed)[3] for seed in range(40)]
    again = [prepared("inpaint", photo, seed=seed)[3] for seed in range(40)]
    assert all(np.array_equal(one, two) for one, two in zip(masks, again, strict=True))
    assert len({mask.tobytes() for mask in masks}) == 40
    turned = sum(random.Random(seed).random() < 0.4 for seed in range(40))
    assert 8 <= turned <= 24


def test_masks_cover_what_is_asked_for():
    for share in (0.1, 0.3, 0.6):
        covered = [random_mask((96, 160), MaskShapes(share), random.Random(seed)).mean() for seed in range(20)]
        assert all(share <= one < share + 0.3 for one in covered)
    assert not random_mask((96, 160), MaskShapes(0), random.Random(0)).any()


def test_a_given_mask_is_used(photo):
    mask = np.zeros((96, 160), bool)
    mask[10:20, 30:50] = True
    made = prepared("inpaint", photo, "p_outpaint=1", mask=mask)
    assert np.array_equal(made[3], mask.astype(np.float32))
    assert (made[:3, mask] == 1).all()


# Small pictures ----------------------------------------------------------------------------------------------------


def test_small_pixels_as_torch_resizes(photo):
    made = torch.from_numpy(prepared("SRFilter", photo, "scale_factor=0.25"))
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    small = functional.interpolate(pixels, scale_factor=0.25, mode="nearest")
    assert torch.equal(made, functional.interpolate(small, scale_factor=4, mode="nearest")[0])


def test_latents_of_the_small_picture(photo):
    maker = make_filter("SREffnetFilter", ("scale_factor=0.5",))
    small = torch.from_numpy(maker.prepare(photo, random.Random(0)))[None]
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    assert torch.allclose(small, functional.interpolate(pixels, scale_factor=0.5, mode="nearest") * 2 - 1)
    seen = []

    def encode(given):
        seen.append(given)
        return torch.arange(16.0 * 6).reshape(1, 16, 2, 3)

    condition = maker.finish(small, encode, 0)
    assert seen[0] is small
    assert condition.shape == (1, 16, 4, 6)
    assert torch.equal(condition[:, :, ::2, ::2], encode(small))


# Ready pictures ----------------------------------------------------------------------------------------------------


def test_ready_pictures_in_grey_and_colours(photo):
    grey, colours = (prepared("folder", photo, f"channels={count}") for count in (1, 3))
    assert make_filter("folder").from_file
    levels = photo.transpose(2, 0, 1) / 255
    assert np.allclose(colours, levels)
    assert np.allclose(grey[0], 0.299 * levels[0] + 0.587 * levels[1] + 0.114 * levels[2], atol=1e-6)


# Parameters --------------------------------------------------------------------------------------------------------


def test_parameters_are_typed():
    made = make_filter("InpaintFilter", ("thresold=[0.1,0.2]", "p_outpaint=0.5"))
    assert (made.threshold, made.p_outpaint) == (((0.1, 0.2)), 0.5)
    assert make_filter("canny", ("resize=None",)).resize is None
    assert filter_params({"thresold": [0.04, 0.4], "resize": None}) == ("thresold=[0.04, 0.4]", "resize=null")
    with pytest.raises(BadValue):
        filter_params([{"a": 1}])


@pytest.mark.parametrize(
    ("name", "params", "what"),
    [
        ("cany", (), "Did you mean canny"),
        ("PidiFilter", (), "there is no filter"),
        ("canny", ("resize=big",), "expected a whole number"),
        ("canny", ("resize=2",), "must be at least 8"),
        ("canny", ("resise=8",), "Did you mean resize"),
        ("canny", ("resize=8", "resize=9"), "given twice"),
        ("canny", ("resize",), "is not name=value"),
        ("inpaint", ("p_outpaint=2",), "between 0 and 1"),
        ("inpaint", ("share=[0.5,0.1]",), "first number"),
        ("inpaint", ("share=null",), "cannot be null"),
        ("inpaint", ("saliency_model_path=nowhere.onnx",), "not found"),
        ("sr", ("scale_factor=0.3",), "1 divided by a whole number"),
        ("folder", ("channels=2",), "must be 1"),
        ("identity", (), "is required"),
        ("a b:C", (), "is not a name such as"),
        (":C", (), "is not a name such as"),
    ],
)
def test_wrong_choices_are_told(name, params, what):
    problems = list(filter_problems(name, params))
    assert len(problems) == 1
    assert what in str(problems[0])
    with pytest.raises(UserError):
        make_filter(name, params)


@pytest.mark.parametrize("name", ["canny", "inpaint", "sr", "sr_effnet", "folder"])
def test_filters_travel_to_loader_processes(name, photo):
    maker = make_filter(name)
    again = pickle.loads(pickle.dumps(maker))
    assert np.array_equal(maker.prepare(photo, random.Random(1)), again.prepare(photo, random.Random(1)))
    assert maker.prepare(photo, random.Random(1)).dtype == np.float32


# The user's own ----------------------------------------------------------------------------------------------------

OWN = """
import torch
class Sketch:
    num_channels = 2
    def __init__(self, level=0.5):
        self.level = level
    def __call__(self, images):
        noise = torch.rand(len(images), 1, *images.shape[2:])
        return torch.cat([(images.mean(1, keepdim=True) > self.level).float(), noise], 1), "a preview"
class Wrong(Sketch):
    def __call__(self, images):
        return images
class Failing(Sketch):
    def __call__(self, images):
        raise ValueError("no")
class Nothing:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_sketches.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_sketches", None)


def test_a_filter_of_ones_own(own, photo):
    maker = make_filter("own_sketches:Sketch", ("level=0.4",))
    assert maker.num_channels == 2
    batch = torch.from_numpy(np.stack([maker.prepare(photo, random.Random(0))] * 2))
    before = torch.get_rng_state()
    condition = maker.finish(batch, nothing, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert condition.shape == (2, 2, 96, 160)
    assert torch.equal(condition[:, :1], (batch.mean(1, keepdim=True) > 0.4).float())
    assert torch.equal(condition, maker.finish(batch, nothing, 5))
    assert not torch.equal(condition, maker.finish(batch, nothing, 6))
    dotted = make_filter("own_sketches.Sketch", ("level=0.4",))
    assert torch.equal(dotted.finish(batch, nothing, 5), condition)
    pickle.loads(pickle.dumps(maker))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("own_sketches:Missing", "cannot be made"),
        ("no_such_module:Sketch", "cannot be made"),
        ("own_sketches:Nothing", "cannot be called"),
    ],
)
def test_filters_that_cannot_be_made(own, name, what):
    with pytest.raises(UserError, match=what):
        make_filter(name)


@pytest.mark.parametrize(("name", "what"), [("Wrong", "returns a tensor"), ("Failing", "fails .ValueError: no")])
def test_filters_that_do_not_work(own, name, what):
    with pytest.raises(UserError, match=what):
        make_filter(f"own_sketches:{name}").finish(torch.zeros(1, 3, 8, 8), nothing, 0)


def test_checking_a_name_runs_nothing(own):
    assert not list(filter_problems("own_sketches:Sketch", ()))
    assert "own_sketches" not in sys.modules


# What matters ------------------------------------------------------------------------------------------------------


def test_the_saliency_network_of_official_files(tmp_path, photo):
    network = _make()
    assert sum(parameter.numel() for parameter in network.parameters()) == 111_233
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.1)
    renamed = {
        f"part.{number}.{name[-6:]}": tensor for number, (name, tensor) in enumerate(network.state_dict().items())
    }
    path = tmp_path / "saliency_model.pt"
    torch.save(renamed, path)
    made = [
        prepared("inpaint", photo, f"saliency_model_path={path}", f"threshold={bounds}", "p_outpaint=0", seed=1)[3]
        for bounds in ([0, 0], [1, 1])
    ]
    assert made[0].all()
    assert not made[1].any()
    torch.save({"a": torch.zeros(3)}, path.with_name("other.pt"))
    with pytest.raises(UserError, match="no saliency model"):
        prepared("inpaint", photo, f"saliency_model_path={path.with_name('other.pt')}")
