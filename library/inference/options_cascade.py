"""All options of stable_cascade_gen_img.py, each group beside what reads it, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library import cascade_config
from library.checkpoints.cascade_configs import CONFIGS
from library.config_file import ForeignConfig
from library.errors import Problem
from library.files import check_writable_folder
from library.inference.cascade_samplers import SAMPLERS
from library.inference.option_set import check_processes
from library.inference.options import (
    NetworkUseOptions,
    PictureFileOptions,
    PromptSourceOptions,
    PromptTextOptions,
    side,
)
from library.models.cascade.control_names import untyped_problems
from library.models.cascade.options import BIG_G
from library.models.token_items import token_list
from library.option_groups import OptionGroup, OptionSet, opt
from library.option_parser import ConfigOptions

STAGE_B, PREVIEWER = "stage_b", "previewer"
DECODERS = (STAGE_B, PREVIEWER)
START, VARIATION = "start", "variation"
_SIDE = 1024
_WITH_B = {"decoder": (STAGE_B,)}
_NETS = "controlnet_checkpoint_path"


@dataclass(frozen=True, kw_only=True)
class CascadeConfigOptions(ConfigOptions, title="config"):
    """Options from files. YAML files of the original program may also begin the command line."""

    config_file_b: str | None = opt(
        None,
        path=True,
        needs={"config_file": ()},
        help="Second YAML file of the original program, where --config_file is one: that of stage B (or C).",
    )


@dataclass(frozen=True, kw_only=True)
class CascadeFileOptions(OptionGroup, title="model"):
    """The parts of the model. Those that are not named are looked for in the files of stages C and B."""

    stage_c_checkpoint_path: str | None = opt(
        None,
        path=True,
        help="Stage C: an official file, a checkpoint for ComfyUI with all that belongs to it, or a Diffusers folder.",
    )
    stage_b_checkpoint_path: str | None = opt(
        None, path=True, help="Stage B: an official file, a checkpoint for ComfyUI, or a Diffusers folder."
    )
    stage_a_checkpoint_path: str | None = opt(
        None, path=True, help="Stage A, which makes the picture from the latents of stage B."
    )
    effnet_checkpoint_path: str | None = opt(
        None, path=True, help="EfficientNet encoder, for pictures to start from and for some ControlNets."
    )
    previewer_checkpoint_path: str | None = opt(None, path=True, help="Previewer, for --decoder previewer.")
    text_model_checkpoint_path: str | None = opt(
        None,
        path=True,
        help=f"Text encoder: a file, a folder or a Hugging Face id. Default: that of the other files, else {BIG_G}.",
    )
    save_text_model: bool = opt(
        False,
        needs={"text_model_checkpoint_path": ()},
        help="Where there is no file --text_model_checkpoint_path yet, download the text encoder and keep it there.",
    )
    image_model_checkpoint_path: str | None = opt(
        None, path=True, help="CLIP image encoder (ViT-L/14), for --image_mode variation."
    )
    tokenizer_cache_dir: str | None = opt(
        None, path=True, help="Folder for tokenizer files. The CLIP vocabulary is built in, so none are needed."
    )
    model_version: str | None = opt(
        None,
        choices=tuple(version for stage, version in CONFIGS if stage == "c"),
        help="Refuse a stage C of another structure than this. Default: what the file holds.",
    )
    model_version_b: str | None = opt(
        None,
        choices=tuple(version for stage, version in CONFIGS if stage == "b"),
        help="Refuse a stage B of another structure than this. Default: what the file holds.",
    )
    no_text_mask: bool = opt(
        False, help="Let the text encoder see padding, for models that sd-scripts trained. Other programs do not."
    )

    def check(self) -> Iterator[Problem]:
        """Stage C is needed, and files must be there; only the text encoder can be downloaded."""
        if not self.stage_c_checkpoint_path:
            yield Problem("--stage_c_checkpoint_path", "is required", "Give stage_c.safetensors or a folder.")
        for name, value in vars(self).items():
            file = name.endswith("_checkpoint_path") and name != "text_model_checkpoint_path"
            if file and isinstance(value, str) and not Path(value).exists():
                yield Problem(f"--{name} {value}", "no such file or folder", "Check the path.")


@dataclass(frozen=True, kw_only=True)
class CascadeSpeedOptions(OptionGroup, title="memory and speed"):
    """Number formats, and what trades memory against speed."""

    fp16: bool = opt(False, help="Refused: stage C overflows in float16. Use --bf16.")
    bf16: bool = opt(False, help="Calculate in bfloat16: half the memory, faster on a recent GPU.")
    xformers: bool = opt(False, help="Accepted for old command lines; PyTorch's attention is used, with equal results.")
    sdpa: bool = opt(False, help="Attention by PyTorch's scaled_dot_product_attention (the default).")
    lowvram: bool = opt(False, help="Keep only the part that is running on the GPU, the others in main memory.")
    batch_size: int = opt(1, at_least=1, help="How many pictures are made at a time, if their settings allow it.")

    def check(self) -> Iterator[Problem]:
        """Weights of stage C overflow in float16."""
        if self.fp16:
            yield Problem("--fp16", "the weights of stage C overflow in float16", "Give --bf16, or neither.")

    def warn(self) -> Iterator[Problem]:
        """Say which attention is used."""
        if self.xformers:
            yield Problem("--xformers", "PyTorch's attention is used, with equal results")


@dataclass(frozen=True, kw_only=True)
class CascadeSamplingOptions(OptionGroup, title="sampling"):
    """How noise becomes a picture. Options of a prompt line (--w, --h, --s, --l, --f, --t, --ss) win over these."""

    W: int | None = opt(
        None, convert=side, help="Width in pixels, cut down to a multiple of 8. Default: 1024, or that of --image."
    )
    H: int | None = opt(
        None, convert=side, help="Height in pixels, cut down to a multiple of 8. Default: 1024, or that of --image."
    )
    steps: int = opt(20, at_least=1, at_most=1000, help="Steps of stage C.")
    scale: float = opt(4.0, help="How much the prompt counts in stage C (guidance scale); at 1 there is no guidance.")
    scale_end: float | None = opt(
        None, help="Let --scale go evenly to this from the first step to the last. Default: it stays. --le in a prompt."
    )
    shift: float = opt(
        2.0, at_least=0.01, at_most=100, help="Shift of stage C's noise: above 1, more of it at the same time."
    )
    sampler: str = opt(SAMPLERS[0], choices=SAMPLERS, help="Sampler of stage C.")
    t_start: float | None = opt(
        None,
        more_than=0,
        at_most=1,
        help="Time to begin at, 1 being pure noise: how much of --image is painted anew. Default: 1, with --image 0.8.",
    )
    cfg_rho: float = opt(
        0.7, at_least=0, at_most=1, help="How far guided predictions are brought back to their usual contrast."
    )
    cfg_t_start: float = opt(1.0, at_least=0, at_most=1, help="Guide stage C from this time on; 1 is the beginning.")
    cfg_t_stop: float = opt(0.0, at_least=0, at_most=1, help="Guide stage C up to this time; 0 is the end.")
    decoder: str = opt(
        STAGE_B,
        choices=DECODERS,
        help="What makes the picture: stages B and A, or the previewer, a small one at once.",
    )
    steps_b: int = opt(10, at_least=1, at_most=1000, matters_when=_WITH_B, help="Steps of stage B.")
    scale_b: float = opt(1.1, matters_when=_WITH_B, help="How much the prompt counts in stage B; at 1, no guidance.")

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height of pictures that ask for no other."""
        return self.W or _SIDE, self.H or _SIDE


