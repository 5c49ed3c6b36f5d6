"""Options that say which Stable Cascade models are used and how captions become conditions for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from library.errors import Problem
from library.models.options import ModelOptions, TextOptions
from library.option_groups import opt

BIG_G = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
"""The text encoder's repository on Hugging Face."""


@dataclass(frozen=True, kw_only=True)
class CascadeModelOptions(ModelOptions, title="model"):
    """Which files the model is made of."""

    effnet_checkpoint_path: str | None = opt(
        None, path=True, resume="free", help="EfficientNet encoder, which makes the latents of stage C of pictures."
    )
    text_model_checkpoint_path: str | None = opt(
        None,
        path=True,
        resume="free",
        help=f"Text encoder: a file, a folder or a Hugging Face id. Default: {BIG_G}.",
    )
    save_text_model: bool = opt(
        False,
        resume="free",
        needs={"text_model_checkpoint_path": ()},
        help="Where there is no file --text_model_checkpoint_path yet, download the text encoder and keep it there.",
    )
    model_version: str | None = opt(
        None,
        help="Structure of the model: 3.6B or 1B (stage C), 3B or 700M (stage B). Default: that of the file. Without a "
        "file the model starts from fresh weights.",
    )

    is_trained: ClassVar[bool] = False
    """Whether what trains belongs to a stage that was trained before, so that fresh weights make no sense."""

    @property
    def stage(self) -> str:
        """Which stage is trained: `c` or `b`."""
        return "c"

    @property
    def stage_path(self) -> str | None:
        """File or folder of the stage that is trained; None: it starts from fresh weights."""
        return None

    @property
    def main_path(self) -> str | None:
        """File or folder of what is trained."""
        return self.stage_path

    @property
    def stage_option(self) -> str:
        """The option that names it."""
        return f"--stage_{self.stage}_checkpoint_path"

    def missing(self) -> Iterator[Problem]:
        """Yield which files a run cannot do without."""
        if not self.stage_path and (self.is_trained or not self.model_version):
            fresh = "" if self.is_trained else " To start from fresh weights instead, give --model_version."
            reason = ": what is trained here belongs to a trained model" if self.is_trained else ""
            yield Problem(self.stage_option, f"is required{reason}", f"Give the file.{fresh}")
        if not self.effnet_checkpoint_path:
            yield Problem("--effnet_checkpoint_path", "is required", "Give effnet_encoder.safetensors.")

    def files(self) -> dict[str, str | None]:
        """Return file or folder by the option that names it; ids of Hugging Face are left to the loader."""
        found = {
            self.stage_option: self.stage_path,
            "--effnet_checkpoint_path": self.effnet_checkpoint_path,
        }
        if not self.save_text_model:
            found["--text_model_checkpoint_path"] = self.text_model_checkpoint_path
        return found

    def base_files(self) -> dict[str, str]:
        """Return what frozen weights come from, by name; the stage that is trained is called ""."""
        found = {"": self.stage_path or f"fresh {self.model_version}", "effnet": self.effnet_checkpoint_path or ""}
        return {**found, "text encoder": self.text_model_checkpoint_path or BIG_G}

    def check(self) -> Iterator[Problem]:
        """Refuse structures that this stage does not have."""
        known = ("3.6B", "1B") if self.stage == "c" else ("3B", "700M")
        if self.model_version is not None and self.model_version not in known:
            what = f"{self.model_version!r} is no structure of stage {self.stage.upper()}"
            yield Problem("--model_version", what, f"Give {' or '.join(known)}.")


