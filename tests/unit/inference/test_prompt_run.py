import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import UserError
from library.inference.prompt_files import PromptEntry
from library.inference.prompt_options import TRAINING_SAMPLES
from library.inference.prompt_run import PromptPlan, PromptRun
from library.inference.prompt_sources import InteractiveSource, ListSource, ModuleSource, file_source, line_source
from library.inference.prompts import PromptRequest

DEFAULTS = PromptRequest(prompt="", steps=20, scale=6.0)


def run_of(*lines, source=None, **plan):
    source = source or ListSource([PromptEntry(f"line {n}", line) for n, line in enumerate(lines, 1)])
    return PromptRun(source, PromptPlan(**{"seed": 42, **plan}), DEFAULTS)


def seeds(*lines, **plan):
    return [request.seed for request in run_of(*lines, **plan)]


def drawn(count, seed=42):
    chance = random.Random(seed)
    return [chance.randint(0, 2**32 - 1) for _ in range(count)]


def test_the_only_picture_of_a_run_has_the_seed_of_the_run():
    assert seeds("a fox") == [42]
    assert seeds("{a|b} fox", seed=2**40) == [2**40]
    assert seeds("a fox", n_iter=2) == drawn(2)
    assert seeds("a fox", images_per_prompt=2) == drawn(2)


def test_seeds_are_drawn_in_the_order_of_the_pictures():
    run = run_of("fox", "duck", images_per_prompt=2, n_iter=2)
    made = list(run)
    assert [request.prompt for request in made] == ["fox", "fox", "duck", "duck"] * 2
    assert [request.seed for request in made] == drawn(8)
    assert [request.index for request in made] == [0, 0, 1, 1] * 2
    assert [len(group) for group in run.groups()] == [2, 2, 2, 2]


def test_known_seeds():
    """Those of Python's generator, which other programs seed in the same way."""
    assert seeds("a", "b", seed=1) == [3280387012, 1095513148]


def test_pictures_with_seeds_of_their_own_draw_none():
    assert seeds("fox --d 7", "duck") == [7, *drawn(1)]
    assert seeds("fox --d 7,8", "duck", images_per_prompt=3) == [7, 8, 8, *drawn(3)]
    assert seeds("fox --d 7", n_iter=2) == [7, 7]


def test_a_round_can_have_one_seed():
    one, two = drawn(2)
    assert seeds("fox", "duck", "bear --d 5", iter_same_seed=True, n_iter=2) == [one, one, 5, two, two, 5]


def test_without_a_seed_runs_differ_and_tell_theirs():
    first, second = run_of("fox", seed=None), run_of("fox", seed=None)
    assert first.seed != second.seed
    assert [request.seed for request in first] == [first.seed]


def test_variants_share_the_seeds_of_their_line_and_keep_the_line_as_written():
    line = "a {e$$red|green|blue} fox --d 3,4 --n {x}"
    made = list(run_of(line, images_per_prompt=2))
    assert [(one.prompt, one.seed) for one in made] == [("a red fox", 3), ("a green fox", 4), ("a blue fox", 4)]
    assert {(one.raw_prompt, one.negative_prompt, one.where) for one in made} == {(line, "x", "line 1")}
    options = {(one.width, one.seed) for one in run_of("fox --w {e$$256|512} --d {1}")}
    assert options == {(256, 1), (512, 1)}


def test_what_is_chosen_depends_on_seed_round_and_line_only():
    lines = ["{a|b|c|d|e|f} {g|h|i|j}"] * 6
    made = [one.prompt for one in run_of(*lines)]
    assert made == [one.prompt for one in run_of(*lines)]
    assert len(set(made)) > 2
    assert made != [one.prompt for one in run_of(*lines, seed=43)]
    assert made[1:] == [one.prompt for one in run_of("--zz", *lines[1:])]
    both = [one.prompt for one in run_of(*lines, n_iter=2)]
    assert both[:6] == made != both[6:]
    assert seeds(*lines) == seeds(*["plain"] * 6), "variants draw no seeds"


def test_shuffled_prompts():
    lines = [f"prompt {n}" for n in range(20)]
    made = [one.prompt for one in run_of(*lines, shuffle_prompts=True, n_iter=2)]
    assert sorted(made[:20]) == sorted(made[20:]) == sorted(lines)
    assert lines != made[:20] != made[20:]
    assert made == [one.prompt for one in run_of(*lines, shuffle_prompts=True, n_iter=2)]


