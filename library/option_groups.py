"""Options are declared once, in frozen dataclasses beside their consumers; this is what declarations are made of.

A group (`LossOptions`) is a dataclass of `opt()` fields. A script's options are a dataclass of groups. Names of options
are unique within a script. `library.option_parser` fills them from the command line and a configuration file.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, TypeVar

from library.errors import Problem
from library.option_values import split_optional

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from library.config_file import ForeignConfig

T = TypeVar("T")
SetClass = TypeVar("SetClass", bound="OptionSet")

ANY_VALUE: tuple[Any, ...] = ()
"""In `matters_when` and `needs`: any value that switches the other option on."""

COMMAND_LINE = "command line"
"""Where an option was set, as in `OptionSet.given`; otherwise it is the place in a configuration file."""

_NOTES = "option"


class Notes(TypedDict, total=False):
    """What a declaration may say besides its default.

    Keys:
        help: One or two sentences for `--help` and the documentation.
        choices: Accepted values.
        flag: Name on the command line if it is not the field's name; None: not offered there.
        positional: Given by its place among the bare words of the command line and not by its name; required unless
            its type allows None. A list takes all words that are left.
        convert: Reads the value in place of the rules for the type; raises `BadValue`.
        at_least, at_most, more_than: Bounds of a number, or of every number of a pair.
        zero_is_off: Values below 1 mean None; "warn" says so.
        matters_when: Other options (any one of them suffices) and the values they need for this one to have an effect.
        needs: Like `matters_when`, but without it the option is refused.
        means: What an old spelling stands for, as option and value; the consumer knows both.
        implies: Other options of the same group that get this value when this one is switched on.
        excludes: Other options that cannot be combined with this one, and why.
        metadata_key: Name under which the value is stored in trained models.
        resume: "exact" if the value changes what a run computes, "free" if it may change when a run is resumed.
        secret: Never written to any file or log.
        path: Names a place on this machine: not logged, not stored in models.
        scope: Levels of a dataset configuration that may hold it ("general", "dataset", "subset").
        kinds: Kinds of dataset that may hold it ("dreambooth", "finetuning", "controlnet").
        toml: Key in a dataset configuration if it is not the field's name.
        blank: An empty text on the command line is a value, and not the same as leaving the option out.
        repeatable: A list that grows when the option is given again; others begin anew.
    """

    help: str
    choices: tuple[Any, ...]
    flag: str | None
    positional: bool
    convert: Callable[[Any], Any]
    at_least: float
    at_most: float
    more_than: float
    zero_is_off: str
    matters_when: Mapping[str, tuple[Any, ...]]
    needs: Mapping[str, tuple[Any, ...]]
    means: Mapping[str, Any]
    implies: Mapping[str, Any]
    excludes: Mapping[str, str]
    metadata_key: str
    resume: str
    secret: bool
    path: bool
    scope: tuple[str, ...]
    kinds: tuple[str, ...]
    toml: str
    blank: bool
    repeatable: bool


def opt(default: T, **notes: Unpack[Notes]) -> T:
    """Declare an option as a field of an `OptionGroup`; see `Notes` for what can be said about it."""
    unknown = set(notes) - set(Notes.__annotations__)
    if unknown:
        raise TypeError(f"opt() does not know {sorted(unknown)}")
    return field(default=default, kw_only=True, metadata={_NOTES: notes})  # type: ignore[return-value]


@dataclass(frozen=True)
class Option:
    """One declared option: where it lives and everything that its declaration says."""

    name: str
    field_name: str
    title: str
    annotation: Any
    optional: bool
    default: Any
    notes: Notes
    resume_default: str = "exact"

    @property
    def flag(self) -> str:
        """The option as typed on the command line; only its name when it is given by its place."""
        return self.name if self.positional else f"--{self.name}"

    @property
    def positional(self) -> bool:
        """Whether it is given by its place on the command line."""
        return self.notes.get("positional", False)

    @property
    def offered(self) -> bool:
        """Whether the command line and `--config_file` have it; if not, only dataset configurations do."""
        return self.notes.get("flag", self.name) is not None

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """Accepted values, or None for any."""
        return self.notes.get("choices")

    @property
    def is_flag(self) -> bool:
        """Whether it takes no value on the command line."""
        return self.annotation is bool

    @property
    def secret(self) -> bool:
        """Whether the value must never be written anywhere."""
        return self.notes.get("secret", False)

    @property
    def exact(self) -> bool:
        """Whether a changed value changes what the run computes."""
        return self.notes.get("resume", self.resume_default) == "exact"


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Base of all groups. Subclasses name a title, and may check themselves."""

    group_title: ClassVar[str] = ""
    group_resume: ClassVar[str] = "exact"

    def __init_subclass__(cls, *, title: str = "", resume: str = "exact", **rest: Any) -> None:
        super().__init_subclass__(**rest)
        cls.group_title = title or cls.__name__
        cls.group_resume = resume

    def __post_init__(self) -> None:
        for option in options_of(type(self)):
            for target, value in option.notes.get("implies", {}).items():
                if switched_on(getattr(self, option.field_name)) and not switched_on(getattr(self, target)):
                    object.__setattr__(self, target, value)

    def check(self) -> Iterator[Problem]:
        """Yield what is wrong inside this group."""
        return iter(())

    def warn(self) -> Iterator[Problem]:
        """Yield what is suspicious inside this group; `--strict_args` makes these errors."""
        return iter(())


