"""A VAE that works in horizontal bands: the same numbers up to rounding, in less memory.

Convolutions see one row beyond their band, and a norm's statistics are taken over the whole picture before any band is
normalised; so there are no seams, unlike with tiles that are decoded one by one and blended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

Affine = tuple[Tensor, Tensor]
"""Factor and summand [B,C,1,1], float32, that a group norm comes down to once its statistics are known."""


def compute_in_slices(model: nn.Module, slices: int) -> None:
    """Let the residual blocks and the resizing layers of an `AutoencoderKL` compute in bands, without gradients.

    Blocks may overwrite their input, which nothing else in an autoencoder reads.
    """
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    kinds: dict[type, Callable[..., Tensor]] = {ResnetBlock2D: _resnet, Upsample2D: _up, Downsample2D: _down}
    for module in model.modules():
        compute = kinds.get(type(module))
        if compute is not None:
            vars(module)["forward"] = partial(compute, module, slices)


def _bands(rows: int, slices: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, row after the last) of each band."""
    step = max(1, -(-rows // slices))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _with_neighbours(x: Tensor, start: int, stop: int) -> Tensor:
    """Return rows `start - 1` to `stop` of [B,C,H,W]; beyond the picture they are zero."""
    rows = x.shape[2]
    part = x[:, :, max(start - 1, 0) : min(stop + 1, rows)]
    return F.pad(part, (0, 0, int(start == 0), int(stop == rows)))


def _resnet(block: Any, slices: int, x: Tensor, *_: Any, **__: Any) -> Tensor:
    first, shortcut = block.conv1, block.conv_shortcut
    inner = x.new_empty((x.shape[0], first.out_channels, *x.shape[2:]))
    _norm_and_convolve(block.norm1, block.nonlinearity, first, x, slices, inner.__setitem__)
    # Rows of the input are needed once more, for the sum: where the widths agree, the sum takes their place.
    result = x if shortcut is None else torch.empty_like(inner)

    def add(where: Any, band: Tensor) -> None:
        result[where] = (x[where] if shortcut is None else shortcut(x[where])) + band

    _norm_and_convolve(block.norm2, block.nonlinearity, block.conv2, inner, slices, add)
    return result


def _norm_and_convolve(
    norm: nn.GroupNorm,
    activation: Callable[[Tensor], Tensor],
    convolution: nn.Conv2d,
    x: Tensor,
    slices: int,
    put: Callable[[Any, Tensor], None],
) -> None:
    """Give `put` each band of norm, activation and 3x3 convolution of x, with the index of its rows."""
    affine, rows = _affine(norm, x, slices), x.shape[2]
    for start, stop in _bands(rows, slices):
        low, high = max(start - 1, 0), min(stop + 1, rows)
        part = activation((x[:, :, low:high].float() * affine[0] + affine[1]).to(x.dtype))
        part = F.pad(part, (0, 0, int(start == 0), int(stop == rows)))
        put((slice(None), slice(None), slice(start, stop)), _convolve(convolution, part))


def _convolve(convolution: nn.Conv2d, part: Tensor) -> Tensor:
    """Apply a 3x3 convolution to rows that come with their neighbours."""
    return F.conv2d(part, convolution.weight, convolution.bias, padding=(0, 1))


def _affine(norm: nn.GroupNorm, x: Tensor, slices: int) -> Affine:
    """Return what the norm multiplies and adds, from the mean and variance of all rows.

    Bands are joined by the parallel formula of Chan, Golub and LeVeque (1979), equations 2.1.
    """
    mean = square = torch.zeros((), device=x.device)
    done = 0
    for start, stop in _bands(x.shape[2], slices):
        grouped = x[:, :, start:stop].float().unflatten(1, (norm.num_groups, -1))
        variance, average = torch.var_mean(grouped, dim=(2, 3, 4), correction=0)
        new = stop - start
        gap = average - mean
        square = square + variance * new + gap**2 * (done * new / (done + new))
        mean = mean + gap * (new / (done + new))
        done += new
    deviation = torch.rsqrt(square / done + norm.eps)
    width = x.shape[1] // norm.num_groups
    factor = norm.weight.float() * deviation.repeat_interleave(width, dim=1)
    summand = norm.bias.float() - mean.repeat_interleave(width, dim=1) * factor
    return factor[..., None, None], summand[..., None, None]


def _up(layer: Any, slices: int, x: Tensor, *_: Any, **__: Any) -> Tensor:
    batch, height, width = x.shape[0], x.shape[2], x.shape[3]
    result = x.new_empty((batch, layer.conv.out_channels, 2 * height, 2 * width))
    for start, stop in _bands(height, slices):
        # Of the doubled rows of the neighbours the convolution needs the nearer one.
        doubled = _doubled(_with_neighbours(x, start, stop))[:, :, 1:-1]
        result[:, :, 2 * start : 2 * stop] = _convolve(layer.conv, doubled)
    return result


def _doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def _down(layer: Any, slices: int, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Halve the size as diffusers does: one row and column of zeros at the end, a 3x3 convolution of stride 2."""
    height, width = x.shape[2:]
    convolution, rows = layer.conv, (height - 2) // 2 + 1
    result = x.new_empty((x.shape[0], convolution.out_channels, rows, (width - 2) // 2 + 1))
    for start, stop in _bands(rows, slices):
        part = x[:, :, 2 * start : 2 * stop + 1]
        part = F.pad(part, (0, 1, 0, 2 * (stop - start) + 1 - part.shape[2]))
        result[:, :, start:stop] = F.conv2d(part, convolution.weight, convolution.bias, stride=2)
    return result
