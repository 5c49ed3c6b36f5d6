import json
import logging
import subprocess
import sys

import pytest

from library.errors import UserError
from library.inference.prompts import PromptRequest, load_prompts, parse_prompt_line


def parsed(line, **more):
    return parse_prompt_line(line, where="here", **more)


def wrong(line):
    with pytest.raises(UserError) as caught:
        parsed(line)
    return str(caught.value)


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_all_options_of_a_line():
    line = "a (red:1.2) fox, --n blurry, low-res --w 640 --h 448 --s 12 --d 42 --l 5.5 --ss k_euler_a --cn pose.png"
    assert parsed(line) == PromptRequest(
        prompt="a (red:1.2) fox,",
        negative_prompt="blurry, low-res",
        width=640,
        height=448,
        steps=12,
        seed=42,
        scale=5.5,
        sampler="k_euler_a",
        controlnet_image="pose.png",
        where="here",
    )


def test_defaults():
    request = parsed("a fox", default_sampler="heun", index=3)
    assert (request.width, request.height, request.steps, request.scale, request.seed) == (512, 512, 30, 7.5, None)
    assert (request.sampler, request.index, request.negative_prompt) == ("heun", 3, "")


@pytest.mark.parametrize("text", ["s 10 times larger", "n o p", "d 5 roses", "w 3 women", "l 2 lamps", "ss euler"])
def test_prompt_text_is_never_read_as_an_option(text):
    request = parsed(text)
    assert request == PromptRequest(prompt=text, where="here")


def test_option_names_ignore_case_and_the_last_one_counts():
    assert parsed("fox --W 256 --w 320 --SS DDIM").width == 320


def test_a_line_may_begin_with_an_option():
    request = parsed("--n ugly --w 256")
    assert (request.prompt, request.negative_prompt, request.width) == ("", "ugly", 256)


def test_dashes_inside_the_prompt_are_text():
    assert parsed("a well-known fox -- jumping --d 1").prompt == "a well-known fox -- jumping"


@pytest.mark.parametrize(("given", "side"), [(1, 64), (64, 64), (71, 64), (515, 512), (8192, 8192)])
def test_sides_become_multiples_of_eight(given, side):
    assert parsed(f"fox --w {given}").width == side


def test_scale_may_be_negative():
    assert parsed("fox --l -3.5").scale == -3.5


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--zz 1", "'--zz'"),
        ("--w abc", "--w"),
        ("--w 999999", "8192"),
        ("--w 0", "--w"),
        ("--h -64", "--h"),
        ("--s 0", "from 1 to 1000"),
        ("--s 1001", "from 1 to 1000"),
        ("--s 2.5", "--s"),
        ("--d -1", "--d"),
        ("--d 99999999999999999999", "--d"),
        ("--l nan", "--l"),
        ("--l 1e999", "--l"),
        ("--l", "--l"),
        ("--ss eulr", "euler_a"),
        ("--w512", "Write --w 512"),
        ("--w=512", "Write --w 512"),
    ],
)
def test_bad_values_are_named(option, words):
    message = wrong(f"fox {option}")
    assert message.startswith("here: ")
    assert words in message


def test_everything_wrong_with_a_line_is_listed():
    assert len(wrong("fox --w abc --zz --s 0").splitlines()) == 3


def test_text_file(tmp_path):
    text = "\ufeff# heading\n\n   # indented comment\na fox --d 7\r\n  a duck  \n"
    first, second = load_prompts(write(tmp_path, "p.txt", text), default_sampler="euler")
    assert (first.prompt, first.seed, first.index, first.sampler) == ("a fox", 7, 0, "euler")
    assert (second.prompt, second.index) == ("a duck", 1)
    assert second.where.endswith("p.txt line 5")


def test_strict_reading_lists_every_problem_of_the_file(tmp_path):
    path = write(tmp_path, "p.txt", "fox --zz 1\nduck\nbear --w abc --s 0\n")
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    wheres = [problem.where.rsplit(" ", 1)[1] for problem in caught.value.problems]
    assert wheres == ["1", "3", "3"]


