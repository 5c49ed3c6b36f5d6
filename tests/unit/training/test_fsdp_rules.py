"""How weights are cut up, and who may ask for it."""

import pytest
import torch
from torch import nn

from library.training.fsdp import _cut
from library.training.fsdp_checks import launcher_problems
from library.training.options import DistributedOptions
from library.training.options_cascade_run import CascadeDistributedOptions
from library.training.pieces import own_piece, piece_of, put_together


@pytest.fixture
def cut(monkeypatch):
    """What is cut up, in order: module and settings."""
    calls = []
    monkeypatch.setattr(
        "torch.distributed.fsdp.fully_shard", lambda module, **settings: calls.append((module, settings))
    )
    return calls


def test_blocks_are_exchanged_in_half_precision_and_times_never(cut):
    from library.models.cascade.unet import CascadeUNet
    from library.models.random_cascade import TINY_C

    unet = CascadeUNet(TINY_C)
    _cut(unet, None, torch.bfloat16)
    assert [module for module, _ in cut][-1] is unet
    assert {id(block) for block in unet.all_blocks()} < {id(module) for module, _ in cut}
    rules = [settings["mp_policy"] for _, settings in cut]
    # A cast of inputs would round the times, and what blocks add to.
    assert not any(rule.cast_forward_inputs for rule in rules)
    assert {rule.reduce_dtype for rule in rules} == {torch.float32}
    assert {rule.param_dtype for rule in rules[:-1]} == {torch.bfloat16}
    assert rules[-1].param_dtype is None


def test_norms_with_weights_stay_exact_and_small_blocks_go_with_the_rest(cut):
    layers = nn.ModuleList(
        [nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)), nn.Linear(64, 64), nn.ModuleList([nn.Linear(2, 1)])]
    )
    model = nn.Sequential(nn.Embedding(100, 64), layers)
    _cut(model, None, torch.bfloat16)
    assert [module for module, _ in cut] == [layers[0], layers[1], model]
    assert [settings["mp_policy"].param_dtype for _, settings in cut] == [None, torch.bfloat16, None]


def test_what_is_not_cut_is_whole():
    whole = torch.ones(3)
    assert own_piece(whole) is piece_of(whole, whole) is put_together(whole, whole) is whole


def test_a_launcher_may_ask_scripts_that_offer_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not list(launcher_problems(DistributedOptions()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    (problem,) = launcher_problems(DistributedOptions())
    assert "accelerate launch --use_fsdp" in str(problem)
    offering = CascadeDistributedOptions()
    assert not list(launcher_problems(offering))
    assert offering.sharing == "accelerate launch --use_fsdp"
    assert CascadeDistributedOptions(fsdp=True).sharing == "--fsdp"
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert CascadeDistributedOptions().sharing == ""
