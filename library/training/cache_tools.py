"""What the tools that fill caches on disk do: the same as training at its start, and a report.

One bad picture ends training but not a tool: it is left out, and named at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from library.data.bad_files import BadFile
from library.data.cache_files import READ_ONLY_FOLDER, CacheFolders
from library.data.cache_names import text_cache_path
from library.data.jobs import JobReport
from library.data.latent_store import MEMORY
from library.errors import UserError
from library.models.sd import StableDiffusion
from library.training.caching import fill_latents
from library.training.opening import open_training_data
from library.training.processes import Processes, ProcessOptions
from library.training.text_caching import cache_texts

if TYPE_CHECKING:
    from library.contracts import FamilySpec
    from library.data.dataset import TrainingData
    from library.data.options import CacheOptions
    from library.models.family import ModelFamily, WeightPlan
    from library.training.options_cache import CachingOptions

Work = Callable[[Processes, "ModelFamily", "TrainingData"], JobReport]
Value = TypeVar("Value")


class LoadedFamily(Protocol):
    """A class of model families."""

    @classmethod
    def load(cls, model: Any, text: Any, memory: Any, *, spec: FamilySpec, weights: WeightPlan) -> Any:
        """Return the model that options name."""


SHARED_FILE = "another image uses the same file"


def latents_only(cache: CacheOptions) -> CacheOptions:
    """Return options of caches with which latents are kept on disk, and nothing else is cached."""
    return replace(
        cache,
        cache_latents_to_disk=True,
        cache_text_encoder_outputs=False,
        cache_text_encoder_outputs_to_disk=False,
    )


def texts_only(cache: CacheOptions) -> CacheOptions:
    """Return options of caches with which text encoder outputs are kept on disk, and nothing else is cached."""
    return replace(cache, cache_text_encoder_outputs_to_disk=True, cache_latents=False, cache_latents_to_disk=False)


def run_cache_tool(
    opts: CachingOptions,
    spec: FamilySpec,
    work: Work,
    *,
    unused: tuple[str, ...],
    family_class: type[LoadedFamily] = StableDiffusion,
) -> None:
    """Open the data and the model, do `work` in all processes, and report; with `--debug_dataset` only report the data.

    Args:
        opts: of the tool.
        spec: of the model family.
        work: `cache_latent_files` or `cache_text_files`.
        unused: parts of the model that `work` does not need.
        family_class: loads the model.

    Raises:
        UserError: something is wrong with options, data or model, or nothing at all could be done.
    """
    # Whether the buckets can be trained on is the business of the script that trains.
    spec = replace(spec, bucket_step_multiple=spec.latent_downscale)
    opts = replace(opts, data=replace(opts.data, skip_bad_files=True))
    data = open_training_data(opts, spec, kinds=("dreambooth", "finetuning", "controlnet"), tolerated_share=1.0)
    if data is None:
        return
    # Pictures kept apart for validation are few, and training encodes them.
    data.validation = None
    fill(opts, spec, data, work, unused=unused, family_class=family_class)


def fill(
    opts: ProcessOptions | CachingOptions,
    spec: FamilySpec,
    data: TrainingData,
    work: Work,
    *,
    unused: tuple[str, ...],
    family_class: type[LoadedFamily] = StableDiffusion,
    then: Callable[[JobReport], None] | None = None,
) -> None:
    """Load the model, do `work` in all processes, and report.

    Args:
        opts: model, number formats and processes.
        spec: of the model family.
        data: to be cached.
        work: `cache_latent_files` or `cache_text_files`.
        unused: parts of the model that `work` does not need.
        family_class: loads the model.
        then: what the first process does with the result before it is told.

    Raises:
        UserError: something is wrong with the model, or nothing at all could be done.
    """
    with Processes(opts) as run:
        plan = run.weight_plan((), unused=unused)
        family = family_class.load(opts.model, opts.text, opts.memory, spec=spec, weights=plan)
        report = work(run, family, data)
        report.failed = [*bad_files(data), *report.failed]
        if then is not None and run.is_main:
            then(report)
        if run.is_main:
            report.close()
        elif not report.done and not report.skipped and report.failed:
            raise UserError("nothing could be cached")


def bad_files(data: TrainingData) -> list[BadFile]:
    """Return the files that the scan of the data left out."""
    return [BadFile(problem.where, problem.what, problem.hint) for problem in data.skipped]


def cache_latent_files(run: Processes, family: ModelFamily, data: TrainingData) -> JobReport:
    """Write the latents that are missing beside their pictures. A collective call.

    Args:
        run: processes and options.
        family: the model; only its VAE is used.
        data: to be cached; its options ask for caches on disk.

    Returns:
        What was done, over all processes.
    """
    begin = time.perf_counter()
    failed: list[BadFile] = []
    plan = fill_latents(run, family, data, failed=lambda error: failed.append(_bad_file(error)), disk_only=True)
    failed = gathered(run, failed)
    wanted = len(plan.on_disk().missing)
    homeless = [
        BadFile(data.table.path(row), why.partition(",")[0])
        for row, why in zip(plan.missing.tolist(), plan.why, strict=True)
        if plan.places[row] == MEMORY
    ]
    return JobReport(
        "caching latents",
        done=wanted - len(failed),
        skipped=plan.reused,
        failed=sorted([*failed, *homeless], key=lambda bad: bad.path),
        seconds=time.perf_counter() - begin,
    )


def cache_text_files(run: Processes, family: ModelFamily, data: TrainingData) -> JobReport:
    """Write the outputs of the text encoder that are missing beside the pictures. A collective call.

    Args:
        run: processes and options.
        family: the model; only its text encoders are used.
        data: to be cached; its options ask for caches on disk.

    Returns:
        What was done, over all processes.
    """
    begin = time.perf_counter()
    plan = cache_texts(run, family, data)
    if plan is None:
        raise UserError("captions are not cached", "Is there room for temporary files?")
    rules, folders = data.cache_rules(family.spec.text_cache_suffix), CacheFolders()
    homeless = {}
    for row in (~plan.on_disk).nonzero()[0].tolist():
        path = text_cache_path(data.table.path(row), rules)
        reason = SHARED_FILE if folders.can_write(path) else READ_ONLY_FOLDER.partition(",")[0]
        homeless[data.table.path(row)] = reason
    return JobReport(
        "caching text encoder outputs",
        done=sum(map(len, plan.file_jobs)),
        skipped=plan.reused,
        failed=[BadFile(path, reason) for path, reason in homeless.items()],
        seconds=time.perf_counter() - begin,
    )


def gathered(run: Processes, items: list[Value]) -> list[Value]:
    """Return the items of all processes."""
    return [item for mine in run.ranks.gather(items) for item in mine]


def _bad_file(error: UserError) -> BadFile:
    problem = error.problems[0]
    return BadFile(problem.where, problem.what, problem.hint)
