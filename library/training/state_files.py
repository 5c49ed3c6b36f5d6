"""State folders on disk: what `resume.json` says, which files belong to it, whether they are whole, which is newest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from library.checkpoints.pickles import load_pickle
from library.contracts import Position, RunLength
from library.errors import EXIT_USER, Problem, StopTraining, UserError
from library.files import NewFile, clean_litter
from library.training.options_output import NEWEST
from library.training.state_content import ANOTHER, FolderContent, StateContent, read_json

_log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "resume.json"
TRAIN_STATE = "train_state.json"
OPTIMIZER = "optimizer.bin"
SCHEDULER = "scheduler.bin"
SCALER = "scaler.pt"
OBJECTIVE = "objective.bin"
EMA_WEIGHTS = "ema.safetensors"
EMA_NUMBERS = "ema.json"
_HASH_BUFFER = 4 * 1024**2
_HASH_THREADS = 4
DEFAULT_NAMES = ("epoch", "at", "last")
"""Names of epoch, step and final saves when there is no `--output_name`."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes two runs compute the same: compared when a state is resumed. All JSON.

    Attributes:
        options: title of group -> option -> value, of the options that change what is computed.
        data: fingerprint of the data set.
        base_model: what was trained from (name, hash).
        environment: versions, device, threads: differences are only reported.
        training: what trains which family of models; empty in older states.
    """

    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    base_model: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    training: str = ""


@dataclass(frozen=True, slots=True)
class StateInfo:
    """All that a state holds besides tensors.

    `loss_average`, `tracker` and `saver` are the JSON states of those objects. `exact` is False for states of the
    reference, which know neither the position in the epoch nor what the run was. `sharded` states hold a part of the
    optimizer for each process.
    """

    position: Position
    seed: int | None = None
    length: RunLength | None = None
    identity: Identity = field(default_factory=Identity)
    output_name: str = ""
    loss_average: Mapping[str, Any] = field(default_factory=dict)
    tracker: Mapping[str, Any] = field(default_factory=dict)
    saver: Mapping[str, Any] = field(default_factory=dict)
    world: int = 1
    modules: tuple[str, ...] = ()
    exact: bool = True
    sharded: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` reads them back."""
        return json.loads(json.dumps(dataclasses.asdict(self), allow_nan=False, default=str))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StateInfo:
        """Rebuild what `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        known = {item.name for item in dataclasses.fields(cls)}
        values = {name: item for name, item in value.items() if name in known}
        position = Position(**{name: int(number) for name, number in values["position"].items()})
        if min(position.step, position.epoch, position.update_in_epoch) < 0:
            raise ValueError("negative position")
        length = None if values.get("length") is None else RunLength(**values["length"])
        values |= {"position": position, "length": length, "identity": Identity(**values["identity"])}
        return cls(**values | {"modules": tuple(values.get("modules", ()))})


@dataclass(frozen=True, slots=True)
class StoredState:
    """A state folder that was found to be whole."""

    folder: Path
    info: StateInfo
    notes: tuple[str, ...] = ()
    sequence: int = 0
    content: StateContent | None = None
    """What stands for its files; None: the files."""

    def opened(self) -> StateContent:
        """Return what its files hold."""
        return self.content or FolderContent(self.folder)

    def finished(self, total_steps: int) -> bool:
        """Whether a run of `total_steps` has nothing left to do."""
        return self.info.position.step >= total_steps


def state_name_pattern(output_name: str | None) -> re.Pattern[str]:
    """Return what matches the names of all state folders of one output name."""
    name = "|".join(DEFAULT_NAMES) if not output_name else re.escape(output_name)
    return re.compile(rf"^(?:{name})(?:-\d{{6,}}|(?:-backup)?-step\d{{8,}})?-state$")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_HASH_BUFFER))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


class FileTable:
    """Size and hash of files, computed in threads while others are still being written."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_HASH_THREADS, thread_name_prefix="hash")
        self._found: dict[str, Any] = {}

    def add(self, path: Path) -> None:
        """Begin to hash a finished file."""
        self._found[path.name] = (path.stat().st_size, self._pool.submit(sha256_file, path))

    def close(self) -> dict[str, dict[str, Any]]:
        """Wait, and return name -> {"size", "sha256"}."""
        with self._pool:
            return {name: {"size": size, "sha256": job.result()} for name, (size, job) in self._found.items()}


