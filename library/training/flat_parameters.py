"""Many small parameters as one long row, so that clipping, the optimizer and zeroing take one call each.

A LoRA has hundreds of matrices of a few kilobytes. Walking through them costs more than their arithmetic: for 528 of
them the norm, AdamW and zeroing take about ten times as long as for the same numbers in one row. The parameters of a
group stay what they are for everybody else (modules, state dicts, files): views of the row, with gradients that are
views of the row's gradient. States hold the optimizer's values parameter by parameter, as if there were no row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from library.contracts import ParamGroup


@dataclass(frozen=True, slots=True)
class _Row:
    """The parameters of one group, and the row that holds the values of those that train.

    Attributes:
        whole: the row.
        members: the parameters in it.
        places: number of each of them in the group.
        shapes: of all parameters of the group, those that do not train included.
    """

    whole: nn.Parameter
    members: tuple[nn.Parameter, ...]
    places: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Number of values of each member."""
        return [member.numel() for member in self.members]


class FlatParameters:
    """Rows in place of the parameters of an optimizer's groups. Every member gets a gradient in every update.

    Parameters that need no gradient stay out of the rows: an optimizer leaves those alone, and a row has no gaps.
    Only for optimizers that treat each number by itself: AdamW does, Adafactor (rows and columns of a matrix) does not.
    """

    def __init__(self, groups: Sequence[ParamGroup]) -> None:
        """Move the values of all parameters into rows; types and devices must agree within a group."""
        self._names = groups
        self._rows = [_row(group.params) for group in groups]

    def groups(self) -> list[ParamGroup]:
        """Return the groups as the optimizer is to see them: one parameter each."""
        return [replace(group, params=(row.whole,)) for group, row in zip(self._names, self._rows, strict=True)]

    def zero_grad(self) -> None:
        """Set all gradients to zero; they stay views of the row's."""
        for row in self._rows:
            if row.whole.grad is not None:
                row.whole.grad.zero_()

    @property
    def shapes(self) -> list[list[tuple[int, ...]]]:
        """Shapes of the parameters of each group."""
        return [list(row.shapes) for row in self._rows]

    def spread(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return an optimizer's `state_dict()` as if it held each parameter by itself."""
        spread: dict[int, Any] = {}
        groups = []
        first = 0
        for row, group in zip(self._rows, state["param_groups"], strict=True):
            indices = list(range(first, first + len(row.shapes)))
            first += len(indices)
            groups.append({**group, "params": indices})
            whole = state["state"].get(group["params"][0])
            if whole is not None:
                parts = {name: _split(value, row) for name, value in whole.items()}
                for at, place in enumerate(row.places):
                    spread[indices[place]] = {name: values[at] for name, values in parts.items()}
        return {**state, "state": spread, "param_groups": groups}

    def gather(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of an optimizer of single parameters as one of the rows: the opposite of `spread`."""
        gathered: dict[int, Any] = {}
        groups = []
        for number, (row, group) in enumerate(zip(self._rows, state["param_groups"], strict=True)):
            groups.append({**group, "params": [number]})
            single = [state["state"].get(group["params"][place]) for place in row.places]
            if single and all(single):
                names = single[0].keys()
                gathered[number] = {name: _join([of[name] for of in single], row) for name in names}
        return {**state, "state": gathered, "param_groups": groups}


def _row(parameters: Sequence[nn.Parameter]) -> _Row:
    places = tuple(place for place, parameter in enumerate(parameters) if parameter.requires_grad)
    members = tuple(parameters[place] for place in places)
    with torch.no_grad():
        whole = nn.Parameter(torch.cat([member.detach().reshape(-1) for member in members]))
        whole.grad = torch.zeros_like(whole)
        values = whole.detach().split([member.numel() for member in members])
        gradients = whole.grad.split([member.numel() for member in members])
        for member, value, gradient in zip(members, values, gradients, strict=True):
            member.data = value.view(member.shape)
            member.grad = gradient.view(member.shape)
    return _Row(whole, members, places, tuple(tuple(parameter.shape) for parameter in parameters))


def _split(value: Any, row: _Row) -> list[Any]:
    """Cut a state of the row's shape into its members'; anything else (a step counter) is everybody's."""
    if isinstance(value, Tensor) and value.shape == row.whole.shape and value.dim():
        return [
            part.view(member.shape).clone()
            for part, member in zip(value.detach().split(row.sizes), row.members, strict=True)
        ]
    return [value.clone() if isinstance(value, Tensor) else value for _ in row.members]


def _join(values: Sequence[Any], row: _Row) -> Any:
    shaped = all(
        isinstance(value, Tensor) and value.shape == member.shape
        for value, member in zip(values, row.members, strict=True)
    )
    return torch.cat([value.reshape(-1) for value in values]) if shaped else values[0]
