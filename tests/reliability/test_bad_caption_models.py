"""Folders of captioning models and taggers from strangers, or damaged: one clear line, nothing of them is executed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.make_captions import main as captions
from finetune.tag_images_by_wd14_tagger import main as tags
from tests.caption_models import make_blip, make_original_blip, make_pictures
from tests.conftest import ROOT
from tests.support import run_tool

sys.path.insert(0, str(ROOT / "tests" / "unit" / "finetune"))

from tagger_models import DEFAULT_LABELS, default_tagger, mapped_tagger, save_model, weights_of  # noqa: E402


class Payload:
    """Pickles as a call that makes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch '{self.witness}'",)


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    return make_blip(tmp_path_factory.mktemp("models") / "blip")


@pytest.fixture
def place(tmp_path, blip):
    """A folder with pictures, and a copy of a model that may be spoilt."""
    make_pictures(tmp_path / "pictures", 1)
    shutil.copytree(blip, tmp_path / "blip")
    return tmp_path


@pytest.fixture
def refused(place, capsys):
    """Run a tool that must refuse its model; returns the one line that says why."""

    def run(main, *argv: object) -> str:
        capsys.readouterr()
        assert run_tool(main, place / "pictures", *argv) == 2
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and said.splitlines()[-1] == errors[0] and "Traceback" not in said, said
        assert [path.name for path in (place / "pictures").iterdir()] == ["0.png"]
        assert not (place / "witness").exists()
        return errors[0]

    return run


def cut(place: Path) -> None:
    file = place / "blip" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def spoil(change):
    def apply(place: Path) -> None:
        file = place / "blip" / "model.safetensors"
        tensors = load_file(file)
        change(tensors, "text_decoder.bert.embeddings.LayerNorm.bias")
        save_file(tensors, file, {"format": "pt"})

    return apply


def hostile(place: Path) -> None:
    (place / "blip" / "model.safetensors").unlink()
    torch.save({"a": Payload(place / "witness")}, place / "blip" / "pytorch_model.bin")


def config(change):
    def apply(place: Path) -> None:
        file = place / "blip" / "config.json"
        table = json.loads(file.read_text())
        change(table)
        file.write_text(json.dumps(table))
        (place / "blip" / "evil.py").write_text(f"open({str(place / 'witness')!r}, 'w').close()")

    return apply


def text(name: str, content: bytes | None):
    def apply(place: Path) -> None:
        if content is None:
            (place / "blip" / name).unlink()
        else:
            (place / "blip" / name).write_bytes(content)

    return apply


DAMAGES = {
    "cut weights": (cut, "incomplete"),
    "NaN": (spoil(lambda tensors, key: tensors[key].fill_(float("nan"))), "1 tensors hold NaN or infinity"),
    "missing tensor": (spoil(lambda tensors, key: tensors.pop(key)), "weights are missing or of another size"),
    "other shape": (spoil(lambda tensors, key: tensors.update({key: torch.ones(3)})), "blip"),
    "hostile pickle": (hostile, "refused: this pickle wants to use"),
    "no weights": (text("model.safetensors", None), "there are no weights in it"),
    "LFS pointer": (text("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid x\n"), "LFS"),
    "code in the folder": (
        config(lambda table: table.update(model_type="evil", auto_map={"AutoConfig": "evil.Evil"})),
        "Code in model folders is not run",
    ),
    "words for numbers": (config(lambda table: table["text_config"].update(hidden_size="big")), "hidden_size"),
    "endless layers": (
        config(lambda table: table["text_config"].update(num_hidden_layers=10**6)),
        "config.json wants 1000000 for num_hidden_layers, the limit is 1000",
    ),
    "config that is none": (text("config.json", b"["), "cannot be loaded"),
    "a list as config": (text("config.json", b"[]"), "cannot be loaded"),
    "another kind of model": (config(lambda table: table.update(model_type="bert")), "makes no texts from pictures"),
    "no picture settings": (text("preprocessor_config.json", None), "cannot be loaded"),
    "sizes that are none": (
        text("preprocessor_config.json", b'{"image_processor_type": "BlipImageProcessor", "size": {"height": "a"}}'),
        "cannot be loaded",
    ),
    "no vocabulary": (text("vocab.txt", None), "cannot be loaded"),
    "short vocabulary": (text("vocab.txt", b"a\nb\n"), "files are missing"),
    "vocabulary in another encoding": (text("vocab.txt", b"\xff\xfe\xff"), "cannot be loaded"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_of_transformers(place, refused, name):
    damage, word = DAMAGES[name]
    damage(place)
    said = refused(captions, f"--local_model={place / 'blip'}", "--max_length=8", "--min_length=1")
    assert word in said and str(place / "blip") in said


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (lambda place: {"model": Payload(place / "witness")}, "refused: this pickle wants to use"),
        (lambda place: {"model": {"a": torch.ones(2)}}, "is no captioning model of BLIP"),
        (lambda place: [1, 2], "is no captioning model of BLIP"),
    ],
)
def test_wrong_checkpoints(place, refused, content, word):
    file = make_original_blip(place / "original", place / "blip")
    torch.save(content(place), file)
    assert word in refused(captions, f"--caption_weights={file}")


