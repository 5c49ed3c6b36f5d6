"""Types that cross packages: what the data packages hand to the models, and what models and methods hand to the loop.

Frozen, slotted, without torch at import time. Sizes are `*_wh` (width, height) for images and options and `*_hw` in
tensors; every name says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


START_ID, END_ID = 49406, 49407
"""Tokens around a text of CLIP. Pooled text is what the encoder says at the first end; most models pad with it, too."""


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """One CLIP tokenizer of a family: its name, padding id, and whether the pad token occurs in text (`!` of SD2)."""

    name: str
    pad_id: int
    pad_text: str | None = None


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """What the data side and the option checks must know of a model family before any model is loaded.

    `latent_cache_sized`: names of latent caches tell the size of the image (`a_0512x0768_sd.npz`), and `a.npz`, the
    oldest form, may hold such latents too.
    `side_multiple`: what sides of pictures are multiples of without buckets, too.
    `text_cache_half`: outputs of text encoders that run in bfloat16 fit float16 and are kept in that, at half the size.
    `foreign_latents`: what to know of latent caches that tell no origin.
    `smallest_side`: of a picture in pixels, below which nothing would be left of it inside the model.
    """

    name: str
    prediction_type: str
    tokenizers: tuple[TokenizerSpec, ...]
    latent_channels: int = 4
    latent_downscale: int = 8
    latent_scale: float = 0.18215
    bucket_step_multiple: int = 64
    side_multiple: int = 1
    smallest_side: int = 8
    latent_cache_suffix: str = "_sd"
    latent_cache_sized: bool = True
    text_cache_suffix: str = "_te_outputs"
    text_array_names: tuple[str, ...] = ("hidden_state1",)
    text_cache_half: bool = False
    foreign_latents: str = ""
    needs_pixels: bool = False
    base_model_version: str = ""
    architecture: str = ""
    implementation: str = "https://github.com/Stability-AI/generative-models"
    default_resolution_wh: tuple[int, int] = (512, 512)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image as the scan knows it; `size_wh` is the size after EXIF orientation."""

    index: int
    path: str
    key: str
    size_wh: tuple[int, int]
    caption: str
    repeats: int
    dataset: int
    subset: int
    is_reg: bool = False
    mask_path: str | None = None
    orientation: int = 1
    file_size: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """How an image is brought into its bucket: scale to `resized_wh`, then cut `bucket_wh` at `crop_xy` (left, top)."""

    bucket_wh: tuple[int, int]
    resized_wh: tuple[int, int]
    crop_xy: tuple[int, int]


@dataclass(frozen=True, slots=True)
class SampleKey:
    """What the batch sampler hands to the dataset: which image, and the counters all its randomness derives from."""

    index: int
    epoch: int
    position: int
    step: int


@dataclass(frozen=True, slots=True)
class StepKey:
    """A micro-batch: the update it belongs to (0-based) and its index inside the update, over all ranks."""

    step: int
    micro: int


@dataclass(frozen=True, slots=True)
class BatchKey:
    """One micro-batch of the plan as the sampler emits it; `share` is 0 for padding that keeps ranks in step."""

    step_key: StepKey
    epoch: int
    update_in_epoch: int
    last_in_update: bool
    last_in_epoch: bool
    share: float
    samples: tuple[SampleKey, ...]


