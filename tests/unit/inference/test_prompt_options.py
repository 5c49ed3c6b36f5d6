"""What a prompt of gen_img.py may say, beyond what sample pictures know (test_prompts)."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import UserError
from library.inference.prompt_files import PromptEntry
from library.inference.prompt_options import GENERATION, PROMPT_OPTIONS, TRAINING_SAMPLES, Place
from library.inference.prompts import PromptRequest, parse_entry, parse_prompt_line

DEFAULTS = PromptRequest(prompt="", width=640, height=448, steps=50, scale=6.0, sampler="euler", negative_scale=2.0)


def parsed(line, **more):
    return parse_prompt_line(line, where="here", defaults=DEFAULTS, place=GENERATION, **more)


def from_table(table, place=GENERATION):
    notes = []
    request, problems = parse_entry(PromptEntry("here", table), DEFAULTS, place, notes)
    return request, problems, notes


def test_what_a_line_leaves_open_comes_from_the_defaults():
    request = parsed("a fox --w 512", index=4)
    assert (request.width, request.height, request.steps, request.scale) == (512, 448, 50, 6.0)
    assert (request.sampler, request.negative_scale, request.index, request.where) == ("euler", 2.0, 4, "here")


def test_all_options_that_only_generation_has():
    request = parsed(
        "a fox --nl 3.5 --t .4 --c a cat --am 0.5,-1,.25 --f fox 1 --d 7,8, 9 --dsd1 3 --dst1 700 --dsd2 2 --dst2 600 "
        "--dsr 0.5 --glt 750 --glr 0.75 --gle 4 --gls 0.25 --glsn 1.1 --glus 3, 0.5,0.5,1"
    )
    assert (request.negative_scale, request.strength, request.clip_prompt) == (3.5, 0.4, "a cat")
    assert (request.multipliers, request.file_name) == ((0.5, -1.0, 0.25), "fox 1")
    assert (request.seeds, request.seed) == ((7, 8, 9), 7)
    assert request.deep_shrink == {
        "depth_1": 3, "timesteps_1": 700, "depth_2": 2, "timesteps_2": 600, "ratio": 0.5
    }  # fmt: skip
    assert request.gradual_latent == {
        "timesteps": 750, "ratio": 0.75, "every_n_steps": 4, "ratio_step": 0.25, "s_noise": 1.1,
        "unsharp_params": "3,0.5,0.5,1",
    }  # fmt: skip
    assert hash(request) == hash(parsed("a fox").__class__(**{n: getattr(request, n) for n in request.__slots__}))


def test_names_ignore_case_and_the_negative_scale_can_be_switched_off():
    assert parsed("fox --NL None --AM 2").negative_scale is None
    assert parsed("fox --AM 2").multipliers == (2.0,)


def test_a_line_adds_to_what_the_defaults_shrink():
    defaults = PromptRequest(prompt="", deep_shrink={"depth_1": 3, "ratio": 0.5})
    request = parse_prompt_line("fox --dsr 0.25 --dst1 100", where="", defaults=defaults, place=GENERATION)
    assert request.deep_shrink == {"depth_1": 3, "ratio": 0.25, "timesteps_1": 100}
    assert defaults.deep_shrink == {"depth_1": 3, "ratio": 0.5}


def test_tables_take_numbers_and_lists():
    table = {"prompt": "fox", "seed": [1, 2], "network_mul": 0.5, "negative_scale": 1, "ds_ratio": 0.5, "strength": 1}
    request, problems, _ = from_table(table)
    assert not problems
    assert (request.seeds, request.seed, request.multipliers) == ((1, 2), 1, (0.5,))
    assert (request.negative_scale, request.strength, request.deep_shrink) == (1.0, 1.0, {"ratio": 0.5})
    assert len(from_table({"prompt": "fox", "seed": "1,2", "network_mul": ["a"], "nl": 3})[1]) == 3


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--w 10", "from 64 to 8192"),
        ("--d 1,,2", "separated by commas"),
        ("--d x", "--d is 'x'"),
        ("--d -1", "--d"),
        ("--d", "--d"),
        ("--am 1,x", "numbers separated by commas"),
        ("--am 1;2", "--am"),
        ("--nl often", "a number, or none"),
        ("--t 1.5", "from 0 to 1"),
        ("--t nan", "from 0 to 1"),
        ("--f ../x", "without folders"),
        ("--f con", "reserved"),
        ("--f", "is empty"),
        ("--dsd1 -1", "from 0 to 100"),
        ("--dst1 1001", "from 0 to 1000"),
        ("--dsr 0", "from 0.01 to 1"),
        ("--gle 0", "--gle"),
        ("--glus 3,0.5", "3,0.5,0.5,1"),
        ("--zz 1", "'--zz'"),
        ("--am0.5", "Write --am 0.5"),
    ],
)
def test_bad_values_are_named(option, words):
    with pytest.raises(UserError) as caught:
        parsed(f"fox {option}")
    assert str(caught.value).startswith("here: ")
    assert words in str(caught.value)


def test_options_of_the_other_place_are_told_as_such():
    with pytest.raises(UserError, match=r"unknown '--am'. It is for prompts of gen_img.py"):
        parse_prompt_line("fox --am 0.5", where="here")
    _, problems, _ = from_table({"prompt": "fox", "network_mul": 1}, TRAINING_SAMPLES)
    assert "gen_img.py" in problems[0].hint


def test_sizes_for_sdxl_are_read_but_noted_for_other_models():
    table = {"prompt": "fox", "original_width": 1024, "crop_top": 8}
    request, problems, notes = from_table(table)
    assert not problems
    assert (request.original_width, request.crop_top) == (None, None)
    assert "original_width has no effect" in notes[0]
    request, _, notes = from_table(table, Place(GENERATION.options, sdxl=True))
    assert (request.original_width, request.crop_top, notes) == (1024, 8, [])


def test_every_option_sets_a_field_that_there_is_and_has_a_flag_of_its_own():
    fields = set(PromptRequest.__slots__)
    assert all(option.field is None or option.field.partition(".")[0] in fields for option in GENERATION.options)
    assert len(GENERATION.by_flag) == len(GENERATION.options) == len(GENERATION.by_key) - 1
    assert {option.flag for option in PROMPT_OPTIONS} < set(GENERATION.by_flag)


@pytest.mark.parametrize("option", ["--l " + "9" * 100_000 + "x", "--glus " + "9" * 100_000, "--am " + "9," * 100_000])
def test_hostile_values_are_refused_quickly(option):
    start = time.process_time()
    with pytest.raises(UserError):
        parsed(f"fox {option}")
    assert time.process_time() - start < 2


FLAG = st.sampled_from([f" --{option.flag} " for option in GENERATION.options]) | st.text(max_size=4)


@settings(deadline=None)
@given(
    st.lists(FLAG | st.sampled_from(["1", "0.5", "-3", "1e9", "none", "1,2", "a", "\0", "--", "9" * 5000]), max_size=8)
)
def test_any_line_is_read_or_refused(parts):
    for place in (GENERATION, TRAINING_SAMPLES):
        request, problems = parse_entry(PromptEntry("here", "".join(parts)), DEFAULTS, place, [])
        assert all(problem.where == "here" for problem in problems)
        assert request.width % 8 == request.height % 8 == 0
        assert 1 <= request.steps <= 1000
        assert request.seed is None or 0 <= request.seed < 2**64