@dataclass(frozen=True, kw_only=True)
class StageCModelOptions(CascadeModelOptions, title="model"):
    """Which files stage C and what surrounds it are made of."""

    stage_c_checkpoint_path: str | None = opt(
        None, path=True, resume="free", help="Stage C: an official or ComfyUI file, or a Diffusers folder."
    )
    previewer_checkpoint_path: str | None = opt(
        None, path=True, resume="free", help="Previewer, which turns latents into small pictures: for sample images."
    )
    image_model_checkpoint_path: str | None = opt(
        None,
        path=True,
        resume="free",
        matters_when={"clip_image_cond_rate": ()},
        help="CLIP image encoder (ViT-L/14), for --clip_image_cond_rate: a file, a folder or a Hugging Face id.",
    )
    clip_image_cond_rate: float = opt(
        0.0,
        at_least=0,
        at_most=1,
        help="Share of the pictures that stage C sees an embedding of, besides the caption, as in its own training.",
    )

    stage_c_dropout: float | None = opt(
        None,
        at_least=0,
        at_most=0.99,
        help="Share of features and attention that training leaves out at random. Default: 0.1, as in its training.",
    )

    @property
    def stage_path(self) -> str | None:
        """File or folder of stage C."""
        return self.stage_c_checkpoint_path

    def files(self) -> dict[str, str | None]:
        """Return file or folder by the option that names it."""
        return {
            **super().files(),
            "--previewer_checkpoint_path": self.previewer_checkpoint_path,
            "--image_model_checkpoint_path": self.image_model_checkpoint_path,
        }

    def base_files(self) -> dict[str, str]:
        """Return what frozen weights come from, by name."""
        seen = {"image encoder": self.image_model_checkpoint_path or ""} if self.clip_image_cond_rate else {}
        return {**super().base_files(), **seen}

    def check(self) -> Iterator[Problem]:
        """Refuse image conditions without what makes them."""
        yield from super().check()
        if self.clip_image_cond_rate and not self.image_model_checkpoint_path:
            yield Problem("--clip_image_cond_rate", "needs --image_model_checkpoint_path")


@dataclass(frozen=True, kw_only=True)
class TrainedStageCModelOptions(StageCModelOptions, title="model"):
    """Which files the stage C is made of that a network or a ControlNet belongs to."""

    is_trained: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class CascadeTextOptions(TextOptions, title="text"):
    """How captions become conditions."""

    no_text_mask: bool = opt(
        False,
        help="Let the text encoder see padding, as sd-scripts did. Programs that draw with the model do not.",
    )

    def cache_origin(self) -> dict[str, Any]:
        """Return what the outputs of the text encoder depend on besides weights and captions."""
        return {**super().cache_origin(), "masked": not self.no_text_mask}

    def warn(self) -> Iterator[Problem]:
        """Point out lengths that nothing draws with."""
        if self.max_token_length is not None:
            what = "few programs give Stable Cascade more than 75 tokens"
            yield Problem("--max_token_length", what, "Leave it out to train as they draw.")


@dataclass(frozen=True, kw_only=True)
class StageBModelOptions(CascadeModelOptions, title="model"):
    """Which files stage B and what surrounds it are made of."""

    stage_b_checkpoint_path: str | None = opt(
        None, path=True, resume="free", help="Stage B: an official or ComfyUI file, or a Diffusers folder."
    )
    stage_a_checkpoint_path: str | None = opt(
        None, path=True, resume="free", help="Stage A, which makes the latents of stage B of pictures."
    )
    effnet_dropout_rate: float = opt(
        0.1,
        at_least=0,
        at_most=1,
        help="Share of the pictures that are trained without the latents of stage C, as in stage B's own training.",
    )

    @property
    def stage(self) -> str:
        """Which stage is trained."""
        return "b"

    @property
    def stage_path(self) -> str | None:
        """File or folder of stage B."""
        return self.stage_b_checkpoint_path

    def missing(self) -> Iterator[Problem]:
        """Yield which files a run cannot do without."""
        yield from super().missing()
        if not self.stage_a_checkpoint_path:
            yield Problem("--stage_a_checkpoint_path", "is required", "Give stage_a.safetensors.")

    def files(self) -> dict[str, str | None]:
        """Return file or folder by the option that names it."""
        return {**super().files(), "--stage_a_checkpoint_path": self.stage_a_checkpoint_path}

    def base_files(self) -> dict[str, str]:
        """Return what frozen weights come from, by name."""
        return {**super().base_files(), "stage A": self.stage_a_checkpoint_path or ""}
