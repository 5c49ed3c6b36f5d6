"""What a run trains on, resolved: data sets and their subsets, every value found and checked. Light and immutable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

DREAMBOOTH = "dreambooth"
FINETUNING = "finetuning"
CONTROLNET = "controlnet"


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetSpec:
    """One folder, metadata file or set of tar files, with its caption and augmentation settings.

    `index` counts over all data sets of the run, `dataset` is the number of the data set it belongs to. Without a
    `caption_extension` no caption files are read.
    """

    index: int = 0
    dataset: int = 0
    image_dir: str | None = None
    metadata_file: str | None = None
    webdataset_path: tuple[str, ...] = ()
    dataset_filter: tuple[str, ...] = ()
    caption_field: tuple[str, ...] = ()
    conditioning_data_dir: str | None = None
    is_reg: bool = False
    class_tokens: str | None = None
    num_repeats: int = 1
    validation_split: float = 0.0
    resize_interpolation: str | None = None
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)
    alpha_mask: bool = False
    shuffle_caption: bool = False
    caption_separator: str = ","
    caption_extension: str | None = ".caption"
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    cache_info: bool = False

    def for_validation(self) -> SubsetSpec:
        """Return the same subset without anything random in its pictures, and with captions that are never dropped."""
        return replace(
            self,
            num_repeats=1,
            shuffle_caption=False,
            token_warmup_step=0,
            color_aug=False,
            flip_aug=False,
            random_crop=False,
            face_crop_aug_range=None,
            caption_dropout_rate=0.0,
            caption_dropout_every_n_epochs=0,
            caption_tag_dropout_rate=0.0,
        )

    @property
    def label(self) -> str:
        """Return the folder, metadata file or tar files that messages name this subset by."""
        return self.metadata_file or self.image_dir or ", ".join(self.webdataset_path) or f"subset {self.index + 1}"

    @property
    def source(self) -> tuple[str | None, str | None, tuple[str, ...]]:
        """Return what tells the pictures of this subset from those of others."""
        return self.image_dir, self.metadata_file, self.webdataset_path


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """One data set: its resolution, batch size, bucket rules and subsets. `resolution_wh` is (width, height).

    `bucket_sizes` are what `multi_aspect_ratio` stands for at this resolution; empty: buckets follow the other rules.
    """

    index: int = 0
    kind: str = DREAMBOOTH
    resolution_wh: tuple[int, int] = (512, 512)
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    multi_aspect_ratio: tuple[str, ...] = ()
    bucket_random_ratio: float = 0.0
    bucket_sizes: tuple[tuple[int, int], ...] = ()
    resize_interpolation: str | None = None
    network_multiplier: float = 1.0
    validation_split: float = 0.0
    validation_seed: int | None = None
    subsets: tuple[SubsetSpec, ...] = ()
