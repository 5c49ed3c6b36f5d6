"""ZeRO training: DeepSpeed's engine behind the interface of `Stepper`, and its weights and optimizer as a whole.

The engine holds the weights in the type of `--mixed_precision` and, shared between the processes, exact ones beside the
optimizer's values. What is written to models and states are the exact ones. DeepSpeed's own checkpoints are not used:
reading them runs pickles without protection.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.training.non_finite import NonFiniteWatch
from library.training.stepping import StepOutcome

if TYPE_CHECKING:
    from collections.abc import Collection

    from library.training.optimizers import BuiltOptimizer
    from library.training.options import DistributedOptions, OptimizerOptions

logger = logging.getLogger(__name__)

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_NOT_STORED = ("loss_scaler", "param_slice_mappings", "clip_grad", "universal_checkpoint_info")
"""Entries of the optimizer's state that are objects of DeepSpeed, or follow from this run's options."""


class EngineStepper:
    """Does for the loop what `Stepper` does, through DeepSpeed's engine.

    Args:
        accelerator: Made with the plugin of `make_plugin`.
        built: The optimizer, over the weights as they were loaded.
        options: Clipping is the engine's; the limit of skipped updates is ours.
        distributed: What is shared, and in which type weights are saved.
        first_step: Updates already done.
    """

    def __init__(
        self,
        accelerator: Any,
        built: BuiltOptimizer,
        options: OptimizerOptions,
        distributed: DistributedOptions,
        *,
        first_step: int = 0,
    ) -> None:
        self.built = built
        self.watch = NonFiniteWatch(options.max_nan_steps)
        self.newly_skipped: list[int] = []
        self.shards = self
        self.layout = None
        self._accelerator = accelerator
        self._save_half = distributed.zero3_save_16bit_model
        self._step = first_step
        self._engine: Any = None
        self._frozen: dict[nn.Parameter, Tensor] = {}
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        self._half = next((dtype for name, dtype in _HALF.items() if config[name]["enabled"]), None)

    def wrap(self, step: nn.Module, *, may_skip_parameters: bool) -> nn.Module:
        """Hand the step and the optimizer to the engine, which shares them; possible once.

        Raises:
            UserError: The engine exists already, or refuses.
        """
        if self._engine is not None:
            raise UserError("what trains cannot change during a run", where="--deepspeed")
        for parameter in step.parameters():
            # The engine sees weights as one long row and cannot read the layout of channels_last.
            parameter.data = parameter.data.contiguous()
        exact = [parameter.detach().cpu() for parameter in step.parameters()] if self._half else []
        self._share_at_once(step)
        self._engine = self._accelerator.prepare(step, self.built.optimizer)[0]
        scaler: Any = getattr(self._engine.optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            # Updates without finite gradients are counted, and end the run, by `NonFiniteWatch`.
            scaler.raise_error_at_min_scale = False
        self._follow_groups()
        self._keep_exact(exact)
        return self._engine

    def accumulating(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Return the context of one micro-batch's forward and backward pass; the last one of an update shares."""
        # Told in full, since the last update of an epoch may have fewer micro-batches than the others.
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch; the engine divides by the accumulation and averages over ranks."""
        self._engine.backward(loss)

    def step(self) -> StepOutcome:
        """Finish an update: clip, then step or skip.

        Raises:
            StopTraining: With exit status 5, if too many updates were skipped.
        """
        optimizer = self._engine.optimizer
        # A higher scale that overflows only was too high.
        blame = self._half is not torch.float16 or float(optimizer.loss_scale) <= 1.0
        self._engine.step()
        # The schedule asks, since offloading puts another optimizer in the place of the one that it knows.
        vars(self.built.optimizer)["_opt_called"] = True
        norm = torch.as_tensor(self._engine.get_global_grad_norm() or 0.0, dtype=torch.float32)
        skipped = torch.tensor(bool(optimizer.overflow))
        outcome = StepOutcome(norm.detach(), skipped, skipped & blame)
        self.newly_skipped = self.watch.add(self._step, outcome)
        self._step += 1
        return outcome

    def zero_grad(self) -> None:
        """Free all gradients."""
        self._engine.zero_grad()

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Make all weights whole on every rank, so that ranks can draw different pictures; a collective call."""
        if not self._shares_weights:
            yield
            return
        import deepspeed

        offload = self._engine.optimizer.parameter_offload
        offload.partition_all_parameters()
        # The hooks would exchange weights, and a rank with one picture less would be waited for in vain.
        offload._remove_module_hooks()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            with deepspeed.zero.GatheredParameters(list(self._engine.module.parameters())):
                yield
        finally:
            offload.setup_zero_stage3_hooks()

    @contextmanager
    def whole_weights(self, *, for_state: bool = False) -> Iterator[None]:
        """Give the modules on rank 0 their exact weights, on the CPU, while models and states are written.

        Every rank enters it, at the same time. With `--zero3_save_16bit_model` models get the engine's 16-bit weights.
        """
        if self._half is None and not self._shares_weights:
            yield
            return
        keep = self._accelerator.is_main_process
        half = self._save_half and self._shares_weights and not for_state
        parameters = list(self._engine.module.parameters())
        whole = [self._whole(parameter, half=half, keep=keep) for parameter in parameters]
        with ExitStack() as restored:
            for parameter, value in zip(parameters, whole, strict=True):
                if value is not None:
                    restored.callback(setattr, parameter, "data", parameter.data)
                    parameter.data = value
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's share of optimizer and exact weights, without objects of DeepSpeed."""
        state = dict(self._engine.optimizer.state_dict())
        scaler = vars(state.get("loss_scaler", object)) if "loss_scaler" in state else {}
        state["scaler"] = {name: value for name, value in scaler.items() if isinstance(value, (int, float))}
        state["zero_stage"] = int(state["zero_stage"])
        return {name: value for name, value in state.items() if name not in _NOT_STORED}

    def load_state_dict(self, state: Mapping[str, Any], *, keep: Collection[str] = ()) -> None:
        """Continue from what `state_dict` returned on the same rank of as many.

        Args:
            state: What was stored.
            keep: Entries of the optimizer's groups that keep their present value (`weight_decay`).

        Raises:
            UserError: It is the state of another optimizer or model.
        """
        optimizer, groups = self._engine.optimizer, self.built.optimizer.param_groups
        kept = [{name: group[name] for name in keep if name in group} for group in groups]
        scaler = optimizer.loss_scaler
        vars(scaler).update({name: value for name, value in state["scaler"].items() if name in vars(scaler)})
        mine = {**state, "loss_scaler": scaler, "clip_grad": getattr(optimizer, "clip_grad", 0.0)}
        rank = self._accelerator.process_index
        try:
            optimizer.load_state_dict(
                [mine if index == rank else None for index in range(rank + 1)], load_from_fp32_weights=True
            )
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            hint = "Resume with the model, optimizer and --zero_stage of the saved run."
            raise UserError(f"does not fit this optimizer ({error})", hint, where="--resume") from error
        self._follow_groups()
        for group, values in zip(self.built.optimizer.param_groups, kept, strict=True):
            group.update(values)

    @property
    def _shares_weights(self) -> bool:
        return self._engine.zero_optimization_partition_weights()

    def _share_at_once(self, step: nn.Module) -> None:
        """Cut up the weights one by one where `--zero3_init_flag` left them waiting outside of the GPU."""
        plugin = self._accelerator.state.deepspeed_plugin
        if not plugin.zero3_init_flag:
            return
        import deepspeed

        for parameter in step.parameters():
            parameter.data = parameter.data.to(self._half or torch.float32)
        deepspeed.zero.Init(module=step, config_dict_or_path=plugin.deepspeed_config, dtype=self._half)
        for holder in step.modules():
            for name, buffer in list(holder.named_buffers(recurse=False)):
                holder.register_buffer(
                    name, buffer.to(self._accelerator.device), persistent=name not in holder._non_persistent_buffers_set
                )

    def _follow_groups(self) -> None:
        """Let our optimizer, and with it the schedule, look at the groups that the engine really steps."""
        engine = self._engine.optimizer
        self.built.optimizer.param_groups = getattr(engine, "optimizer", engine).param_groups

    def _keep_exact(self, exact: list[Tensor]) -> None:
        """Undo the rounding of the weights beside the optimizer, which the engine made from those in half precision."""
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter, value in zip(self._engine.module.parameters(), exact, strict=bool(exact)):
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, value.to(self._accelerator.device))
            else:
                self._frozen[parameter] = value

    def _whole(self, parameter: nn.Parameter, *, half: bool, keep: bool) -> Tensor | None:
        """Return a weight as it is to be written, where `keep` is set; a collective call."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        if parameter in self._frozen and not half:
            return self._frozen[parameter] if keep else None
        value = None if half or not parameter.requires_grad else safe_get_full_fp32_param(parameter)
        if value is None and self._shares_weights:
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().to("cpu", copy=True) if keep else None
        return None if value is None or not keep else value.detach().reshape(_shape(parameter)).cpu()


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
