"""Options of data sets: flags of the scripts, and at the same time the keys of dataset configuration files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.data.options_tars import SelectionOptions, ShardOptions
from library.errors import Problem
from library.option_groups import OptionGroup, opt
from library.option_values import number_pair, resolution_text

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")
"""Names on the command line; dataset files may also say `box`."""

ALL_LEVELS = ("general", "dataset", "subset")
DATASET_LEVELS = ("general", "dataset")
SUBSET_LEVEL = ("subset",)
ALL_KINDS = ("dreambooth", "finetuning", "controlnet")

_BUCKETS = {"enable_bucket": (), "dataset_config": ()}
_SHUFFLING = {"shuffle_caption": (), "token_warmup_step": (), "caption_tag_dropout_rate": (), "dataset_config": ()}


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(ShardOptions, title="data"):
    """Where images come from and how they are put into batches."""

    dataset_config: str | None = opt(
        None,
        path=True,
        resume="free",
        help="TOML or JSON file that describes the data sets; replaces --train_data_dir and --reg_data_dir.",
    )
    train_data_dir: str | None = opt(
        None, path=True, resume="free", help="Folder with sub-folders <repeats>_<words> of training images."
    )
    reg_data_dir: str | None = opt(None, path=True, resume="free", help="The same for regularization (class) images.")
    in_json: str | None = opt(
        None,
        flag=None,
        path=True,
        resume="free",
        help="Metadata file (JSON or JSON Lines) of the images in --train_data_dir, in place of folders with captions.",
    )
    dataset_class: str | None = opt(
        None,
        help="Python class of your own that serves the data (package.module.Class).",
    )
    resolution: str | None = opt(
        None,
        convert=resolution_text,
        scope=DATASET_LEVELS,
        kinds=ALL_KINDS,
        metadata_key="ss_resolution",
        help="Training resolution: one number, or width,height.",
    )
    batch_size: int = opt(
        1,
        flag="train_batch_size",
        at_least=1,
        scope=DATASET_LEVELS,
        kinds=ALL_KINDS,
        metadata_key="ss_batch_size_per_device",
        help="Images per batch and device.",
    )
    enable_bucket: bool = opt(
        False,
        scope=DATASET_LEVELS,
        kinds=ALL_KINDS,
        metadata_key="ss_enable_bucket",
        help="Train images in several aspect ratios (buckets) in place of cropping all to one.",
    )
    min_bucket_reso: int = opt(
        256,
        at_least=1,
        scope=DATASET_LEVELS,
        kinds=ALL_KINDS,
        matters_when=_BUCKETS,
        metadata_key="ss_min_bucket_reso",
        help="Shortest side of a bucket.",
    )
    max_bucket_reso: int = opt(
        1024,
        at_least=1,
        scope=DATASET_LEVELS,
        kinds=ALL_KINDS,
        matters_when=_BUCKETS,
        metadata_key="ss_max_bucket_reso",
        help="Longest side of a bucket.",
    )
    bucket_reso_steps: int = opt(
        64,
        at_least=1,
        scope=DATASET_LEVELS,
        kinds=ALL_KINDS,
        matters_when=_BUCKETS,
        help="Sides of buckets are multiples of this: 64 or a multiple of it.",
    )
    bucket_no_upscale: bool = opt(
        False,
        scope=DATASET_LEVELS,
        kinds=ALL_KINDS,
        matters_when=_BUCKETS,
        metadata_key="ss_bucket_no_upscale",
        help="Make buckets from the images' own sizes and never enlarge an image.",
    )
    resize_interpolation: str | None = opt(
        None,
        choices=INTERPOLATIONS,
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        metadata_key="ss_resize_interpolation",
        help="How images are resized. Default: area when shrinking, Lanczos when enlarging.",
    )
    debug_dataset: bool = opt(
        False,
        resume="free",
        help="Write dataset_report.html and dataset_report.json into --output_dir and stop; no model is needed.",
    )
    conditioning_data_dir: str | None = opt(
        None, path=True, resume="free", help="Folder of condition images, for scripts that train on them."
    )
    masked_loss: bool = opt(
        False, help="Weight the loss by masks: subsets of the dataset configuration name a conditioning_data_dir."
    )
    prior_loss_weight: float = opt(
        1.0,
        at_least=0,
        matters_when={"reg_data_dir": (), "dataset_config": ()},
        metadata_key="ss_prior_loss_weight",
        help="Weight of the loss of regularization images.",
    )
    network_multiplier: float = opt(
        1.0,
        flag=None,
        scope=DATASET_LEVELS,
        kinds=ALL_KINDS,
        help="Multiplier of the trained network for this data set.",
    )
    validation_split: float = opt(
        0.0,
        flag=None,
        at_least=0,
        at_most=1,
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        metadata_key="ss_validation_split",
        help="Share of the images that is kept apart for validation.",
    )
    validation_seed: int | None = opt(
        None,
        flag=None,
        scope=DATASET_LEVELS,
        kinds=ALL_KINDS,
        metadata_key="ss_validation_seed",
        help="Seed of the choice of validation images. Default: --seed.",
    )
    skip_bad_files: bool = opt(
        False, help="Leave out files that cannot be used, and list them, in place of stopping (at most 1 % of them)."
    )
    no_exif_transpose: bool = opt(False, help="Ignore the orientation that cameras write into photographs.")
    max_image_pixels: int = opt(
        179_000_000, at_least=1, resume="free", help="Refuse images with more pixels than this (a guard of memory)."
    )
    caption_encoding: str = opt("utf-8", help="Encoding of caption files.")
    check_images: str = opt(
        "auto",
        choices=("auto", "all", "none"),
        resume="free",
        help="Decode images once at the start to find broken files: all of them, none, or all up to 20,000 and a "
        "sample above (auto).",
    )

    def check(self) -> Iterator[Problem]:
        """Refuse unknown encodings and class paths that are not dotted names."""
        import codecs

        try:
            codecs.lookup(self.caption_encoding)
        except LookupError:
            yield Problem("--caption_encoding", f"unknown encoding {self.caption_encoding!r}", "Try utf-8 or cp932.")
        name = self.dataset_class
        if name is not None and ("." not in name or not all(part.isidentifier() for part in name.split("."))):
            yield Problem("--dataset_class", f"{name!r} is not a dotted name", "Write package.module.Class.")


@dataclass(frozen=True, kw_only=True)
class SubsetOptions(SelectionOptions, title="subset"):
    """What may differ between subsets: captions and augmentation."""

    num_repeats: int = opt(
        1,
        flag="dataset_repeats",
        at_least=0,
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        help="How often each image is used in an epoch, for subsets that do not say.",
    )
    shuffle_caption: bool = opt(
        False,
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        metadata_key="ss_shuffle_caption",
        help="Shuffle the tags of a caption.",
    )
    caption_separator: str = opt(",", scope=ALL_LEVELS, kinds=ALL_KINDS, help="What separates the tags of a caption.")
    caption_extension: str = opt(
        ".caption",
        scope=ALL_LEVELS,
        kinds=("dreambooth", "controlnet"),
        help="Extension of caption files. --caption_extention is understood too.",
    )
    keep_tokens: int = opt(
        0,
        at_least=0,
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        matters_when=_SHUFFLING,
        metadata_key="ss_keep_tokens",
        help="How many tags at the start stay in place when tags are shuffled or dropped.",
    )
    keep_tokens_separator: str = opt(
        "",
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        matters_when=_SHUFFLING,
        help="Text that separates fixed tags from those that are shuffled; replaces --keep_tokens.",
    )
    secondary_separator: str | None = opt(
        None, scope=ALL_LEVELS, kinds=ALL_KINDS, help="Joins tags that must stay together; becomes --caption_separator."
    )
    enable_wildcard: bool = opt(
        False,
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        help="Choose among {a|b} in captions, and among the lines of a caption.",
    )
    caption_prefix: str | None = opt(None, scope=ALL_LEVELS, kinds=ALL_KINDS, help="Text in front of every caption.")
    caption_suffix: str | None = opt(None, scope=ALL_LEVELS, kinds=ALL_KINDS, help="Text after every caption.")
    token_warmup_min: int = opt(
        1,
        at_least=0,
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        matters_when={"token_warmup_step": (), "dataset_config": ()},
        help="Number of tags that the token warm-up starts with.",
    )
    token_warmup_step: float = opt(
        0,
        at_least=0,
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        help="Updates over which captions grow to all their tags; below 1: a share of the run.",
    )
    color_aug: bool = opt(
        False, scope=ALL_LEVELS, kinds=ALL_KINDS, metadata_key="ss_color_aug", help="Vary hue or brightness a little."
    )
    flip_aug: bool = opt(
        False, scope=ALL_LEVELS, kinds=ALL_KINDS, metadata_key="ss_flip_aug", help="Mirror half of the images."
    )
    random_crop: bool = opt(
        False,
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        metadata_key="ss_random_crop",
        help="Crop at random in place of the centre.",
    )
    face_crop_aug_range: tuple[float, float] | None = opt(
        None,
        convert=number_pair,
        more_than=0,
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        metadata_key="ss_face_crop_aug_range",
        help="Crop around the face that the file name describes, scaled by low,high (without buckets).",
    )
    alpha_mask: bool = opt(
        False, scope=SUBSET_LEVEL, kinds=("dreambooth", "finetuning"), help="Weight the loss by the alpha channel."
    )
    caption_dropout_rate: float = opt(
        0.0,
        at_least=0,
        at_most=1,
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        metadata_key="ss_caption_dropout_rate",
        help="Probability of an empty caption.",
    )
    caption_dropout_every_n_epochs: int = opt(
        0,
        at_least=0,
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        metadata_key="ss_caption_dropout_every_n_epochs",
        help="Train without captions in every n-th epoch. 0: never.",
    )
    caption_tag_dropout_rate: float = opt(
        0.0,
        at_least=0,
        at_most=1,
        scope=ALL_LEVELS,
        kinds=ALL_KINDS,
        metadata_key="ss_caption_tag_dropout_rate",
        help="Probability that a tag is left out.",
    )
    cache_info: bool = opt(
        False,
        resume="free",
        scope=ALL_LEVELS,
        kinds=("dreambooth", "controlnet"),
        help="Keep image sizes and captions in metadata_cache.json inside the image folder.",
    )
    class_tokens: str | None = opt(
        None, flag=None, scope=ALL_LEVELS, kinds=("dreambooth",), help="Caption of images that have no caption file."
    )
    is_reg: bool = opt(
        False, flag=None, scope=SUBSET_LEVEL, kinds=("dreambooth",), help="These are regularization images."
    )
    image_dir: str | None = opt(None, flag=None, path=True, scope=SUBSET_LEVEL, kinds=ALL_KINDS, help="Image folder.")
    metadata_file: str | None = opt(
        None, flag=None, path=True, scope=SUBSET_LEVEL, kinds=("finetuning",), help="Metadata file (JSON)."
    )
    custom_attributes: Mapping[str, Any] | None = opt(
        None, flag=None, scope=ALL_LEVELS, kinds=ALL_KINDS, help="Table that is handed to the training code untouched."
    )


@dataclass(frozen=True, kw_only=True)
class CacheOptions(OptionGroup, title="cache", resume="free"):
    """Whether pictures and captions are encoded once, and where the results are kept."""

    cache_latents: bool = opt(
        False,
        resume="exact",
        metadata_key="ss_cache_latents",
        help="Encode every image by the VAE once before training. Excludes --color_aug and --random_crop.",
    )
    cache_latents_to_disk: bool = opt(
        False,
        implies={"cache_latents": True},
        help="Keep the encoded images in .npz files for later runs; switches --cache_latents on.",
    )
    # The last bits of a latent depend on how many pictures share its batch.
    vae_batch_size: int = opt(1, at_least=0, resume="exact", help="Images that the VAE encodes at once when caching.")
    cache_text_encoder_outputs: bool = opt(
        False,
        help="Run the text encoder, which must not be trained, once over all captions before training. Where they need "
        "at most 1 GiB this happens without the option too.",
    )
    cache_text_encoder_outputs_to_disk: bool = opt(
        False,
        implies={"cache_text_encoder_outputs": True},
        help="Keep these outputs in .npz files for later runs; switches --cache_text_encoder_outputs on.",
    )
    # The last bits of an output depend on how many captions share its batch.
    text_encoder_batch_size: int | None = opt(
        None,
        at_least=1,
        resume="exact",
        help="Captions that the text encoder encodes at once when caching. Default: the batch size of the data.",
    )
    skip_cache_check: bool = opt(False, help="Trust cache files without looking into them at the start.")
    cache_dir: str | None = opt(
        None,
        path=True,
        matters_when={
            "cache_latents_to_disk": (),
            "cache_text_encoder_outputs_to_disk": (),
            "webdataset_path": (),
        },
        help="Folder for cache files. Default: beside the images; for images in tar files it must be given.",
    )
    cache_hash: bool = opt(
        False,
        matters_when={"cache_latents_to_disk": ()},
        help="Recognise edited images by their content in place of size and time of change.",
    )
    cache_trust_mtime: bool = opt(
        False,
        matters_when={"cache_latents_to_disk": ()},
        help="Accept cache files although the time of change of the image differs (copied folders).",
    )


@dataclass(frozen=True, kw_only=True)
class LoaderOptions(OptionGroup, title="loader", resume="free"):
    """Processes that load images."""

    max_data_loader_n_workers: int = opt(
        8, at_least=0, help="Processes that load images, at most one per CPU core. 0: load in the main process."
    )
    persistent_data_loader_workers: bool = opt(
        False, help="Keep loading processes from epoch to epoch (they are always kept)."
    )
