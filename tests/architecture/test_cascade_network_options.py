"""The network script for stage C takes every option that sd-scripts' branch for Stable Cascade had, and alike."""

import json
from pathlib import Path

import pytest

from library.option_values import type_name
from stable_cascade_train_c_network import Options

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/stable_cascade_train_c_network_options.json").read_text(encoding="utf-8"))
OPTIONS = {name: option for name, option in Options.options().items() if option.offered}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_type_default_and_choices(name):
    option, golden = OPTIONS[name], GOLDEN[name]
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    assert (type_name(option.annotation), default) == (golden["type"], golden["default"])
    assert list(option.choices or []) == golden.get("choices", [])


def test_nothing_of_other_models_is_offered():
    assert not {"pretrained_model_name_or_path", "v2", "v_parameterization", "no_token_padding"} & set(OPTIONS)


def test_options_of_both_kinds_of_script_are_there():
    wanted = {"train_tokens", "embedding_lr", "ema_decay", "validation_split", "initial_step", "stage_c_dropout"}
    assert wanted <= set(OPTIONS)
    assert OPTIONS["stage_c_dropout"].default == 0


def test_every_option_is_explained():
    for option in OPTIONS.values():
        assert option.notes["help"].endswith("."), option.flag
        for note in ("needs", "matters_when", "excludes", "implies", "means"):
            assert set(option.notes.get(note, {})) <= set(OPTIONS), option.flag
