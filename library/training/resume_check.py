"""Whether a run may go on from a state: what differs between then and now, and whether the user allowed it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from library.contracts import Position, RunLength
from library.errors import Problem, UserError
from library.log import safe_text
from library.training.options_output import OVERRIDES
from library.training.state_files import Identity, StateInfo

_RATES = frozenset(OVERRIDES["lr"])
_TOTALS = frozenset(OVERRIDES["steps"])
_SCHEDULE_TITLE = "schedule"
_DATA = "data"
_DATA_GROUPS = frozenset({_DATA, "subset"})
_MODEL = "model"
_MOST_LINES = 12
_MISSING = "(none)"
# What to type after --resume_override for an option or a group; everything else is named by itself.
_SHORT_NAMES = {**dict.fromkeys(_RATES, "lr"), **dict.fromkeys(_TOTALS, "steps"), _SCHEDULE_TITLE: "scheduler"}


@dataclass(frozen=True, slots=True)
class Difference:
    """One value that is not what it was; `name` is an option or a path inside the data's fingerprint."""

    group: str
    name: str
    saved: Any
    now: Any
    is_option: bool = True

    @property
    def override(self) -> str:
        """What `--resume_override` needs to allow this."""
        if self.group in _DATA_GROUPS:
            return _DATA
        if not self.is_option:
            return self.group
        return _SHORT_NAMES.get(self.name) or _SHORT_NAMES.get(self.group) or self.name


@dataclass(frozen=True, slots=True)
class Changes:
    """The outcome of `compare`: differences that stop the run, differences that were allowed, and remarks."""

    refused: tuple[Difference, ...] = ()
    allowed: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()
    moved: bool = False
    """Whether the user says where the run begins, in place of the state."""

    @property
    def new_schedule(self) -> bool:
        """Whether rates and schedule are those of this run, not of the state."""
        return self.moved or any(
            change.group == _SCHEDULE_TITLE or change.name in _RATES or change.name in _TOTALS
            for change in self.allowed
        )

    @property
    def optimizer_arguments(self) -> frozenset[str]:
        """Names in `--optimizer_args` whose values are those of this run."""
        names: set[str] = set()
        for change in self.allowed:
            if change.name == "optimizer_args":
                names |= {str(text).partition("=")[0] for text in set(change.saved or ()) ^ set(change.now or ())}
        return frozenset(names)

    @property
    def new_data(self) -> bool:
        """Whether the data set is not what it was, so that positions inside an epoch mean nothing."""
        return any(change.group in _DATA_GROUPS for change in self.allowed)

    def raise_refused(self, where: str) -> None:
        """Stop with a table of what differs.

        Raises:
            UserError: anything differs that was not allowed.
        """
        if self.refused:
            names = " ".join(sorted({change.override for change in self.refused}))
            hint = (
                f"Give the saved values, or allow the changes with --resume_override {names}. A new run has another "
                "--output_name (`experiment_id` in a YAML file)."
            )
            what = "this run differs from the one that was saved"
            raise UserError.of([Problem(where, what, f"\n{_table(self.refused)}\n{hint}")])


def compare(
    info: StateInfo,
    identity: Identity,
    length: RunLength,
    allows: Callable[[str, str], bool],
    *,
    seed: int | None = None,
) -> Changes:
    """Compare a state with this run.

    Args:
        info: what the state says.
        identity: of this run, JSON-able.
        length: of this run.
        allows: `StateOptions.allows(title of the group, option)`.
        seed: `--seed` of this run; None takes the state's.

    Raises:
        UserError: the state is one of another script or another family of models.
    """
    if not info.exact:
        return Changes()
    saved, now = info.identity.training, identity.training
    if saved and now and saved != now:
        what = f"the state is one of another training: {saved}, and this is {now}"
        hint = "Give it to the script that saved it, or choose another --output_name or --output_dir"
        raise UserError(what, hint, where="--resume")
    found = [*_options(info, identity, length, seed), *_data(info, identity)]
    refused = tuple(
        change for change in found if not allows(change.group, change.name) and not allows("", change.override)
    )
    allowed = tuple(change for change in found if change not in refused)
    return Changes(refused, allowed, tuple(_notes(info, identity, length)))


