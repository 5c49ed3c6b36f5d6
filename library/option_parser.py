"""Fills a script's options from the command line and a configuration file, and reports all problems together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from library.errors import Problem, UserError, raise_problems
from library.option_groups import COMMAND_LINE, Option, OptionGroup, OptionSet, opt
from library.option_places import expected, hand_out, places_of, without_value
from library.option_relations import check_relations
from library.option_values import BadValue, check_choice, convert, is_list, nearest
from library.retired import ELSEWHERE, SPELLINGS

SetClass = TypeVar("SetClass", bound=OptionSet)

_CONTROL_HINT = "A backslash followed by a letter means a control character: use single quotes or forward slashes."


@dataclass(frozen=True, kw_only=True)
class ConfigOptions(OptionGroup, title="config", resume="free"):
    """Options from files."""

    config_file: str | None = opt(
        None, path=True, help="TOML file with options; the command line wins. `.toml` is added when it is missing."
    )
    output_config: bool = opt(
        False,
        needs={"config_file": ()},
        help="Write the options of this command to --config_file (keys and tokens left out) and stop.",
    )
    strict_args: bool = opt(False, help="Treat warnings about options as errors.")


@dataclass
class Reading:
    """What was read so far: values by option name, where they came from, and what is wrong with the rest."""

    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    meant_by: Callable[[str], str | None] = OptionSet.meant_by

    def refuse(self, where: str, what: str, hint: str = "", *, about: str | None = None) -> None:
        """Note a problem; follow-up problems of the option `about` will not be shown."""
        self.problems.append(Problem(where, what, hint))
        if about is not None:
            self.bad.add(about)


def parse(options_class: type[SetClass], argv: Sequence[str]) -> SetClass:
    """Return the options of a script; the command line wins over `--config_file`, which wins over defaults.

    Args:
        options_class: Composition of option groups.
        argv: Arguments without the script's name.

    Raises:
        UserError: With everything that is wrong.
    """
    return finish(options_class, read(options_class, argv))


def read(options_class: type[OptionSet], argv: Sequence[str]) -> Reading:
    """Read and convert all values; what fails is noted in the result, not raised."""
    options = options_class.options()
    offered = {name: option for name, option in options.items() if option.offered}
    reading = Reading(meant_by=options_class.meant_by)
    typed = _read_command_line(offered, options_class.spell_out(argv), reading)
    for name, value in typed.items():
        _store(reading, offered[name], value, offered[name].flag, COMMAND_LINE)
    config = reading.values.get("config_file")
    if config and not reading.values.get("output_config"):
        _read_config_file(options_class, config, offered, typed, reading)
    _check_places(places_of(options_class), reading)
    return reading


def finish(options_class: type[SetClass], reading: Reading) -> SetClass:
    """Build the options and check them; under `--output_config` only that they could be read.

    Raises:
        UserError: With everything that is wrong.
    """
    options = options_class.options()
    if without_value(places_of(options_class), reading.values):
        # What a script works on is unknown, so nothing else can be judged.
        raise_problems(reading.problems)
    given = {
        name: reading.sources.get(name, COMMAND_LINE)
        for name, value in reading.values.items()
        if value != options[name].default
    }
    built = options_class.build(reading.values, given=given)
    if reading.values.get("output_config"):
        raise_problems([*reading.problems, *check_relations(built, only="output_config").errors])
        return built
    relations = check_relations(built)
    errors = [*relations.errors, *built.check_together()]
    warnings = [*reading.warnings, *relations.warnings, *built.warn_together()]
    for holder in type(built).groups():
        group: OptionGroup = getattr(built, holder)
        errors.extend(group.check())
        warnings.extend(group.warn())
    if reading.values.get("strict_args"):
        errors.extend(warnings)
    raise_problems([*reading.problems, *(error for error in errors if not _concerns(error, reading.bad))])
    return replace(built, warnings=tuple(warnings), notices=(*reading.notes, *relations.notices))


def _concerns(problem: Problem, names: set[str]) -> bool:
    words = set(f"{problem.where} {problem.what}".replace(",", " ").split())
    return any(f"--{name}" in words for name in names)


def _read_command_line(offered: Mapping[str, Option], argv: Sequence[str], reading: Reading) -> dict[str, Any]:
    """Return the last value typed for each option: text, list of texts, or True."""
    typed: dict[str, Any] = {}
    places = [option for option in offered.values() if option.positional]
    words: list[str] = []
    rest = list(argv)
    last_flag = None
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            if not places or not _is_plain(word, last_flag):
                _refuse_stray(word, last_flag, reading)
            else:
                words.append(word)
                last_flag = None
            continue
        name, separator, attached = word[2:].partition("=")
        option = offered.get(SPELLINGS.get(name, name))
        last_flag = None
        if option is None or option.positional:
            _refuse_unknown(name, offered, reading)
            _skip_values(rest)
        elif is_list(option.annotation):
            before = typed.get(name, []) if option.notes.get("repeatable") else []
            typed[name] = [*before, *([attached] if separator else _take_values(rest))]
        elif separator:
            typed[name] = attached
        elif option.is_flag:
            typed[name], last_flag = True, option
        elif rest and not rest[0].startswith("--"):
            typed[name] = rest.pop(0)
        else:
            reading.refuse(option.flag, "needs a value", _value_hint(option, rest), about=option.name)
    return {**_modern_spelling(typed), **_place(places, words, reading)}


def _place(places: Sequence[Option], words: Sequence[str], reading: Reading) -> dict[str, Any]:
    values, problems = hand_out(places, words)
    reading.problems.extend(problems)
    return values


def _check_places(places: Sequence[Option], reading: Reading) -> None:
    """Note which words are missing, unless another mistake may have swallowed them."""
    for option in places:
        if reading.values.get(option.name) == "":
            reading.refuse(option.name, "is empty", "Is a variable of the shell not set?", about=option.name)
    missing = [option.name for option in without_value(places, reading.values)]
    if missing and not reading.problems:
        reading.refuse("", f"missing: {' and '.join(missing)}", f"{expected(places)} See --help.")


def _modern_spelling(values: dict[str, Any]) -> dict[str, Any]:
    """Replace old spellings, which win over the new one when both are there."""
    for old, new in SPELLINGS.items():
        if old in values:
            values[new] = values.pop(old)
    return values


def _take_values(rest: list[str]) -> list[str]:
    taken = []
    while rest and not rest[0].startswith("--"):
        taken.append(rest.pop(0))
    return taken


def _skip_values(rest: list[str]) -> None:
    _take_values(rest)


def _value_hint(option: Option, rest: Sequence[str]) -> str:
    return f"Write {option.flag}={rest[0]} if the value starts with --." if rest else ""


def _is_plain(word: str, last_flag: Option | None) -> bool:
    """Whether a bare word can be a value given by its place: no misspelled option, no value of a flag."""
    return not _looks_like_option(word) and not _looks_like_value_of(last_flag, word)


def _looks_like_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not word[1].isdigit()


def _looks_like_value_of(last_flag: Option | None, word: str) -> bool:
    return last_flag is not None and word.lower() in ("true", "false", "1", "0", "yes", "no")


def _refuse_stray(word: str, last_flag: Option | None, reading: Reading) -> None:
    if last_flag is not None and _looks_like_value_of(last_flag, word):
        reading.refuse(
            last_flag.flag, f"takes no value, but {word!r} follows", f"Write {last_flag.flag}={word.lower()}."
        )
    elif _looks_like_option(word):
        reading.refuse("", f"unexpected argument {word!r}", "Options start with two dashes.")
    else:
        reading.refuse("", f"unexpected argument {word!r}", "Put quotes around values that contain spaces.")


def _refuse_unknown(name: str, offered: Mapping[str, Option], reading: Reading) -> None:
    where = f"--{name}"
    spelled = name.replace("-", "_")
    places = [option for option in offered.values() if option.positional]
    named = [known for known, option in offered.items() if not option.positional]
    longer = [known for known in named if known.startswith(spelled)] if spelled else []
    if spelled in offered and spelled not in named:
        reading.refuse(where, "is given by its place, without a name", expected(places), about=spelled)
    elif spelled in named:
        reading.refuse(where, "unknown option", f"Write --{spelled}.", about=spelled)
    elif (meant := reading.meant_by(spelled)) in named:
        reading.refuse(where, "unknown option", f"As an option it is called --{meant}.", about=meant)
    elif name in ELSEWHERE:
        reading.refuse(where, f"is not an option of this script; it belongs to {ELSEWHERE[name]}")
    elif longer:
        listed = " or ".join(f"--{known}" for known in longer[:4]) + (" ..." if len(longer) > 4 else "")
        reading.refuse(where, "options may not be abbreviated", f"Write {listed}.")
        reading.bad.update(longer)
    else:
        near = nearest(spelled, named, cutoff=0.6)
        hint = f"Did you mean --{near}?" if near else "See --help for all options."
        reading.refuse(where, "unknown option", hint, about=near)


def _read_config_file(
    options_class: type[OptionSet],
    config: str,
    offered: Mapping[str, Option],
    typed: Mapping[str, Any],
    reading: Reading,
) -> None:
    from library.config_file import read_config

    try:
        other = options_class.foreign_config(config, typed)
        values = read_config(config) if other is None else other.values
        reading.notes.extend(() if other is None else other.notes)
    except UserError as error:
        reading.problems.extend(error.problems)
        # What the unreadable file would have set is unknown: complaints about missing options would mislead.
        reading.bad.update(name for name in offered if name not in typed)
        return
    foreign = []
    for key, found in _modern_spelling(dict(values)).items():
        if key in offered and key not in typed:
            _store(reading, offered[key], found.value, f"{found.place}: {key}", found.place)
        elif key in ELSEWHERE and not found.value:
            continue  # graphical front ends write all that they know, also what is off
        elif key not in offered and not _refuse_typo(key, found.place, offered, reading):
            foreign.append(key)
    if foreign:
        reading.warnings.append(_foreign_keys(config, foreign))


def _refuse_typo(key: str, place: str, offered: Mapping[str, Option], reading: Reading) -> bool:
    """Note a key that is nearly an option of this script; return False when it is something else altogether."""
    if key in ELSEWHERE:
        return False
    near = nearest(key.replace("-", "_"), offered, cutoff=0.8)
    if near is None:
        return False
    reading.refuse(f"{place}: {key}", "unknown option", f"Did you mean {near}?", about=near)
    return True


def _foreign_keys(config: str, keys: Sequence[str]) -> Problem:
    listed = ", ".join(f"{key} ({ELSEWHERE[key]})" if key in ELSEWHERE else key for key in keys[:8])
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return Problem(f"--config_file {config}", f"keys that are not options of this script are ignored: {listed}{more}")


def _store(reading: Reading, option: Option, value: Any, where: str, source: str) -> None:
    """Convert and check one value; note it, or note what is wrong with it."""
    try:
        converted = _converted(option, value, from_file=source != COMMAND_LINE)
    except BadValue as error:
        reading.refuse(where, str(error), about=option.name)
        return
    if option.notes.get("zero_is_off") and isinstance(converted, int) and converted < 1:
        if option.notes["zero_is_off"] == "warn" or converted < 0:
            reading.warnings.append(Problem(where, f"{converted} switches it off"))
        converted = None
    reading.values[option.name] = converted
    reading.sources[option.name] = source


def _converted(option: Option, value: Any, *, from_file: bool) -> Any:
    if value == "" and option.optional and (from_file or (option.annotation is str and not option.notes.get("blank"))):
        return None
    if from_file and value is not None and isinstance(value, dict):
        raise BadValue("expected a value, not a table")
    converted = convert(value, option.annotation, option.notes.get("convert"))
    for item in converted if isinstance(converted, tuple) else (converted,):
        _check_range(option, item)
        _check_text(option, item)
    check_choice(converted, option.choices)
    return converted


def _check_range(option: Option, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low, high, above = option.notes.get("at_least"), option.notes.get("at_most"), option.notes.get("more_than")
    if low is not None and high is not None and not low <= value <= high:
        raise BadValue(f"must be between {low} and {high}, got {value}")
    if low is not None and value < low:
        raise BadValue(f"must be at least {low}, got {value}")
    if high is not None and value > high:
        raise BadValue(f"must be at most {high}, got {value}")
    if above is not None and value <= above:
        raise BadValue(f"must be more than {above}, got {value}")


def _check_text(option: Option, value: Any) -> None:
    if not isinstance(value, str):
        return
    control = any(ord(character) < 32 or ord(character) == 127 for character in value)
    if "\0" in value:
        raise BadValue(f"{value!r} contains a zero byte")
    if control and option.notes.get("path", False):
        raise BadValue(f"{value!r} contains a control character. {_CONTROL_HINT}")
