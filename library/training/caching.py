"""Filling the caches of a run: latents of pictures and, where text encoders do not train, their outputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from library.data.bad_files import SHOWN, printable
from library.data.metadata_scan import MISSING_SUFFIX
from library.data.storage import exists
from library.draws import normal_rows
from library.errors import Problem, UserError
from library.randomness import derive
from library.training.cache_worker import CacheWorker
from library.training.text_caching import cache_texts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from library.data.dataset import LatentInput, TrainingData
    from library.data.latent_store import LatentPlan
    from library.models.family import ModelFamily
    from library.training.processes import Processes

logger = logging.getLogger(__name__)

_POSTERIOR_SEED = 0
"""Posterior draws of caches depend on the image alone, so that a cache serves runs with any seed."""


def fill_caches(run: Processes, family: ModelFamily, data: TrainingData, *, frozen_text: bool = False) -> None:
    """Encode what the caches lack, then serve latents and captions from them. A collective call.

    Args:
        run: processes, device and options.
        family: the model, with its weights as the run begins, before adapters are attached.
        data: of the run, its validation part included.
        frozen_text: the text encoders never train in this run. Captions that do not vary are then encoded here, and
            the encoders leave the device.

    Raises:
        UserError: a picture or caption cannot be encoded, or outputs of a trained encoder are to be cached.
        StopTraining: a signal arrived; finished entries count at the next start.
    """
    for part in (data, data.validation):
        if part is not None and part.uses_latent_cache:
            fill_latents(run, family, part)
    family.release_vae()
    if not data.fixed_captions:
        return
    if frozen_text:
        if cache_texts(run, family, data):
            family.park_text_encoders()
    elif data.cache.cache_text_encoder_outputs:
        hint = "Drop the option, or leave the text encoder out of training (--network_train_unet_only)."
        raise UserError(
            "the text encoder is trained, so its outputs change", hint, where="--cache_text_encoder_outputs"
        )


def fill_latents(
    run: Processes,
    family: ModelFamily,
    data: TrainingData,
    *,
    failed: Callable[[UserError], None] | None = None,
    disk_only: bool = False,
) -> LatentPlan:
    """Encode the pictures whose latents are missing, then serve latents from the cache. A collective call.

    Args:
        run: processes, device and options.
        family: the model.
        data: one part of the data.
        failed: takes the errors of single pictures, which are left out; None: the first one ends the work.
        disk_only: leave out what would be kept in memory.

    Returns:
        What there was to do.

    Raises:
        UserError: a picture cannot be encoded, and nobody takes such errors.
        StopTraining: a signal arrived; finished entries count at the next start.
    """
    vae = family.fingerprint("vae")
    plan: LatentPlan = run.broadcast(data.latent_plan(vae) if run.is_main else None)
    logger.info("latent cache: %s", plan.describe())
    if plan.unknown and family.spec.foreign_latents:
        logger.warning("%d files of cached latents tell no origin: %s", plan.unknown, family.spec.foreign_latents)
    if failed is None:
        _require_pictures(data, plan)
    todo = plan.on_disk() if disk_only else plan
    memory = data.create_latent_memory(todo) if run.is_local_main else None
    path = run.from_node_leader(memory.path if memory else None)
    data.use_latents(todo, vae, memory or path)
    encoder = _LatentEncoder(run, family, data)
    worker = CacheWorker(run, what="caching latents", prepare=data.latent_input, encode=encoder.encode, failed=failed)
    worker.fill(todo, max(data.cache.vae_batch_size, 1))
    return plan


def _require_pictures(data: TrainingData, plan: LatentPlan) -> None:
    """Refuse latents that must be made again when their pictures are gone: before others are encoded for hours.

    Raises:
        UserError: names the first of them.
    """
    paths = [data.table.path(row) for row in plan.missing.tolist()]
    gone = [(path, why) for path, why in zip(paths, plan.why, strict=True) if not exists(path)]
    if gone:
        hint = "Give the options that they were made with, or bring it back."
        problems = [
            Problem(
                printable(path.removesuffix(MISSING_SUFFIX)),
                f"the picture is gone, and its cached latents do not fit ({why})",
                hint,
            )
            for path, why in gone[:SHOWN]
        ]
        rest = [Problem("the latent cache", f"{len(gone) - SHOWN} more pictures are gone")] if len(gone) > SHOWN else []
        raise UserError.of([*problems, *rest])


class _LatentEncoder:
    """Encodes pictures, and their mirror images where these are needed."""

    def __init__(self, run: Processes, family: ModelFamily, data: TrainingData) -> None:
        self.run, self.family, self.data = run, family, data

    def encode(self, inputs: Sequence[LatentInput]) -> list[Callable[[], None]]:
        """Draw posterior samples [B,C,h,w] of the pictures; return what stores each of them."""
        latents = self._encode(inputs, flipped=False)
        flipped = self._encode(inputs, flipped=True) if inputs[0].flip else [None] * len(inputs)
        return [
            partial(self.data.store_latents, item.row, plain, mirrored, item.mask)
            for item, plain, mirrored in zip(inputs, latents, flipped, strict=True)
        ]

    @torch.no_grad()
    def _encode(self, inputs: Sequence[LatentInput], *, flipped: bool) -> NDArray[np.float32]:
        device, spec = self.run.device, self.family.spec
        pictures = [torch.from_numpy(item.flipped if flipped else item.pixels) for item in inputs]
        pixels = torch.stack(pictures).to(device)
        size = (pixels.shape[-2] // spec.latent_downscale, pixels.shape[-1] // spec.latent_downscale)
        seeds = [derive(_POSTERIOR_SEED, "posterior", item.draw_name(flipped=flipped)) for item in inputs]
        # On the CPU, so that every machine stores the same draw.
        noise = normal_rows(seeds, (spec.latent_channels, *size), torch.device("cpu"))
        return self.family.encode_latents(pixels, noise.to(device)).cpu().numpy()