def start_position(info: StateInfo, length: RunLength, changes: Changes) -> Position:
    """Return where this run goes on: at the same place, or the nearest one before it that its batches have.

    With other data the epoch begins again. With another number of batches per update, the updates done in the epoch are
    converted, rounding down. A state of the reference tells updates only; they are taken as done in order.
    """
    position = info.position
    if info.length is None:
        return Position(position.step, *divmod(position.step, length.updates_per_epoch))
    before, now = info.length.micro_batches_per_update, length.micro_batches_per_update
    inside = position.update_in_epoch * before // now
    if changes.new_data or inside >= length.updates_per_epoch:
        inside = 0
    return replace(position, update_in_epoch=inside)


def _options(info: StateInfo, identity: Identity, length: RunLength, seed: int | None) -> Iterator[Difference]:
    saved, now = info.identity.options, _plain(identity.options)
    same_batches = info.length is not None and info.length.micro_batches_per_update == length.micro_batches_per_update
    for title in (*saved, *(title for title in now if title not in saved)):
        before, after = saved.get(title, {}), now.get(title, {})
        for name in (*before, *(name for name in after if name not in before)):
            if before.get(name, _MISSING) == after.get(name, _MISSING):
                continue
            if name == "seed" and seed in (None, info.seed):
                continue
            if name == "gradient_accumulation_steps" and same_batches:
                continue
            yield Difference(title, name, before.get(name, _MISSING), after.get(name, _MISSING))


def _data(info: StateInfo, identity: Identity) -> Iterator[Difference]:
    pairs = ((_DATA, info.identity.data, identity.data), (_MODEL, info.identity.base_model, identity.base_model))
    for group, saved, now in pairs:
        before, after = dict(_flat(saved)), dict(_flat(_plain(now)))
        if not before or not after:
            continue
        for name in (*before, *(name for name in after if name not in before)):
            if before.get(name, _MISSING) != after.get(name, _MISSING):
                yield Difference(group, name, before.get(name, _MISSING), after.get(name, _MISSING), is_option=False)


def _notes(info: StateInfo, identity: Identity, length: RunLength) -> Iterator[str]:
    before, after = info.identity.environment, _plain(identity.environment)
    for name in (*before, *(name for name in after if name not in before)):
        if before.get(name) != after.get(name):
            yield f"{name} was {before.get(name)}, is {after.get(name)}: the run continues, but perhaps not bit for bit"
    if info.length is not None and info.world != length.world_size:
        text = f"saved by {info.world} processes, resumed by {length.world_size}: not bit-exact"
        if info.length.micro_batches_per_update != length.micro_batches_per_update:
            text += "; an update now holds another number of batches, so the order of the samples changes too"
        yield text


def _plain(value: Any) -> Any:
    """Return `value` as it looks after being stored as JSON (tuples become lists)."""
    return json.loads(json.dumps(value, default=str))


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested JSON values with their paths."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _flat(item, f"{path}[{index}]")
    else:
        yield path, value


def _table(changes: tuple[Difference, ...]) -> str:
    """Return the differences in columns: name, saved, now."""
    rows = [("", "saved", "now")]
    rows += [(_label(change), _short(change.saved), _short(change.now)) for change in changes[:_MOST_LINES]]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip() for row in rows]
    if len(changes) > _MOST_LINES:
        lines.append(f"  ... and {len(changes) - _MOST_LINES} more")
    return "\n".join(lines)


def _label(change: Difference) -> str:
    return safe_text(f"--{change.name}" if change.is_option else f"{change.group}: {change.name}")


def _short(value: Any, limit: int = 48) -> str:
    text = safe_text(json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
