"""Options of gen_img.py about pictures that steer others, and about making large ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import Problem, UserError
from library.inference.guides import preparation
from library.inference.prompt_options import UnusableValue, unsharp_numbers
from library.option_groups import OptionGroup, opt
from library.option_values import BadValue

_LARGE = {"highres_fix_scale": ()}
_SDXL = "SDXL only"
_DEEPEST = 3
"""Blocks of the U-Nets of Stable Diffusion count from 0."""


def unsharp(value: Any) -> str:
    """Read the parameters of sharpening, which stay text.

    Raises:
        BadValue: they are no such parameters.
    """
    try:
        unsharp_numbers(value)
    except UnusableValue as error:
        raise BadValue(f"takes {error}, not {value!r}") from None
    return str(value)


@dataclass(frozen=True, kw_only=True)
class ImageInputOptions(OptionGroup, title="pictures to start from"):
    """img2img and inpainting."""

    image_path: str | None = opt(
        None,
        path=True,
        help="Picture to start from, or a folder of them, of which every result takes the next one. Without any "
        "prompt, prompts come from the pictures' own metadata.",
    )
    mask_path: str | None = opt(
        None,
        path=True,
        help="Mask, or a folder of them: white is painted anew. Without --image_path: regions for networks.",
    )
    strength: float | None = opt(
        None,
        at_least=0,
        at_most=1,
        matters_when={"image_path": (), "highres_fix_scale": ()},
        help="How much of --image_path, or of the first picture of a highres fix, is painted anew: 0 to 1. "
        "Default: 0.8.",
    )
    clip_vision_strength: float | None = opt(None, help=f"Refused: {_SDXL}.")

    def check(self) -> Iterator[Problem]:
        """Refuse what is missing, and what only SDXL has."""
        for option, name in (("--image_path", self.image_path), ("--mask_path", self.mask_path)):
            if name is not None and not Path(name).exists():
                yield Problem(f"{option} {name}", "no such file or folder", "Check the path.")
        if self.clip_vision_strength is not None:
            yield Problem("--clip_vision_strength", "is for SDXL models, which come with a later release")


@dataclass(frozen=True, kw_only=True)
class HighresOptions(OptionGroup, title="highres fix"):
    """A small picture first, which is then enlarged and refined."""

    highres_fix_scale: float | None = opt(
        None,
        more_than=0,
        at_most=1,
        help="Size of the first picture relative to the final one, such as 0.5. Switches the highres fix on.",
    )
    highres_fix_steps: int = opt(
        28, at_least=1, at_most=1000, matters_when=_LARGE, help="Denoising steps of the first picture."
    )
    highres_fix_strength: float | None = opt(
        None,
        at_least=0,
        at_most=1,
        matters_when={"image_path": ()},
        help="How much the first pass paints anew of --image_path. Default: --strength.",
    )
    highres_fix_save_1st: bool = opt(False, matters_when=_LARGE, help="Save the first picture too.")
    highres_fix_latents_upscaling: bool = opt(
        False, matters_when=_LARGE, help="Enlarge latents, not pixels: faster, less sharp."
    )
    highres_fix_upscaler: str | None = opt(
        None,
        matters_when=_LARGE,
        excludes={"highres_fix_latents_upscaling": "it enlarges pixels"},
        help="Python module whose create_upscaler(**arguments) returns what enlarges pictures.",
    )
    highres_fix_upscaler_args: str | None = opt(
        None,
        matters_when={"highres_fix_upscaler": ()},
        help="Arguments of the upscaler, name=value, several of them separated by semicolons.",
    )
    highres_fix_disable_control_net: bool = opt(
        False, matters_when=_LARGE, help="Leave ControlNet out of the second pass."
    )


@dataclass(frozen=True, kw_only=True)
class DeepShrinkOptions(OptionGroup, title="deep shrink"):
    """Smaller features in the first steps, so that large pictures keep one composition."""

    ds_depth_1: int | None = opt(
        None,
        at_least=0,
        at_most=_DEEPEST,
        help="Depth of the U-Net, from 0 to 3, at which features shrink. Switches deep shrink on.",
    )
    ds_timesteps_1: int = opt(
        650, at_least=0, at_most=1000, matters_when={"ds_depth_1": ()}, help="Shrink down to this timestep."
    )
    ds_depth_2: int | None = opt(
        None,
        at_least=0,
        at_most=_DEEPEST,
        matters_when={"ds_depth_1": ()},
        help="Depth at which features shrink after --ds_timesteps_1.",
    )
    ds_timesteps_2: int = opt(
        650, at_least=0, at_most=1000, matters_when={"ds_depth_2": ()}, help="Shrink at --ds_depth_2 down to this one."
    )
    ds_ratio: float = opt(
        0.5, more_than=0, at_most=1, matters_when={"ds_depth_1": ()}, help="Size of the shrunk features."
    )


@dataclass(frozen=True, kw_only=True)
class GradualLatentOptions(OptionGroup, title="gradual latent"):
    """Latents that begin small and grow while they are denoised."""

    gradual_latent_timesteps: float | None = opt(
        None, at_least=0, at_most=1000, help="Latents grow from this timestep on. Switches gradual latent on."
    )
    gradual_latent_ratio: float = opt(
        0.5,
        more_than=0,
        at_most=1,
        matters_when={"gradual_latent_timesteps": ()},
        help="Size at which latents begin, relative to the final one.",
    )
    gradual_latent_ratio_step: float = opt(
        0.125, more_than=0, matters_when={"gradual_latent_timesteps": ()}, help="How much the ratio grows each time."
    )
    gradual_latent_every_n_steps: int = opt(
        3, at_least=1, matters_when={"gradual_latent_timesteps": ()}, help="Grow every n steps."
    )
    gradual_latent_s_noise: float = opt(
        1.0, at_least=0, matters_when={"gradual_latent_timesteps": ()}, help="Strength of the noise of enlarged steps."
    )
    gradual_latent_unsharp_params: str | None = opt(
        None,
        convert=unsharp,
        matters_when={"gradual_latent_timesteps": ()},
        help="Sharpen enlarged latents: kernel size, sigma, strength and whether the target is sharpened (1 or 0), "
        "such as 3,0.5,0.5,1.",
    )


@dataclass(frozen=True, kw_only=True)
class ControlOptions(OptionGroup, title="ControlNet"):
    """Pictures that guide the composition. Lists go together: the first model with the first preparation."""

    control_net_models: tuple[str, ...] = opt((), path=True, help="ControlNet models (files or folders).")
    control_net_lllite_models: tuple[str, ...] = opt((), path=True, help="Refused: ControlNet-LLLite is for SDXL.")
    guide_image_path: tuple[str, ...] = opt(
        (),
        path=True,
        needs={"control_net_models": ()},
        help="Pictures (or folders of them) for ControlNet, a prompt's one for each model. Default: --image_path.",
    )
    control_net_preps: tuple[str, ...] = opt(
        (),
        matters_when={"control_net_models": ()},
        help="What is done with guide pictures, for each model: canny_LOW_HIGH (canny_63_191) or none.",
    )
    control_net_multipliers: tuple[float, ...] = opt(
        (), matters_when={"control_net_models": ()}, help="Strength of each ControlNet. Default: 1."
    )
    control_net_ratios: tuple[float, ...] = opt(
        (),
        at_least=0,
        at_most=1,
        matters_when={"control_net_models": ()},
        help="Share of the steps, from the first, in which each ControlNet works. Default: 1.",
    )

    def check(self) -> Iterator[Problem]:
        """Lists must match the models, and the models must be there."""
        if self.control_net_lllite_models:
            what = "ControlNet-LLLite is for SDXL models, which come with a later release"
            yield Problem("--control_net_lllite_models", what, "Use --control_net_models.")
        count = len(self.control_net_models)
        for name in ("control_net_preps", "control_net_multipliers", "control_net_ratios"):
            given = len(getattr(self, name))
            if count and given > count:
                yield Problem(f"--{name}", f"{given} values for {count} of --control_net_models")
        for prep in self.control_net_preps:
            try:
                preparation(prep)
            except UserError as error:
                yield from error.problems
        for name in (*self.guide_image_path, *self.control_net_models):
            option = "--guide_image_path" if name in self.guide_image_path else "--control_net_models"
            if not Path(name).exists() and (option == "--guide_image_path" or name.count("/") != 1):
                yield Problem(f"{option} {name}", "no such file or folder", "Check the path.")


@dataclass(frozen=True, kw_only=True)
class SdxlSizeOptions(OptionGroup, title="SDXL sizes"):
    """What SDXL is told about the size of pictures; refused until SDXL models are there."""

    original_height: int | None = opt(None, at_least=1, help=f"Refused: {_SDXL}.")
    original_width: int | None = opt(None, at_least=1, help=f"Refused: {_SDXL}.")
    original_height_negative: int | None = opt(None, at_least=1, help=f"Refused: {_SDXL}.")
    original_width_negative: int | None = opt(None, at_least=1, help=f"Refused: {_SDXL}.")
    crop_top: int | None = opt(None, help=f"Refused: {_SDXL}.")
    crop_left: int | None = opt(None, help=f"Refused: {_SDXL}.")

    def check(self) -> Iterator[Problem]:
        """Refuse what no model that can be loaded has."""
        for name, value in vars(self).items():
            if value is not None:
                what = "tells SDXL models about sizes, and those come with a later release"
                yield Problem(f"--{name}", what, "Leave it out.")