@dataclass(slots=True)
class Sample:
    """One image loaded for one visit.

    Arrays are numpy: pixels [3,H,W] in [-1,1], latents [C,h,w], mask [H,W] in [0,1].
    """

    key: SampleKey
    record_key: str
    caption: str
    loss_weight: float
    pixels: Any = None
    latents: Any = None
    text_arrays: Mapping[str, Any] | None = None
    token_ids: tuple[Any, ...] = ()
    token_weights: tuple[Any, ...] | None = None
    mask: Any = None
    control: Any = None
    original_size_wh: tuple[int, int] = (0, 0)
    crop_top_left: tuple[int, int] = (0, 0)
    target_size_wh: tuple[int, int] = (0, 0)
    flipped: bool = False
    network_multiplier: float = 1.0
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)
    replaced_because: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one bucket, stacked.

    pixels [B,3,H,W] or None; latents [B,C,h,w] unscaled or None; token_ids one [B,n,77] int64 per text encoder;
    token_weights alike or None; mask [B,1,H,W] or None; sizes_hw [B,6] int64 (original h,w, crop top,left, target h,w);
    loss_weight [B] float32; share multiplies the loss (0 for padding batches); left_out counts, by reason, samples
    that a stream passed over before this batch.
    """

    key: BatchKey
    captions: tuple[str, ...]
    record_keys: tuple[str, ...]
    loss_weight: Tensor
    pixels: Tensor | None = None
    latents: Tensor | None = None
    text_arrays: Mapping[str, Tensor] | None = None
    token_ids: tuple[Tensor, ...] = ()
    token_weights: tuple[Tensor, ...] | None = None
    mask: Tensor | None = None
    control: Tensor | None = None
    sizes_hw: Tensor | None = None
    network_multiplier: float = 1.0
    custom_attributes: tuple[Mapping[str, Any], ...] = ()
    replaced: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of samples in the micro-batch."""
        return len(self.captions)

    def to(self, device: torch.device) -> Batch:
        """Move every tensor to `device`, without waiting when the source is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Pin every tensor; called by the loader's pinning thread."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Any) -> Batch:
        def one(value: Any) -> Any:
            return None if value is None else move(value)

        return replace(
            self,
            loss_weight=one(self.loss_weight),
            pixels=one(self.pixels),
            latents=one(self.latents),
            mask=one(self.mask),
            control=one(self.control),
            sizes_hw=one(self.sizes_hw),
            token_ids=tuple(one(ids) for ids in self.token_ids),
            token_weights=None if self.token_weights is None else tuple(one(w) for w in self.token_weights),
            text_arrays=None if self.text_arrays is None else {k: one(v) for k, v in self.text_arrays.items()},
        )


@dataclass(frozen=True, slots=True)
class Condition:
    """What the denoiser is conditioned on: hidden [B,L,D], pooled [B,P] or None, and family-specific extras."""

    hidden: Tensor
    pooled: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Noised:
    """A noised micro-batch: noisy and target [B,C,h,w], t [B], weight [B], huber_c [B] or None."""

    noisy: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor
    huber_c: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters that share a rate; `name` is what `lr/<name>` is logged as; `settings` go to the optimizer."""

    name: str
    params: tuple[Any, ...]
    lr: float
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunLength:
    """How long the run is. `micro_batches_per_update` is accumulation times world size (K of the design).

    An update never crosses an epoch; the last update of an epoch may hold fewer batches (its divisor stays K).
    """

    total_steps: int
    epochs: int
    batches_per_epoch: int
    micro_batches_per_update: int
    accumulation: int
    world_size: int

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer updates in one epoch: ceil(batches / K)."""
        return -(-self.batches_per_epoch // self.micro_batches_per_update)

    def batches_in_update(self, update_in_epoch: int) -> int:
        """Return how many batches the given update of an epoch holds, over all ranks and without padding."""
        first = update_in_epoch * self.micro_batches_per_update
        return min(self.micro_batches_per_update, self.batches_per_epoch - first)


@dataclass(frozen=True, slots=True)
class Position:
    """All that a run must remember about its data: updates done, epoch (0-based) and updates done inside the epoch."""

    step: int = 0
    epoch: int = 0
    update_in_epoch: int = 0

    def advance(self, length: RunLength) -> Position:
        """Return the position after one more update."""
        inside = self.update_in_epoch + 1
        if inside >= length.updates_per_epoch:
            return Position(self.step + 1, self.epoch + 1, 0)
        return Position(self.step + 1, self.epoch, inside)


class ConditionMaker(Protocol):
    """Makes what a ControlNet looks at from a picture; picklable, since loader processes run it."""

    from_file: bool
    """It gets the picture of `conditioning_data_dir` that belongs to the image, not the image."""

    def prepare(self, picture: Any, rng: Any) -> Any:
        """Return float32 [C,h,w] made of uint8 [H,W,3]; all that is left to chance comes from the `random.Random`."""


class ConditionFinder(ConditionMaker, Protocol):
    """Makes it of something that it finds in a picture, always the same, such as edges or faces: that can be kept."""

    @property
    def kept(self) -> str:
        """Names all but the picture that decides what is found."""

    def find(self, picture: Any) -> Mapping[str, Any]:
        """Return arrays by name, found in uint8 [H,W,3]."""

    def accepts(self, found: Mapping[str, Any], size_hw: tuple[int, int]) -> bool:
        """Whether arrays from a file can be what was found in a picture of this size."""

    def paint(self, found: Mapping[str, Any], size_hw: tuple[int, int], rng: Any) -> Any:
        """Return what `prepare` does for a picture of this size in which this was found."""


class Tokenizer(Protocol):
    """Turns a caption into fixed chunks of 77 ids; picklable, thread-safe, without torch or transformers."""

    spec: TokenizerSpec

    def encode(self, text: str) -> tuple[Any, Any]:
        """Return (ids int64 [n,77], weights float32 [n,77] or None)."""
