"""Captions by GIT: agreement with transformers, options, and phrases about lettering that are cut out."""

import re
from pathlib import Path

import pytest
from PIL import Image

from finetune import make_captions, make_captions_by_git
from finetune.remove_words import without_words
from tests.caption_models import make_git, make_pictures


def run(*argv: object, script=make_captions_by_git) -> int:
    with pytest.raises(SystemExit) as ended:
        script.main([str(item) for item in argv])
    return int(ended.value.code or 0)


def captions(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.caption"))]


@pytest.fixture(scope="module")
def git(tmp_path_factory, one_torch_thread) -> Path:
    return make_git(tmp_path_factory.mktemp("git"))


def reference(git: Path, pictures: Path, **settings) -> list[str]:
    from transformers import AutoProcessor, GitForCausalLM

    processor = AutoProcessor.from_pretrained(git)
    model = GitForCausalLM.from_pretrained(git).eval()
    texts = []
    for path in sorted(pictures.glob("*.png")):
        inputs = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")
        made = model.generate(pixel_values=inputs["pixel_values"], do_sample=False, **settings)
        texts.append(" ".join(processor.tokenizer.decode(made[0], skip_special_tokens=True).split()))
    return texts


def test_captions_are_what_transformers_gives(git, tmp_path):
    pictures = make_pictures(tmp_path / "pictures")
    assert run("--local_model", git, "--max_length=20", "--batch_size=2", pictures) == 0
    wanted = reference(git, pictures, max_length=20)
    assert captions(pictures) == [f"{text}\n" for text in wanted]
    assert len(set(wanted)) > 2, "the tiny model looks at the pictures"


def test_a_folder_may_also_be_given_as_model_id(git, tmp_path):
    pictures = make_pictures(tmp_path / "pictures", 2)
    assert run("--model_id", git, "--max_length=10", pictures) == 0
    assert captions(pictures) == [f"{text}\n" for text in reference(git, pictures, max_length=10)]


def test_make_captions_works_with_git_too(git, tmp_path):
    pictures = make_pictures(tmp_path / "pictures", 3)
    options = ("--beam_search", "--num_beams=2", "--max_length=16")
    assert run("--model_id", git, *options, pictures, script=make_captions) == 0
    assert captions(pictures) == [
        f"{text}\n" for text in reference(git, pictures, max_length=16, min_length=5, num_beams=2)
    ]
    prompted = make_pictures(tmp_path / "prompted", 3)
    assert run("--model_id", git, *options, "--prompt=the dog", prompted, script=make_captions) == 0
    assert captions(prompted) != captions(pictures)
    assert not any(text.startswith("the dog the dog") for text in captions(prompted))


def test_words_are_removed_on_request(git, tmp_path, monkeypatch):
    from finetune import captioning

    monkeypatch.setattr(captioning.Captioner, "work", lambda self, paths, inputs: ['a cat that says "meow"'])
    pictures = make_pictures(tmp_path / "pictures", 1)
    assert run("--local_model", git, pictures) == 0
    assert captions(pictures) == ['a cat that says "meow"\n']
    assert run("--local_model", git, "--remove_words", pictures) == 0
    assert captions(pictures) == ["a cat\n"]


@pytest.mark.parametrize(
    ("caption", "rest"),
    [
        ("a girl with the word anime on it", "a girl"),
        ("a girl with the words 'hello world' on the front.", "a girl."),
        ('a shirt that has the word "love" written on the front of it', "a shirt"),
        ("a red car has the name max", "a red car"),
        ("a dog and a sign with the letters a b c on a wall", "a dog and a sign"),
        ("a poster with the name 'bob' in the corner, a lamp", "a poster, a lamp"),
        ("a man with a sign that says stop", "a man with a sign"),
        ('a mug that says "good morning" on the table and a spoon', "a mug and a spoon"),
        ("a book which reads the word peace on it", "a book"),
        ("a player with the number 23 on his back", "a player"),
        ("a cup that says 'i'm happy' on it and a plate", "a cup and a plate"),
        ("a horse with the number 5", "a horse with the number 5"),
        ("a wall, word art on it", "a wall"),
        ("a cat with the word a and the name tom", "a cat"),
        ("a cat with the words", "a cat"),
        ("a shirt with the words on it", "a shirt"),
        ("a shirt with the words on the front of it and a hat", "a shirt and a hat"),
        ("a cat with the words '", "a cat"),
        ("a cat that says 'oh my", "a cat"),
        ("a dog with the wordless book", "a dog with the wordless book"),
        ("a woman with the wind in her hair", "a woman with the wind in her hair"),
        ("a cat and a dog on it", "a cat and a dog on it"),
        ("A Girl With The Word Anime On It", "A Girl"),
        ("with the word x on it", "with the word x on it"),
        ("", ""),
    ],
)
def test_phrases_about_lettering(caption, rest):
    assert without_words(caption) == rest


@pytest.mark.parametrize("length", [1000, 5000])
def test_long_captions_take_no_time(length):
    assert without_words("with the word " * (length // 14))
    assert without_words("and " * (length // 4) + "that says '")


def test_a_missing_model_is_said_in_one_line(tmp_path, capsys):
    pictures = make_pictures(tmp_path / "pictures", 1)
    assert run(pictures) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert re.search("--model_id microsoft/git-large-textcaps: .*offline mode is on.*hf download", lines[0])
