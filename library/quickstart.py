"""What quickstart.py does: prepare a data set configuration and prompts, launch train_db.py, show what came out."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.files import write_text

if TYPE_CHECKING:
    from library.quickstart_options import QuickstartOptions

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
_SUBJECTS = {"duck": "sks duck", "bear": "sks bear", "car": "sks car", "robot": "sks robot"}


@dataclass(frozen=True, slots=True)
class Plan:
    """One training: the model, the data set configuration, the prompts and the options of train_db.py."""

    model: str
    dataset: str
    prompts: str
    options: tuple[str, ...]


def run(options: QuickstartOptions) -> None:
    """Prepare, train, and tell what was made.

    Raises:
        UserError: something is missing, or the training ended with an error (which it has shown).
    """
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    plan = _own(options, output) if options.model else _tiny(options, output)
    write_text(output / "dataset.toml", plan.dataset)
    write_text(output / "prompts.txt", plan.prompts)
    command = _command(plan, output)
    logger.info("starting: %s", shlex.join(command))
    if subprocess.run(command, check=False, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}).returncode != 0:
        raise UserError("the training ended with the error above", where="quickstart")
    _tell(options, output)


def _tiny(options: QuickstartOptions, output: Path) -> Plan:
    """A random model of the true structure and the photographs that come with the toolkit: seconds, not hours."""
    from library.models.random_models import make_random_sd

    logger.info("making a tiny random model: its pictures are noise, but every step is the real one")
    model = make_random_sd(output / "tiny_model.safetensors", family="sd1")
    folders = [(ROOT / "examples" / "photos" / name, words) for name, words in _SUBJECTS.items()]
    size, steps = options.resolution or 128, options.steps or 24
    return Plan(
        model=str(model),
        dataset=_dataset(folders, size=size, batch_size=2, repeats=1),
        prompts=_prompts(_SUBJECTS.values(), size=size, steps=8),
        options=(
            f"--max_train_steps={steps}",
            "--learning_rate=1e-4",
            "--max_data_loader_n_workers=2",
            f"--sample_every_n_steps={max(1, steps // 2)}",
        ),
    )


def _own(options: QuickstartOptions, output: Path) -> Plan:
    """The user's model and pictures, with settings for a consumer GPU."""
    prompt, size, steps = options.prompt or "", options.resolution or 512, options.steps or 400
    pictures = Path(options.images or "").resolve()
    return Plan(
        model=str(options.model),
        dataset=_dataset([(pictures, prompt)], size=size, batch_size=1, repeats=1),
        prompts=_prompts([f"a photo of {prompt}", f"a painting of {prompt}"], size=size, steps=25),
        options=(
            *_family_flags(str(options.model)),
            *_hardware(),
            f"--max_train_steps={steps}",
            "--learning_rate=2e-6",
            "--gradient_checkpointing",
            f"--sample_every_n_steps={min(100, steps)}",
        ),
    )


def _family_flags(model: str) -> list[str]:
    """Return the flags that say what kind of model this is; nothing for a hub id, which only loading can tell."""
    from library.checkpoints.detect import inspect

    if not Path(model).exists():
        return []
    info = inspect(model)
    flags = ["--v2"] if info.family == "sd2" else []
    return [*flags, "--v_parameterization"] if info.prediction_type == "v_prediction" else flags


def _hardware() -> list[str]:
    """Return the options that save memory where the device has what they need."""
    import torch

    if not torch.cuda.is_available():
        return []
    precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return [f"--mixed_precision={precision}", "--use_8bit_adam"]


def _dataset(folders: Sequence[tuple[Path, str]], *, size: int, batch_size: int, repeats: int) -> str:
    """Return a data set configuration in TOML."""
    lines = ["# Made by quickstart.py; docs/train_db.md explains every line.", "", "[[datasets]]"]
    lines += [f"resolution = {size}", f"batch_size = {batch_size}", "enable_bucket = true"]
    lines += [f"min_bucket_reso = {max(64, size // 2)}", f"max_bucket_reso = {size * 2}"]
    for folder, words in folders:
        lines += [
            "",
            "  [[datasets.subsets]]",
            f"  image_dir = {_toml(str(folder))}",
            f"  class_tokens = {_toml(words)}",
        ]
        lines += [f"  num_repeats = {repeats}"]
    return "\n".join([*lines, ""])


def _toml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _prompts(texts: Iterable[str], *, size: int, steps: int) -> str:
    lines = [f"{text} --w {size} --h {size} --s {steps} --d {1 + index}" for index, text in enumerate(texts)]
    return "\n".join([*lines, ""])


def _command(plan: Plan, output: Path) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes=1", "--num_machines=1"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=2"]
    return [
        *launcher,
        str(ROOT / "train_db.py"),
        f"--pretrained_model_name_or_path={plan.model}",
        f"--dataset_config={output / 'dataset.toml'}",
        f"--output_dir={output}",
        "--output_name=quickstart",
        "--cache_latents",
        "--seed=42",
        f"--logging_dir={output / 'logs'}",
        f"--sample_prompts={output / 'prompts.txt'}",
        "--sample_sampler=euler_a",
        "--overwrite",
        *plan.options,
    ]


def _tell(options: QuickstartOptions, output: Path) -> None:
    """Print what was made, where, and how to do the same with one's own model."""
    made = sorted(
        path for path in output.glob("quickstart*") if path.suffix in (".safetensors", ".ckpt") or path.is_dir()
    )
    pictures = sorted((output / "sample").glob("*.png"))
    lines = ["", "Done. What was made:"]
    lines += [f"  trained model     {path}" for path in made]
    lines += [f"  sample pictures   {len(pictures)} in {output / 'sample'}"]
    lines += [f"  curves            tensorboard --logdir {output / 'logs'}"]
    lines += [f"  settings          {output / 'dataset.toml'}, {output / 'prompts.txt'}"]
    if not options.model:
        lines += ["", "The same with your own Stable Diffusion model and pictures:"]
        lines += ['  python quickstart.py --model model.safetensors --images my_photos --prompt "sks dog"']
    sys.stdout.write("\n".join([*lines, ""]))
