"""The options of train_db.py are those that users' command lines and scripts were written for, plus ours."""

import ast
import json
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

import train_db
from library.option_parser import parse
from library.option_values import type_name
from library.retired import ELSEWHERE, NO_EFFECT_IN, SPELLINGS

ROOT = Path(__file__).parents[2]
DECLARATIONS = {"options.py", "options_objective.py", "options_output.py", "checks.py", "retired.py", "options_doc.py"}
# Options that ask for what always happens, and one that its group reads itself.
HONOURED = {"sdpa", "persistent_data_loader_workers", "resume_override"}

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "train_db_options.json").read_text(encoding="utf-8"))
OURS = {
    "allow_nan_weights",
    "cache_dir",
    "cache_hash",
    "cache_trust_mtime",
    "caption_encoding",
    "check_images",
    "deterministic",
    "fast_resume",
    "log_every_n_steps",
    "max_image_pixels",
    "max_nan_steps",
    "no_exif_transpose",
    "no_save_on_interrupt",
    "overwrite",
    "resume_override",
    "save_retry_minutes",
    "skip_bad_files",
    "strict_args",
}

OPTIONS = {name: option for name, option in train_db.Options.options().items() if option.offered}


def test_same_options_as_golden():
    assert set(OPTIONS) == set(GOLDEN) | OURS


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_type_default_and_choices(name):
    option, golden = OPTIONS[name], GOLDEN[name]
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    assert (type_name(option.annotation), default) == (golden["type"], golden["default"])
    assert list(option.choices or []) == golden.get("choices", [])


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_option_is_explained(name):
    text = OPTIONS[name].notes["help"]
    assert text[0].isupper() or text.split()[0].strip(":,.`-").islower()
    assert text.endswith(".")


def test_conditions_name_known_options():
    for name, option in OPTIONS.items():
        for note in ("needs", "matters_when", "excludes", "implies", "means"):
            for other in option.notes.get(note, {}):
                assert other in OPTIONS, f"--{name}: {note} names {other}"


def test_tables_of_names_agree_with_the_options():
    assert not set(ELSEWHERE) & set(OPTIONS)
    assert set(SPELLINGS.values()) <= set(OPTIONS)
    assert {name for name, scripts in NO_EFFECT_IN.items() if "train_db" in scripts} <= set(OPTIONS)


@pytest.fixture
def places(tmp_path):
    (tmp_path / "T" / "10_sks dog").mkdir(parents=True)
    (tmp_path / "R" / "1_dog").mkdir(parents=True)
    (tmp_path / "M").mkdir()
    return {name: str(tmp_path / name) for name in "TRMO"}


def test_documented_command_lines_parse(places, monkeypatch):
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    start = [
        f"--pretrained_model_name_or_path={places['M']}",
        f"--train_data_dir={places['T']}",
        f"--reg_data_dir={places['R']}",
        f"--output_dir={places['O']}",
        "--prior_loss_weight=1.0",
    ]
    first = parse(
        train_db.Options,
        start
        + shlex.split(
            "--resolution=512 --train_batch_size=1 --learning_rate=1e-6 --max_train_steps=1600 --use_8bit_adam "
            "--xformers --mixed_precision=bf16 --cache_latents --gradient_checkpointing"
        ),
    )
    assert first.optimizer.learning_rate == 1e-6
    assert not first.warnings
    second = parse(
        train_db.Options,
        start
        + shlex.split(
            "--resolution=768,512 --train_batch_size=20 --learning_rate=5e-6 --max_train_steps=800 --use_8bit_adam "
            "--xformers --mixed_precision=bf16 --save_every_n_epochs=1 --save_state --save_precision=bf16 "
            "--logging_dir=logs --enable_bucket --min_bucket_reso=384 --max_bucket_reso=1280 --color_aug --flip_aug "
            "--gradient_checkpointing --seed 42"
        ),
    )
    assert second.data.resolution == "768,512"
    assert (second.length.seed, second.data.batch_size) == (42, 20)
    assert not second.warnings


def _words_of_consumers():
    """Return every attribute name and text constant of the code outside the declarations."""
    words = set()
    files = [*(ROOT / "library").rglob("*.py"), ROOT / "train_db.py"]
    for path in files:
        if path.name in DECLARATIONS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                words.add(node.value)
    return words


def test_every_option_is_used_or_says_that_it_is_not():
    words = _words_of_consumers()
    # checkpoints/metadata.py reads f"metadata_{name}" for each name of its table.
    words |= {f"metadata_{word}" for word in words}
    unused = [
        name
        for name, option in OPTIONS.items()
        if option.field_name not in words and "train_db" not in NO_EFFECT_IN.get(name, {}) and name not in HONOURED
    ]
    assert not unused
