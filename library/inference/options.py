"""Options of gen_img.py, each group beside what reads it: the model, the prompts, the pictures, what is drawn on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import Problem
from library.inference.prompt_options import MAX_SIDE, MIN_SIDE
from library.inference.samplers import SAMPLER_NAMES
from library.option_groups import OptionGroup, opt
from library.option_values import BadValue

SDXL_REASON = "SDXL models come with a later release"
_SIDE = 512


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(OptionGroup, title="model"):
    """Which model draws. What kind of model a file holds is found out; the flags only confirm it."""

    ckpt: str | None = opt(
        None,
        path=True,
        help="Model: a .safetensors or .ckpt file, a Diffusers folder, a Hugging Face id, or a pattern such as "
        "'models/cat*.safetensors' that fits exactly one file.",
    )
    v1: bool = opt(
        False,
        excludes={"v2": "a model is of one kind", "sdxl": "a model is of one kind"},
        help="The model is a Stable Diffusion 1.x model.",
    )
    v2: bool = opt(
        False, excludes={"sdxl": "a model is of one kind"}, help="The model is a Stable Diffusion 2.x model."
    )
    sdxl: bool = opt(False, help=f"The model is an SDXL model. Refused: {SDXL_REASON}.")
    v_parameterization: bool = opt(
        False, help="The model predicts velocity (v-prediction). Found out where the model says so."
    )
    zero_terminal_snr: bool = opt(
        False, help="Draw with the noise schedule that ends in pure noise, for models that were trained so."
    )
    vae: str | None = opt(
        None, path=True, help="VAE to use in place of the model's own (file, Diffusers folder or id)."
    )
    tokenizer_cache_dir: str | None = opt(
        None, path=True, help="Folder for tokenizer files. The CLIP vocabulary is built in, so none are needed."
    )

    def check(self) -> Iterator[Problem]:
        """A model is needed, and SDXL is not there yet."""
        if self.sdxl:
            yield Problem("--sdxl", SDXL_REASON, "gen_img.py draws with Stable Diffusion 1.x and 2.x models.")
        elif not self.ckpt:
            yield Problem("--ckpt", "is required", "Give a model file, a Diffusers folder or a hub id.")


@dataclass(frozen=True, kw_only=True)
class SpeedOptions(OptionGroup, title="memory and speed"):
    """Number formats, and what trades memory against speed."""

    fp16: bool = opt(
        False,
        excludes={"bf16": "numbers have one format"},
        help="Calculate in float16: half the memory, faster on a GPU.",
    )
    bf16: bool = opt(False, help="Calculate in bfloat16: half the memory, faster on a recent GPU.")
    no_half_vae: bool = opt(
        False,
        matters_when={"fp16": (), "bf16": ()},
        help="Run the VAE in float32 all the same. A VAE that overflows does so by itself, but later.",
    )
    xformers: bool = opt(False, help="Attention by xformers, where it is installed.")
    sdpa: bool = opt(False, help="Attention by PyTorch's scaled_dot_product_attention (the default).")
    diffusers_xformers: bool = opt(False, help="The same as --xformers: the U-Net is that of diffusers.")
    opt_channels_last: bool = opt(
        False, help="Lay weights of convolutions out channels last. On a GPU this is done anyway."
    )
    batch_size: int = opt(1, at_least=1, help="How many pictures are made at a time, if their settings allow it.")
    vae_batch_size: float | None = opt(
        None,
        more_than=0,
        help="How many pictures the VAE takes at a time; below 1: that share of --batch_size. Default: one.",
    )
    vae_slices: int | None = opt(
        None, at_least=1, help="Cut large pictures into this many slices for the VAE, which saves memory."
    )

    @property
    def vae_batch(self) -> int:
        """How many pictures are decoded at a time."""
        if self.vae_batch_size is None:
            return 1
        if self.vae_batch_size < 1:
            return max(1, int(self.batch_size * self.vae_batch_size))
        return int(self.vae_batch_size)


@dataclass(frozen=True, kw_only=True)
class PromptSourceOptions(OptionGroup, title="prompts"):
    """Where prompts come from, and how often each is drawn."""

    prompt: str | None = opt(
        None, blank=True, help="The prompt, with its own options behind it: 'a photo of a cat --w 512 --h 768 --d 42'."
    )
    from_file: str | None = opt(
        None,
        path=True,
        excludes={"prompt": "prompts come from one place"},
        help="File with a prompt in each line (UTF-8); empty lines and those that begin with # are passed over.",
    )
    from_module: str | None = opt(
        None,
        path=True,
        excludes={"prompt": "prompts come from one place", "from_file": "prompts come from one place"},
        help="Python file whose get_prompter(args, pipe, networks) returns a function that gives the next prompt. "
        "It is run with all your rights.",
    )
    prompter_module_args: tuple[str, ...] = opt(
        (), matters_when={"from_module": ()}, help="Arguments for --from_module, which reads them itself."
    )
    interactive: bool = opt(
        False,
        excludes={name: "prompts come from one place" for name in ("prompt", "from_file", "from_module")},
        help="Read prompts from standard input, one a line, until it ends (Ctrl-D) or Ctrl-C.",
    )
    no_preview: bool = opt(
        False,
        matters_when={"interactive": ()},
        help="Accepted for old command lines: no window is ever opened, the file's name is shown.",
    )
    n_iter: int = opt(1, at_least=1, help="How often all prompts are drawn.")
    images_per_prompt: int = opt(1, at_least=1, help="Pictures for each prompt, with different seeds.")
    seed: int | None = opt(
        None,
        at_least=0,
        at_most=2**64 - 1,
        help="Seed that the seeds of pictures without one (--d) are made from. Default: a random one.",
    )
    iter_same_seed: bool = opt(
        False,
        help="Use the same seed for all prompts of a round of --n_iter (or for all pictures, if each prompt has one).",
    )
    shuffle_prompts: bool = opt(False, help="Draw the prompts in another order in each round.")

    def check(self) -> Iterator[Problem]:
        """Refuse missing files before the model is loaded."""
        for option, name in (("--from_file", self.from_file), ("--from_module", self.from_module)):
            yield from _missing_file(option, name)


@dataclass(frozen=True, kw_only=True)
class PictureFileOptions(OptionGroup, title="files"):
    """Where pictures go, and what they are called."""

    outdir: str = opt("outputs", path=True, help="Folder for the pictures; made if it is not there.")
    sequential_file_name: bool = opt(
        False, help="Call pictures im_000001.png and so on, behind those that are there, not by time and seed."
    )
    use_original_file_name: bool = opt(
        False,
        matters_when={"image_path": ()},
        help="Give a picture the name of the one of --image_path it was made from.",
    )


def side(value: Any) -> int:
    """Read a side of a picture: a whole number of pixels, rounded down to a multiple of 8.

    Raises:
        BadValue: If it is no such number.
    """
    try:
        pixels = int(str(value))
    except ValueError:
        raise BadValue(f"expected a number of pixels, got {value!r}") from None
    if not MIN_SIDE <= pixels <= MAX_SIDE:
        raise BadValue(f"must be between {MIN_SIDE} and {MAX_SIDE} pixels, got {pixels}")
    return pixels - pixels % 8


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(OptionGroup, title="sampling"):
    """How noise becomes a picture. Options of a prompt line (--w, --h, --s, --l, --nl, --d) win over these."""

    W: int | None = opt(
        None, convert=side, help="Width in pixels, cut down to a multiple of 8. Default: 512, or that of --image_path."
    )
    H: int | None = opt(
        None, convert=side, help="Height in pixels, cut down to a multiple of 8. Default: 512, or that of --image_path."
    )
    steps: int = opt(50, at_least=1, at_most=1000, help="Denoising steps.")
    scale: float = opt(7.5, help="How much the prompt counts (guidance scale); from 0 to 1 there is no guidance.")
    negative_scale: float | None = opt(
        None, help="Guide away from the negative prompt on its own, with this scale, beside the empty prompt."
    )
    sampler: str = opt("ddim", choices=SAMPLER_NAMES, help="Sampler; k_ names are other names of the same samplers.")
    force_scheduler_zero_steps_offset: bool = opt(
        False, help="Let the steps of ddim and pndm begin one timestep earlier (steps_offset 0)."
    )

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height of pictures that ask for no other."""
        return self.W or _SIDE, self.H or _SIDE


