"""How many updates and epochs a run has, and what that means in images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.contracts import RunLength
from library.errors import UserError
from library.log import counted

if TYPE_CHECKING:
    from library.data.dataset import TrainingData
    from library.training.options import LengthOptions, TrainingOptions


def resolve_length(length: LengthOptions, *, batches_per_epoch: int, world_size: int = 1) -> RunLength:
    """Return the length of a run; `--max_train_epochs` wins over `--max_train_steps`.

    An update uses up `--gradient_accumulation_steps` batches on each process. It never crosses the end of an epoch, so
    an epoch has ceil(batches / (accumulation x processes)) updates.

    Args:
        length: What the user asked for; totals, also when a run is resumed.
        batches_per_epoch: Batches of all data sets together, before they are shared out.
        world_size: Number of processes.

    Raises:
        UserError: if there is nothing to train on.
    """
    if batches_per_epoch < 1:
        raise UserError("there is not a single batch to train on", "Check the folders of images.")
    accumulation = length.gradient_accumulation_steps
    per_update = accumulation * world_size
    updates_per_epoch = -(-batches_per_epoch // per_update)
    if length.max_train_epochs:
        epochs = length.max_train_epochs
        total_steps = epochs * updates_per_epoch
    else:
        total_steps = length.max_train_steps
        epochs = -(-total_steps // updates_per_epoch)
    return RunLength(
        total_steps=total_steps,
        epochs=epochs,
        batches_per_epoch=batches_per_epoch,
        micro_batches_per_update=per_update,
        accumulation=accumulation,
        world_size=world_size,
    )


def length_report(length: RunLength, *, samples_per_epoch: int) -> list[str]:
    """Say what a run amounts to, in lines for the log.

    Args:
        length: The run.
        samples_per_epoch: Images of an epoch with their repeats, regularization images included.
    """
    updates, per_update = length.updates_per_epoch, length.micro_batches_per_update
    images = samples_per_epoch / updates
    lines = [
        f"{counted(length.total_steps, 'update')} in {counted(length.epochs, 'epoch')}; an epoch: "
        f"{counted(samples_per_epoch, 'image')}, {counted(length.batches_per_epoch, 'batch')}, "
        f"{counted(updates, 'update')}",
        f"an update: {counted(per_update, 'batch')} ({counted(length.world_size, 'process')} x accumulation "
        f"{length.accumulation}), {images:.4g} image{'' if images == 1 else 's'} on average; the run: about "
        f"{counted(round(images * length.total_steps), 'image')}",
    ]
    rest = length.batches_per_epoch % per_update
    if rest:
        lines.append(
            f"the last update of each epoch has only {rest} of {per_update} batches, and is weaker by as much; use "
            "--gradient_accumulation_steps and processes that divide the number of batches if that matters"
        )
    return lines


def report_data(data: TrainingData, opts: TrainingOptions) -> None:
    """Write the report of `--debug_dataset`: what a run with these options would see."""
    from library.data.report import write_report

    length = resolve_length(opts.length, batches_per_epoch=data.batch_count())
    write_report(data, opts.save.output_dir, length=length, seed=opts.length.seed or 0)
