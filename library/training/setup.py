"""Everything that the loop works with, made from options in the order in which it can fail cheaply."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from library.contracts import Position, RunLength
from library.data.loader import PlannedBatches
from library.data.stream import batches_of
from library.option_groups import loggable
from library.training.beginning import Beginning
from library.training.ema import WeightAverage, average_of
from library.training.loss import make_loss
from library.training.lr_schedules import build_lr_schedule
from library.training.model_saves import ModelWriter, RunFacts
from library.training.objective import Objective
from library.training.observers import observe
from library.training.optimizer_state import advance_schedule
from library.training.optimizers import BuiltOptimizer, build_optimizer
from library.training.sampling import Process, SampleImages
from library.training.save_names import EMA_SUFFIX
from library.training.saving import SaveActions, Saver
from library.training.state import StateInfo, StateParts, load_progress, load_weights, save_state, state_bytes
from library.training.step import TrainStep
from library.training.tracking import Tracker
from library.training.upload import Uploader

if TYPE_CHECKING:
    from library.data.dataset import TrainingData
    from library.models.family import ModelFamily
    from library.training.deepspeed import EngineStepper
    from library.training.methods.base import Method
    from library.training.options import TrainingOptions
    from library.training.run import Run
    from library.training.stepper import Stepper


@dataclass
class Training:
    """The parts of a run, ready to train; the loop drives them."""

    run: Run
    family: ModelFamily
    method: Method
    opts: TrainingOptions
    begin: Beginning
    objective: Objective
    built: BuiltOptimizer
    lr_schedule: Any
    parts: StateParts
    average: WeightAverage | None
    """Of the weights, where one is kept."""
    stepper: Stepper | EngineStepper
    step: TrainStep = field(init=False)
    module: nn.Module = field(init=False)
    """The step, wrapped so that processes share its gradients."""
    loader: PlannedBatches
    tracker: Tracker
    uploader: Uploader | None
    rate_names: list[str]
    """What the learning rates of the optimizer's groups are logged as."""

    @property
    def length(self) -> RunLength:
        """How long the run is."""
        return self.begin.length

    def wrap(self) -> None:
        """Make the step around what trains now, and share its gradients between processes."""
        self.step = TrainStep(
            self.family,
            self.method,
            self.objective,
            make_loss(self.opts.loss),
            seed=self.run.seed,
            autocast=self.run.autocast,
        )
        self.module = self.stepper.wrap(self.step, may_skip_parameters=self.method.may_skip_parameters)

    def info(self, position: Position, saver: Saver) -> StateInfo:
        """Return what a state says besides its tensors."""
        return StateInfo(
            position=position,
            seed=self.run.seed,
            length=self.length,
            identity=self.begin.identity,
            output_name=self.opts.save.output_name or "",
            tracker=self.tracker.state_dict(),
            loss_average=self.tracker.loss_average.state_dict(),
            saver=saver.to_json(),
        )


def set_up(run: Run, family: ModelFamily, method: Method, data: TrainingData, opts: TrainingOptions) -> Training:
    """Build optimizer, schedule, step and loader, and bring them to where the run begins."""
    begin = run.begin
    method.attach()
    if begin.stored is not None:
        load_weights(begin.stored, method.parts())
    run.share_weights(method.parts())
    groups = method.param_groups()
    # Rows need gradients that stay where they are: DDP's own buckets and DeepSpeed's engine would replace them.
    moved = opts.distributed.deepspeed or opts.distributed.ddp_gradient_as_bucket_view
    built = build_optimizer(opts.optimizer, run.own_groups(groups), flat=method.flat_parameters and not moved)
    if built.flat is not None and run.world_size == 1 and not opts.memory.torch_compile:
        method.accumulate_in_place()
    lr_schedule = build_lr_schedule(opts.schedule, opts.optimizer, built, begin.length.total_steps)
    objective = opts.objective(family.spec, run.device)
    if begin.stored is None:
        advance_schedule(lr_schedule, begin.position.step)
    method.enter_step(begin.position.step)
    if opts.memory.torch_compile and opts.memory.dynamo_backend is not None:
        family.compile(opts.memory.dynamo_backend)
    stepper = run.stepper(built)
    # Made of the weights as they are now: in a run that is resumed the state brings its own average.
    average = average_of(opts.ema_options(), method.parts())
    parts = StateParts(
        method.parts(),
        built.optimizer,
        lr_schedule,
        run.scaler,
        objective,
        ema=average,
        shards=stepper.shards,
        layout=stepper.layout or built.flat,
    )
    pin = run.device.type == "cuda"
    loader = batches_of(data, begin.length, rank=run.rank, seed=run.seed, loader=opts.loader, pin_memory=pin)
    training = Training(
        run=run,
        family=family,
        method=method,
        opts=opts,
        begin=begin,
        objective=objective,
        built=built,
        lr_schedule=lr_schedule,
        parts=parts,
        average=average,
        stepper=stepper,
        loader=loader,
        tracker=_make_tracker(run, opts, begin),
        uploader=_uploader(run, opts),
        rate_names=[group.name for group in groups],
    )
    training.wrap()
    if begin.stored is not None:
        # After wrapping: an engine that shares the optimizer between processes comes into being there.
        load_progress(begin.stored, parts, begin.changes, run.ranks)
    return training