def test_bad_lines_are_told_once_and_the_others_drawn(caplog):
    told = []
    lines = ["fox --zz 1 --w abc", "duck", "{a|b} {1-$$c|d}", "bear --l x"]
    entries = [PromptEntry(f"p.txt line {n}", line) for n, line in enumerate(lines, 1)]
    run = PromptRun(ListSource(entries), PromptPlan(seed=1, n_iter=3), DEFAULTS, on_problem=told.append)
    assert [one.prompt for one in run] == ["duck"] * 3
    assert [problem.where for problem in told] == [f"p.txt line {n}" for n in (1, 1, 3, 4)]
    assert told == run.problems
    assert ["--zz" in told[0].what, "--w" in told[1].what, "1-" in told[2].what, "--l" in told[3].what] == [True] * 4
    assert list(run_of("fox --zz")) == []
    assert "prompt skipped: line 1" in caplog.text


def test_prompts_can_be_checked_before_they_are_drawn(caplog):
    run = run_of("a cat --zz", "a dog", seed=5)
    run.check()
    assert caplog.text.count("line 1") == 1
    assert [request.prompt for request in run] == ["a dog"]
    assert caplog.text.count("line 1") == 1
    assert [request.seed for request in run] == [request.seed for request in run_of("a cat --zz", "a dog", seed=5)]
    with pytest.raises(UserError, match="'--zz'(.|\n)*--s is 'x'"):
        run_of("a cat --zz", "a dog --s x").check()


def test_notes(caplog):
    list(run_of("fox --ow 3", "a } fox", "bear --d 1", images_per_prompt=2))
    assert "line 1: --ow has no effect" in caplog.text
    assert "line 2: a brace without its partner" in caplog.text
    assert "line 3: its 2 pictures are alike" in caplog.text
    assert len(caplog.records) == 3
    list(run_of("fox --d 1,2,3", "duck --d 4,5", "{e$$a|b} --d 1,2"))
    assert "line 1: 2 seeds are left over" in caplog.text
    assert "line 2: 1 seed is left over" in caplog.text
    assert len(caplog.records) == 5


def test_tables_are_expanded_together():
    table = {"prompt": "{e$$a|b} fox", "negative_prompt": "{e$$c|d}", "width": 256, "scale": 3}
    made = list(run_of(source=ListSource([PromptEntry("t", table)])))
    assert [(one.prompt, one.negative_prompt) for one in made] == [
        ("a fox", "c"), ("a fox", "d"), ("b fox", "c"), ("b fox", "d")
    ]  # fmt: skip
    assert {(one.width, one.scale, one.steps, one.raw_prompt) for one in made} == {(256, 3.0, 20, "{e$$a|b} fox")}
    loose = {"prompt": "{a|b", "negative_prompt": "c|d}"}
    (request,) = run_of(source=ListSource([PromptEntry("t", loose)]))
    assert (request.prompt, request.negative_prompt) == ("{a|b", "c|d}")


def test_prompts_of_pictures_are_taken_as_they_are():
    entry = PromptEntry("a.png", {"prompt": "a {red|green} fox --w 3", "negative_prompt": r"\{"})
    (request,) = run_of(source=ListSource([entry], dynamic=False))
    assert (request.prompt, request.negative_prompt) == ("a {red|green} fox --w 3", r"\{")


def test_the_place_decides_about_options():
    run = PromptRun(line_source("fox --am 1"), PromptPlan(), DEFAULTS, place=TRAINING_SAMPLES)
    assert not list(run)
    assert "gen_img.py" in run.problems[0].hint


def test_lines_of_a_file_with_any_name(tmp_path):
    path = tmp_path / "prompts"
    path.write_text("# heading\n\n a fox --d 3\nbär\n", encoding="utf-8")
    made = list(run_of(source=file_source(path)))
    assert [(one.prompt, one.where) for one in made] == [("a fox", f"{path} line 3"), ("bär", f"{path} line 4")]
    (tmp_path / "p.toml").write_text("[[prompt.subset]]\nprompt='duck'\nnetwork_mul=[0.5]\n", encoding="utf-8")
    (request,) = run_of(source=file_source(tmp_path / "p.toml"))
    assert (request.prompt, request.multipliers, request.seed) == ("duck", (0.5,), 42)
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(UserError, match="no prompt"):
        file_source(path)


