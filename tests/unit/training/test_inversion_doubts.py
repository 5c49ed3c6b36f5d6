"""What the options of textual inversion make the program point out."""

from __future__ import annotations

import pytest

from library.option_parser import parse
from library.training.options_inversion import InversionTrainingOptions


@pytest.fixture
def doubts(tmp_path):
    def read(*words):
        start = ("--pretrained_model_name_or_path=owner/model", "--resolution=64", "--token_string=w")
        folders = (f"--train_data_dir={tmp_path}", f"--output_dir={tmp_path / 'out'}")
        options = parse(InversionTrainingOptions, [*start, *folders, *words])
        return [str(warning) for warning in options.warnings]

    return read


def test_the_default_rate_is_pointed_out(doubts):
    found = doubts()[-1]
    assert found.startswith("--learning_rate: is 2e-06, the default made for whole models")


@pytest.mark.parametrize("words", [("--learning_rate=1e-6",), ("--optimizer_type=AdaFactor",)])
def test_a_rate_of_ones_own_is_not(doubts, words):
    assert not [found for found in doubts(*words) if found.startswith("--learning_rate")]