@dataclass(frozen=True, kw_only=True)
class NoiseExperimentOptions(OptionGroup, title="noise experiments"):
    """Random changes to the noise that a picture begins with, each picture by its own seed."""

    pyramid_noise_prob: float | None = opt(
        None, at_least=0, at_most=1, help="Probability that a picture begins with pyramid noise."
    )
    pyramid_noise_discount_range: tuple[float, ...] = opt(
        (), at_least=0, matters_when={"pyramid_noise_prob": ()},
        help="Two numbers: the discount of pyramid noise is drawn between them.",
    )  # fmt: skip
    noise_offset_prob: float | None = opt(
        None, at_least=0, at_most=1, help="Probability that a picture's noise is shifted."
    )
    noise_offset_range: tuple[float, ...] = opt(
        (), matters_when={"noise_offset_prob": ()}, help="Two numbers: the shift is drawn between them."
    )

    def check(self) -> Iterator[Problem]:
        """A range has two ends, and an experiment needs its range."""
        pairs = (
            ("pyramid_noise", self.pyramid_noise_prob, "discount_range", self.pyramid_noise_discount_range),
            ("noise_offset", self.noise_offset_prob, "range", self.noise_offset_range),
        )
        for name, probability, suffix, ends in pairs:
            if (probability is not None or ends) and (len(ends) != 2 or ends[0] > ends[1]):
                yield Problem(f"--{name}_{suffix}", "needs two numbers, the smaller one first", f"For --{name}_prob.")


