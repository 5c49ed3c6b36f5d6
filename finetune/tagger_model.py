"""A tagger as an ONNX file: opened by onnxruntime, checked against its list of tags, and asked for probabilities."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.tagger_files import TaggerFiles
from finetune.tagger_pictures import TaggerPicture
from library.data.images import BadImage
from library.errors import UserError

_log = logging.getLogger(__name__)

USUAL_SIDE = 448
_LARGEST_SIDE, _LARGEST_BATCH = 4096, 1024
PROVIDERS = ("OpenVINOExecutionProvider", "CUDAExecutionProvider", "ROCMExecutionProvider", "CPUExecutionProvider")
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class TaggerInputs:
    """A batch: what the model gets, and the sizes (width, height) of the pictures in it."""

    images: NDArray[Any]
    sizes_wh: list[tuple[int, int]]


class TaggerModel:
    """An opened tagger.

    Attributes:
        side: of the square pictures that it looks at, in pixels.
        batch_size: the number of pictures that it takes at once, None for any.
        provider: what it runs on, such as `CUDAExecutionProvider`.
    """

    def __init__(self, files: TaggerFiles, count: int) -> None:
        """Open a model.

        Args:
            files: where it is.
            count: number of tags in its list.

        Raises:
            UserError: onnxruntime is missing, or the file is no model of this format and length.
        """
        self._where, self._format, self._count = str(files.model), files.format, count
        self._session = _open(files)
        self.provider: str = self._session.get_providers()[0]
        self._input, self.batch_size, self.side = self._check_input(self._session.get_inputs())
        self._type = _TYPES[self._input.type]
        self._output = self._check_outputs(self._session.get_outputs())

    def _check_input(self, inputs: Sequence[Any]) -> tuple[Any, int | None, int]:
        """Return the input, its number of pictures and their side."""
        if len(inputs) != 1:
            raise UserError(f"has {len(inputs)} inputs, a tagger has one: the pictures", where=self._where)
        shape = list(inputs[0].shape)
        shown = f"[{', '.join(str(size) for size in shape)}]"
        first = self._format.channels_first
        wanted = "[batch, 3, height, width]" if first else "[batch, height, width, 3]"
        names = f"of the {self._format.name} format ({self._format.model} with {self._format.tags})"
        channels = shape[1 if first else 3] if len(shape) == 4 else 0
        if channels != 3 and not _open_ended(channels):
            hint = f"A model {names} takes {wanted}."
            raise UserError(f"its input is {shown}, not {wanted}", hint, where=self._where)
        if inputs[0].type not in _TYPES:
            raise UserError(f"its input is {inputs[0].type}, not tensor(float)", where=self._where)
        height, width = shape[2:] if first else shape[1:3]
        sides = {size for size in (height, width) if not _open_ended(size)}
        if len(sides) > 1:
            raise UserError(f"its input is {shown}, but taggers look at squares", where=self._where)
        if max(sides, default=0) > _LARGEST_SIDE:
            raise UserError(f"its input is {shown}; the largest side is {_LARGEST_SIDE}", where=self._where)
        batch = None if _open_ended(shape[0]) else int(shape[0])
        if (batch or 0) > _LARGEST_BATCH:
            raise UserError(f"it wants {batch} pictures at once; at most {_LARGEST_BATCH} are given", where=self._where)
        return inputs[0], batch, int(sides.pop()) if sides else USUAL_SIDE

    def _check_outputs(self, outputs: Sequence[Any]) -> str:
        """Return the name of the output with one value for each tag, which is the first."""
        shape = list(outputs[0].shape)
        if len(shape) == 2 and not _open_ended(shape[1]):
            self._check_count(int(shape[1]))
        elif len(shape) not in (0, 2):
            raise UserError(f"its output has {len(shape)} dimensions, not [batch, tags]", where=self._where)
        return str(outputs[0].name)

    def _check_count(self, found: int) -> None:
        if found != self._count:
            what = f"has {found} outputs, but {self._format.tags} names {self._count} tags"
            raise UserError(what, "The two files belong to different models.", where=self._where)

    def gather(self, pictures: Sequence[TaggerPicture]) -> TaggerInputs:
        """Return a batch, filled up with zeros where the model takes a fixed number."""
        images = np.stack([picture.pixels for picture in pictures]).astype(np.float32)
        if self._format.channels_first:
            images = images.transpose(0, 3, 1, 2)
        if self._format.scaled:
            images = images / 127.5 - 1
        missing = (self.batch_size or 0) - len(images)
        if missing > 0:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
        ready = np.ascontiguousarray(images, self._type)
        return TaggerInputs(ready, [picture.size_wh for picture in pictures])

    def probabilities(self, inputs: TaggerInputs) -> NDArray[np.float32]:
        """Return probabilities [pictures, tags].

        Raises:
            UserError: the values cannot be probabilities of these tags.
            BadImage: they are no numbers.
        """
        (found,) = self._session.run([self._output], {self._input.name: inputs.images})
        values = np.asarray(found, np.float32)[: len(inputs.sizes_wh)]
        if values.ndim != 2:
            raise UserError(f"its output is {list(values.shape)}, not [batch, tags]", where=self._where)
        self._check_count(values.shape[1])
        if not np.isfinite(values).all():
            raise BadImage(self._where, "the model gives values that are no numbers")
        if self._format.logits:
            return (0.5 * (1 + np.tanh(0.5 * values))).astype(np.float32)  # the sigmoid, without overflow
        if values.min() < -_TOLERANCE or values.max() > 1 + _TOLERANCE:
            what = f"gives values from {values.min():.3g} to {values.max():.3g}, which are no probabilities"
            raise UserError(what, f"Is it a model of the {self._format.name} format?", where=self._where)
        return values


def _open_ended(size: Any) -> bool:
    """Tell whether a size in a model's shape may be anything: it has a name, or none, there."""
    return not isinstance(size, int) or size < 1


def choose_providers(available: Sequence[str]) -> list[str]:
    """Return what a model is run on: the first of `PROVIDERS` that is there, and the CPU for the rest of it."""
    best = next((name for name in PROVIDERS if name in available), PROVIDERS[-1])
    return list(dict.fromkeys((best, PROVIDERS[-1])))


def _open(files: TaggerFiles) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        hint = "pip install onnxruntime, or onnxruntime-gpu for NVIDIA graphics cards."
        raise UserError("onnxruntime, which runs taggers, is not installed", hint) from error
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors; its warnings are about the model's insides
    providers = choose_providers(onnxruntime.get_available_providers())
    try:
        session = onnxruntime.InferenceSession(str(files.model), settings, providers=providers)
    except Exception as error:  # noqa: BLE001 - the boundary: its errors have no common class, and all mean this file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"is no ONNX model that can be run here ({reason})", where=str(files.model)) from error
    _log.info("%s runs on %s", files.model, session.get_providers()[0])
    return session
