"""Captions by BLIP: both layouts of its weights, decoding, options, files, and agreement with transformers."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune import make_captions
from tests.caption_models import WORDS, make_blip, make_original_blip, make_pictures, write_vocabulary


def run(*argv: object) -> int:
    with pytest.raises(SystemExit) as ended:
        make_captions.main([str(item) for item in argv])
    return int(ended.value.code or 0)


def captions(folder: Path, suffix: str = ".caption") -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob(f"*{suffix}")
    }


@pytest.fixture(scope="module")
def blip(tmp_path_factory, one_torch_thread) -> Path:
    return make_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, blip) -> Path:
    return make_original_blip(tmp_path_factory.mktemp("original"), blip)


@pytest.fixture
def pictures(tmp_path) -> Path:
    return make_pictures(tmp_path / "pictures")


def reference(blip: Path, pictures: Path, **settings) -> list[str]:
    """What transformers' own classes make of the pictures, one by one."""
    from transformers import AutoProcessor, BlipForConditionalGeneration

    processor = AutoProcessor.from_pretrained(blip)
    model = BlipForConditionalGeneration.from_pretrained(blip).eval()
    texts = []
    for path in sorted(pictures.glob("*.png")):
        inputs = processor(images=Image.open(path).convert("RGB"), text="a picture of ", return_tensors="pt")
        made = model.generate(**inputs, max_length=30, min_length=5, **settings)
        texts.append(processor.tokenizer.decode(made[0], skip_special_tokens=True).removeprefix("a picture of").strip())
    return texts


@pytest.mark.parametrize("beams", [1, 3])
def test_beam_search_gives_what_transformers_gives(blip, pictures, beams):
    assert run("--local_model", blip, "--beam_search", "--num_beams", beams, "--max_length=30", pictures) == 0
    wanted = reference(blip, pictures, num_beams=beams, do_sample=False)
    assert [captions(pictures)[f"{index}.caption"] for index in range(5)] == [f"{text}\n" for text in wanted]
    assert len(set(wanted)) > 2, "the tiny model looks at the pictures"


def test_a_checkpoint_of_the_authors_gives_the_same_captions(blip, checkpoint, pictures, tmp_path):
    other = make_pictures(tmp_path / "other")
    common = ("--beam_search", "--max_length=30", "--batch_size=2")
    assert run("--local_model", blip, *common, pictures) == 0
    assert run("--caption_weights", checkpoint, *common, other) == 0
    assert captions(other) == captions(pictures)


def test_sampling_depends_on_seed_and_picture_alone(checkpoint, tmp_path):
    made = []
    for name, options in {
        "one": (),
        "three": ("--batch_size=3", "--max_data_loader_n_workers=2"),
        "seed": ("--seed=7",),
    }.items():
        folder = make_pictures(tmp_path / name)
        assert run("--caption_weights", checkpoint, "--max_length=30", *options, folder) == 0
        made.append(captions(folder))
    assert made[0] == made[1]
    assert made[0] != made[2]
    assert set(made[0]) == {f"{index}.caption" for index in range(5)}


def test_a_narrow_nucleus_is_greedy(blip, tmp_path):
    """Apart from the penalty for words that occurred, which the authors apply when they sample."""
    folder = make_pictures(tmp_path / "pictures")
    assert run("--local_model", blip, "--top_p=0.000001", "--max_length=30", folder) == 0
    wanted = reference(blip, folder, num_beams=1, do_sample=False, repetition_penalty=1.1)
    assert [captions(folder)[f"{index}.caption"] for index in range(5)] == [f"{text}\n" for text in wanted]


def test_what_users_type(checkpoint, pictures, capsys):
    """A command line as it was always typed, from any folder, with a bad picture and one in a sub-folder."""
    make_pictures(pictures / "sub ü", 1)
    (pictures / "2.png").write_bytes(b"no picture")
    options = ("--caption_extention=.txt", "--batch_size=8", "--recursive", "--debug", "--max_length=12")
    assert run("--caption_weights", checkpoint, *options, pictures) == 0
    made = captions(pictures, ".txt")
    assert set(made) == {"0.txt", "1.txt", "3.txt", "4.txt", "sub ü/0.txt"}
    assert all(re.fullmatch(r"[^\n]*\n", text) for text in made.values())
    printed = capsys.readouterr()
    assert f"{pictures / '0.png'}: {made['0.txt'].strip()}" in printed.out
    assert "4 pictures done" not in printed.err
    assert "5 pictures done, 1 failed" in printed.err
    assert "2.png: not an image (looks like text)" in printed.err


def test_skip_existing_goes_on_where_a_run_was_stopped(checkpoint, pictures, capsys):
    (pictures / "1.caption").write_text("mine")
    assert run("--caption_weights", checkpoint, "--skip_existing", "--max_length=12", pictures) == 0
    assert "4 pictures done, 1 skipped" in capsys.readouterr().err
    assert captions(pictures)["1.caption"] == "mine"
    assert run("--caption_weights=not_even_loaded.pth", "--skip_existing", pictures) == 0
    assert "0 pictures done, 5 skipped" in capsys.readouterr().err
    assert run("--caption_weights", checkpoint, "--max_length=12", pictures) == 0
    assert captions(pictures)["1.caption"] != "mine"


