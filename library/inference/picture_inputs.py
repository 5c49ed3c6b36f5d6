"""What pictures are made from beside their prompts: files of the command line, taken in turn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.images import image_header
from library.data.jobs import find_pictures
from library.errors import UserError
from library.inference.extensions import PictureInputs
from library.inference.guides import guide_sets
from library.inference.image_to_image import DEFAULT_STRENGTH, SIDE_STEP, read_picture, size_from
from library.inference.png_info import read_prompt
from library.inference.prompt_files import PromptEntry
from library.inference.studio import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.inference.option_set import GenerationOptions
    from library.inference.prompts import PromptRequest

logger = logging.getLogger(__name__)

_GREY_SPREAD = 12
"""Channels of a grey pixel differ by no more than this, lossy compression included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureFiles:
    """Which pictures there are, by the options that name them.

    Attributes:
        images: picture or folder to start from.
        masks: masks for these, or regions.
        guides: pictures or folders for ControlNets.
        nets: how many ControlNets there are.
        networks: whether networks are ``attached``, whose regions a coloured mask may say, all ``merged``, or `""`.
        images_option: names `images` in messages.
        guides_option: names `guides`.
        nets_option: names the ControlNets.
    """

    images: str | None = None
    masks: str | None = None
    guides: Sequence[str] = ()
    nets: int = 0
    networks: str = ""
    images_option: str = "--image_path"
    guides_option: str = "--guide_image_path"
    nets_option: str = "--control_net_models"


def named_files(opts: GenerationOptions) -> PictureFiles:
    """Return the pictures that the options of gen_img.py name."""
    networks = len(opts.networks.network_weights)
    attached = networks > opts.networks.merged_count
    return PictureFiles(
        images=opts.images.image_path,
        masks=opts.images.mask_path,
        guides=opts.control.guide_image_path,
        nets=len(opts.control.control_net_models),
        networks="attached" if attached else "merged" if networks else "",
    )


