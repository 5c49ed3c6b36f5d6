"""The parts of Stable Cascade for generation: found among the files that there are, checked, built where they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from library.checkpoints import load_cascade
from library.checkpoints.detect_cascade import cascade_option
from library.checkpoints.key_maps_cascade import Part
from library.errors import UserError
from library.models.assemble import check_weights
from library.models.cascade.effnet import EffNetEncoder
from library.models.cascade.file_fit import check_text_fit, require_complete
from library.models.cascade.options import CascadeTextOptions, StageCModelOptions
from library.models.cascade.previewer import Previewer
from library.models.cascade.sources import CascadeSources, LazyPart, open_text
from library.models.cascade.specs import STAGE_C
from library.models.cascade.stage_a import StageA
from library.models.cascade.stage_c import StageC
from library.models.cascade.unet import CascadeUNet
from library.models.cascade.vision import make_image_encoder
from library.models.family import WeightPlan

if TYPE_CHECKING:
    from torch import nn

    from library.checkpoints.cascade_configs import CascadeConfig
    from library.checkpoints.load_cascade import LoadedPart
    from library.inference.options_cascade import CascadeFileOptions


def _stage(stage: Any, version: str | None, path: Path) -> LoadedPart[Any]:
    return load_cascade.load_stage(path, stage, version=version)


_SHARED: tuple[Part, ...] = ("stage_c", "stage_b")
"""Parts whose files may hold others, too."""

Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where parts run, where they wait, and the type of the weights of large ones."""

    device: torch.device
    home: torch.device
    dtype: torch.dtype


class CascadeParts:
    """Everything that the options name, opened but not yet read; a part is built when it is first used.

    Args:
        options: the files.
        place: where parts run.
    """

    def __init__(self, options: CascadeFileOptions, place: Placement) -> None:
        self._options = options
        self.place = place

    def find(self, part: Part) -> Path | None:
        """Return the file or folder of a part: the one that its option names, or another one that holds it."""
        given = self._given(part)
        if given is not None:
            return given
        shared = [path for other in _SHARED if (path := self._given(other)) is not None]
        return next((path for path in shared if part in load_cascade.parts_at(path)), None)

    def _given(self, part: Part) -> Path | None:
        name = getattr(self._options, cascade_option(part).removeprefix("--"), None)
        return None if name is None else Path(name).expanduser()

    def _open(self, part: Part, load: Callable[[Path], Loaded], needed_by: str) -> Loaded:
        """Open a part.

        Raises:
            UserError: it is not there, damaged, or another part.
        """
        path = self.find(part)
        if path is None:
            raise UserError(f"is required for {needed_by}", where=cascade_option(part))
        try:
            return load(path)
        except UserError as error:
            if self._given(part) is None or any(cascade_option(part) in problem.where for problem in error.problems):
                raise
            problem = error.problems[0]
            raise UserError(problem.what, problem.hint, where=f"{cascade_option(part)} {path}") from error

    @cached_property
    def stage(self) -> LoadedPart[CascadeConfig]:
        """The file of stage C, complete.

        Raises:
            UserError: it is missing, damaged, or another part; so do all below.
        """
        opened = self._open("stage_c", partial(_stage, "c", self._options.model_version), "any picture")
        require_complete(CascadeUNet, opened.config, opened.tensors, f"stage C in {opened.path}")
        return opened

    @cached_property
    def text(self) -> LoadedPart[dict[str, Any]]:
        """The text encoder's file."""
        found = None if self._given("text") is not None else self.find("text")
        return open_text(self._model) if found is None else load_cascade.load_text(found)

    @property
    def _model(self) -> StageCModelOptions:
        options = self._options
        return StageCModelOptions(
            stage_c_checkpoint_path=options.stage_c_checkpoint_path,
            text_model_checkpoint_path=options.text_model_checkpoint_path,
            save_text_model=options.save_text_model,
        )

    def stage_c(self) -> StageC:
        """Return stage C with its text encoder, as networks and renderers know it."""
        # Nothing is encoded by the family itself: `effnet` below is used for that, and only where there is one.
        sources = CascadeSources(self.stage, self.stage.config, self.text, effnet=None)
        weights = WeightPlan(self.place.home, trained=(), frozen_dtype=self.place.dtype)
        text = CascadeTextOptions(no_text_mask=self._options.no_text_mask)
        family = StageC(STAGE_C, sources, self._model, text, weights)
        for module, origin in ((family.unet, self.stage), (family.text_encoder, self.text)):
            check_weights(module.state_dict(), str(origin.path), allow_nan=False)
        return family

    def stage_b(self) -> LazyPart:
        """Return stage B."""
        opened = self._open("stage_b", partial(_stage, "b", self._options.model_version_b), "--decoder stage_b")
        return self._part(opened, CascadeUNet, "stage B", self.place.dtype)

    def check_text(self, decoder: LoadedPart[CascadeConfig] | None) -> None:
        """See that the text encoder belongs to stage C and, where there is one, to the stage B that decodes."""
        name = self._options.text_model_checkpoint_path
        check_text_fit("c", self.stage.config, self.text, name)
        if decoder is not None:
            check_text_fit("b", decoder.config, self.text, name)

    def stage_a(self) -> LazyPart:
        """Return stage A, in float32: half precision would show in the colours."""
        opened = self._open("stage_a", load_cascade.load_stage_a, "--decoder stage_b")
        return self._part(opened, StageA, "stage A")

    def previewer(self) -> LazyPart:
        """Return the previewer."""
        opened = self._open("previewer", load_cascade.load_previewer, "--decoder previewer")
        return self._part(opened, Previewer, "previewer")

    def effnet(self, needed_by: str) -> LazyPart:
        """Return the EfficientNet encoder; `needed_by` says what for."""
        opened = self._open("effnet", load_cascade.load_effnet, needed_by)
        return self._part(opened, EffNetEncoder, "EfficientNet encoder")

    def image_encoder(self) -> LazyPart:
        """Return CLIP's image encoder."""
        opened = self._open("vision", load_cascade.load_vision, "--image_mode variation")
        return self._part(opened, make_image_encoder, "image encoder")

    def _part(
        self,
        opened: LoadedPart[Any],
        make: Callable[[Any], nn.Module],
        what: str,
        dtype: torch.dtype = torch.float32,
    ) -> LazyPart:
        require_complete(make, opened.config, opened.tensors, f"{what} in {opened.path}")
        return LazyPart(opened, make, what, device=self.place.home, dtype=dtype)
