"""One number per sample: the element-wise losses, masks, and gradients at the places where they could break."""

import pytest
import torch

from library.training.loss import LOSSES, make_loss
from library.training.options import LossOptions

PREDICTION = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
TARGET = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2))
C = torch.tensor([0.1, 0.7])
D = PREDICTION - TARGET
C4 = C.view(2, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("l2", D**2),
        ("l1", D.abs()),
        ("huber", 2 * C4 * ((D**2 + C4**2).sqrt() - C4)),
        ("smooth_l1", 2 * ((D**2 + C4**2).sqrt() - C4)),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_losses(name, expected, masked):
    mask = torch.rand(2, 1, 64, 96, generator=torch.Generator().manual_seed(3)) if masked else None
    if mask is not None:
        expected = expected * mask.view(2, 1, 8, 8, 12, 8).mean(dim=(3, 5))
    loss = make_loss(LossOptions(loss_type=name))(PREDICTION, TARGET, mask, C)
    torch.testing.assert_close(loss, expected.mean(dim=(1, 2, 3)))
    assert loss.shape == (2,)


def test_every_choice_of_the_option_exists():
    assert set(LOSSES) == {"l1", "l2", "huber", "smooth_l1"}


def test_half_precision_is_compared_in_float32():
    loss = make_loss(LossOptions())(PREDICTION.bfloat16(), TARGET, None, None)
    assert loss.dtype == torch.float32


def test_the_mean_is_not_divided_by_the_area_of_the_mask():
    mask = torch.zeros(2, 1, 64, 96)
    mask[0, :, :, :48] = 1
    loss = make_loss(LossOptions())(torch.ones(2, 4, 8, 12), torch.zeros(2, 4, 8, 12), mask, None)
    assert loss.tolist() == [0.5, 0.0]


def test_a_mask_without_a_whole_number_of_pixels_per_latent():
    mask = torch.rand(2, 1, 60, 100)
    loss = make_loss(LossOptions())(PREDICTION, TARGET, mask, None)
    assert torch.isfinite(loss).all()


@pytest.mark.parametrize("name", ["huber", "smooth_l1", "l1", "l2"])
def test_gradients_are_finite_where_prediction_and_target_agree(name):
    prediction = TARGET.clone().requires_grad_()
    make_loss(LossOptions(loss_type=name))(prediction, TARGET, None, C).sum().backward()
    assert torch.equal(prediction.grad, torch.zeros_like(TARGET))


def test_huber_losses_need_their_threshold():
    with pytest.raises(ValueError, match="threshold"):
        make_loss(LossOptions(loss_type="huber"))(PREDICTION, TARGET, None, None)