def write_pickle(path: Path, value: Any) -> Path:
    """Write with torch, and see at once that it can be read back without running code."""
    import torch

    with NewFile(path) as file:
        torch.save(value, cast("Any", file))
    try:
        load_pickle(path)
    except UserError as error:
        what = f"{path.name}: this optimizer or schedule keeps objects that cannot be stored safely ({error})"
        raise StopTraining(what, EXIT_USER) from error
    return path


def verify_state(folder: str | Path, *, fast: bool = False) -> StoredState:
    """Check that a state folder is whole and return what it says, without loading a tensor.

    Args:
        folder: a state of ours, or one of the reference's (which has no `resume.json` and is only looked over).
        fast: compare sizes only, not hashes (`--fast_resume`).

    Raises:
        UserError: naming every file that is missing, has another size or another content; or the folder is no state.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("no such state folder", _neighbours(folder), where=f"--resume {folder}")
    if planted := sorted(path.name for path in folder.glob("custom_checkpoint_*")):
        what = f"refused: {planted[0]} is a pickle that could run code when loaded"
        raise UserError(what, "Remove it if you trust the rest of the folder", where=str(folder))
    if not (folder / MANIFEST).exists():
        from library.training.official_state import is_official, read_official_state
        from library.training.reference_state import read_reference_state

        return read_official_state(folder) if is_official(folder) else read_reference_state(folder)
    manifest = read_json(folder / MANIFEST)
    info = _read_info(folder, manifest)
    problems = _check_files(folder, manifest.get("files"), info, fast=fast)
    if problems:
        raise UserError.of(problems)
    sequence = manifest.get("sequence", 0)
    return StoredState(folder, info, sequence=sequence if isinstance(sequence, int) else 0)


def _read_info(folder: Path, manifest: Mapping[str, Any]) -> StateInfo:
    version = manifest.get("format_version")
    where = str(folder / MANIFEST)
    if version != FORMAT_VERSION:
        hint = "It was written by another version of this program: resume with that one"
        raise UserError(f"unknown format version {version!r} (this program reads {FORMAT_VERSION})", hint, where=where)
    try:
        return StateInfo.from_json(manifest["info"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"does not describe a state ({type(error).__name__}: {error})"
        raise UserError(what, ANOTHER, where=where) from error


def _check_files(folder: Path, files: Any, info: StateInfo, *, fast: bool) -> list[Problem]:
    """Return one problem per file that is not as listed."""
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return [Problem(str(folder / MANIFEST), "lists no files", ANOTHER)]
    needed = {SCHEDULER, *model_names(len(info.modules))}
    needed |= {shard_name(rank) for rank in range(info.world)} if info.sharded else {OPTIMIZER}
    needed |= {f"random_states_{rank}.pkl" for rank in range(info.world)}
    problems = [Problem(str(folder / name), "is not listed in resume.json", ANOTHER) for name in needed - set(files)]
    hashed: list[str] = []
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name or name in {"", ".", ".."}:
            problems.append(Problem(str(folder / MANIFEST), f"{name!r} is not a plain file name", ANOTHER))
        elif not path.is_file():
            problems.append(Problem(str(path), "is missing", ANOTHER))
        elif path.stat().st_size != entry.get("size"):
            what = f"has {path.stat().st_size} bytes instead of {entry.get('size')}"
            problems.append(Problem(str(path), what, ANOTHER))
        else:
            hashed.append(name)
    if not fast and not problems:
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            digests = pool.map(lambda name: sha256_file(folder / name), hashed)
        wrong = [name for name, digest in zip(hashed, digests, strict=True) if digest != files[name].get("sha256")]
        problems = [Problem(str(folder / name), "was damaged or changed since it was saved", ANOTHER) for name in wrong]
    return problems


def model_names(count: int) -> list[str]:
    """Return the names of `count` weight files: model.safetensors, model_1.safetensors, ..."""
    return [f"model{'' if index == 0 else f'_{index}'}.safetensors" for index in range(count)]


def shard_name(rank: int) -> str:
    """Return the file of the part of the optimizer that one of several processes holds."""
    return f"optimizer_shard_{rank}.bin"


def find_state(
    resume: str, output_dir: str | Path | None, output_name: str | None, *, fast: bool = False
) -> StoredState | None:
    """Return the state that `--resume` names; `latest` or `auto`: the newest whole one of this output name.

    Call it on rank 0 only and hand the folder to the others, which then need no hashing (`verify_state(fast=True)`).

    Returns:
        None when the newest is asked for and there is no state at all yet: the run starts from the beginning.

    Raises:
        UserError: the folder is no whole state, or all states of this output name are broken.
    """
    if resume not in NEWEST:
        clean_litter(Path(resume).absolute().parent)
        return verify_state(resume, fast=fast)
    folder = Path(output_dir or ".")
    clean_litter(folder)
    found = _states(folder, output_name)
    problems: list[Problem] = []
    for candidate in found:
        try:
            state = _verify_ours(candidate, fast=fast)
        except UserError as error:
            _log.warning("passed over %s: %s", candidate, error)
            problems += error.problems
            continue
        _log.info("resuming from %s", candidate)
        return state
    if found:
        raise UserError.of([Problem(f"--resume {resume}", "no state of this run is whole"), *problems])
    if (official := _official(folder)) is not None:
        return official
    _log.info(
        "--resume %s: no state of this output name in %s yet, so training starts from the beginning", resume, folder
    )
    return None


def _official(folder: Path) -> StoredState | None:
    """Return the run of the original trainer that an output folder holds, if it can be continued."""
    from library.training.official_state import is_official, read_official_state

    if not is_official(folder):
        return None
    try:
        return read_official_state(folder)
    except UserError as error:
        _log.warning("%s", error)
        return None


def _verify_ours(folder: Path, *, fast: bool) -> StoredState:
    if not (folder / MANIFEST).exists():
        raise UserError("has no resume.json: not complete, or not written by this program", where=str(folder))
    return verify_state(folder, fast=fast)


def _states(folder: Path, output_name: str | None) -> list[Path]:
    """Return the state folders of one output name: unreadable ones (so that they get named), then the newest first."""
    pattern = state_name_pattern(output_name)
    found = [path for path in folder.iterdir() if pattern.match(path.name) and path.is_dir()] if folder.is_dir() else []
    order = [(_sequence(path), path.name, path) for path in found]
    return [path for _, _, path in sorted(order, key=lambda entry: (entry[0] < 0, *entry[:2]), reverse=True)]


def _sequence(folder: Path) -> int:
    """The number that grows with every state saved under one name; independent of clocks. -1: cannot be read."""
    try:
        sequence = read_json(folder / MANIFEST).get("sequence", 0)
    except UserError:
        return -1
    return sequence if isinstance(sequence, int) else -1


def next_sequence(folder: Path, output_name: str | None) -> int:
    """Return a number larger than that of all states beside `folder`."""
    return 1 + max((_sequence(path) for path in _states(folder.parent, output_name)), default=0)


def _neighbours(folder: Path) -> str:
    """Name the state folders that are where one was looked for."""
    try:
        found = sorted(path.name for path in folder.absolute().parent.iterdir() if path.name.endswith("-state"))
    except OSError:
        return ""
    return f"There: {', '.join(found[:5])}" if found else "No state folder is there (names end in -state)"
