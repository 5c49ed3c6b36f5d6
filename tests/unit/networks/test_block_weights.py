"""Ranks, alphas and learning rates by blocks of the U-Net."""

import json
import logging
import math
from pathlib import Path

import pytest
from small_models import attached, small_models

from library.errors import UserError
from networks import lora
from networks.block_weights import SD, SDXL, block_rates

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def ones(count, **changes):
    values = ["2"] * count
    for index, value in changes.items():
        values[int(index[1:])] = str(value)
    return ",".join(values)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("down_blocks_0_resnets_0_conv1", 1),
        ("down_blocks_0_attentions_1_proj_in", 2),
        ("down_blocks_0_downsamplers_0_conv", 3),
        ("down_blocks_2_attentions_0_proj_in", 7),
        ("down_blocks_2_downsamplers_0_conv", 9),
        ("down_blocks_3_resnets_1_conv2", 11),
        ("mid_block_attentions_0_proj_in", 12),
        ("mid_block_resnets_1_conv1", 12),
        ("up_blocks_0_resnets_0_conv1", 13),
        ("up_blocks_0_upsamplers_0_conv", 15),
        ("up_blocks_1_attentions_2_proj_out", 18),
        ("up_blocks_3_attentions_2_proj_out", 24),
    ],
)
def test_blocks_of_sd_are_numbered_as_in_the_original(name, index):
    assert SD.index(f"lora_unet_{name}") == index


@pytest.mark.parametrize(
    ("name", "index"),
    [("input_blocks_0_0", 1), ("input_blocks_8_1_proj_in", 9), ("middle_block_1_proj_in", 11),
     ("output_blocks_0_0_in_layers_2", 13), ("output_blocks_8_0_out_layers_3", 21)],
)  # fmt: skip
def test_blocks_of_sdxl(name, index):
    assert SDXL.index(f"lora_unet_{name}") == index


@pytest.mark.parametrize(("version", "layout"), [("sd15_conv", SD), ("sd21", SD), ("sdxl_conv", SDXL)])
def test_every_module_of_a_real_model_has_a_block(version, layout):
    names = json.loads((GOLDEN / f"lora_keys_{version}.json").read_text())
    found = {layout.index(name.partition(".")[0]) for name in names if name.startswith("lora_unet_")}
    assert None not in found
    lowest, highest = (1, 24) if layout is SD else (2, 21)
    assert (min(found), max(found)) == (lowest, highest)


def sizes(network):
    return {SD.index(a.name): (a.rank, float(a.alpha)) for a in network.unet_adapters if "_attentions_" in a.name}


def test_ranks_and_alphas_by_block():
    dims, alphas = ones(25, _1=8, _12=0), ones(25, _16=1.5)
    network = attached(lora, small_models(), block_dims=dims, block_alphas=alphas)
    assert sizes(network) == {1: (8, 2.0), 16: (2, 1.5)}
    assert {(a.rank, float(a.alpha)) for a in network.text_adapters} == {(4, 2.0)}
    assert not [a for a in network.unet_adapters if "resnets" in a.name]


def test_ranks_of_larger_convolutions_by_block():
    dims, alphas = ones(25, _1=6, _3=0), ones(25, _12=1)
    network = attached(lora, small_models(), conv_block_dims=dims, conv_block_alphas=alphas)
    conv = {SD.index(a.name): (a.rank, float(a.alpha)) for a in network.unet_adapters if a.name.endswith("conv1")}
    assert conv == {1: (6, 2.0), 12: (2, 1.0), 13: (2, 2.0), 16: (2, 2.0)}
    assert not [a for a in network.unet_adapters if "downsamplers" in a.name]
    assert {a.rank for a in network.unet_adapters if "time_emb_proj" in a.name} == {4}


def test_one_conv_rank_everywhere():
    network = attached(lora, small_models(), block_dims=ones(25), conv_dim="3")
    assert {(a.rank, float(a.alpha)) for a in network.unet_adapters if a.name.endswith("conv1")} == {(3, 1.0)}


