"""What quickstart.py does: prepare a data set configuration and prompts, launch a training, show what came out."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.files import write_text

if TYPE_CHECKING:
    from library.quickstart_options import QuickstartOptions

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
NAME = "quickstart"
_SUBJECTS = {"duck": "sks duck", "bear": "sks bear", "car": "sks car", "robot": "sks robot"}
_SCRIPTS = {
    "lora": "train_network.py",
    "dreambooth": "train_db.py",
    "textual_inversion": "train_textual_inversion.py",
}
_STEPS = {"lora": 1000, "dreambooth": 400, "textual_inversion": 1000}
_MADE = {"lora": "LoRA", "dreambooth": "trained model", "textual_inversion": "embedding"}
_ROOMY = 12 * 1024**3
"""GPU memory from which activations of a LoRA training are kept, in place of being computed again."""

# The U-Net alone: the subject is learnt there, captions are then encoded once, and the text encoder leaves the GPU.
_LORA = ("--network_module=networks.lora", "--network_dim=16", "--network_alpha=8", "--network_train_unet_only")
_VECTORS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """One training: the model, the data set configuration, the prompts and the options of the script."""

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
    plan = _own(options) if options.model else _tiny(options, output)
    write_text(output / "dataset.toml", plan.dataset)
    write_text(output / "prompts.txt", plan.prompts)
    command = _command(options.method, plan, output)
    logger.info("starting: %s", shlex.join(command))
    if subprocess.run(command, check=False, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}).returncode != 0:
        raise UserError("the training ended with the error above", where="quickstart")
    sys.stdout.write("\n".join([*_told(options, output), ""]))


def _tiny(options: QuickstartOptions, output: Path) -> Plan:
    """A random model of the true structure and the photographs that come with the toolkit: seconds, not hours."""
    from library.models.random_models import make_random_sd

    logger.info("making a tiny random model: its pictures are noise, but every step is the real one")
    model = make_random_sd(output / "tiny_model.safetensors", family="sd1")
    subjects = _SUBJECTS if options.method != "textual_inversion" else {"duck": _SUBJECTS["duck"]}
    folders = [(ROOT / "examples" / "photos" / name, words) for name, words in subjects.items()]
    size, steps = options.resolution or 128, options.steps or 24
    return Plan(
        model=str(model),
        dataset=_dataset(folders, size=size, batch_size=2, repeats=1),
        prompts=_prompts(subjects.values(), size=size, steps=8),
        options=(
            *_kind(options.method, subjects["duck"]),
            f"--max_train_steps={steps}",
            "--learning_rate=1e-4",
            "--max_data_loader_n_workers=2",
            f"--sample_every_n_steps={max(1, steps // 2)}",
        ),
    )


def _own(options: QuickstartOptions) -> Plan:
    """The user's model and pictures, with settings for a consumer GPU."""
    prompt, size, steps = options.prompt or "", options.resolution or 512, options.steps or _STEPS[options.method]
    pictures = Path(options.images or "").resolve()
    return Plan(
        model=str(options.model),
        dataset=_dataset([(pictures, prompt)], size=size, batch_size=1, repeats=1),
        prompts=_prompts([f"a photo of {prompt}", f"a painting of {prompt}"], size=size, steps=25),
        options=(
            *_family_flags(str(options.model)),
            *_hardware(options.method),
            *_method(options.method, steps, prompt),
            f"--max_train_steps={steps}",
        ),
    )


def _kind(method: str, prompt: str) -> Sequence[str]:
    """Return what is trained: the options that belong to the method, whatever the model."""
    if method == "lora":
        return _LORA
    if method == "dreambooth":
        return ()
    word, *_, known = prompt.split()
    inversion = [f"--token_string={word}", f"--init_word={known}", f"--num_vectors_per_token={_VECTORS}"]
    return [*inversion, "--use_object_template", "--save_model_as=safetensors"]