@dataclass(frozen=True, kw_only=True)
class CascadeWordOptions(OptionGroup, title="trained words"):
    """Words in LoRA files. Those of this program's files need no word about them."""

    train_tokens: tuple[str, ...] = opt(
        (),
        convert=token_list,
        needs={"network_weights": ()},
        help="For LoRA files of the original trainer, which do not say what their words are: as in the training, "
        "such as '[fernando]=^dog</w>'.",
    )


@dataclass(frozen=True, kw_only=True)
class CascadeImageOptions(OptionGroup, title="pictures to start from"):
    """img2img and variations."""

    image: str | None = opt(
        None, path=True, help="Picture that is used, or a folder of them, of which every result takes the next one."
    )
    image_mode: str = opt(
        START,
        choices=(START, VARIATION),
        matters_when={"image": ()},
        help="What --image is for: start (img2img), or variation: results look like it, with a prompt or without.",
    )

    @property
    def varied(self) -> bool:
        """Whether results only look like the picture."""
        return self.image_mode == VARIATION

    def check(self) -> Iterator[Problem]:
        """Refuse what is missing."""
        if self.image is not None and not Path(self.image).exists():
            yield Problem(f"--image {self.image}", "no such file or folder", "Check the path.")


@dataclass(frozen=True, kw_only=True)
class CascadeControlOptions(OptionGroup, title="ControlNet"):
    """Pictures that guide the composition. Lists go together: the first ControlNet with the first filter."""

    controlnet_checkpoint_path: tuple[str, ...] = opt((), path=True, help="ControlNets for stage C.")
    controlnet_image: tuple[str, ...] = opt(
        (),
        path=True,
        needs={_NETS: ()},
        help="Pictures (or folders of them) that ControlNets look at, a prompt's one for each. Default: --image.",
    )
    controlnet_filter: tuple[str, ...] = opt(
        (),
        needs={_NETS: ()},
        help="What is made of the pictures first, for each ControlNet: canny and the like, or module:Class of your "
        "own. Default: what the file says it was trained with.",
    )
    controlnet_filter_params: tuple[str, ...] = opt(
        (), needs={_NETS: ()}, help="Parameters of each filter, name=value, several of them separated by semicolons."
    )
    controlnet_mask: str | None = opt(
        None,
        path=True,
        needs={_NETS: ()},
        help="For filters that paint a part over, such as inpaint: a picture in which that part is white.",
    )
    controlnet_blocks: tuple[int, ...] = opt(
        (), at_least=0, needs={_NETS: ()}, help="Residual blocks that the ControlNets act on, where files do not tell."
    )
    controlnet_multipliers: tuple[float, ...] = opt(
        (), needs={_NETS: ()}, help="Strength of each ControlNet. Default: 1."
    )
    controlnet_cond_only: bool = opt(
        False, needs={_NETS: ()}, help="Steer only the predictions for the prompt, not those for the negative prompt."
    )
    controlnet_ratios: tuple[float, ...] = opt(
        (),
        at_least=0,
        at_most=1,
        needs={_NETS: ()},
        help="Share of the steps, from the first, in which each ControlNet works. Default: 1.",
    )

    def check(self) -> Iterator[Problem]:
        """Lists must match the ControlNets, and files must be there."""
        count = len(self.controlnet_checkpoint_path)
        for name in ("controlnet_filter", "controlnet_filter_params", "controlnet_multipliers", "controlnet_ratios"):
            given = len(getattr(self, name))
            if count and given > count:
                yield Problem(f"--{name}", f"{given} values for {count} of --{_NETS}")
        for name in (_NETS, "controlnet_image"):
            for path in getattr(self, name):
                if not Path(path).exists():
                    yield Problem(f"--{name} {path}", "no such file or folder", "Check the path.")
        if self.controlnet_mask is not None and not Path(self.controlnet_mask).exists():
            yield Problem(f"--controlnet_mask {self.controlnet_mask}", "no such file", "Check the path.")


