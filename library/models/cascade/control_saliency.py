"""What matters in a picture, by a small network of the user's: for inpainting filters that hide or keep just that.

A file of the network that accompanies the official ControlNets (111,233 values), or any ONNX file that turns pictures
[1,3,h,w] in [0,1] into one map.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from library.errors import UserError
from library.models.cascade.onnx_file import onnx_problem, run_onnx

if TYPE_CHECKING:
    from torch import nn

_SHORT_SIDE = 240
_WIDTHS = (8, 16, 32, 64)


def saliency_problem(path: str) -> str:
    """Return why `path` cannot be such a file, or nothing; it is not opened."""
    wrong = onnx_problem(path)
    return f"saliency_model_path: {wrong}" if wrong else ""


def open_saliency(path: str) -> None:
    """Read the model now, so that a wrong file is known before training starts; an ONNX file is left for later.

    Raises:
        UserError: it is damaged, or another kind of model.
    """
    if Path(path).suffix.lower() != ".onnx":
        _network(path)


def saliency(path: str, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return a rough map [h,w] of what matters in a picture [H,W,3], about 0 to 1.

    Raises:
        UserError: the file holds another kind of model.
    """
    import cv2

    height, width = picture.shape[:2]
    scale = _SHORT_SIDE / min(height, width)
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    small: Any = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    pixels = np.ascontiguousarray(small.transpose(2, 0, 1)[None]).astype(np.float32) / np.float32(255)
    if Path(path).suffix.lower() == ".onnx":
        found = np.asarray(run_onnx(path, pixels)[0], np.float32)
    else:
        import torch

        with torch.inference_mode():
            found = _network(path)(torch.from_numpy(pixels)).numpy()
    found = found.squeeze()
    if found.ndim != 2 or not np.isfinite(found).all():
        raise UserError("its output is not one map of a picture", where=path)
    return found


@lru_cache(maxsize=2)
def _network(path: str) -> nn.Module:
    """Load the network of the official ControlNets; its tensors are told by their order."""
    from library.checkpoints.tensor_files import open_tensors

    tensors = open_tensors(Path(path))
    network = _make()
    own = network.state_dict()
    names = sorted(tensors, key=_natural)
    shapes = [tuple(tensors[name].shape) for name in names]
    if shapes != [tuple(tensor.shape) for tensor in own.values()]:
        hint = "Give saliency_model.pt of the official ControlNets, or an ONNX file."
        raise UserError("is no saliency model that is known here", hint, where=path)
    network.load_state_dict({mine: tensors[name] for mine, name in zip(own, names, strict=True)})
    return network.eval().requires_grad_(False)


def _natural(name: str) -> list[Any]:
    """Order names as modules are in a network: numbers by value, and a weight before its bias."""
    parts = [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name[: name.rfind(".")])
    ]
    return [parts, name.endswith("bias")]


def _make() -> nn.Module:
    """Make the network: three steps down, a residual block, twice the features, another one, and one step up."""
    from torch import nn

    class Residual(nn.Module):
        """Two convolutions with norms, and a residual."""

        def __init__(self, features: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(*_unit(features, features, 3), *_unit(features, features, 3)[:-1])

        def forward(self, x: Any) -> Any:
            return x + self.layers(x)

    def _unit(c_in: int, c_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(c_in, c_out, kernel, stride)
        return [nn.ReflectionPad2d(kernel // 2), convolution, nn.InstanceNorm2d(c_out, affine=True), nn.ReLU()]

    first, second, third, wide = _WIDTHS
    return nn.Sequential(
        *_unit(3, first, 9, 4),
        *_unit(first, second, 3, 2),
        *_unit(second, third, 3, 2),
        Residual(third),
        nn.Conv2d(third, wide, 1, groups=third, bias=False),
        Residual(wide),
        *_unit(wide, second, 3),
        nn.Upsample(scale_factor=2),
        nn.ReflectionPad2d(4),
        nn.Conv2d(second, 1, 9),
        nn.Sigmoid(),
    )