def test_typed_prompts_are_drawn_one_by_one():
    typed = iter(["a fox --w 256", "", "# no", "bad --zz", "duck"])
    asked = []

    def ask():
        asked.append(len(asked))
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    run = run_of(source=InteractiveSource(ask), images_per_prompt=2)
    groups = run.groups()
    assert [one.prompt for one in next(groups)] == ["a fox", "a fox"]
    assert len(asked) == 1, "the next line is asked for when it is needed"
    (duck, _) = next(groups)
    assert (duck.prompt, duck.where, run.problems[0].where) == ("duck", "line 5", "line 4")
    assert list(groups) == []


PROMPTER = """
import random
class Prompter:
    def __init__(self, args, pipe, networks):
        self.words, self.calls = list(args.words), []
        self.extra = [pipe, *networks]
    def shuffle(self):
        self.words.reverse()
    def __call__(self, args, pipe, seed_random, iter_seed, prompt_index, global_step):
        assert isinstance(seed_random, random.Random)
        if prompt_index >= len(self.words):
            return None
        return f"{self.words[prompt_index]} {prompt_index} {global_step} {self.extra} --d 1"
def get_prompter(args, pipe, networks):
    return Prompter(args, pipe, networks)
"""


class Args:
    words = ("a", "b")


def module(tmp_path, text):
    path = tmp_path / "prompter.py"
    path.write_text(text, encoding="utf-8")
    return ModuleSource(path, Args(), "pipe", ["net"])


def test_prompts_of_a_module(tmp_path):
    made = [one.prompt for one in run_of(source=module(tmp_path, PROMPTER), n_iter=2, shuffle_prompts=True)]
    assert made == [f"{word} {n % 2} {n} ['pipe', 'net']" for n, word in enumerate("baab")]


def test_a_module_may_return_a_list_a_generator_or_tables(tmp_path, caplog):
    text = "def get_prompter(args, pipe, networks):\n    return ['fox --w 256', {'prompt': 'duck', 'seed': 5}]\n"
    made = list(run_of(source=module(tmp_path, text), n_iter=2, shuffle_prompts=True))
    assert [(one.prompt, one.width) for one in made] == [("fox", 256), ("duck", 512)] * 2
    assert made[1].seed == 5
    assert "no method shuffle" in caplog.text
    text = "def get_prompter(args, pipe, networks):\n    yield 'fox'\n"
    assert len(list(run_of(source=module(tmp_path, text)))) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "get_prompter"),
        ("def get_prompter(:\n", "SyntaxError"),
        ("import nothing_of_that_name\n", "line 1: import failed: ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "SystemExit"),
        ("def get_prompter(*a):\n    return 3\n", "returned 3"),
        ("def get_prompter(*a):\n    1 / 0\n", "line 2: get_prompter failed: ZeroDivisionError"),
        ("def get_prompter(*a):\n    return lambda *b: 7\n", "gave 7"),
        ("def get_prompter(*a):\n    return lambda: 'x'\n", "prompter failed: TypeError"),
        ("def get_prompter(*a):\n    yield 'a'\n    [][1]\n", "line 3: prompter failed: IndexError"),
    ],
)
def test_failures_of_a_module_are_one_line(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        list(run_of(source=module(tmp_path, text)))
    assert words in str(caught.value)
    assert "prompter.py" in str(caught.value)


def test_files_that_are_no_module(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        ModuleSource(tmp_path / "missing.py", Args(), None, [])
    (tmp_path / "prompts.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"\.py"):
        ModuleSource(tmp_path / "prompts.txt", Args(), None, [])


PIECES = [
    "{",
    "}",
    "|",
    "e$$",
    "2$$",
    "1-$$",
    "a",
    " --n ",
    " --d ",
    "1,2",
    " --w ",
    "256",
    "\\",
    "\0",
    "\n",
    "--",
    "#",
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@settings(deadline=None)
@given(TEXT, TEXT, st.integers(1, 3))
def test_any_prompt_is_planned_or_told(one, two, count):
    entries = [PromptEntry("line", one), PromptEntry("table", {"prompt": one, "negative_prompt": two})]
    run = PromptRun(ListSource(entries), PromptPlan(seed=1, images_per_prompt=count), DEFAULTS, on_problem=str)
    made = list(run)
    assert {request.where for request in made} | {problem.where for problem in run.problems} == {"line", "table"}
    assert all(request.seed is not None and request.raw_prompt == one for request in made)
    assert not any("\0" in request.prompt + request.negative_prompt for request in made)
