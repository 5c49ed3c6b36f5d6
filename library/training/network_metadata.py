"""What a saved network says about its training: the `ss_*` entries that other trainers, viewers and web UIs read.

All values are text. Folders and files appear by their last name only: a network is published, and where its author
keeps things is nobody's business.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from threading import Thread
from typing import TYPE_CHECKING, Any

from library.checkpoints.hashes import model_hashes, vae_hashes
from library.models.network_module import HYPERNETWORK
from library.option_groups import metadata_values
from library.training.model_saves import described, largest_resolution

if TYPE_CHECKING:
    from library.contracts import FamilySpec, RunLength
    from library.data.dataset import TrainingData
    from library.training.optimizers import BuiltOptimizer
    from library.training.options_network import NetworkTrainingOptions

_log = logging.getLogger(__name__)

MINIMAL = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
"""What `--no_metadata` leaves, besides `modelspec.*`."""

_OF_ONE_DATASET = (
    "ss_batch_size_per_device",
    "ss_resolution",
    "ss_color_aug",
    "ss_flip_aug",
    "ss_random_crop",
    "ss_shuffle_caption",
    "ss_enable_bucket",
    "ss_bucket_no_upscale",
    "ss_min_bucket_reso",
    "ss_max_bucket_reso",
    "ss_keep_tokens",
)
"""Options that say something about the data only if no `--dataset_config` does."""


class BaseHashes:
    """Hashes of the base model and a replacing VAE, computed by a thread: a large file takes many seconds."""

    def __init__(self, model: str, vae: str | None = None) -> None:
        """Begin; names of files are enough, folders and ids have no hashes."""
        self._found: dict[str, str] = {}
        self._names = [str(Path(name).expanduser()) for name in (model, vae) if name]
        # A daemon: a run that is stopped does not wait for a hash that nothing will be saved with.
        self._thread = Thread(target=self._compute, name="model hashes", daemon=True)
        self._thread.start()

    def wait(self) -> dict[str, str]:
        """Return the `ss_*` entries, once they are known."""
        if self._thread.is_alive():
            _log.info("waiting for the hash of the base model")
        self._thread.join()
        return dict(self._found)

    def _compute(self) -> None:
        for describe, name in zip((model_hashes, vae_hashes), self._names, strict=False):
            try:
                found = describe(name)
            except OSError as error:
                _log.warning("no hash of %s in the metadata: %s", PurePath(name).name, error.strerror or error)
                continue
            self._found |= {f"ss_{key}": value for key, value in found.items()}


@dataclass(frozen=True, slots=True)
class NetworkMetadata:
    """Makes the metadata of one save after the other.

    Attributes:
        opts: options of the run.
        family: of the base model.
        facts: the entries that stay the same during the run.
        length: of the run.
        resolution_wh: largest training resolution.
        hashes: of the base model; None with `--no_metadata`.
    """

    opts: NetworkTrainingOptions
    family: FamilySpec
    facts: Mapping[str, str]
    length: RunLength
    resolution_wh: tuple[int, int]
    hashes: BaseHashes | None = field(repr=False)

    def __call__(self, epoch: int, step: int) -> dict[str, str]:
        """Return the metadata of a network that is saved now; the first call may wait for the hashes.

        Args:
            epoch: epochs done; of the last save, which may be in the middle of one, all epochs count.
            step: updates done.
        """
        kind = "hypernetwork" if self.opts.network.network_module == HYPERNETWORK else "lora"
        modelspec = described(self.opts, self.family, self.resolution_wh, kind=kind)
        if self.hashes is None:
            return {**{key: self.facts[key] for key in MINIMAL if key in self.facts}, **modelspec}
        ended = step >= self.length.total_steps
        progress = {
            "ss_epoch": str(self.length.epochs if ended else epoch),
            "ss_steps": str(step),
            "ss_training_finished_at": str(time.time()),
        }
        return {**self.facts, **self.hashes.wait(), **progress, **modelspec}


def network_metadata(
    opts: NetworkTrainingOptions,
    *,
    family: FamilySpec,
    data: TrainingData,
    built: BuiltOptimizer,
    length: RunLength,
    seed: int,
) -> NetworkMetadata:
    """Collect what is known when training begins, and let a thread hash the base model. For the main process.

    Args:
        opts: options of the run.
        family: of the base model.
        data: of the run.
        built: the optimizer.
        length: of the run.
        seed: that the run uses, whether given or not.
    """
    # Families without that option have nothing to say about it, but readers look for the entry.
    facts = {"ss_v2": "False", **metadata_values(opts)}
    in_config = opts.data.dataset_config is not None
    if in_config:
        facts = {key: value for key, value in facts.items() if key not in _OF_ONE_DATASET}
    facts |= _of_data(data, length, in_config=in_config)
    facts |= _of_rates(opts, built)
    if arguments := opts.network.arguments:
        facts["ss_network_args"] = json.dumps({name: _last_name(value) for name, value in arguments.items()})
    facts |= {
        "ss_session_id": str(secrets.randbits(32)),
        "ss_training_started_at": str(time.time()),
        "ss_sd_scripts_commit_hash": "(unknown)",
        "ss_base_model_version": family.base_model_version,
        "ss_optimizer": built.description,
        "ss_seed": str(seed),
        "ss_max_train_steps": str(length.total_steps),
        "ss_num_epochs": str(length.epochs),
    }
    hashes = None
    if not opts.network.no_metadata:
        hashes = BaseHashes(opts.model.main_path or "", opts.model.vae)
    return NetworkMetadata(opts, family, facts, length, largest_resolution(data), hashes)


def _of_rates(opts: NetworkTrainingOptions, built: BuiltOptimizer) -> dict[str, str]:
    """Return learning rates and schedule; an optimizer that sets its rate itself has none."""
    if built.is_relative_adafactor:
        none = dict.fromkeys(("ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr"), "None")
        return {**none, "ss_lr_scheduler": f"adafactor:{opts.optimizer.learning_rate}"}
    given = opts.network.text_encoder_lr
    return {"ss_text_encoder_lr": str(opts.network.text_rate if len(given) < 2 else list(given))}


def _of_data(data: TrainingData, length: RunLength, *, in_config: bool) -> dict[str, str]:
    counts = {
        **data.counts(),
        "num_validation_images": 0 if data.validation is None else len(data.validation.table),
        "num_batches_per_epoch": -(-length.batches_per_epoch // length.world_size),
    }
    found = {f"ss_{name}": str(count) for name, count in counts.items()}
    if not hasattr(data, "summary"):  # a class of the user's own, which tells no more
        return found
    summary = data.summary()
    if in_config:
        return found | _as_json(summary, "datasets", "tag_frequency", "dataset_dirs")
    spec = data.specs[0]
    found["ss_resolution"] = str(tuple(spec.resolution_wh))
    found["ss_total_batch_size"] = str(spec.batch_size * length.micro_batches_per_update)
    return found | _as_json(summary, "tag_frequency", "dataset_dirs", "reg_dataset_dirs", "bucket_info")


def _as_json(summary: Mapping[str, Any], *names: str) -> dict[str, str]:
    return {f"ss_{name}": json.dumps(summary[name]) for name in names}


def _last_name(value: str) -> str:
    """Return a value without the folders of a path on this machine, such as that of a preset file."""
    looks_like_path = Path(value).is_absolute() or value.startswith("~") or (os.sep in value and Path(value).exists())
    return PurePath(value).name if looks_like_path else value
