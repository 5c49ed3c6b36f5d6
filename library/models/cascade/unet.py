"""Stages B and C of Stable Cascade: one network with two sizes, for training and generation.

The structure is that of the official models (Würstchen, arXiv:2306.00637, and Stable Cascade); tensors are named as in
their files, with queries, keys and values apart. Time enters in float32 whatever the type of the weights: in bfloat16
its embedding would be wrong by more than half of its range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library.checkpoints.cascade_configs import CascadeConfig
from library.models.assemble import build_module
from library.models.cascade import blocks
from library.models.cascade.blocks import ResBlock, TimestepBlock
from library.randomness import derive

_POSITIONS = 10000
_CONDITION_SPREAD = 0.02
_INPUT_GAIN = 0.02
_CONDITION_MAPPERS = (
    "clip_txt_mapper",
    "clip_txt_pooled_mapper",
    "clip_img_mapper",
    "clip_mapper",
    "effnet_mapper.0",
    "effnet_mapper.2",
    "pixels_mapper.0",
    "pixels_mapper.2",
)


class StageInputs(NamedTuple):
    """What stage B or C is conditioned on; a tuple, so that wrappers of modules see the tensors in it.

    Attributes:
        pooled: [N,P] or [N,k,P] pooled text embeddings.
        text: [N,L,T] hidden states of the text; stage C.
        image: [N,I] or [N,k,I] image embeddings; stage C; None is zeros, which stands for no image.
        effnet: [N,16,h,w] EfficientNet latents; stage B; None is zeros, which stands for no condition.
        pixels: [N,3,h,w]; stage B; None is zeros, as in all published uses.
    """

    pooled: Tensor
    text: Tensor | None = None
    image: Tensor | None = None
    effnet: Tensor | None = None
    pixels: Tensor | None = None


def embed_ratio(ratio: Tensor, width: int) -> Tensor:
    """Return sines and cosines [N,width] of a time ratio [N] in [0,1], in float32.

    Raises:
        TypeError: the ratio has fewer than 32 bits, and so is no longer what it was.
    """
    if ratio.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"the time ratio must be float32, not {ratio.dtype}: its embedding would be wrong")
    half = width // 2
    rates = torch.exp(
        torch.arange(half, device=ratio.device, dtype=torch.float32) * (-math.log(_POSITIONS) / (half - 1))
    )
    angles = (ratio.float() * _POSITIONS)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class CascadeUNet(nn.Module):
    """Predicts the noise in latents of stage B or C."""

    embedding: Any
    down_blocks: Any
    down_repeat_mappers: Any
    up_blocks: Any
    up_repeat_mappers: Any

    def __init__(self, config: CascadeConfig) -> None:
        super().__init__()
        self.config = config
        outer, count = config.c_hidden[0], len(config.c_hidden)
        if config.stage == "c":
            self.clip_txt_mapper = nn.Linear(config.c_text or 0, config.c_cond)
            self.clip_txt_pooled_mapper = nn.Linear(config.c_pooled, config.c_cond * config.tokens)
            self.clip_img_mapper = nn.Linear(config.c_image or 0, config.c_cond * config.tokens)
        else:
            self.effnet_mapper = blocks.map_pixels(config.c_effnet or 0, outer)
            self.pixels_mapper = blocks.map_pixels(config.c_pixels or 0, outer)
            self.clip_mapper = nn.Linear(config.c_pooled, config.c_cond * config.tokens)
        inside = config.channels * config.patch**2
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(config.patch), nn.Conv2d(inside, outer, 1), blocks.LayerNorm2d()
        )
        levels = range(count)
        self.down_blocks = nn.ModuleList(
            [blocks.make_level(config, i, config.blocks_down[i], skip=False) for i in levels]
        )
        self.down_downscalers = nn.ModuleList(
            [blocks.make_joint(config, i, up=False) if i else nn.Identity() for i in levels]
        )
        self.down_repeat_mappers = nn.ModuleList(
            [blocks.make_repeats(config, i, config.repeats_down[i]) for i in levels]
        )
        order = list(enumerate(reversed(levels)))
        self.up_blocks = nn.ModuleList(
            [blocks.make_level(config, i, config.blocks_up[n], skip=n > 0) for n, i in order]
        )
        self.up_upscalers = nn.ModuleList(
            [blocks.make_joint(config, i, up=True) if i else nn.Identity() for _, i in order]
        )
        self.up_repeat_mappers = nn.ModuleList([blocks.make_repeats(config, i, config.repeats_up[n]) for n, i in order])
        self.clf = nn.Sequential(blocks.LayerNorm2d(), nn.Conv2d(outer, inside, 1), nn.PixelShuffle(config.patch))
        self._checkpoint: Callable[..., Tensor] | None = None

    # Settings ------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, whatever type linear layers and convolutions may be stored in."""
        return self.embedding[1].bias.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.embedding[1].weight.device

    def all_blocks(self) -> list[nn.Module]:
        """Return every block, down path first."""
        return [block for path in (self.down_blocks, self.up_blocks) for level in path for block in level]

    def residual_blocks(self) -> list[ResBlock]:
        """Return the residual blocks; the place in this list is the number that ControlNets use."""
        return [block for block in self.all_blocks() if isinstance(block, ResBlock)]

    def set_dropout(self, probability: float | None) -> None:
        """Set the dropout of all levels that have one in the released models; None is what those were trained with."""
        for path, order in ((self.down_blocks, 1), (self.up_blocks, -1)):
            for level, usual in zip(path, self.config.dropout[::order], strict=True):
                for block in level:
                    if hasattr(block, "set_dropout"):
                        block.set_dropout(usual if probability is None else probability if usual else 0.0)

    def enable_gradient_checkpointing(self, run: Callable[..., Tensor]) -> None:
        """Run each block through `run(block, *inputs)` while gradients are recorded, to be recomputed later."""
        self._checkpoint = run

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations again."""
        self._checkpoint = None

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compile every block as one graph without breaks; arguments as `torch.compile` takes them."""
        for block in self.all_blocks():
            block.compile(fullgraph=True, **options)

    # The forward pass ----------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        ratio: Tensor,
        inputs: StageInputs,
        *,
        control: Mapping[int, Tensor] | None = None,
        time_values: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Predict the noise.

        Args:
            x: noised latents [N,C,H,W].
            ratio: float32 [N], the noise condition in [0,1].
            inputs: what the picture shall show.
            control: residuals [N,c,h,w] of a ControlNet by the number of the residual block; added, resized, to
                what enters that block.
            time_values: float32 [N] for the names in `config.time_conditions`; missing ones are zero.

        Returns:
            The noise [N,C,H,W].
        """
        dtype = self.dtype
        times = self._times(ratio, time_values or {})
        condition = self._condition(inputs)
        inner = self._embed(x.to(dtype), inputs)
        if not torch.is_autocast_enabled(x.device.type):
            times = times.to(dtype)
        run = self._run if control is None else self._controlled(control)
        return self.clf(self._up(self._down(inner, times, condition, run), times, condition, run))

    def _times(self, ratio: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        width, zero = self.config.c_time, torch.zeros_like(ratio)
        rows = [embed_ratio(ratio, width)]
        rows += [embed_ratio(values.get(name, zero), width) for name in self.config.time_conditions]
        return torch.cat(rows, dim=1)

    def _condition(self, inputs: StageInputs) -> Tensor:
        """Return the condition as normalized tokens [N,L,c_cond]."""
        pooled = inputs.pooled.to(self.dtype)
        if self.config.stage == "b":
            return blocks.normalize(self._tokens(self.clip_mapper, pooled))
        if inputs.text is None:
            raise TypeError("stage C needs the hidden states of the text")
        image = inputs.image
        if image is None:
            image = pooled.new_zeros(len(pooled), self.config.c_image or 0)
        tokens = [
            self.clip_txt_mapper(inputs.text.to(self.dtype)),
            self._tokens(self.clip_txt_pooled_mapper, pooled),
            self._tokens(self.clip_img_mapper, image.to(self.dtype)),
        ]
        return blocks.normalize(torch.cat(tokens, dim=1))

    def _tokens(self, mapper: nn.Module, vectors: Tensor) -> Tensor:
        """Map vectors [N,D] or [N,k,D] to tokens [N, k * tokens, c_cond]."""
        return mapper(vectors).reshape(len(vectors), -1, self.config.c_cond)

    def _embed(self, x: Tensor, inputs: StageInputs) -> Tensor:
        inner = self.embedding(x)
        if self.config.stage == "c":
            return inner
        effnet, pixels = inputs.effnet, inputs.pixels
        # A map of zeros is the same everywhere, so one pixel of it says all.
        effnet = x.new_zeros(len(x), self.config.c_effnet or 0, 1, 1) if effnet is None else effnet.to(self.dtype)
        pixels = x.new_zeros(len(x), self.config.c_pixels or 0, 1, 1) if pixels is None else pixels.to(self.dtype)
        size = inner.shape[-2:]
        if effnet.shape[-2:] != (1, 1):
            effnet = blocks.resize(effnet, size)
        mapped = self.pixels_mapper(pixels)
        if mapped.shape[-2:] != (1, 1):
            mapped = blocks.resize(mapped, size)
        return inner + self.effnet_mapper(effnet) + mapped

    def _down(self, x: Tensor, times: Tensor, condition: Tensor, run: Callable[..., Tensor]) -> list[Tensor]:
        outputs = []
        number = 0
        for level, joint, repeats in zip(
            self.down_blocks, self.down_downscalers, self.down_repeat_mappers, strict=True
        ):
            x = joint(x)
            first = number
            for turn in range(len(repeats) + 1):
                number = first
                for block in level:
                    x = run(block, number, x, times, condition, None)
                    number += isinstance(block, ResBlock)
                if turn < len(repeats):
                    x = repeats[turn](x)
            outputs.append(x)
        return outputs

    def _up(self, outputs: list[Tensor], times: Tensor, condition: Tensor, run: Callable[..., Tensor]) -> Tensor:
        number = sum(self.config.blocks_down)
        x = outputs[-1]
        paths = zip(reversed(outputs), self.up_blocks, self.up_upscalers, self.up_repeat_mappers, strict=True)
        for index, (output, level, joint, repeats) in enumerate(paths):
            first = number
            for turn in range(len(repeats) + 1):
                number = first
                for place, block in enumerate(level):
                    skip = output if place == 0 and index > 0 else None
                    if skip is not None:
                        x = blocks.resize(x, skip.shape[-2:])
                    x = run(block, number, x, times, condition, skip)
                    number += isinstance(block, ResBlock)
                if turn < len(repeats):
                    x = repeats[turn](x)
            x = joint(x)
        return x

    def _run(self, block: nn.Module, number: int, *inputs: Tensor | None) -> Tensor:
        if self._checkpoint is not None and torch.is_grad_enabled():
            return self._checkpoint(block, *inputs)
        return block(*inputs)

    def _controlled(self, control: Mapping[int, Tensor]) -> Callable[..., Tensor]:
        """Return a `_run` that adds the residuals of a ControlNet to what enters their blocks."""

        def run(block: nn.Module, number: int, x: Tensor, *rest: Tensor | None) -> Tensor:
            if number in control and isinstance(block, ResBlock):
                x = x + blocks.resize(control[number], x.shape[-2:]).to(x.dtype)
            return self._run(block, number, x, *rest)

        return run


# Making one --------------------------------------------------------------------------------------------------------


def build_stage(
    config: CascadeConfig, tensors: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype
) -> CascadeUNet:
    """Build stage B or C around tensors by their names in memory; frozen, in evaluation mode.

    Raises:
        UserError: names or shapes do not fit the sizes.
    """
    what = f"stage {config.stage.upper()}"
    return build_module(lambda: CascadeUNet(config), tensors, what=what, device=device, dtype=dtype)


def new_stage(config: CascadeConfig, seed: int, *, device: torch.device, dtype: torch.dtype) -> CascadeUNet:
    """Make stage B or C with the official fresh initialisation, from which training from scratch starts."""
    with torch.device("meta"):
        network = CascadeUNet(config).to(dtype)
    network = network.to_empty(device=device)
    initialize(network, seed)
    return network


@torch.no_grad()
def initialize(network: CascadeUNet, seed: int) -> None:
    """Give a network its initial weights, each tensor a function of the seed and its name.

    Such a network predicts zero: the last convolution is zero, and blocks begin close to passing on what they get.
    """
    shrink = math.sqrt(1 / sum(network.config.blocks_down))
    for name, parameter in network.named_parameters():
        module, _, kind = name.rpartition(".")
        owner = network.get_submodule(module.rpartition(".")[0])
        if kind != "weight" or module == "clf.1" or isinstance(owner, TimestepBlock):
            parameter.zero_()
            continue
        generator = torch.Generator().manual_seed(derive(seed, "init", name) >> 1)
        value = torch.empty(parameter.shape, dtype=torch.float32)
        if module in _CONDITION_MAPPERS:
            value.normal_(0, _CONDITION_SPREAD, generator=generator)
        else:
            bound = _gain(module) * math.sqrt(6 / sum(nn.init._calculate_fan_in_and_fan_out(value)))
            value.uniform_(-bound, bound, generator=generator)
        if module.endswith("channelwise.4"):
            value *= shrink
        parameter.copy_(value)


def _gain(module: str) -> float:
    """Return the factor on Xavier's bound."""
    if module == "embedding.1":
        return _INPUT_GAIN
    # The official network draws the three matrices as one of [3c,c], whose bound is smaller by this factor.
    return math.sqrt(0.5) if module.endswith((".to_q", ".to_k", ".to_v")) else 1.0
