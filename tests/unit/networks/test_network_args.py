"""Reading of --network_args."""

import pytest

from library.errors import UserError
from networks import lora, lora_fa
from networks.network_args import choice, flag, number, read_arguments, whole

KEYS = {"size": whole(1, 8), "rate": number(0), "fast": flag, "mode": choice("a", "b")}


def test_values_come_in_their_types():
    found = read_arguments({"size": "4", "rate": "1e-2", "fast": "True", "mode": "b"}, KEYS)
    assert found == {"size": 4, "rate": 0.01, "fast": True, "mode": "b"}


@pytest.mark.parametrize("word", ["False", "false", "0", "no"])
def test_words_for_false_are_false(word):
    assert read_arguments({"fast": word}, KEYS)["fast"] is False


@pytest.mark.parametrize("given", [{}, {"size": "None"}, {"size": ""}, {"size": None}])
def test_what_is_not_given_is_none(given):
    assert read_arguments(given, KEYS) == dict.fromkeys(KEYS)


def test_all_problems_come_together():
    with pytest.raises(UserError) as caught:
        read_arguments({"size": "9", "rate": "fast", "fast": "maybe", "mode": "c", "sise": "1", "q": "1"}, KEYS)
    text = str(caught.value)
    assert len(caught.value.problems) == 6
    for part in (
        "size: must be at most 8, got 9",
        "rate: expected a number",
        "fast: expected true or false",
        "mode: expected one of a, b, got 'c'",
        "'sise'. Did you mean size?",
        "'q'. It knows size, rate",
    ):
        assert part in text


def test_every_documented_key_is_known():
    arguments = {
        "conv_dim": "4", "conv_alpha": "1", "rank_dropout": "0.1", "module_dropout": "0.1", "dropout": "0.1",
        "block_dims": ",".join("2" * 25), "block_alphas": ",".join("1" * 25), "conv_block_dims": ",".join("2" * 25),
        "conv_block_alphas": ",".join("1" * 25),
        "down_lr_weight": "sine", "mid_lr_weight": "1", "up_lr_weight": "zeros+1",
        "block_lr_zero_threshold": "0.1", "loraplus_lr_ratio": "16", "loraplus_unet_lr_ratio": "16",
        "loraplus_text_encoder_lr_ratio": "4", "dora_wd": "True", "wd_on_output": "True",
    }  # fmt: skip
    assert not list(lora.check_network_args(4, 1.0, arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"con_dim": "4"}, "'con_dim'. Did you mean conv_dim"),
        ({"rank_dropout": "1.5"}, "rank_dropout: must be"),
        ({"rank_dropout": "1"}, "rank_dropout: must be"),
        ({"conv_dim": "-1"}, "conv_dim: must be at least 0"),
        ({"loraplus_lr_ratio": "-2"}, "loraplus_lr_ratio: must be at least 0"),
    ],
)
def test_bad_arguments_are_found_before_there_is_a_model(arguments, message):
    (problem,) = lora.check_network_args(4, 1.0, arguments)
    assert problem.where == "--network_args"
    assert message in str(problem)


def test_lora_fa_has_no_second_rate():
    (problem,) = lora_fa.check_network_args(4, 1.0, {"loraplus_lr_ratio": "16"})
    assert "loraplus_lr_ratio" in str(problem)
