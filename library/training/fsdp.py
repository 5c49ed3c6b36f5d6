"""FSDP: weights, gradients and optimizer of what trains are cut up between the processes.

PyTorch's `fully_shard` (FSDP2) cuts every tensor into rows, one piece for each process, and puts the tensors of a block
together while it runs. The optimizer steps plain tensors, which share their memory with this process's pieces. Whatever
is written is whole, so models and states do not tell, and need not know, how many processes there were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from library.contracts import ParamGroup
from library.training.pieces import is_cut, own_piece, piece_of, put_together
from library.training.ranks import Ranks
from library.training.stepper import Stepper
from library.training.stepping import StepOutcome, gradient_norm

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from library.training.optimizers import BuiltOptimizer
    from library.training.options import OptimizerOptions

_SMALLEST = 1 / 1024
"""Share of a model's values below which a block is not exchanged by itself: many small messages take long."""


class WeightShares:
    """What trains, cut up; also the layout of the optimizer's values in a state (see `library.training.state.Layout`).

    Blocks without norms of their own are put together in `half`; all else (embeddings, mappers of conditions and times)
    stays in the type that it has, as do the pieces that are stepped. Gradients are added up in float32.
    """

    def __init__(self, parts: Mapping[str, nn.Module], device: torch.device, half: torch.dtype | None) -> None:
        """Cut the weights up; a collective call. Each goes to `device` when its turn comes.

        Args:
            parts: what trains, wherever its weights are. Afterwards they have other parameters.
            device: of this process.
            half: type of mixed precision, in which blocks are put together; None: that of their weights.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule

        mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        for part in parts.values():
            _cut(part, mesh, half)
        self._parts = parts
        self._device = device
        self._modules: list[Any] = [
            module for part in parts.values() for module in part.modules() if isinstance(module, FSDPModule)
        ]
        # The pieces come to lie where they stay only now.
        with self.open():
            pass
        self._pieces = {
            parameter: nn.Parameter(own_piece(parameter), requires_grad=parameter.requires_grad)
            for part in parts.values()
            for parameter in part.parameters()
        }
        self._groups: list[tuple[nn.Parameter, ...]] = []
        self._in_order: list[nn.Parameter] = []

    def own_groups(self, groups: Sequence[ParamGroup]) -> list[ParamGroup]:
        """Return the groups as the optimizer of this process is to see them: its pieces, without those of no rows."""
        self._groups = [group.params for group in groups]
        self._in_order = [parameter for group in self._groups for parameter in group]
        return [
            replace(group, params=tuple(self._pieces[parameter] for parameter in self._held(group.params)))
            for group in groups
        ]

    def _held(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        return [parameter for parameter in parameters if self._pieces[parameter].numel()]

    def take_gradients(self) -> None:
        """Let the optimizer see the gradients of the backward pass."""
        for parameter, piece in self._pieces.items():
            piece.grad = None if parameter.grad is None else own_piece(parameter.grad)

    def zero_grad(self) -> None:
        """Free all gradients."""
        for parameter, piece in self._pieces.items():
            parameter.grad = piece.grad = None

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the L2 norm of all gradients of all processes, of which these are the pieces here."""
        squares = gradient_norm(gradients).to(self._device).square()
        distributed.all_reduce(squares)
        return squares.sqrt()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Have all weights on every process, so that processes can use the model at different times."""
        for module in self._modules:
            module.set_reshard_after_forward(reshard_after_forward=False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in self._modules:
                module.set_reshard_after_forward(reshard_after_forward=True, recurse=False)
                module.reshard()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let the modules of the first process have their whole weights, in main memory; a collective call."""
        keep = distributed.get_rank() == 0
        with ExitStack() as restored:
            for module in (module for part in self._parts.values() for module in part.modules()):
                for name, parameter in list(module._parameters.items()):
                    if parameter is None or not is_cut(parameter):
                        continue
                    value = put_together(own_piece(parameter), parameter)
                    if keep:
                        restored.callback(module._parameters.__setitem__, name, parameter)
                        module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            yield

    # The optimizer's values in a state --------------------------------------------------------------------------

    @property
    def shapes(self) -> list[list[tuple[int, ...]]]:
        """Shapes of the parameters of each group, as a whole."""
        return [[tuple(parameter.shape) for parameter in group] for group in self._groups]

    def spread(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the optimizer's `state_dict()` as if one process had all of it; a collective call.

        Only the first process gets the values.
        """
        values: dict[int, Any] = {}
        groups = []
        first = 0
        for parameters, group in zip(self._groups, state["param_groups"], strict=True):
            numbers = dict(zip(self._held(parameters), group["params"], strict=True))
            indices = list(range(first, first + len(parameters)))
            first += len(indices)
            groups.append({**group, "params": indices})
            for index, parameter in zip(indices, parameters, strict=True):
                values[index] = state["state"].get(numbers.get(parameter), {})
        # The first process has rows of every tensor, so it knows of all that there is.
        kinds = Ranks.of_torch().broadcast([self._kinds(values[index], of) for index, of in enumerate(self._in_order)])
        together = [self._together(values[index], of, kinds[index]) for index, of in enumerate(self._in_order)]
        return {**state, "state": {index: of for index, of in enumerate(together) if of}, "param_groups": groups}

    def gather(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a single process's optimizer as one of the pieces here: the opposite of `spread`."""
        values: dict[int, Any] = {}
        groups = []
        for parameters, group in zip(self._groups, state["param_groups"], strict=True):
            held = self._held(parameters)
            indices = list(range(len(values), len(values) + len(held)))
            numbers = dict(zip(parameters, group["params"], strict=True))
            groups.append({**group, "params": indices})
            for index, parameter in zip(indices, held, strict=True):
                found = state["state"].get(numbers[parameter], {})
                values[index] = {name: _piece(value, parameter) for name, value in found.items()}
        return {**state, "state": {index: of for index, of in values.items() if of}, "param_groups": groups}

    def _kinds(self, values: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, torch.dtype | None]:
        """Return the names of an optimizer's values for a parameter, with the type of those that are cut up like it."""
        shape = self._pieces[parameter].shape
        return {
            name: value.dtype if isinstance(value, Tensor) and value.dim() and value.shape == shape else None
            for name, value in values.items()
        }

    def _together(
        self, values: Mapping[str, Any], parameter: nn.Parameter, kinds: Mapping[str, torch.dtype | None]
    ) -> dict[str, Any]:
        nothing = self._pieces[parameter].detach()
        found = {}
        for name, dtype in kinds.items():
            value = values.get(name)
            if dtype is not None:
                value = put_together(nothing.to(dtype) if value is None else value, parameter)
            found[name] = value
        return found


class ShardedStepper(Stepper):
    """Steps what is cut up.

    Args:
        built: The optimizer, made for the groups of `WeightShares.own_groups`.
        options: Clipping, and the limit of skipped updates.
        shares: What is cut up.
        accumulation: Micro-batches of an update on this process.
        first_step: Updates already done.
    """

    def __init__(
        self,
        built: BuiltOptimizer,
        options: OptimizerOptions,
        shares: WeightShares,
        *,
        accumulation: int = 1,
        first_step: int = 0,
    ) -> None:
        super().__init__(built, options, accumulation=accumulation, first_step=first_step)
        self.layout = self._shares = shares
        self._norm_of = shares.norm

    def step(self) -> StepOutcome:
        """Finish an update: clip, then step or skip."""
        self._shares.take_gradients()
        return super().step()

    def zero_grad(self) -> None:
        """Free all gradients."""
        self._shares.zero_grad()

    def observing(self) -> AbstractContextManager[None]:
        """Have all weights on every process, so that ranks can draw different pictures; a collective call."""
        return self._shares.open()

    def whole_weights(self, *, for_state: bool = False) -> AbstractContextManager[None]:
        """Let the modules on rank 0 have whole weights while models and states are written; a collective call."""
        return self._shares.whole()


def _cut(part: nn.Module, mesh: Any, half: torch.dtype | None) -> None:
    """Cut up a part: blocks that are large enough one by one, and everything else together."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def rules(dtype: torch.dtype | None) -> MixedPrecisionPolicy:
        # Inputs keep their types: times are float32 whatever the weights are, and autocast does the rest.
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    enough = _values(part) * _SMALLEST
    for block in _blocks(part):
        if _values(block) > enough:
            # Norms compute in float32, so weights of theirs are not rounded, nor what comes along with them.
            dtype = None if any(isinstance(layer, nn.LayerNorm) for layer in block.modules()) else half
            fully_shard(block, mesh=mesh, mp_policy=rules(dtype), reshard_after_forward=True)
    fully_shard(part, mesh=mesh, mp_policy=rules(None), reshard_after_forward=True)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what lists of modules hold, the outermost lists counting: such modules are called as a whole."""
    listed = isinstance(module, nn.ModuleList)
    for child in module.children():
        if listed and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _blocks(child)


def _values(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _piece(value: Any, parameter: nn.Parameter) -> Any:
    if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape:
        return piece_of(value, parameter).clone()
    return value
