"""From `--dataset_config`, or the folders named on the command line, to checked data set specs.

A value is looked up in subset, data set, `[general]`, command line and default, in this order; the first that is
present wins. All problems are reported together.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from library.data.buckets import bucket_notes, bucket_problems
from library.data.dataset_file import read_table
from library.data.dataset_schema import KIND_NAMES, REQUIRED, Level, check_table, known_keys
from library.data.dataset_spec import CONTROLNET, DREAMBOOTH, FINETUNING, DatasetSpec, SubsetSpec
from library.data.folder_tree import read_folder_tree
from library.data.options import DatasetOptions, SubsetOptions
from library.data.spec_checks import path_problems
from library.data.spec_sizes import as_trained, side_problems, step_as_given, with_bucket_sizes
from library.errors import Problem, raise_problems
from library.option_values import nearest, resolution_wh

__all__ = ["CONTROLNET", "DREAMBOOTH", "FINETUNING", "DatasetSpec", "SubsetSpec", "load_dataset_specs"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Subset:
    where: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Dataset:
    where: str
    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    subsets: list[_Subset] = field(default_factory=list)


@dataclass(slots=True)
class _Source:
    """Everything that was read, before precedence is applied, and the problems met so far."""

    general: dict[str, Any] = field(default_factory=dict)
    datasets: list[_Dataset] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Script:
    """What the script accepts: its own kinds, those that the options leave, and whether it has caption dropout."""

    kinds: tuple[str, ...]
    accepted: tuple[str, ...]
    caption_dropout: bool


def load_dataset_specs(
    data: DatasetOptions,
    subset: SubsetOptions,
    *,
    kinds: tuple[str, ...],
    bucket_step_multiple: int,
    in_json: str | None = None,
    caption_dropout: bool = True,
    side_multiple: int = 1,
) -> tuple[DatasetSpec, ...]:
    """Return the data sets of a run.

    Args:
        data: Data set options of the command line.
        subset: Subset options of the command line.
        kinds: Kinds of data set that the script takes: "dreambooth", "finetuning", "controlnet".
        bucket_step_multiple: Sides of trained pictures must be multiples of this when buckets are on.
        in_json: Metadata file named on the command line, in scripts that have `--in_json`.
        caption_dropout: Whether the script has caption dropout at all.
        side_multiple: The same without buckets.

    Raises:
        UserError: Holds every problem of the configuration.
    """
    script = _Script(kinds, _accepted_kinds(kinds, data.masked_loss), caption_dropout)
    if data.dataset_config is not None:
        _warn_ignored(data, in_json)
        source = _from_file(data.dataset_config, script)
    else:
        source = _from_command_line(data, subset, script, in_json)
    problems, share = source.problems, data.encoded_share
    built = _build(source, data, subset, problems)
    specs = [with_bucket_sizes(spec, bucket_step_multiple, share) for spec in built]
    for spec, dataset in zip(specs, source.datasets, strict=True):
        problems.extend(bucket_problems(spec, dataset.where, step_as_given(bucket_step_multiple, share)))
        problems.extend(side_problems(spec, dataset.where, step_as_given(side_multiple, share)))
    raise_problems(problems)
    for spec in specs:
        for note in bucket_notes(spec):
            _log.warning("data set %d: %s", spec.index + 1, note)
    return tuple(as_trained(spec, share) for spec in specs)


def _accepted_kinds(kinds: tuple[str, ...], masked_loss: bool) -> tuple[str, ...]:
    """Apply `--masked_loss`: it adds masks in conditioning folders, and replaces DreamBooth where that was alone."""
    if not masked_loss or CONTROLNET in kinds or DREAMBOOTH not in kinds:
        return kinds
    return (CONTROLNET,) if kinds == (DREAMBOOTH,) else (*kinds, CONTROLNET)


def _warn_ignored(data: DatasetOptions, in_json: str | None) -> None:
    names = ("train_data_dir", "reg_data_dir", "webdataset_path")
    ignored = [f"--{name}" for name in names if getattr(data, name)] + (["--in_json"] if in_json else [])
    if ignored:
        _log.warning("%s ignored: --dataset_config names the data", " and ".join(ignored))


def _from_file(path: str, script: _Script) -> _Source:
    table = read_table(path)
    source = _Source()
    for name in table:
        if name not in ("general", "datasets"):
            source.problems.append(_misplaced(path, name))
    general = table.get("general", {})
    if isinstance(general, dict):
        place = Level(f"{path}: general.", "general", _general_kinds(script), script.caption_dropout)
        source.problems.extend(check_table(general, place, source.general))
    else:
        source.problems.append(Problem(f"{path}: general", "must be a table", "Write [general]."))
    datasets = _tables(table, "datasets", path, "[[datasets]]", source.problems)
    for number, entry in enumerate(datasets):
        source.datasets.append(_read_dataset(entry, f"{path}: datasets[{number}]", script, source.problems))
    return source


def _general_kinds(script: _Script) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*script.kinds, *script.accepted)))


def _misplaced(path: str, name: str) -> Problem:
    key = known_keys().get(name)
    if key is not None:
        return Problem(
            f"{path}: {name}", f"{name!r} is not allowed at the top level", f"Move it to {key.legal_levels()}."
        )
    near = nearest(name, ("general", "datasets"), cutoff=0.6)
    hint = f"Did you mean {near!r}?" if near else "Only [general] and [[datasets]] may stand there."
    return Problem(f"{path}: {name}", f"unknown table or key {name!r}", hint)


def _tables(
    table: Mapping[str, Any], name: str, where: str, syntax: str, problems: list[Problem]
) -> list[dict[str, Any]]:
    """Return a non-empty list of tables under `name`, or report why there is none."""
    entries = table.get(name)
    if entries is None or entries == []:
        what = "names no data sets" if name == "datasets" else "has no subsets"
        problems.append(Problem(where, what, f"Add {syntax}."))
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        problems.append(Problem(f"{where}: {name}", "must be a list of tables", f"Write {syntax}."))
        return []
    return entries


def _read_dataset(table: dict[str, Any], where: str, script: _Script, problems: list[Problem]) -> _Dataset:
    subsets = _tables(table, "subsets", where, "[[datasets.subsets]]", problems)
    kind = _kind_of(subsets, script)
    dataset = _Dataset(where, kind)
    refusal = _refused_kind(kind, script) if subsets else None
    if refusal is not None:
        problems.append(Problem(where, *refusal))
    place = Level(f"{where}.", "dataset", (kind,), script.caption_dropout, structure=("subsets",))
    problems.extend(check_table(table, place, dataset.values))
    for number, entry in enumerate(subsets):
        subset = _Subset(f"{where}.subsets[{number}]")
        place = Level(f"{subset.where}.", "subset", (kind,), script.caption_dropout)
        problems.extend(check_table(entry, place, subset.values))
        problems.extend(_missing_keys(entry, kind, subset.where))
        dataset.subsets.append(subset)
    return dataset


def _kind_of(subsets: list[dict[str, Any]], script: _Script) -> str:
    if subsets and all("conditioning_data_dir" in subset for subset in subsets):
        return CONTROLNET
    if any("metadata_file" in subset for subset in subsets):
        return FINETUNING
    return _kind_of_shards(script) if all("webdataset_path" in subset for subset in subsets) else DREAMBOOTH


def _kind_of_shards(script: _Script) -> str:
    """Tar files serve where folders do, and in scripts for metadata files, too."""
    return FINETUNING if DREAMBOOTH not in script.accepted and FINETUNING in script.accepted else DREAMBOOTH


def _refused_kind(kind: str, script: _Script) -> tuple[str, str] | None:
    if kind in script.accepted:
        return None
    accepted = " and ".join(KIND_NAMES[name] for name in script.accepted)
    if kind == CONTROLNET and DREAMBOOTH in script.kinds:
        return "conditioning_data_dir needs --masked_loss in this script", "Add --masked_loss or remove the key."
    if kind == DREAMBOOTH and script.accepted == (CONTROLNET,) and DREAMBOOTH in script.kinds:
        return (
            "with --masked_loss every subset needs conditioning_data_dir",
            "For masks in the alpha channel use --alpha_mask (or alpha_mask = true) without --masked_loss.",
        )
    hint = "Name the captions of each subset in a metadata_file." if script.accepted == (FINETUNING,) else ""
    return f"is a {KIND_NAMES[kind]} data set, but this script takes {accepted} data sets", hint


def _missing_keys(entry: Mapping[str, Any], kind: str, where: str) -> Iterator[Problem]:
    packed = "webdataset_path" in entry
    others = [name for name in ("image_dir", "metadata_file") if packed and name in entry]
    if others:
        yield Problem(where, f"has webdataset_path and {others[0]}", "Make two subsets of it.")
    for name in REQUIRED[kind]:
        if name in entry or (packed and kind != CONTROLNET):
            continue
        if kind == FINETUNING:
            yield Problem(
                where,
                "has no metadata_file, but another subset of the same data set has one",
                "Kinds cannot be mixed in one data set: move it to a [[datasets]] of its own.",
            )
        else:
            yield Problem(f"{where}.{name}", "is required", f"Add {name} = '...'.")


def _from_command_line(data: DatasetOptions, subset: SubsetOptions, script: _Script, in_json: str | None) -> _Source:
    source = _Source()
    if data.webdataset_path:
        _read_shards(data, script, source)
    elif not data.train_data_dir and not (in_json and FINETUNING in script.kinds):
        problem = Problem("", "no training data named", "Give --train_data_dir or --dataset_config.")
        source.problems.append(problem)
    elif FINETUNING in script.kinds and in_json:
        values: dict[str, Any] = {
            "metadata_file": in_json,
            **({"image_dir": data.train_data_dir} if data.train_data_dir else {}),
        }
        source.datasets.append(_Dataset("--in_json", FINETUNING, {}, [_Subset("--in_json", values)]))
    elif DREAMBOOTH in script.kinds:
        _read_trees(data, script, source)
    elif CONTROLNET in script.kinds:
        values = {"image_dir": data.train_data_dir, "num_repeats": 1}
        if data.conditioning_data_dir:
            values["conditioning_data_dir"] = data.conditioning_data_dir
        else:
            source.problems.append(Problem("--conditioning_data_dir", "is required"))
        source.datasets.append(_Dataset("--train_data_dir", CONTROLNET, {}, [_Subset("--train_data_dir", values)]))
    else:
        source.problems.append(Problem("--in_json", "is required", "Or give --dataset_config."))
    return source


def _read_shards(data: DatasetOptions, script: _Script, source: _Source) -> None:
    """Turn `--webdataset_path` into one data set, together with the folders that are named besides."""
    kind = _kind_of_shards(script)
    refusal = _refused_kind(kind, script)
    if refusal is not None:
        source.problems.append(Problem("--webdataset_path", *refusal))
        return
    values = {"webdataset_path": data.webdataset_path}
    dataset = _Dataset("--webdataset_path", kind, {}, [_Subset("--webdataset_path", values)])
    if kind == DREAMBOOTH:
        _read_trees(data, script, source)
        dataset.subsets += [subset for tree in source.datasets for subset in tree.subsets]
    elif data.train_data_dir:
        _log.warning("--train_data_dir ignored: --webdataset_path names the data")
    source.datasets = [dataset]


def _read_trees(data: DatasetOptions, script: _Script, source: _Source) -> None:
    """Turn `--train_data_dir` and `--reg_data_dir` into one data set."""
    refusal = _refused_kind(DREAMBOOTH, script)
    if refusal is not None:
        hint = "Name the mask folders in a --dataset_config; " + refusal[1][:1].lower() + refusal[1][1:]
        source.problems.append(Problem("--masked_loss", refusal[0], hint))
        return
    dataset = _Dataset("--train_data_dir", DREAMBOOTH)
    trees = (("--train_data_dir", data.train_data_dir, False), ("--reg_data_dir", data.reg_data_dir, True))
    for option, parent, is_reg in trees:
        if not parent:
            continue
        tree = read_folder_tree(parent, option)
        if isinstance(tree, Problem):
            source.problems.append(tree)
            continue
        if not tree.subsets:
            source.problems.append(tree.nothing_found(option))
            continue
        for reason in tree.ignored:
            _log.warning("%s %s: folder ignored: %s", option, parent, reason)
        for folder, repeats, words in tree.subsets:
            values = {"image_dir": folder, "num_repeats": repeats, "is_reg": is_reg, "class_tokens": words}
            if is_reg or data.webdataset_path:
                values |= {"dataset_filter": (), "caption_field": ()}
            dataset.subsets.append(_Subset(f"{option} {folder}", values))
    if dataset.subsets:
        source.datasets.append(dataset)


def _build(source: _Source, data: DatasetOptions, options: SubsetOptions, problems: list[Problem]) -> list[DatasetSpec]:
    specs = []
    count = 0
    for index, dataset in enumerate(source.datasets):
        spec = _build_dataset(dataset, source.general, data, index, problems)
        subsets: list[SubsetSpec] = []
        for entry in _kept_subsets(dataset, source.general, options):
            subset = _build_subset(entry, dataset, source.general, (data, options))
            subset = replace(subset, index=count + len(subsets), dataset=index)
            problems.extend(path_problems(subset, entry.where))
            subsets.append(subset)
        if dataset.subsets and not subsets:
            problems.append(Problem(dataset.where, "has no subset with num_repeats of 1 or more"))
        count += len(subsets)
        specs.append(replace(spec, subsets=tuple(subsets)))
    return specs


_NOT_READ = ("index", "kind", "subsets", "bucket_sizes")
_DATASET_FIELDS = tuple(f.name for f in fields(DatasetSpec) if f.name not in _NOT_READ)


def _build_dataset(
    dataset: _Dataset, general: Mapping[str, Any], data: DatasetOptions, index: int, problems: list[Problem]
) -> DatasetSpec:
    values = {}
    for name in _DATASET_FIELDS:
        key = name.removesuffix("_wh")
        values[name] = _look_up(key, (dataset.values, general), getattr(data, key))
    if values["resolution_wh"] is None:
        problems.append(
            Problem(dataset.where, "resolution is required", "Give --resolution, such as --resolution 512.")
        )
        values["resolution_wh"] = "512"
    values["resolution_wh"] = resolution_wh(values["resolution_wh"])
    values["network_multiplier"] = float(values["network_multiplier"])
    values["enable_bucket"] = values["enable_bucket"] or bool(values["multi_aspect_ratio"])
    return DatasetSpec(index=index, kind=dataset.kind, **values)


_SUBSET_FIELDS = tuple(f.name for f in fields(SubsetSpec) if f.name not in ("index", "dataset"))


def _build_subset(
    entry: _Subset,
    dataset: _Dataset,
    general: Mapping[str, Any],
    options: tuple[DatasetOptions, SubsetOptions],
) -> SubsetSpec:
    """Resolve one subset; keys that its kind does not know keep their plain defaults."""
    values = {}
    for name in _SUBSET_FIELDS:
        key = known_keys()[name]
        if dataset.kind not in key.kinds:
            continue
        fallback = next((getattr(group, name) for group in reversed(options) if hasattr(group, name)), None)
        values[name] = _look_up(name, (entry.values, dataset.values, general), fallback)
    values["custom_attributes"] = dict(values["custom_attributes"] or {})
    values["webdataset_path"] = entry.values.get("webdataset_path", ())
    extension = values.get("caption_extension")
    if extension and not extension.startswith("."):
        values["caption_extension"] = "." + extension
    if dataset.kind == CONTROLNET:
        values["conditioning_data_dir"] = entry.values.get("conditioning_data_dir")
        if options[1].alpha_mask:
            _log.warning("%s: --alpha_mask has no effect: masks come from conditioning_data_dir", entry.where)
    return SubsetSpec(**values)


def _look_up(name: str, levels: tuple[Mapping[str, Any], ...], fallback: Any) -> Any:
    return next((level[name] for level in levels if name in level), fallback)


def _kept_subsets(dataset: _Dataset, general: Mapping[str, Any], options: SubsetOptions) -> list[_Subset]:
    """Leave out repeated subsets and those without repeats, with a warning each."""
    names = {FINETUNING: ("metadata_file",), CONTROLNET: ("image_dir", "conditioning_data_dir")}
    kept: dict[tuple[str, ...], _Subset] = {}
    for entry in dataset.subsets:
        repeats = _look_up("num_repeats", (entry.values, dataset.values, general), options.num_repeats)
        paths = [entry.values.get(name) for name in names.get(dataset.kind, ("image_dir",))]
        paths += entry.values.get("webdataset_path", ())
        identity = tuple(os.path.normpath(path) for path in paths if path) or (entry.where,)
        if repeats < 1:
            _log.warning("%s: num_repeats is %d: subset ignored", entry.where, repeats)
        elif identity in kept:
            _log.warning("%s: %s is already in this data set: subset ignored", entry.where, ", ".join(identity))
        else:
            kept[identity] = entry
    return list(kept.values())