def switched_on(value: Any) -> bool:
    """Tell whether a value asks for something: not None, False, 0 or empty."""
    return value is not None and value is not False and value not in (0, "", ())


_DECLARED: dict[type, tuple[Option, ...]] = {}


def options_of(group: type[OptionGroup]) -> tuple[Option, ...]:
    """Return the options that a group declares, in order."""
    if group not in _DECLARED:
        _DECLARED[group] = tuple(_read_declarations(group))
    return _DECLARED[group]


def _read_declarations(group: type[OptionGroup]) -> Iterator[Option]:
    hints = typing.get_type_hints(group)
    for item in dataclasses.fields(group):
        notes: Notes = item.metadata[_NOTES]
        annotation, optional = split_optional(hints[item.name])
        yield Option(
            name=notes.get("flag") or item.name,
            field_name=item.name,
            title=group.group_title,
            annotation=annotation,
            optional=optional,
            default=item.default,
            notes=notes,
            resume_default=group.group_resume,
        )


@dataclass(frozen=True, kw_only=True)
class OptionSet:
    """Base of a script's options: every further field is an `OptionGroup`.

    A script adapts what it inherits with class arguments: `changes` replaces notes or the default of single options
    (`changes={"save_model_as": {"default": "safetensors"}}`), `leave_out` withdraws options from the script.
    """

    given: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Where each option that differs from its default was set: `COMMAND_LINE` or the place in a configuration file."""
    warnings: tuple[Problem, ...] = field(default=(), compare=False, repr=False)
    """What the checks found suspicious; logged once logging is set up."""
    notices: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """What the options bring about that the user may not expect; logged too."""

    script: ClassVar[str] = ""
    changes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    own_changes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    leave_out: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(
        cls,
        *,
        script: str = "",
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        leave_out: tuple[str, ...] = (),
        **rest: Any,
    ) -> None:
        super().__init_subclass__(**rest)
        cls.script = script or _script_name(cls)
        cls.own_changes = changes or {}
        # Of all bases, the nearest first: a script may be of two kinds at once.
        lines = [vars(base).get("own_changes", {}) for base in reversed(cls.__mro__)]
        cls.changes = {name: notes for line in lines for name, notes in line.items()}
        cls.leave_out = frozenset(leave_out).union(*(getattr(base, "leave_out", ()) for base in cls.__bases__))

    @classmethod
    def groups(cls) -> dict[str, type[OptionGroup]]:
        """Return the groups by the name of the field that holds them."""
        hints = typing.get_type_hints(cls)
        names = [item.name for item in dataclasses.fields(cls)]
        return {name: hints[name] for name in names if isinstance(hints[name], type) and _is_group(hints[name])}

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Return all options of the script by name, with its changes applied."""
        found: dict[str, Option] = {}
        for group in cls.groups().values():
            for option in options_of(group):
                if option.name in found:
                    raise TypeError(f"{option.flag} is declared twice in {cls.__name__}")
                if option.name not in cls.leave_out:
                    found[option.name] = _changed(option, cls.changes.get(option.name, {}), cls.leave_out)
        return found

    @classmethod
    def spell_out(cls, words: Sequence[str]) -> list[str]:
        """Return the command line in full; scripts with short forms override this."""
        return list(words)

    @classmethod
    def meant_by(cls, name: str) -> str | None:
        """Return the option that a key of another program's files stands for, in scripts that understand some."""
        return None

    @classmethod
    def foreign_config(cls, name: str, typed: Mapping[str, Any]) -> ForeignConfig | None:
        """Read a `--config_file` of another program, in scripts that understand some; None: it is one of ours.

        Args:
            name: of the file, as it was given.
            typed: options on the command line, which win, with their values as they were typed.

        Raises:
            UserError: the file is wrong.
        """
        return None

    @classmethod
    def build(cls: type[SetClass], values: Mapping[str, Any], **extra: Any) -> SetClass:
        """Return an instance with `values` (by option name); options that are absent keep the script's default."""
        options = cls.options()
        groups: dict[str, Any] = {}
        for name, group in cls.groups().items():
            fields = {}
            for option in options_of(group):
                known = options.get(option.name, option)
                fields[option.field_name] = values.get(option.name, known.default)
            groups[name] = group(**fields)
        return cls(**groups, **extra)

    def value(self, name: str) -> Any:
        """Return the value of the option `name`."""
        return self.values()[name]

    def values(self) -> dict[str, Any]:
        """Return all values by option name."""
        found = {}
        for holder, group in type(self).groups().items():
            for option in options_of(group):
                if option.name not in self.leave_out:
                    found[option.name] = getattr(getattr(self, holder), option.field_name)
        return found

    def check_together(self) -> Iterator[Problem]:
        """Yield what is wrong between groups; scripts override this."""
        return iter(())

    def warn_together(self) -> Iterator[Problem]:
        """Yield what is suspicious between groups; scripts override this."""
        return iter(())

    def check_folders(self) -> Iterator[Problem]:
        """Yield what is wrong with the folders that the run writes to; may create them. Scripts override this."""
        return iter(())