def _method(method: str, steps: int, prompt: str) -> list[str]:
    """Return what the methods do differently; of files, which are small, several are kept to choose from."""
    if method == "dreambooth":
        return ["--learning_rate=2e-6", "--gradient_checkpointing", f"--sample_every_n_steps={min(100, steps)}"]
    every = max(1, steps // 5)
    rate = ["--learning_rate=1e-4", "--save_precision=fp16"] if method == "lora" else ["--learning_rate=5e-3"]
    return [*_kind(method, prompt), *rate, f"--save_every_n_steps={every}", f"--sample_every_n_steps={every}"]


def _family_flags(model: str) -> list[str]:
    """Return the flags that say what kind of model this is; nothing for a hub id, which only loading can tell."""
    from library.checkpoints.detect import inspect

    if not Path(model).exists():
        return []
    info = inspect(model)
    flags = ["--v2"] if info.family == "sd2" else []
    return [*flags, "--v_parameterization"] if info.prediction_type == "v_prediction" else flags


def _hardware(method: str) -> list[str]:
    """Return the options that save memory where the device has what they need."""
    import torch

    if not torch.cuda.is_available():
        return []
    flags = [f"--mixed_precision={'bf16' if torch.cuda.is_bf16_supported() else 'fp16'}"]
    if method == "dreambooth":
        flags.append("--use_8bit_adam")
    elif torch.cuda.get_device_properties(0).total_memory < _ROOMY:
        flags.append("--gradient_checkpointing")
    return flags


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


def _command(method: str, plan: Plan, output: Path) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes=1", "--num_machines=1"]
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    launcher += ["--mixed_precision=no", "--dynamo_backend=no", f"--num_cpu_threads_per_process={threads}"]
    return [
        *launcher,
        str(ROOT / _SCRIPTS[method]),
        f"--pretrained_model_name_or_path={plan.model}",
        f"--dataset_config={output / 'dataset.toml'}",
        f"--output_dir={output}",
        f"--output_name={NAME}",
        "--cache_latents",
        "--seed=42",
        f"--logging_dir={output / 'logs'}",
        f"--sample_prompts={output / 'prompts.txt'}",
        "--sample_sampler=euler_a",
        "--overwrite",
        *plan.options,
    ]


def _told(options: QuickstartOptions, output: Path) -> Iterator[str]:
    """Yield what was made, where, and how to use it."""
    what = _MADE[options.method]
    made = sorted(path for path in output.glob(f"{NAME}*") if path.suffix in (".safetensors", ".ckpt") or path.is_dir())
    finals = [path for path in made if path.stem == NAME]
    yield from ("", "Done. What was made:")
    for path in finals:
        yield f"  {what:17} {path}"
    if len(made) > len(finals):
        count = len(made) - len(finals)
        yield f"  earlier ones      {count} beside it; take one if the last shows too much of the training pictures"
    yield f"  sample pictures   {len(list((output / 'sample').glob('*.png')))} in {output / 'sample'}"
    yield f"  curves            tensorboard --logdir {output / 'logs'}"
    yield f"  settings          {output / 'dataset.toml'}, {output / 'prompts.txt'}"
    if not options.model:
        yield from (
            "",
            "The model was random, so the pictures are noise. With a Stable Diffusion model and your pictures:",
        )
        chosen = "" if options.method == "lora" else f" --method {options.method}"
        yield f'  python quickstart.py --model model.safetensors --images my_photos --prompt "sks dog"{chosen}'
    if finals:
        yield from _usage(options, finals[0])


def _usage(options: QuickstartOptions, made: Path) -> Iterator[str]:
    """Yield how other programs take the result."""
    method, prompt = options.method, options.prompt or "sks duck"
    whole = method == "dreambooth"
    base = str(made) if whole else options.model or "model.safetensors"
    load = "from_single_file" if Path(base).suffix in (".safetensors", ".ckpt") else "from_pretrained"
    folder, word = made.parent.as_posix(), prompt.split()[0]
    yield from ("", "How to use it" + ("" if options.model else ", once it was made for a real model") + ":")
    yield f'  diffusers         pipe = StableDiffusionPipeline.{load}("{Path(base).as_posix()}").to("cuda")'
    if method == "lora":
        yield f'                    pipe.load_lora_weights("{folder}", weight_name="{made.name}")'
    elif method == "textual_inversion":
        yield f'                    pipe.load_textual_inversion("{folder}", weight_name="{made.name}", token="{word}")'
    yield f'                    pipe("a photo of {prompt}").images[0].save("picture.png")'
    if method == "lora":
        yield "  ComfyUI           copy it to models/loras, and add the node Load LoRA"
        yield f"  A1111 web UI      copy it to models/Lora, and write <lora:{made.stem}:1> into the prompt"
    elif method == "textual_inversion":
        yield f"  ComfyUI           copy it to models/embeddings, and write embedding:{made.stem} into the prompt"
        yield f"  A1111 web UI      copy it to embeddings, and write {made.stem} into the prompt"
    else:
        yield "  ComfyUI           copy it to models/checkpoints"
        yield "  A1111 web UI      copy it to models/Stable-diffusion"
