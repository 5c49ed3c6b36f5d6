"""Wrong input for train_textual_inversion.py: one clear line, exit status 2, no model file written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.checkpoints.embedding_file import write_embedding
from tests.support import train_textual_inversion


def options(model: Path, photos: Path, out: Path, *more: str) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={photos}",
        f"--output_dir={out}",
        "--resolution=64",
        "--max_train_steps=1",
        "--max_data_loader_n_workers=0",
        "--use_object_template",
        "--token_string=zshs",
        *more,
    ]


CASES = {
    "no word": (("--token_string=",), "--token_string: is required"),
    "a word that is known": (("--token_string=cat",), "--token_string: the word 'cat' is already in the vocabulary"),
    "no init word": (("--init_word= ",), "--init_word: there is no word in it"),
    "no vectors": (("--num_vectors_per_token=0",), "--num_vectors_per_token"),
    "too many vectors": (("--num_vectors_per_token=76",), "76 vectors do not fit into captions of 75 tokens"),
    "no rate": (("--learning_rate=0",), "--learning_rate: is 0, so nothing would be trained"),
    "a missing file": (("--weights=missing.pt",), "--weights: file 'missing.pt' not found"),
    "cached captions": (("--cache_text_encoder_outputs",), "its new vectors are trained"),
    "dropped captions": (("--caption_dropout_rate=0.1",), "belongs to training with captions that may be dropped"),
    "a class of one's own": (("--dataset_class=a.B",), "cannot change the captions that --dataset_class serves"),
    "float8 without autocast": (("--fp8_base",), "--fp8_base: needs --mixed_precision"),
}


def assert_refused(argv, out, message, capsys):
    assert train_textual_inversion(*argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and message in lines[0], lines
    assert {path.name for path in out.glob("*")} <= {"run_summary.json"}


@pytest.mark.parametrize("case", CASES)
def test_wrong_options(case, photo_folders, tmp_path, capsys, tiny_sd1):
    more, message = CASES[case]
    assert_refused(options(tiny_sd1, photo_folders, tmp_path / "out", *more), tmp_path / "out", message, capsys)


FILES = {
    "another width": ({"clip_l": torch.ones(1, 768)}, "vectors of 768 values, but those of this model have 64"),
    "two text encoders": ({"clip_l": torch.ones(1, 64), "clip_g": torch.ones(1, 128)}, "of 64 and 128 values, but"),
    "another number": (
        {"clip_l": torch.ones(3, 64)},
        "holds 3 vectors, not 1. Give --num_vectors_per_token=3",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_embeddings(case, photo_folders, tmp_path, capsys, tiny_sd1):
    rows, message = FILES[case]
    path = write_embedding(tmp_path / "e.safetensors", rows)
    argv = options(tiny_sd1, photo_folders, tmp_path / "out", f"--weights={path}")
    assert_refused(argv, tmp_path / "out", message, capsys)


def test_no_embedding(photo_folders, tmp_path, capsys, tiny_sd1):
    argv = options(tiny_sd1, photo_folders, tmp_path / "out", f"--weights={tiny_sd1}")
    assert_refused(argv, tmp_path / "out", "is no embedding but", capsys)


def test_captions_without_the_word(photo_folders, tmp_path, capsys, tiny_sd1):
    argv = [item for item in options(tiny_sd1, photo_folders, tmp_path / "out") if "template" not in item]
    assert_refused(argv, tmp_path / "out", "no caption contains 'zshs', so nothing would be learnt", capsys)
    (photo_folders / "2_sks duck").rename(photo_folders / "2_Zshs duck")
    for path in photo_folders.rglob("*.caption"):
        path.unlink()
    assert_refused(argv, tmp_path / "out", "Some have it with other capital letters, which count", capsys)


def test_some_captions_without_the_word(photo_folders, tmp_path, tiny_sd1, caplog):
    for path in photo_folders.rglob("*.caption"):
        path.write_text("a zshs duck", encoding="utf-8")
    argv = [item for item in options(tiny_sd1, photo_folders, tmp_path / "out") if "template" not in item]
    assert train_textual_inversion(*argv) == 0
    assert "2 of 5 images have captions without 'zshs'" in caplog.text


def test_captions_that_a_dataset_file_drops(photo_folders, tmp_path, capsys, tiny_sd1):
    config = tmp_path / "data.toml"
    folder = str(photo_folders / "2_sks duck").replace("\\", "/")
    config.write_text(
        f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{folder}"\nclass_tokens = "zshs duck"\n'
        "caption_dropout_rate = 0.1\n",
        encoding="utf-8",
    )
    argv = options(tiny_sd1, photo_folders, tmp_path / "out", f"--dataset_config={config}")
    message = "--dataset_config: dataset 1: caption_dropout_rate: would drop the word that is trained"
    assert_refused(argv, tmp_path / "out", message, capsys)


def test_a_rate_that_is_too_high_saves_no_broken_file(photo_folders, tmp_path, tiny_sd1):
    argv = options(tiny_sd1, photo_folders, tmp_path / "out", "--learning_rate=1e38", "--max_train_steps=30")
    assert train_textual_inversion(*argv, "--optimizer_type=SGD", "--max_grad_norm=0", "--max_nan_steps=2") == 5
    assert not list((tmp_path / "out").glob("*.pt"))


def test_the_extended_script_explains_itself(capsys):
    import train_textual_inversion_XTI as script

    with pytest.raises(SystemExit) as ended:
        script.main(["--token_string=zshs", "--unknown"])
    assert ended.value.code == 2
    assert "train_textual_inversion_XTI.py: training a vector of its own for each layer" in capsys.readouterr().err