def _is_group(candidate: type) -> bool:
    return issubclass(candidate, OptionGroup)


def _changed(option: Option, change: Mapping[str, Any], left_out: frozenset[str]) -> Option:
    """Return an option as a script declares it; conditions do not name options that the script leaves out."""
    known: dict[str, Any] = {**option.notes, **{k: v for k, v in change.items() if k != "default"}}
    for name in ("matters_when", "needs"):
        if left_out & set(known.get(name, {})):
            known[name] = {other: wanted for other, wanted in known[name].items() if other not in left_out}
    notes = typing.cast("Notes", known)
    return dataclasses.replace(option, notes=notes, default=change.get("default", option.default))


def _script_name(cls: type) -> str:
    if cls.__module__ != "__main__":
        return cls.__module__.rpartition(".")[2]
    return Path(sys.argv[0]).stem


def resume_fingerprint(options: OptionSet) -> dict[str, dict[str, Any]]:
    """Return title of group -> option -> value for every option that changes what a run computes."""
    values = options.values()
    declared = type(options).options()
    for option in declared.values():
        if switched_on(values[option.name]):
            values.update(option.notes.get("means", {}))
    found: dict[str, dict[str, Any]] = {}
    for name, option in declared.items():
        if option.exact:
            found.setdefault(option.title, {})[name] = values[name]
    return found


def loggable(options: OptionSet) -> dict[str, Any]:
    """Return the values that may leave this machine: neither secrets nor paths."""
    values = options.values()
    return {
        name: values[name]
        for name, option in type(options).options().items()
        if not option.secret and not option.notes.get("path", False)
    }


def metadata_values(options: OptionSet) -> dict[str, str]:
    """Return what saved models tell about the options of their run: metadata key -> value as text."""
    values = options.values()
    declared = type(options).options().items()
    return {key: str(values[name]) for name, option in declared if (key := option.notes.get("metadata_key"))}