class InputPictures:
    """The pictures that a run makes its own from.

    Args:
        files: what the options name.

    Raises:
        UserError: a folder holds no picture, or guides cannot be shared out.
    """

    def __init__(self, files: PictureFiles) -> None:
        self._own: dict[str, int] = {}
        self._files = files
        self._images = listed(files.images)
        self._masks = listed(files.masks)
        nets = files.nets
        guides = [listed(path) for path in files.guides]
        if not guides and self._images:
            guides = [self._images] * nets  # what a prompt starts from is what all of them look at
        self._guides = guide_sets(guides, nets, files.guides_option) if nets else []
        if nets and not self._guides:
            what = "%s has no effect on prompts without --cn: there is no %s"
            logger.warning(what, files.nets_option, files.guides_option)
        self._nets = nets
        self._regional = bool(self._masks) and self._holds_regions(with_networks=files.networks == "attached")
        if self._masks and files.networks == "merged" and is_coloured(opened(self._masks[0])):
            logger.warning("--mask_path is coloured, but merged networks have no regions: it says what is painted anew")

    def _holds_regions(self, *, with_networks: bool) -> bool:
        """Tell a mask of regions from one that says what is to be painted: by its colours, where both are possible."""
        if not with_networks:
            return False
        if not self._images:
            return True
        coloured = is_coloured(opened(self._masks[0]))
        meaning = "regions of networks" if coloured else "what is painted anew"
        logger.info("--mask_path is %s, so it means %s", "coloured" if coloured else "grey", meaning)
        return coloured

    @property
    def images(self) -> tuple[Path, ...]:
        """The pictures to start from."""
        return tuple(self._images)

    @property
    def nets_option(self) -> str:
        """Names the ControlNets where there are none, so that guide pictures have no effect; else empty."""
        return "" if self._nets else self._files.nets_option

    @property
    def regional(self) -> bool:
        """Whether the mask says where networks and parts of the prompt hold."""
        return self._regional

    def picture(self, turn: int, request: PromptRequest) -> Picture:
        """Return what is to be made for one picture.

        Args:
            turn: how many pictures came before, those of bad prompts included: each takes the next file. A prompt
                that was read from a file belongs to that one.
            request: the picture; a side of 0 is one that nobody asked for.

        Raises:
            UserError: a file cannot be read or is too small.
        """
        turn = self._own.get(request.where, turn)
        origin, mask_path = _in_turn(self._images, turn), _in_turn(self._masks, turn)
        image = None if origin is None else opened(origin)
        mask = None if mask_path is None else opened(mask_path)
        inputs = PictureInputs(
            image=image,
            mask=None if self._regional or image is None or mask is None else mask.convert("L"),
            regions=mask if self._regional else None,
            guides=tuple(opened(path) for path in self._guide_paths(turn, request)),
        )
        return Picture(self._sized(request, image, str(origin)), inputs, origin)

    def _guide_paths(self, turn: int, request: PromptRequest) -> tuple[Path, ...]:
        if not self._nets:
            return ()
        if request.controlnet_image:
            return (Path(request.controlnet_image),) * self._nets
        return self._guides[turn % len(self._guides)] if self._guides else ()

    def _sized(self, request: PromptRequest, image: Image | None, where: str) -> PromptRequest:
        """Give a picture that is made from another its strength, and the sides that nobody asked for."""
        if image is None:
            return request
        request = replace(request, strength=DEFAULT_STRENGTH if request.strength is None else request.strength)
        width, height = request.width, request.height
        if width and height:
            return request
        if width or height:
            across, down = image.size
            return replace(
                request, width=width or _side(height * across / down), height=height or _side(width * down / across)
            )
        width, height = size_from(image, where)
        return replace(request, width=width, height=height)

    def own_prompts(self) -> list[PromptEntry]:
        """Return the prompts that the pictures of `--image_path` were made from.

        Raises:
            UserError: one of them does not tell its prompt, which would shift all that follow.
        """
        entries = []
        for number, path in enumerate(self._images):
            found = read_prompt(path)
            if found is None:
                what = "says nothing about a prompt"
                raise UserError(
                    what, "Give a prompt with --prompt or --from_file.", where=f"{self._files.images_option} {path}"
                )
            self._own[str(path)] = number
            entries.append(PromptEntry(str(path), {"prompt": found[0], "negative_prompt": found[1]}))
        return entries


def listed(path: str | None) -> list[Path]:
    """Return the picture, or the pictures in the folder, that a path means; None means nothing.

    Raises:
        UserError: none of them can be opened. One of several that cannot only costs the prompts whose turn it is.
    """
    if path is None:
        return []
    found = find_pictures(Path(path), recursive=None) if Path(path).is_dir() else [Path(path)]
    first: UserError | None = None
    for one in found:
        try:
            image_header(one)
        except UserError as error:
            first = first or error
        else:
            return found
    raise first or UserError("holds no pictures", where=path)


def _in_turn(paths: Sequence[Path], number: int) -> Path | None:
    return paths[number % len(paths)] if paths else None


def _side(length: float) -> int:
    """Return a side of this length, cut down to a step that sides have."""
    return max(SIDE_STEP, int(length / SIDE_STEP + 1e-6) * SIDE_STEP)


def opened(path: Path) -> Image:
    """Read a picture as RGB, upright; the last ones are kept, since several prompts may start from one."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        changed = 0  # reading it says what is wrong
    return _opened(path, changed)


@lru_cache(maxsize=8)
def _opened(path: Path, changed: int) -> Image:
    """Read a picture, once for each time that it changed: who types prompts may paint the next mask meanwhile."""
    return read_picture(path)


def is_coloured(image: Image) -> bool:
    """Tell whether a picture holds anything but shades of grey."""
    import numpy as np

    levels = np.asarray(image.convert("RGB")).astype(int)
    return bool((levels.max(axis=2) - levels.min(axis=2) > _GREY_SPREAD).any())