def rates(layout=SD, **values):
    return block_rates({name: str(value) for name, value in values.items()}, layout)


def test_no_weights_mean_one_rate():
    assert block_rates({}, SD) is None


def test_numbers_with_gaps_and_short_lists(caplog):
    with caplog.at_level(logging.WARNING):
        found = rates(down_lr_weight="0.5,,2", up_lr_weight=",".join(["3"] * 14))
    assert found == (0.5, 0, 2, *[1] * 9, 1, *[3] * 12)
    assert "3 numbers for 12 blocks; the others count 1" in caplog.text
    assert "14 numbers for 12 blocks; the rest is ignored" in caplog.text


def test_one_number_is_for_the_whole_side():
    assert rates(down_lr_weight="0.5", mid_lr_weight="0.25") == (*[0.5] * 12, 0.25, *[1] * 12)


@pytest.mark.parametrize(
    ("curve", "first", "second", "last"),
    [
        ("sine", 0, math.sin(math.pi / 22), 1),
        ("cosine", 1, math.cos(math.pi / 22), 0),
        ("linear", 0, 1 / 11, 1),
        ("reverse_linear", 1, 10 / 11, 0),
        ("zeros", 0, 0, 0),
        ("linear+.25", 0.25, 0.25 + 1 / 11, 1.25),
        ("zeros+1", 1, 1, 1),
    ],
)
def test_curves(curve, first, second, last):
    found = rates(down_lr_weight=curve, up_lr_weight=curve)
    assert (found[0], found[1], found[11]) == pytest.approx((first, second, last), abs=1e-12)
    assert found[13:] == found[:12]


def test_weights_up_to_the_threshold_switch_a_block_off():
    found = block_rates({"down_lr_weight": "linear", "block_lr_zero_threshold": 0.5}, SD)
    assert [value > 0 for value in found[:12]] == [False] * 6 + [True] * 6
    network = attached(lora, small_models(), down_lr_weight="0.1", block_lr_zero_threshold="0.1")
    assert not [a for a in network.unet_adapters if "down_blocks" in a.name]


def test_sdxl_has_three_middle_blocks_and_fixed_ends():
    found = rates(SDXL, down_lr_weight="zeros", mid_lr_weight="1,2,3", up_lr_weight="linear")
    assert len(found) == 23
    assert found[:13] == (1, *[0] * 9, 1, 2, 3)
    assert found[21:] == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_dims": "2,2,2"}, "block_dims has 3 numbers, not 25"),
        ({"block_dims": "2,x"}, "block_dims: expected a whole number, got 'x'"),
        ({"block_alphas": ones(25)}, "block_alphas needs block_dims"),
        ({"block_dims": ones(25, _3=-1)}, "block_dims: must not hold numbers below 0"),
        ({"down_lr_weight": "cosin"}, "down_lr_weight: .*did you mean cosine"),
        ({"up_lr_weight": "1,a"}, "up_lr_weight: expected a number, got 'a'"),
        ({"mid_lr_weight": "-1,2"}, "mid_lr_weight: must not hold numbers below 0"),
        ({"block_lr_zero_threshold": "-1"}, "block_lr_zero_threshold: must be at least 0"),
    ],
)
def test_bad_lists_are_named(arguments, message):
    problems = "\n".join(map(str, lora.check_network_args(4, 1.0, arguments)))
    with pytest.raises(UserError, match=message):
        attached(lora, small_models(), **arguments)
    import re

    assert re.search(message, problems)


def test_rates_by_block_apply_to_a_network_from_a_file(tmp_path):
    attached(lora, small_models()).save_weights(tmp_path / "a.safetensors", None, None)
    network, _ = lora.create_network_from_weights(
        1.0, tmp_path / "a.safetensors", None, *small_models(), down_lr_weight="0", mid_lr_weight="3"
    )
    found = {a.group: a.rate_factor for a in network.unet_adapters}
    assert found == {"block1": 0, "block12": 3, "block16": 1}
