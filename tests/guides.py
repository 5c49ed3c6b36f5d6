"""The commands and files that guides show, and places where they can be run: tiny models and photographs.

`python -m tests.guides FOLDER` makes such a place for docs/fine_tune.md, to type its commands by hand, and
`python -m tests.guides FOLDER stable_cascade` one for docs/stable_cascade.md.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageFilter

from tests.conftest import PHOTOS, ROOT
from tests.support import run_tool

if TYPE_CHECKING:
    from library.models.random_cascade import CascadeFiles

DOCS = ROOT / "docs"
LAUNCHED = "accelerate launch "
TRAINING = (
    "--resolution=64",
    "--min_bucket_reso=64",
    "--max_bucket_reso=128",
    "--max_data_loader_n_workers=0",
    "--overwrite",
)
"""What makes a training small."""

CASCADE_DRAWING = ("--W=128", "--H=128", "--steps=2", "--steps_b=2")
CASCADE_TRAINING = ("--max_train_steps=1", "--gradient_accumulation_steps=1")
CASCADE_DATA = ("--resolution=128", "--max_data_loader_n_workers=0")
"""What makes drawing with Stable Cascade, and training it, small."""

SMALL = {
    "gen_img.py": ("--W=64", "--H=64", "--steps=2"),
    "finetune/prepare_buckets_latents.py": ("--max_resolution=64", "--min_bucket_reso=64", "--max_bucket_reso=128"),
    "tools/cache_latents.py": TRAINING,
    "tools/cache_text_encoder_outputs.py": TRAINING,
    "stable_cascade_gen_img.py": CASCADE_DRAWING,
    "tools/check_dataset.py": ("--max_data_loader_n_workers=0",),
}
"""By script: what is put behind its command lines to make them small."""


def blocks(guide: Path, language: str) -> list[str]:
    """Return the contents of all fenced blocks of a language; those in lists are moved to the margin."""
    text = re.sub(r"^ +(?=```)", "", guide.read_text(encoding="utf-8"), flags=re.MULTILINE)
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [content for kind, content in fences if kind == language]


def commands(guide: Path) -> list[str]:
    """Return all command lines of a guide, in order."""
    return [line.strip() for block in blocks(guide, "bash") for line in block.splitlines()]


def ours(guide: Path) -> list[str]:
    """Return the command lines of a guide that run something of the toolkit."""
    return [line for line in commands(guide) if line.startswith((LAUNCHED, "python "))]


def write_files(guide: Path, folder: Path) -> None:
    """Write the files that a guide shows with their name in a comment on the first line, small, into a folder.

    YAML files may come in parts, each with the name.
    """
    for block in (*blocks(guide, "toml"), *blocks(guide, "")):
        named = re.match(r"# ([\w.]+\.(?:toml|txt))\b", block)
        if named:
            small = re.sub(r'= "?(?:512|640)"?', "= 64\nmin_bucket_reso = 64", block)
            (folder / named[1]).write_text(re.sub(r"--([wh]) (?:512|1024)", r"--\1 64", small), encoding="utf-8")
    parts: dict[str, str] = {}
    for block in blocks(guide, "yaml"):
        if named := re.match(r"# (\w+\.yaml)\b", block):
            parts[named[1]] = parts.get(named[1], "") + block
    for name, text in parts.items():
        (folder / name).write_text(text, encoding="utf-8")


def copy_photographs(folder: Path, *, sources: Iterable[str], each: int = 2, captions: bool = False) -> Path:
    """Copy photographs that come along as `duck_00.jpg` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        for path in sorted((PHOTOS / source).glob("*.jpg"))[:each]:
            shutil.copy(path, folder / f"{source}_{path.name}")
            if captions:
                shutil.copy(path.with_suffix(".caption"), folder / f"{source}_{path.stem}.caption")
    return folder


def describing_models(folder: Path) -> None:
    """Make a tiny BLIP in `blip`, and a tiny tagger in `tagger` where the package for it is installed."""
    from importlib.util import find_spec

    from tests.caption_models import make_blip

    make_blip(folder / "blip")
    if find_spec("onnx") is not None:
        from tests.unit.finetune.tagger_models import default_tagger

        default_tagger(folder / "tagger")