def test_lenient_reading_leaves_bad_prompts_out_and_keeps_the_numbers_of_the_others(tmp_path, caplog):
    path = write(tmp_path, "p.txt", "fox --zz 1\nduck\n")
    with caplog.at_level(logging.WARNING):
        (request,) = load_prompts(path, strict=False)
    assert (request.prompt, request.index) == ("duck", 1)
    assert "--zz" in caplog.text
    assert "line 1" in caplog.text


def test_a_file_without_usable_prompts_is_refused(tmp_path):
    for text in ("", "# only a comment\n", "fox --zz 1\n"):
        with pytest.raises(UserError, match="no usable prompt"):
            load_prompts(write(tmp_path, "p.txt", text), strict=False)


def test_options_of_other_models_are_accepted_with_a_note(tmp_path, caplog):
    path = write(tmp_path, "p.txt", "fox --g 3.5 --fs 2 --ctr 0.5 --rcfg 1\n")
    with caplog.at_level(logging.WARNING):
        assert load_prompts(path)[0].prompt == "fox"
    assert "--g has no effect" in caplog.text


def test_toml_subset_wins_over_shared_keys(tmp_path):
    text = """
[prompt]
width = 640
scale = 5
negative_prompt = "blurry"

[[prompt.subset]]
prompt = "fox"
seed = 1

[[prompt.subset]]
prompt = "duck"
width = 320
scale = -1.5
sample_steps = 3
sample_sampler = "pndm"
"""
    fox, duck = load_prompts(write(tmp_path, "p.toml", text))
    assert (fox.width, fox.scale, fox.seed, fox.negative_prompt) == (640, 5.0, 1, "blurry")
    assert (duck.width, duck.scale, duck.steps, duck.sampler) == (320, -1.5, 3, "pndm")
    assert duck.where.endswith("subset 2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[prompt]\nwidth = 3\n", "subset"),
        ("[prompt]\nwidth = \n", "line 2"),
        ("prompts = 1\n[[prompt.subset]]\nprompt='a'\n", "'prompts'"),
        ("[[prompt.subset]]\nprompt='a'\nsample_step = 3\n", "sample_steps"),
        ("[[prompt.subset]]\nprompt='a'\nwidth = '512'\n", "width is '512'"),
        ("[[prompt.subset]]\nprompt='a'\nseed = true\n", "seed"),
        ("[[prompt.subset]]\nprompt=3\n", "prompt is 3"),
    ],
)
def test_toml_problems(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        load_prompts(write(tmp_path, "p.toml", text))
    assert words in str(caught.value)
    assert "p.toml" in str(caught.value)


def test_json_holds_lines_and_tables(tmp_path):
    document = ["a fox --d 3 --w 128", {"prompt": "duck", "seed": 2**40, "height": 100, "sample_sampler": "K_LMS"}]
    fox, duck = load_prompts(write(tmp_path, "p.json", json.dumps(document)))
    assert (fox.prompt, fox.seed, fox.width) == ("a fox", 3, 128)
    assert (duck.prompt, duck.seed, duck.height, duck.sampler) == ("duck", 2**40, 96, "k_lms")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "line 1"),
        ('{"prompt": "a"}', "not a list"),
        ("[1, null]", "prompt 2"),
        ('[{"prompt": "a", "scale": NaN}]', "scale"),
        ('[{"prompt": "a", "width": 1e9}]', "width"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_json_problems(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        load_prompts(write(tmp_path, "p.json", text))
    assert words in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes("d\xfcck".encode("latin-1"))
    (tmp_path / "folder.txt").mkdir()
    write(tmp_path, "prompts.yaml", "a: b")
    for name, words in (
        ("latin.txt", "UTF-8"),
        ("folder.txt", "not a file"),
        ("missing.txt", "file not found"),
        ("prompts.yaml", ".toml or .json"),
    ):
        with pytest.raises(UserError, match=words):
            load_prompts(tmp_path / name)


def test_control_characters_do_not_reach_the_model():
    assert parsed("a\x00fox\tin\x1b[31m snow").prompt == "a fox in [31m snow"


def test_the_module_is_light():
    code = "import library.inference.prompts, sys; assert not {'torch', 'numpy', 'PIL', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
