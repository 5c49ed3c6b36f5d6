"""The options of the training scripts are those that users' command lines and scripts were written for, plus ours."""

import ast
import json
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

import fine_tune
import gen_img
import train_db
import train_network
import train_textual_inversion
from library.option_parser import parse
from library.option_values import type_name
from library.retired import ELSEWHERE, NO_EFFECT_IN, SPELLINGS

ROOT = Path(__file__).parents[2]
DECLARATIONS = {
    "checks.py",
    "checks_inversion.py",
    "checks_network.py",
    "options.py",
    "options_doc.py",
    "options_full.py",
    "options_inversion.py",
    "options_network.py",
    "options_objective.py",
    "options_output.py",
    "options_pictures.py",
    "options_progress.py",
    "options_tars.py",
    "retired.py",
}
# Options that ask for what always happens, one that its group reads itself, and one that is only stored.
HONOURED = {"diffusers_xformers", "sdpa", "persistent_data_loader_workers", "resume_override", "training_comment"}

SCRIPTS = {
    "train_db": train_db.Options,
    "fine_tune": fine_tune.Options,
    "train_network": train_network.Options,
    "train_textual_inversion": train_textual_inversion.Options,
}
GOLDEN = {
    script: json.loads((ROOT / "tests" / "golden" / f"{script}_options.json").read_text(encoding="utf-8"))
    for script in SCRIPTS
}
OURS = {
    "allow_nan_weights",
    "allow_pipe_urls",
    "bucket_random_ratio",
    "cache_dir",
    "cache_hash",
    "cache_trust_mtime",
    "caption_encoding",
    "caption_field",
    "check_images",
    "dataset_filter",
    "deterministic",
    "fast_resume",
    "log_every_n_steps",
    "max_image_pixels",
    "max_nan_steps",
    "multi_aspect_ratio",
    "no_exif_transpose",
    "no_save_on_interrupt",
    "overwrite",
    "resume_override",
    "save_retry_minutes",
    "skip_bad_files",
    "strict_args",
    "webdataset_cache_dir",
    "webdataset_epoch_size",
    "webdataset_path",
    "webdataset_resampled",
    "webdataset_shuffle",
    "webdataset_streaming",
}

TEXT_CACHES = {"cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "text_encoder_batch_size"}
OURS_IN: dict[str, set[str]] = {
    "train_db": set(),
    "fine_tune": TEXT_CACHES,
    "train_network": TEXT_CACHES,
    "train_textual_inversion": TEXT_CACHES | {"save_tensor_name"},
}

OPTIONS = {
    script: {name: option for name, option in declared.options().items() if option.offered}
    for script, declared in SCRIPTS.items()
}
every_script = pytest.mark.parametrize("script", SCRIPTS)


@every_script
def test_same_options_as_golden(script):
    assert set(OPTIONS[script]) == set(GOLDEN[script]) | OURS | OURS_IN[script]


@pytest.mark.parametrize(("script", "name"), [(script, name) for script in SCRIPTS for name in sorted(GOLDEN[script])])
def test_type_default_and_choices(script, name):
    option, golden = OPTIONS[script][name], GOLDEN[script][name]
    default = list(option.default) if isinstance(option.default, tuple) else option.default
    assert (type_name(option.annotation), default) == (golden["type"], golden["default"])
    assert list(option.choices or []) == golden.get("choices", [])


@every_script
def test_every_option_is_explained(script):
    for option in OPTIONS[script].values():
        text = option.notes["help"]
        assert text[0].isupper() or text.split()[0].strip(":,.`-").islower(), option.flag
        assert text.endswith("."), option.flag


@every_script
def test_conditions_name_known_options(script):
    for name, option in OPTIONS[script].items():
        for note in ("needs", "matters_when", "excludes", "implies", "means"):
            for other in option.notes.get(note, {}):
                assert other in OPTIONS[script], f"--{name}: {note} names {other}"


@every_script
def test_tables_of_names_agree_with_the_options(script):
    options = set(OPTIONS[script])
    assert {name for name in options & set(ELSEWHERE) if f"{script}.py" not in ELSEWHERE[name]} == set()
    assert {name for name, owner in ELSEWHERE.items() if f"{script}.py" in owner} <= options
    assert set(SPELLINGS.values()) - set(gen_img.Options.options()) <= options
    assert {name for name, scripts in NO_EFFECT_IN.items() if script in scripts} <= options


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


def _words_of_consumers(script):
    """Return every attribute name and text constant of the code; of the declarations, only what properties read."""
    words = set()
    nodes: list[ast.AST] = []
    for path in (*(ROOT / "library").rglob("*.py"), ROOT / f"{script}.py"):
        found = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        if path.name in DECLARATIONS:
            properties = [node for node in found if isinstance(node, ast.FunctionDef) and node.decorator_list]
            found = [inner for node in properties for inner in ast.walk(node)]
        nodes += found
    for node in nodes:
        if isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            words.add(node.value)
    return words


@every_script
def test_every_option_is_used_or_says_that_it_is_not(script):
    words = _words_of_consumers(script)
    # checkpoints/metadata.py reads f"metadata_{name}" for each name of its table.
    words |= {f"metadata_{word}" for word in words}
    unused = [
        name
        for name, option in OPTIONS[script].items()
        if option.field_name not in words and script not in NO_EFFECT_IN.get(name, {}) and name not in HONOURED
    ]
    assert not unused
