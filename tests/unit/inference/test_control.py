"""Which guide belongs to which ControlNet and prompt, how preparations are written, and when a ControlNet works."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from library.contracts import Condition
from library.errors import UserError
from library.inference.control import ControlNet, ControlNets
from library.inference.extensions import BatchContext, DenoiserInput, Moment, PictureInputs
from library.inference.guides import guide_sets, preparation
from library.inference.prompts import PromptRequest

A, B, C, D = (Path(name) for name in "abcd")


@pytest.mark.parametrize(
    ("pictures", "nets", "sets"),
    [
        ([[A]], 1, [(A,)]),
        ([[A, B]], 1, [(A,), (B,)]),
        ([[A], [B]], 2, [(A, B)]),
        ([[A, B, C], [D]], 2, [(A, D), (B, D), (C, D)]),
        ([[A]], 2, [(A, A)]),
        ([[A, B, C, D]], 2, [(A, B), (C, D)]),
        ([[A], [B], [C], [D]], 2, [(A, B), (C, D)]),
        ([[A], [B]], 1, [(A,), (B,)]),
    ],
)
def test_guides_are_shared_out(pictures, nets, sets):
    assert guide_sets(pictures, nets) == sets


def test_guides_that_do_not_go_round_are_refused():
    with pytest.raises(UserError, match="3 pictures cannot be shared out among 2 ControlNets"):
        guide_sets([[A, B, C]], 2)


def test_canny_finds_edges_and_none_changes_nothing():
    levels = np.zeros((32, 32, 3), np.uint8)
    levels[:, 16:] = 200
    picture = Image.fromarray(levels)
    assert preparation("none")(picture) is picture
    edges = np.asarray(preparation("canny_50_100")(picture))
    assert edges.shape == (32, 32, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert 15 in np.nonzero(edges[16, :, 0])[0] or 16 in np.nonzero(edges[16, :, 0])[0]
    assert not edges[:, :10].any()


@pytest.mark.parametrize(
    ("text", "thresholds"),
    [("canny", (63, 191)), ("canny_20", (20, 191)), ("Canny_100_300", (100, 300)), ("None", None)],
)
def test_preparations_as_sd_scripts_reads_them(text, thresholds):
    """Thresholds may be left out; they may exceed 255, since they limit gradients, not brightness."""
    import cv2

    levels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
    edges = levels if thresholds is None else np.repeat(cv2.Canny(levels, *thresholds)[..., None], 3, axis=2)
    assert np.array_equal(np.asarray(preparation(text)(Image.fromarray(levels))), edges)


@pytest.mark.parametrize("text", ["canny_", "canny_1_", "canny_1_2_3", "depth", "canny_a_b", ""])
def test_unknown_preparations_are_refused(text):
    with pytest.raises(UserError, match="--control_net_preps"):
        preparation(text)


def test_as_many_guides_as_nets():
    extension, request = ControlNets([ControlNet(None)] * 2), PromptRequest(prompt="x", where="line 3")
    guide = Image.new("RGB", (8, 8))
    assert extension.batch_key(request, PictureInputs()) != extension.batch_key(
        request, PictureInputs(guides=(guide,) * 2)
    )
    with pytest.raises(UserError, match="line 3: 1 guide pictures for 2 ControlNets"):
        extension.batch_key(request, PictureInputs(guides=(guide,)))


class Net(torch.nn.Module):
    """Notes what it is given."""

    dtype = torch.float32
    config: ClassVar[dict[str, bool]] = {}

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, noisy, t, hidden, guide, scale, return_dict):
        self.seen.append(guide)
        return [noisy * scale], noisy * scale


def batch(requests, inputs):
    return BatchContext(
        family=None,
        device=torch.device("cpu"),
        requests=tuple(requests),
        inputs=tuple(inputs),
        generators=(),
        scheduler=None,
        timesteps=torch.arange(2),
        latent_shape=(4, 8, 8),
        branches=2,
        vae_batch=1,
        encode=None,
    )


def test_guides_follow_the_rows_and_the_size_of_the_latents():
    guides = [Image.new("RGB", (30, 20), color) for color in ((255, 0, 0), (0, 255, 0))]
    requests = [PromptRequest(prompt="x", width=64, height=64)] * 2
    net = Net()
    with ControlNets([ControlNet(net, 2.0)]).begin(
        batch(requests, [PictureInputs(guides=(guide,)) for guide in guides])
    ) as hooks:
        for side in (8, 4):
            noisy = torch.ones(4, 4, side, side)
            call = DenoiserInput(noisy, torch.zeros(4), Condition(torch.zeros(4, 1, 1)))
            residuals = hooks.control(Moment(0, 2, 999), call)
            assert torch.equal(residuals["mid_block_additional_residual"], noisy * 2)
            assert net.seen[-1].shape == (4, 3, 8 * side, 8 * side)
            assert net.seen[-1][:, :2, 0, 0].tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("ratio", "works"), [(1.0, [1, 1, 1, 1]), (0.5, [1, 1, 0, 0]), (0.6, [1, 1, 0, 0]), (0, [0] * 4)]
)
def test_the_share_of_the_steps(ratio, works):
    net = ControlNet(None, ratio=ratio)
    assert [net.works_at(Moment(index, 4, 0)) for index in range(4)] == [bool(one) for one in works]
    assert not ControlNet(None, multiplier=0).works_at(Moment(0, 4, 0))
