"""Where curves go: TensorBoard event files and wandb. A writer that fails is switched off; training goes on."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from library.errors import UserError
from library.files import write_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from library.training.options import LogOptions
    from library.training.scalars import Histogram

_log = logging.getLogger(__name__)
_SECRET = re.compile(r"token|api_?key|password|secret", re.IGNORECASE)
_FLUSH_SECONDS = 30


class EventWriter(Protocol):
    """One destination of scalars."""

    def write(self, scalars: Mapping[str, float], step: int, *, epoch: int | None = None) -> None:
        """Store `scalars` at `step`; `epoch` marks values of a whole epoch, which have its number as their step."""

    def picture(self, tag: str, image: Image, step: int, caption: str) -> None:
        """Store a sample picture."""

    def histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Store a distribution at `step`."""

    def close(self) -> None:
        """Bring everything to disk or to the server."""


@dataclass(frozen=True, slots=True)
class RunPlace:
    """Where the curves of one run live: `folder` is `<prefix><time stamp>` inside `--logging_dir`."""

    name: str
    folder: str = ""
    wandb_id: str | None = None
    resumed_at: int | None = None

    def path(self, log: LogOptions) -> Path:
        """Return ``<logging_dir>/<folder>/<tracker name>``."""
        return Path(log.logging_dir or "") / self.folder / self.name


def choose_place(log: LogOptions, default_name: str, resumed: Mapping[str, Any], step: int) -> RunPlace:
    """Return the place that a resumed run had, or a new one named by the local time.

    Args:
        log: the options.
        default_name: tracker name of the script without `--log_tracker_name`.
        resumed: what `Tracker.state_dict` stored; empty for a new run.
        step: updates done so far.
    """
    name = log.log_tracker_name or default_name
    folder, wandb_id = resumed.get("folder"), resumed.get("wandb_id")
    wandb_id = wandb_id if isinstance(wandb_id, str) else None
    if isinstance(folder, str) and folder and Path(folder).name == folder:
        return RunPlace(name, folder, wandb_id, step)
    moment = time.time()
    while True:
        folder = f"{log.log_prefix or ''}{time.strftime('%Y%m%d%H%M%S', time.localtime(moment))}"
        if not log.logging_dir or not (Path(log.logging_dir) / folder).exists():
            return RunPlace(name, folder, wandb_id, step if resumed else None)
        moment += 1


def open_writers(log: LogOptions, place: RunPlace, hparams: Mapping[str, Any] | None) -> list[EventWriter]:
    """Open what `--log_with` asks for; TensorBoard when only `--logging_dir` is given.

    Raises:
        UserError: an argument in `--log_tracker_config` is not one of the tracker.
    """
    config = _tracker_config(log)
    hparams = safe_hparams(hparams) if hparams and log.log_config else {}
    writers: list[EventWriter] = []
    if log.logging_dir and log.log_with in (None, "tensorboard", "all"):
        writers.append(TensorBoard(place.path(log), place.resumed_at, hparams, config.get("tensorboard", {})))
    if log.log_with in ("wandb", "all"):
        writers.append(Wandb(log, place, hparams, config.get("wandb", {})))
    return writers


def safe_hparams(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that may be shown anywhere: no secrets, and text for everything but numbers and flags."""
    return {
        name: value if isinstance(value, (bool, int, float)) else str(value)
        for name, value in values.items()
        if not _SECRET.search(name)
    }


class TensorBoard:
    """Event files under the run's folder."""

    def __init__(
        self, folder: Path, resumed_at: int | None, hparams: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What was logged after the state that a run resumes from is going to be logged again.
        purge = None if resumed_at is None else resumed_at + 1
        arguments = {"flush_secs": _FLUSH_SECONDS, "purge_step": purge} | dict(config)
        with _nameless_host():
            try:
                self._writer = SummaryWriter(str(folder), **arguments)
            except TypeError as error:
                raise UserError(str(error), where="--log_tracker_config [tensorboard]") from error
            if hparams:
                self._write_hparams(folder, dict(hparams))

    def write(self, scalars: Mapping[str, float], step: int, *, epoch: int | None = None) -> None:
        """Store `scalars` at `step`, or at `epoch`."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step if epoch is None else epoch)

    def picture(self, tag: str, image: Image, step: int, caption: str) -> None:
        """Store a picture; TensorBoard shows no captions."""
        import numpy as np

        self._writer.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Store a distribution at `step`."""
        edges, counts = histogram.edges, histogram.counts
        middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
        weighted = [(middle, count) for middle, count in zip(middles, counts, strict=True)]
        self._writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(middle * count for middle, count in weighted),
            sum_squares=sum(middle**2 * count for middle, count in weighted),
            bucket_limits=list(edges[1:]),
            bucket_counts=list(counts),
            global_step=step,
        )

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def _write_hparams(self, folder: Path, hparams: dict[str, Any]) -> None:
        import yaml

        name = str(time.time())
        self._writer.add_hparams(hparams, {}, run_name=name)
        write_text(folder / name / "hparams.yml", yaml.safe_dump(hparams, allow_unicode=True))


class Wandb:
    """Weights & Biases; rows also carry `epoch`, and steps never decrease."""

    def __init__(self, log: LogOptions, place: RunPlace, hparams: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        import wandb

        if log.logging_dir:
            Path(place.path(log)).mkdir(parents=True, exist_ok=True)
            os.environ["WANDB_DIR"] = str(place.path(log))
        if log.wandb_api_key:
            wandb.login(key=log.wandb_api_key)
        arguments: dict[str, Any] = {"name": log.wandb_run_name, "id": place.wandb_id, "resume": "allow"}
        arguments |= ({"entity": log.entity} if log.entity else {}) | dict(config)
        self._run = wandb.init(project=place.name, config=dict(hparams), **arguments)

    @property
    def run_id(self) -> str:
        """What continues this run later."""
        return str(self._run.id)

    def write(self, scalars: Mapping[str, float], step: int, *, epoch: int | None = None) -> None:
        """Store `scalars` at `step`; values of an epoch get the number of the epoch as a column."""
        row = dict(scalars) if epoch is None else {**scalars, "epoch": epoch}
        self._run.log(row, step=step)

    def picture(self, tag: str, image: Image, step: int, caption: str) -> None:
        """Store a picture with its prompt, in the row of `step`."""
        import wandb

        self._run.log({tag: wandb.Image(image, caption=caption)}, step=step)

    def histogram(self, name: str, histogram: Histogram, step: int) -> None:
        """Store a distribution in the row of `step`."""
        import wandb

        found = wandb.Histogram(np_histogram=(list(histogram.counts), list(histogram.edges)))
        self._run.log({name: found}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


@contextmanager
def _nameless_host() -> Iterator[None]:
    """Keep the host's name out of the names of event files that are opened within the block."""
    from tensorboard.summary.writer import event_file_writer as module

    real = getattr(module, "socket", None)
    if real is None:
        yield
        return
    module.socket = SimpleNamespace(gethostname=lambda: "run")
    try:
        yield
    finally:
        module.socket = real


def _tracker_config(log: LogOptions) -> dict[str, Any]:
    if not log.log_tracker_config:
        return {}
    from library.config_file import load_toml

    path = Path(log.log_tracker_config)
    config = load_toml(path, "--log_tracker_config")
    for name in ("tensorboard", "wandb"):
        if not isinstance(config.get(name, {}), dict):
            raise UserError(f"{name} must be a table", f"Write [{name}] and its arguments below", where=str(path))
    return config