def test_the_prompt_begins_the_caption_and_is_not_part_of_it(blip, tmp_path):
    texts = []
    for name, options in {"usual": (), "same": ("--prompt", "A Picture of"), "dog": ("--prompt=the dog",)}.items():
        folder = make_pictures(tmp_path / name)
        assert run("--local_model", blip, "--beam_search", "--max_length=20", *options, folder) == 0
        texts.append(captions(folder))
    assert texts[0] == texts[1] != texts[2]
    assert not any(text.startswith(("a picture of", "the dog")) for table in texts for text in table.values())


def test_weights_as_a_pickle_are_read_without_running_anything(blip, pictures, tmp_path, capsys):
    from safetensors.torch import load_file

    folder = tmp_path / "bin"
    folder.mkdir()
    for path in blip.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(blip / "model.safetensors"), folder / "pytorch_model.bin")
    assert run("--local_model", folder, "--beam_search", "--max_length=30", pictures) == 0
    wanted = reference(blip, pictures, num_beams=1, do_sample=False)
    assert captions(pictures)["0.caption"] == f"{wanted[0]}\n"
    torch.save({"model": Hostile()}, folder / "pytorch_model.bin")
    assert run("--local_model", folder, pictures) == 2
    assert "nothing in it was run" in capsys.readouterr().err


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--local_model=nowhere"], "error: --local_model nowhere: is not a folder of transformers"),
        (["--model_id=owner/model"], "error: --model_id owner/model: local path not found.*offline mode is on"),
        (["--local_model=a", "--model_id=b"], "error: --local_model: cannot be combined with --model_id"),
        (["--caption_weights=a", "--model_id=b"], "error: --caption_weights: cannot be combined with --model_id"),
        (["--caption_weights=gone.pth"], "error: --caption_weights gone.pth: no such file or folder"),
        (["--min_length=20", "--max_length=10"], "error: --min_length: is 20, more than --max_length 10"),
        (["--caption_extension=.png"], "error: --caption_extension .png: is the suffix of pictures"),
        (["--device=tpu9"], "error: --device tpu9: cannot be used"),
        (["--beam_serch"], "error: --beam_serch: unknown option. Did you mean --beam_search?"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(pictures, argv, message, capsys):
    assert run(*argv, pictures) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_options_without_effect_are_mentioned(checkpoint, pictures, capsys):
    options = ("--num_beams=3", "--max_length=8")
    assert run("--caption_weights", checkpoint, *options, pictures) == 0
    assert "--num_beams: has no effect without --beam_search" in capsys.readouterr().err


def test_no_pictures(tmp_path, capsys):
    assert run("--local_model=nowhere", tmp_path) == 2
    assert "holds no pictures" in capsys.readouterr().err


def test_nothing_but_bad_pictures(blip, tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(b"")
    assert run("--local_model", blip, tmp_path) == 2
    assert "none of 1 pictures could be used" in capsys.readouterr().err


class TestVocabulary:
    """A checkpoint of the authors holds no vocabulary."""

    @pytest.fixture
    def alone(self, checkpoint, tmp_path):
        path = tmp_path / "alone" / checkpoint.name
        path.parent.mkdir()
        path.write_bytes(checkpoint.read_bytes())
        return path

    def test_it_may_be_named(self, alone, checkpoint, pictures):
        for named in (checkpoint.parent, checkpoint.parent / "vocab.txt"):
            assert run("--caption_weights", alone, "--tokenizer", named, "--max_length=8", pictures) == 0

    def test_without_one_the_ways_are_named(self, alone, pictures, capsys):
        assert run("--caption_weights", alone, pictures) == 2
        assert "needs the vocabulary of bert-base-uncased" in capsys.readouterr().err

    def test_one_of_another_size(self, alone, pictures, tmp_path, capsys):
        write_vocabulary(tmp_path / "other")
        (tmp_path / "other" / "vocab.txt").write_text("\n".join([*WORDS, "more"]))
        assert run("--caption_weights", alone, "--tokenizer", tmp_path / "other", pictures) == 2
        assert re.search(r"has \d+ words with \[DEC\] and \[ENC\]", capsys.readouterr().err)

    def test_no_vocabulary_of_bert(self, alone, pictures, tmp_path, capsys):
        (tmp_path / "vocab.txt").write_text("a\nb\n")
        assert run("--caption_weights", alone, "--tokenizer", tmp_path, pictures) == 2
        assert "is no vocabulary of BERT: it lacks [CLS]" in capsys.readouterr().err


def test_captions_end_where_the_model_has_no_more_places(blip, pictures, caplog):
    """The tiny model has 64; --max_length is 75 unless given."""
    assert run("--local_model", blip, "--beam_search", "--num_beams=2", "--min_length=64", pictures) == 0
    assert len(captions(pictures)) == 5
    assert "64 tokens at most, not of 75" in caplog.text
