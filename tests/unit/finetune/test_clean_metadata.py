"""clean_captions_and_tags.py: the documented rules, rules from a file, and the account of what was changed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import clean_captions_and_tags as script
from finetune.clean_rules import read_rules
from finetune.clean_texts import Cleaner


def run(*argv):
    with pytest.raises(SystemExit) as ended:
        script.main([str(item) for item in argv])
    return ended.value.code


@pytest.fixture(scope="module")
def cleaner():
    return Cleaner(read_rules(None))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("1girl, long_hair, ^_^, rating:safe", "1girl, long hair, ^_^"),
        ("2girls, blue hair, red hair, long hair, smile", "2girls, long hair, smile"),
        ("2girls, blue hair, long hair, smile", "2girls, blue hair, long hair, smile"),
        ("1girl, white shirt, shirt, skirt", "1girl, white shirt, skirt"),
        ("2girls, blue eyes, red eyes, green eyes", "2girls"),
        # one person has one colour of hair, however it is described
        ("1girl, blue hair, red hair", "1girl, blue hair, red hair"),
        ("2boys, long_hair, short_hair, blue hair", "2boys, blue hair"),
        ("2girls, bob cut, hime cut, ponytail, two side up, hair bun", "2girls"),
        ("2girls, long sleeves, sleeveless", "2girls"),
        ("2girls, twintails", "2girls, twintails"),
        ("hair ornament, red hair ornament", "red hair ornament"),
        ("1girl, rating:safe, hat", "1girl"),
        ("a,b", "a,b"),
        ("", ""),
    ],
)
def test_tags(cleaner, before, after):
    assert cleaner.clean_tags(before) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a young anime woman with people", "a girl with girls"),
        ("a female in a females room", "a girl in a girls room"),
        ("anime anime anime girl", "girl"),
        ("a cartoon lady and cartoon women", "a girl and girls"),
        ("a cartoon image of an anime character", "an image of an girl"),
        ("a cartoon picture, a cartoon drawing, a cartoon figure", "a picture, a drawing, a figure"),
        ("a woman girl person", "a girl"),
        ("a duck on a rock", "a duck on a rock"),
    ],
)
def test_captions(cleaner, before, after):
    assert cleaner.clean_caption(before) == after


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["2girls", "blue hair", "red_hair", "long hair", "shirt", "white shirt", "^_^", "a"])))
def test_cleaning_clean_tags_changes_nothing(tags):
    cleaner = Cleaner(read_rules(None))
    once = cleaner.clean_tags(", ".join(tags))
    assert cleaner.clean_tags(once) == once


@pytest.fixture
def metadata(tmp_path):
    path = tmp_path / "meta.json"
    entries = {f"image_{number:02}": {"caption": "a woman", "tags": "1girl, red_hat, hat"} for number in range(8)}
    entries["other"] = {"caption": "a duck", "image_size": [3, 4], "mine": {"x": 1}}
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_says_what_it_changed(tmp_path, metadata, capsys):
    target = tmp_path / "clean.json"
    assert run(metadata, target) == 0
    entries = json.loads(target.read_text(encoding="ascii"))
    assert entries["image_07"] == {"caption": "a girl", "tags": "1girl, red hat"}
    assert entries["other"] == {"caption": "a duck", "image_size": [3, 4], "mine": {"x": 1}}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "captions: 8 of 9 changed" and "tags: 8 of 8 changed" in lines
    assert "        8  'woman' -> 'girl'" in lines
    assert "        8  removed beside a longer tag: hat" in lines
    assert "  image_00: 'a woman' -> 'a girl'" in lines and "image_07" not in "".join(lines)
    assert "  ... and 3 more (--debug shows all)" in lines
    assert run(metadata, target, "--debug") == 0
    assert "  image_07: '1girl, red_hat, hat' -> '1girl, red hat'" in capsys.readouterr().out


def test_three_files_as_of_old(tmp_path, metadata, capsys):
    assert run("some_folder", metadata, tmp_path / "clean.json") == 0
    assert "some_folder: is ignored" in capsys.readouterr().err
    assert (tmp_path / "clean.json").exists()


def test_in_place(metadata):
    assert run(metadata, metadata) == 0
    assert json.loads(metadata.read_text(encoding="utf-8"))["image_00"]["caption"] == "a girl"


def test_rules_of_ones_own(tmp_path, metadata, capsys):
    assert run("--print_rules") == 0
    printed = capsys.readouterr().out
    rules = tmp_path / "rules.toml"
    rules.write_text(printed, encoding="utf-8")
    assert read_rules(rules) == read_rules(None)
    rules.write_text('[captions]\nreplace = [["woman", "person"]]\n', encoding="utf-8")
    assert run(metadata, tmp_path / "clean.json", "--rules", rules) == 0
    entry = json.loads((tmp_path / "clean.json").read_text(encoding="utf-8"))["image_00"]
    assert entry == {"caption": "a person", "tags": "1girl, red_hat, hat"}
    assert run("--print_rules", "--rules", rules) == 0
    assert '["woman", "person"]' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[captions]\nreplace = [["a", "aa"]]', "puts 'a' in its own place"),
        ('[captions]\nreplace = [["", "x"]]', "replaces the empty text"),
        ('[captions]\nreplace = [["a"]]', "captions.replace, number 1: must be a pair of texts"),
        ("[tags]\ngeneral = ['(']", "'(' is no regular expression"),
        ("[tags]\ncut_at = 'x'", "tags.cut_at: must be a list of texts"),
        ("[tags]\ncut = ['x']", "[tags] cut: is no rule"),
        ("[[tags.ambiguous]]\nname = 'x'", "[[tags.ambiguous]] number 1: needs a pattern"),
        ("[tag]\n", "tag: is no rule"),
        ("[tags\n", "rules.toml, line 1"),
    ],
)
def test_wrong_rules(tmp_path, metadata, capsys, content, message):
    rules = tmp_path / "rules.toml"
    rules.write_text(content, encoding="utf-8")
    assert run(metadata, tmp_path / "clean.json", "--rules", rules) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "clean.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "missing: in_json and out_json"),
        (["in.json"], "missing: out_json"),
        (["gone.json", "out.json"], "not found"),
    ],
)
def test_wrong_command_lines(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_a_rule_that_lengthens_is_applied_once(tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text('[captions]\nreplace = [["ab", "bba"]]', encoding="utf-8")
    assert Cleaner(read_rules(rules)).clean_caption("a" * 50 + "b") == "a" * 49 + "bba"


def test_long_texts_among_tags_take_no_memory(cleaner):
    """Sentences may stand where tags are expected; all their endings together would be a multiple of their length."""
    import tracemalloc

    text = "word " * 20_000 + "shirt, shirt"
    tracemalloc.start()
    assert cleaner.clean_tags(text) == "word " * 20_000 + "shirt"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(text)