def run(line: str, *more: str) -> int:
    """Run a command line of a guide in this process, small; returns the exit status.

    Args:
        line: `python script ...` or `accelerate launch script ...`, perhaps with `> file` at its end.
        more: further words, put behind the others.
    """
    script, words, target = parsed(line)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = run_tool(module.main, *words, *SMALL.get(script, ()), *more)
    if target:
        Path(target).write_text(said.getvalue(), encoding="utf-8")
    return status


def cascade_size(line: str) -> tuple[str, ...]:
    """Return what makes a training of Stable Cascade, or encoding for it, small."""
    if not re.search(r"stable_cascade_(train|cache)", line):
        return ()
    own_shapes = "--multi_aspect_ratio" in line or ".yaml" in line
    buckets = () if own_shapes else ("--min_bucket_reso=64", "--bucket_reso_steps=32")
    batch = "--global_batch_size=2" if ".yaml" in line else "--train_batch_size=2"
    training = (*CASCADE_TRAINING, batch) if "_train_" in line else ()
    samples = ("--sample_every_n_steps=1",) if "--sample_prompts" in line else ()
    return (*CASCADE_DATA, *buckets, *training, *samples)


def parsed(line: str) -> tuple[str, list[str], str]:
    """Return script, its words, and the file that its output goes to."""
    words = shlex.split(line)
    place = next(number for number, word in enumerate(words) if word.endswith(".py"))
    script, rest = words[place], words[place + 1 :]
    if ">" in rest:
        rest, target = rest[: rest.index(">")], rest[-1]
        return script, rest, target
    return script, rest, ""


CASCADE_FILES = {
    "stage_c_bf16": "stage_c",
    "stage_c_lite_bf16": "stage_c",
    "stage_b_bf16": "stage_b",
    "stage_b_lite_bf16": "stage_b",
    "stage_a": "stage_a",
    "effnet_encoder": "effnet",
    "previewer": "previewer",
    "text_model": "text",
    "image_model": "vision",
}
"""Names of the published files, and the parts of a tiny model that take their places."""


def cascade_models(folder: Path, files: CascadeFiles) -> None:
    """Copy the parts of a tiny Stable Cascade model under the names of the published files."""
    folder.mkdir()
    for name, part in CASCADE_FILES.items():
        shutil.copy(getattr(files, part), folder / f"{name}.safetensors")


def cascade_data(folder: Path) -> None:
    """Put photographs where docs/stable_cascade.md has them."""
    copy_photographs(folder / "photos" / "1_all", sources=("bear", "car", "duck", "robot"), captions=True)
    copy_photographs(folder / "duck" / "10_a photo of [zduck]", sources=("duck",))
    copy_photographs(folder / "toys" / "1_a photo of a toy", sources=("robot",))
    (folder / "edges").mkdir()
    (folder / "dataset").mkdir()
    for number, path in enumerate(sorted((folder / "photos" / "1_all").glob("*.jpg"))):
        caption = path.with_suffix(".caption").read_text(encoding="utf-8").strip()
        with Image.open(path) as picture:
            picture.convert("L").filter(ImageFilter.FIND_EDGES).save(folder / "edges" / f"{path.stem}.png")
            facts = {"score": 4.4 + number / 10, "width": picture.width, "height": picture.height, "title": caption}
        path.with_suffix(".json").write_text(json.dumps({**facts, "tags": "outdoors"}), encoding="utf-8")
        for suffix, source in {".jpg": ".jpg", ".txt": ".caption", ".json": ".json"}.items():
            shutil.copy(path.with_suffix(source), folder / "dataset" / f"{number:04d}{suffix}")


def pack(target: Path, folder: Path) -> None:
    """Make the tar file that `tar --sort=name` makes of a folder."""
    with tarfile.open(target, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, f"{folder.name}/{path.name}")


def main(argv: Sequence[str]) -> None:
    """Make a folder in which the commands of a guide can be typed."""
    from library.models.random_models import make_random_sd

    folder = Path(argv[0])
    if argv[1:] == ["stable_cascade"]:
        from library.models.random_cascade import make_random_cascade

        cascade_models(folder / "models", make_random_cascade(folder / "parts"))
        cascade_data(folder)
        return
    copy_photographs(folder / "photos", sources=("bear", "car", "duck", "robot"), each=5)
    describing_models(folder)
    make_random_sd(folder / "model.safetensors", family="sd1")
    make_random_sd(folder / "model_768.safetensors", family="sd2", v_prediction=True)


if __name__ == "__main__":
    main(sys.argv[1:])