@dataclass(frozen=True, kw_only=True)
class CascadeGenerationOptions(
    OptionSet,
    changes={
        "config_file": {"help": cascade_config.HELP},
        "outdir": {"default": "../outputs"},
        "use_original_file_name": {
            "matters_when": {"image": ()},
            "help": "Give a picture the name of the one of --image it was made from.",
        },
    },
    leave_out=("clip_skip", "network_regional_mask_max_color_codes"),
):
    """Everything about making pictures with Stable Cascade."""

    config: CascadeConfigOptions = field(default_factory=CascadeConfigOptions)
    model: CascadeFileOptions = field(default_factory=CascadeFileOptions)
    speed: CascadeSpeedOptions = field(default_factory=CascadeSpeedOptions)
    source: PromptSourceOptions = field(default_factory=PromptSourceOptions)
    files: PictureFileOptions = field(default_factory=PictureFileOptions)
    sampling: CascadeSamplingOptions = field(default_factory=CascadeSamplingOptions)
    text: PromptTextOptions = field(default_factory=PromptTextOptions)
    networks: NetworkUseOptions = field(default_factory=NetworkUseOptions)
    words: CascadeWordOptions = field(default_factory=CascadeWordOptions)
    images: CascadeImageOptions = field(default_factory=CascadeImageOptions)
    control: CascadeControlOptions = field(default_factory=CascadeControlOptions)

    @classmethod
    def spell_out(cls, words: Sequence[str]) -> list[str]:
        """Return the command line with the names of options before YAML files that begin it."""
        return cascade_config.spell_out_two(list(words))

    @classmethod
    def foreign_config(cls, name: str, typed: Mapping[str, Any]) -> ForeignConfig | None:
        """Read YAML files of the original program."""
        offered = {option.name for option in cls.options().values() if option.offered}
        return cascade_config.read_for_pictures(name, second=typed.get("config_file_b"), offered=offered)

    def check_together(self) -> Iterator[Problem]:
        """Times of guidance must be in order, code of the user's own is typed, and one process draws."""
        if self.sampling.cfg_t_start < self.sampling.cfg_t_stop:
            yield Problem("--cfg_t_start", "is below --cfg_t_stop, so nothing is guided", "Time goes from 1 to 0.")
        yield from untyped_problems(self.control.controlnet_filter, self.given.get("controlnet_filter"))
        yield from check_processes()

    def check_folders(self) -> Iterator[Problem]:
        """Make the folder for pictures and see that it can be written to."""
        return iter(check_writable_folder(self.files.outdir, f"--outdir {self.files.outdir}"))