def test_a_checkpoint_of_another_model_is_told_before_a_vocabulary_is_looked_for(refused, tiny_sd1):
    assert "is no captioning model of BLIP" in refused(captions, f"--caption_weights={tiny_sd1}")


def test_tags_stay_on_one_line(place, tmp_path):
    labels = [("new\nline", 0, 0, 1.0), ("\x1b[31mred\x07", 0, 0, 1.0), ("../../evil", 0, 0, 1.0), *DEFAULT_LABELS[:4]]
    default_tagger(tmp_path / "tagger", labels=labels)
    argv = (f"--local_model={tmp_path / 'tagger'}", "--thresh=0", "--remove_underscore")
    assert run_tool(tags, place / "pictures", *argv) == 0
    assert (place / "pictures" / "0.txt").read_text() == "new line, [31mred, ../../evil\n"
    assert sorted(path.name for path in (place / "pictures").iterdir()) == ["0.png", "0.txt"]


def external_data(folder: Path) -> None:
    """Let a weight of the model lie in a file elsewhere, which the format allows."""
    import onnx

    model = onnx.load(folder / "model.onnx")
    tensor = next(one for one in model.graph.initializer if one.name == "matrix")
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../../../../../../etc/passwd"
    (folder / "model.onnx").write_bytes(model.SerializeToString())


TAGGERS = {
    "sides of a million": (
        lambda folder: save_model(
            folder / "model.onnx", weights_of([0] * 9, [1] * 9), shape=["b", 10**6, 10**6, 3], axes=[1, 2]
        ),
        "the largest side is 4096",
    ),
    "a million pictures at once": (lambda folder: default_tagger(folder, batch=10**6), "pictures at once"),
    "weights elsewhere": (external_data, "is no ONNX model that can be run here"),
    "a pickle": (
        lambda folder: torch.save({"a": Payload(folder.parent / "witness")}, folder / "model.onnx"),
        "no ONNX",
    ),
    "tags of control characters": (
        lambda folder: (folder / "selected_tags.csv").write_text("tag_id,name,category\n0,\x01,0\n"),
        "nothing but control characters",
    ),
}


@pytest.mark.parametrize("name", TAGGERS)
def test_taggers_of_strangers(place, refused, name):
    folder = default_tagger(place / "tagger")
    spoil_it, word = TAGGERS[name]
    spoil_it(folder)
    said = refused(tags, f"--local_model={folder}", "--max_data_loader_n_workers=0")
    assert word in said and str(folder) in said


def test_a_table_of_tags_that_is_nested_deeply(place, refused):
    folder = mapped_tagger(place / "tagger")
    (folder / "tag_mapping.json").write_text("[" * 100_000)
    assert "nested too deeply" in refused(tags, f"--local_model={folder}")