def _make_tracker(run: Run, opts: TrainingOptions, begin: Beginning) -> Tracker:
    tracker = Tracker(
        opts.log,
        length=begin.length,
        default_name=opts.tracker_name,
        is_main=run.is_main,
        hparams=loggable(opts),
    )
    if begin.stored is not None:
        info = begin.stored.info
        tracker.resume(info.tracker, info.loss_average, begin.position.step)
    elif begin.position.step:
        tracker.resume({}, {}, begin.position.step)
    return tracker


def make_saver(training: Training, data: TrainingData, position: Any) -> Saver:
    """Return what saves models and states; `position()` tells where the run is.

    Raises:
        UserError: the disk has no room for a single save.
    """
    run, opts = training.run, training.opts
    facts = RunFacts(
        opts=opts,
        spec=training.family.spec,
        data=data,
        built=training.built,
        length=training.length,
        identity=training.begin.identity,
        seed=run.seed,
    )
    writer = ModelWriter(
        training.method,
        opts.save,
        training.method.describe(facts),
        observing=partial(observe, training.method, training.built),
        is_main=run.is_main,
    )

    def write_model(target: Path, *, epoch: int, step: int) -> Path | None:
        if training.average is not None:
            with training.average.applied(), training.stepper.whole_weights():
                writer(target.with_name(target.name + EMA_SUFFIX), epoch=epoch, step=step)
        with training.stepper.whole_weights():
            return writer(target, epoch=epoch, step=step)

    def write_state(folder: Path) -> None:
        with training.stepper.whole_weights(for_state=True):
            save_state(folder, training.parts, training.info(position(), saver), run.ranks)

    beside = training.method.saved_beside
    if training.average is not None:
        beside = (*beside, EMA_SUFFIX, *(EMA_SUFFIX + ending for ending in beside))
    actions = SaveActions(
        model=write_model, state=write_state, upload=training.uploader, suffix=writer.suffix, beside=beside
    )
    saver = Saver(opts.save, opts.state, training.length, actions, run.ranks)
    stored = training.begin.stored
    if stored is not None:
        saver.restore(stored.info.saver, stored.folder)
    if run.is_main:
        models = 1 if training.average is None else 2
        averages = 0.0 if training.average is None else 1.0
        state = state_bytes(training.parts.modules, 2.0 + averages)
        saver.preflight(models * writer.estimated_bytes(), state)
    return saver


def make_sampler(training: Training) -> SampleImages:
    """Return what draws sample pictures."""
    run, opts = training.run, training.opts
    return SampleImages(
        opts.sample,
        opts.save,
        training.method.samples(opts.renderer(training.family, run.autocast)),
        seed=run.seed,
        process=Process(run.rank, run.world_size),
        should_stop=lambda: run.stop.requested is not None,
    )


def _uploader(run: Run, opts: TrainingOptions) -> Uploader | None:
    """Return what sends complete files to Hugging Face, on the main process of a run that asks for it."""
    if not (run.is_main and opts.hub.huggingface_repo_id):
        return None
    uploader = Uploader(opts.hub)
    uploader.prepare()
    return uploader