@dataclass(frozen=True, kw_only=True)
class PromptTextOptions(OptionGroup, title="text"):
    """How prompts become conditions."""

    clip_skip: int | None = opt(
        None, at_least=1, help="Use the output of the n-th layer from the end of the text encoder. Default: 1."
    )
    max_embeddings_multiples: int | None = opt(
        None, at_least=1, at_most=100, help="Longest prompt, in chunks of 75 tokens. Default: 3."
    )
    emb_normalize_mode: str = opt(
        "original",
        choices=("original", "abs", "none"),
        help="What weighting tokens keeps: the mean of the prompt, the mean of absolute values, or neither.",
    )

    @property
    def chunks(self) -> int:
        """The longest prompt in chunks of 75 tokens."""
        return self.max_embeddings_multiples or 3


@dataclass(frozen=True, kw_only=True)
class NetworkUseOptions(OptionGroup, title="networks"):
    """LoRA and other networks, embeddings. Lists go together: the first weights with the first multiplier."""

    network_module: tuple[str, ...] = opt(
        (),
        help="Python module of each network (networks.lora, lycoris.kohya ...); the last one stands for those that "
        "follow. Default: networks.lora.",
    )
    network_weights: tuple[str, ...] = opt((), path=True, help="File of each network.")
    network_mul: tuple[float, ...] = opt((), help="Strength of each network. Default: 1. --am in a prompt wins.")
    network_args: tuple[str, ...] = opt(
        (), help="Arguments of each network's module, name=value, several of them separated by semicolons."
    )
    network_show_meta: bool = opt(
        False, matters_when={"network_weights": ()}, help="Show what the files of the networks say about themselves."
    )
    network_merge: bool = opt(
        False,
        needs={"network_weights": ()},
        excludes={"network_merge_n_models": "both say which networks are merged"},
        help="Add the networks to the weights of the model: as fast as without them, strengths are fixed.",
    )
    network_merge_n_models: int | None = opt(
        None, at_least=1, needs={"network_weights": ()}, help="Merge only the first n networks."
    )
    network_pre_calc: bool = opt(
        False,
        needs={"network_weights": ()},
        help="Add networks to the weights before each batch and take them out again: faster, strengths may vary.",
    )
    network_regional_mask_max_color_codes: int | None = opt(
        None,
        at_least=1,
        needs={"mask_path": ()},
        help="Regions of --mask_path are told by the n colours that come first, not by the channels R, G, B.",
    )
    textual_inversion_embeddings: tuple[str, ...] = opt(
        (), path=True, help="Embedding files; the name of the file without suffix is the word for prompts."
    )

    @property
    def merged_count(self) -> int:
        """How many networks, from the first, are merged into the model."""
        return len(self.network_weights) if self.network_merge else self.network_merge_n_models or 0

    def check(self) -> Iterator[Problem]:
        """Lists must not be longer than that of the files, and the files must be there."""
        count = len(self.network_weights)
        for name in ("network_module", "network_mul", "network_args"):
            given = len(getattr(self, name))
            if given > count:
                hint = "" if count else "Give the files with --network_weights."
                yield Problem(f"--{name}", f"{given} values for {count} of --network_weights", hint)
        if self.network_merge_n_models is not None and self.network_merge_n_models > count > 0:
            yield Problem("--network_merge_n_models", f"there are only {count} of --network_weights")
        for name in self.network_weights:
            if not Path(name).exists():
                yield Problem(f"--network_weights {name}", "no such file", "Check the path.")
        yield from self._check_embeddings()
        for item in self.network_args:
            for pair in filter(None, item.split(";")):
                if not pair.partition("=")[1] or not pair.partition("=")[0].strip():
                    yield Problem("--network_args", f"{pair!r} is not name=value", "Separate several by semicolons.")

    def _check_embeddings(self) -> Iterator[Problem]:
        seen: dict[str, str] = {}
        for name in self.textual_inversion_embeddings:
            yield from _missing_file("--textual_inversion_embeddings", name)
            word = Path(name).stem
            if word in seen:
                what = f"stands for the word {word!r}, as {seen[word]} does"
                yield Problem(f"--textual_inversion_embeddings {name}", what, "Rename one of the files.")
            seen[word] = name


def _missing_file(option: str, name: str | None) -> Iterator[Problem]:
    if name is not None and not Path(name).is_file():
        what = "is a folder" if Path(name).is_dir() else "no such file"
        yield Problem(f"{option} {name}", what, "Check the path.")
