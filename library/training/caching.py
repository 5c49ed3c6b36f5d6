"""Latent caching: pictures are decoded, encoded and written at the same time, split over the ranks."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from library.draws import normal_rows
from library.randomness import derive

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from library.data.dataset import LatentInput, TrainingData
    from library.models.family import ModelFamily
    from library.training.run import Run

logger = logging.getLogger(__name__)

_POSTERIOR_SEED = 0
"""Posterior draws of caches depend on the image alone, so that a cache serves runs with any seed."""

_READ_AHEAD = 3


def fill_caches(run: Run, family: ModelFamily, data: TrainingData) -> None:
    """Encode what the latent caches lack, then serve latents from them. A collective call.

    Raises:
        UserError: a picture cannot be read or encoded.
        StopTraining: a signal arrived; finished entries count at the next start.
    """
    for part in (data, data.validation):
        if part is not None and part.uses_latent_cache:
            _fill(run, family, part)
    family.release_vae()


def _fill(run: Run, family: ModelFamily, data: TrainingData) -> None:
    vae = family.fingerprint("vae")
    plan = run.broadcast(data.latent_plan(vae) if run.is_main else None)
    logger.info("latent cache: %s", plan.describe())
    memory = data.create_latent_memory(plan) if run.is_local_main else None
    path = run.from_node_leader(memory.path if memory else None)
    data.use_latents(plan, vae, memory or path)
    encoder = _Encoder(run, family, data)
    batch_size = max(data.cache.vae_batch_size, 1)
    shares = ((run.rank, run.world_size, False), (run.local_rank, run.local_world_size, True))
    for rank, world_size, in_memory in shares:
        batches = list(plan.batches(batch_size, rank=rank, world_size=world_size, in_memory=in_memory))
        encoder.work(batches, total=sum(len(batch) for batch in batches))
    run.barrier()


class _Encoder:
    """Keeps the VAE busy: threads decode the next batches and write the finished ones."""

    def __init__(self, run: Run, family: ModelFamily, data: TrainingData) -> None:
        self.run, self.family, self.data = run, family, data
        self.threads = max(1, min(8, (os.cpu_count() or 1) // run.local_world_size))

    def work(self, batches: list[list[int]], *, total: int) -> None:
        """Encode the rows of all batches and store them."""
        if not batches:
            return
        writing: deque[Future[None]] = deque()
        with (
            ThreadPoolExecutor(self.threads, "decode") as readers,
            ThreadPoolExecutor(1, "write") as writer,
            tqdm(total=total, desc="caching latents", disable=not self.run.is_main, leave=False) as bar,
        ):
            for inputs in _read_ahead(readers, self.data, batches):
                self.run.stop.check("caching latents")
                latents, flipped = self.encode(inputs)
                for index, item in enumerate(inputs):
                    mirrored = None if flipped is None else flipped[index]
                    writing.append(
                        writer.submit(self.data.store_latents, item.row, latents[index], mirrored, item.mask)
                    )
                while len(writing) > 4 * len(inputs):
                    writing.popleft().result()
                bar.update(len(inputs))
            for future in writing:
                future.result()

    def encode(self, inputs: list[LatentInput]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return posterior samples [B,C,h,w] of the pictures and, where needed, of the mirrored pictures."""
        plain = self._encode(inputs, flipped=False)
        return plain, self._encode(inputs, flipped=True) if inputs[0].flip else None

    @torch.no_grad()
    def _encode(self, inputs: list[LatentInput], *, flipped: bool) -> NDArray[np.float32]:
        device, spec = self.run.device, self.family.spec
        pictures = [torch.from_numpy(item.flipped if flipped else item.pixels) for item in inputs]
        pixels = torch.stack(pictures).to(device)
        size = (pixels.shape[-2] // spec.latent_downscale, pixels.shape[-1] // spec.latent_downscale)
        seeds = [derive(_POSTERIOR_SEED, "posterior", item.draw_name(flipped=flipped)) for item in inputs]
        # On the CPU, so that every machine stores the same draw.
        noise = normal_rows(seeds, (spec.latent_channels, *size), torch.device("cpu"))
        return self.family.encode_latents(pixels, noise.to(device)).cpu().numpy()


def _read_ahead(pool: ThreadPoolExecutor, data: TrainingData, batches: list[list[int]]) -> Iterator[list[LatentInput]]:
    """Yield the decoded inputs of each batch while the next ones are being read."""
    ahead: deque[list[Future[LatentInput]]] = deque()
    for rows in batches:
        ahead.append([pool.submit(data.latent_input, row) for row in rows])
        if len(ahead) >= _READ_AHEAD:
            yield [future.result() for future in ahead.popleft()]
    while ahead:
        yield [future.result() for future in ahead.popleft()]
