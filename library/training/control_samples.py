"""Sample pictures of a ControlNet in training: guides that prompts name."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from library.inference.diffusion import UNWATCHED, Watch
from library.inference.extensions import NO_INPUTS, PictureInputs
from library.inference.picture_inputs import opened

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.cascade import CascadeRenderer
    from library.inference.prompts import PromptRequest


class GuidedRenderer:
    """Renders requests with the guide pictures that they name by `--cn`; without one, as without a ControlNet.

    Args:
        renderer: has the ControlNet as an extension.
    """

    reads_guides = True

    def __init__(self, renderer: CascadeRenderer) -> None:
        self._renderer = renderer
        self.sample_defaults, self.sample_place = renderer.sample_defaults, renderer.sample_place

    def session(self) -> AbstractContextManager[None]:
        """Return the context in which what rendering loads stays in memory."""
        return self._renderer.session()

    def render(self, requests: Sequence[PromptRequest], *, watch: Watch = UNWATCHED) -> list[Image]:
        """Return one picture per request.

        Raises:
            UserError: a guide picture cannot be read.
        """
        return self._renderer.render(requests, [_guided(request) for request in requests], watch=watch)


def _guided(request: PromptRequest) -> PictureInputs:
    if not request.controlnet_image:
        return NO_INPUTS
    return PictureInputs(guides=(opened(Path(request.controlnet_image)),))
