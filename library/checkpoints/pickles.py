"""The only place where a pickle is opened. Nothing in a file is ever executed, and there is no way around that.

Three gates, each of which is enough for an honest file: the archive must look as torch writes it, every global that the
pickle names must be on the list below, and `torch.load` runs with `weights_only=True`. What is left of training objects
in old checkpoints (callbacks, configurations) becomes empty objects that keep nothing.
"""

from __future__ import annotations

import io
import logging
import os
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from library.checkpoints.headers import file_kind
from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)

MAX_PICKLE_BYTES = 256 * 1024**2
MAX_MEMBERS = 200_000
_MEMBER = re.compile(
    r"^(?P<root>[^/\\]+)/(data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|"
    r"\.data/serialization_id)$"
)
_DOWNLOAD_AGAIN = "Is the download incomplete? Fetch the file again"
_CONVERT = (
    "It may be malicious, so nothing in it was run. Ask for a safetensors version; its owner can make one, on "
    "a machine without anything of value, with: safetensors.torch.save_file({k: v.contiguous() for k, v in "
    "torch.load(FILE, weights_only=False)['state_dict'].items() if hasattr(v, 'shape')}, 'model.safetensors')"
)

_TORCH_NAMES = re.compile(
    r"^torch\.("
    r"(Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool|ComplexFloat|ComplexDouble)Storage|"
    r"storage\.UntypedStorage|(Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)?Tensor|"
    r"float(16|32|64)|bfloat16|float8_\w+|u?int(8|16|32|64)|bool|complex(64|128)|Size|device|"
    r"nn\.parameter\.Parameter|serialization\._get_layout|_tensor\._rebuild_from_type_v2|"
    r"_utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|"
    r"device_tensor_from_numpy|device_tensor_from_cpu_tensor)"
    r")$"
)
_PLAIN_NAMES = frozenset(
    f"{module}.{name}"
    for module, names in {
        "collections": ("OrderedDict", "Counter"),
        "builtins": ("set", "complex"),
        "_codecs": ("encode",),
    }.items()
    for name in names
)
_STUB_NAMES = frozenset(
    [
        f"{package}.{module}.ModelCheckpoint"
        for package in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning")
        for module in ("callbacks.model_checkpoint", "callbacks")
    ]
    + [
        f"{package}.utilities.{module}.AttributeDict"
        for package in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")
        for module in ("parsing", "parsing_", "data")
    ]
)
_OMEGACONF = "omegaconf."
_OMEGACONF_NAMES = frozenset(
    [f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")]
    + [f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata", "UnionNode")]
    + [
        f"omegaconf.nodes.{name}Node"
        for name in ("Any", "String", "Integer", "Float", "Boolean", "Enum", "Bytes", "Path", "Interpolation")
    ]
)
# omegaconf's own containers refer to these; they become stubs only in a file that holds such a container.
_OMEGACONF_COMPANIONS = frozenset(
    ("typing.Any", "collections.defaultdict", "builtins.dict", "builtins.list", "builtins.str", "builtins.int",
     "builtins.float", "builtins.bool")
)  # fmt: skip


class _Forgotten:
    """Stands for an object of a training framework: accepts whatever the pickle gives it and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Forgotten:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take any arguments."""

    def __setstate__(self, _: Any) -> None:
        """Take any state."""


@dataclass(frozen=True, slots=True)
class StateDict:
    """What a pickled checkpoint holds: tensors by name, whether they were wrapped, and the counters beside them."""

    tensors: Mapping[str, Tensor]
    wrapped: bool = False
    counters: Mapping[str, int] = field(default_factory=dict)


def load_pickle(path: str | Path, mmap: bool = True) -> Any:
    """Load a file written by `torch.save`, on the CPU, with tensors mapped from the file where it is a zip archive.

    Raises:
        UserError: the file is damaged, or names anything that is not on the list of harmless things.
    """
    path = Path(path)
    kind = file_kind(path)
    if kind == "safetensors":
        raise UserError("a safetensors file, not a pickle", where=str(path))
    names = _globals_of_zip(path) if kind == "zip" else _globals_of_legacy(path)
    stubs = _check_globals(path, names)
    value = _torch_load(path, stubs, mmap=mmap and kind == "zip")
    _check_tensors(path, value)
    return value


def load_state_dict(path: str | Path) -> StateDict:
    """Load the tensors of a pickled checkpoint, wrapped in ``state_dict`` or bare.

    Raises:
        UserError: as `load_pickle`, or there are no named tensors in it.
    """
    import torch

    value = load_pickle(path)
    wrapped = isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping)
    table = value["state_dict"] if wrapped else value
    if not isinstance(table, Mapping):
        raise UserError("holds no table of tensors", where=str(path))
    tensors = {name: item.detach() for name, item in table.items() if isinstance(name, str) and torch.is_tensor(item)}
    if not tensors:
        raise UserError("holds no table of tensors", where=str(path))
    counters = {name: value[name] for name in ("epoch", "global_step") if wrapped and type(value.get(name)) is int}
    return StateDict(tensors, wrapped, counters)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(what, _DOWNLOAD_AGAIN, where=str(path))


def _globals_of_zip(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            pickle_name = _check_members(path, members)
            return set(_globals_in(io.BytesIO(archive.read(pickle_name))))
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError, AssertionError) as error:
        raise _damaged(path, "incomplete or damaged checkpoint (its archive index cannot be read)") from error


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> str:
    """Check that an archive holds what `torch.save` writes and nothing else; return the name of its pickle."""
    size = path.stat().st_size
    if len(members) > MAX_MEMBERS:
        raise UserError(f"an archive of {len(members)} members (limit {MAX_MEMBERS})", where=str(path))
    roots = set()
    for member in members:
        match = _MEMBER.match(member.filename)
        if match is None:
            hint = "TorchScript and other archives are not checkpoints"
            raise UserError(
                f"the archive holds {member.filename!r}, which torch.save does not write", hint, where=str(path)
            )
        roots.add(match["root"])
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise UserError(f"archive member {member.filename!r} is compressed", where=str(path))
        if member.header_offset + member.file_size > size:
            raise _damaged(path, f"archive member {member.filename!r} lies outside the file")
    pickles = [member for member in members if member.filename.endswith("/data.pkl")]
    if len(roots) != 1 or len(pickles) != 1 or len({member.filename for member in members}) != len(members):
        raise UserError("the archive is not one checkpoint", where=str(path))
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise UserError(f"its pickle is larger than {MAX_PICKLE_BYTES} bytes", where=str(path))
    return pickles[0].filename


def _globals_of_legacy(path: Path) -> set[str]:
    """List the globals of the five pickles (magic, version, system, object, storage keys) of the older format."""
    names: set[str] = set()
    try:
        with path.open("rb") as file:
            bounded = _Bounded(file)
            for _ in range(5):
                names.update(_globals_in(bounded))
    except (ValueError, OSError, OverflowError, AssertionError) as error:
        if names and _refused(names):
            return names
        raise _damaged(path, "incomplete or damaged checkpoint (its pickle cannot be read)") from error
    return names


class _Bounded:
    """A file of which a damaged pickle cannot ask for more than there may be: lengths in it are only claims."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._left()))

    def readline(self) -> bytes:
        return self._file.readline(self._left())

    def tell(self) -> int:
        return self._file.tell()

    def _left(self) -> int:
        left = min(os.fstat(self._file.fileno()).st_size, MAX_PICKLE_BYTES) - self._file.tell()
        if left <= 0:
            raise ValueError("the pickle goes on behind the end")
        return left


def _globals_in(file: Any) -> Iterator[str]:
    """Yield the names that a pickle imports, without running it."""
    recent: list[str] = []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            yield _modern_name(*str(argument).partition(" ")[::2])
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(recent[-2:]) if len(recent) > 1 else "(computed name)"
        elif opcode.name in ("EXT1", "EXT2", "EXT4"):
            yield "(extension registry)"
        elif isinstance(argument, str):
            recent = [*recent[-1:], argument]


def _modern_name(module: str, name: str) -> str:
    """Return the dotted name of a global; older protocols spell some as Python 2 did."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _numpy_names() -> dict[str, Any]:
    """Return the numpy callables that scalars and arrays need, under the names of numpy 1 and 2."""
    import numpy as np

    try:
        from numpy._core import multiarray
    except ImportError:  # numpy 1
        from numpy.core import multiarray  # type: ignore[no-redef]
    table: dict[str, Any] = {"numpy.dtype": np.dtype, "numpy.ndarray": np.ndarray}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        table[f"{module}.scalar"] = multiarray.scalar  # type: ignore[attr-defined]
        table[f"{module}._reconstruct"] = multiarray._reconstruct  # type: ignore[attr-defined]
    for kind in "?bhilqBHILQefdUS":
        dtype_class = type(np.dtype(kind))
        table[f"numpy.dtypes.{dtype_class.__name__}"] = dtype_class
    return table


def _is_allowed(name: str) -> bool:
    if name in _PLAIN_NAMES or name in _STUB_NAMES or name in _OMEGACONF_NAMES or _TORCH_NAMES.match(name):
        return True
    return name in ("torch.nn.modules.container.ParameterDict", "torch.nn.ParameterDict") or name in _numpy_names()


def _refused(names: set[str]) -> list[str]:
    """Return the names that are not allowed, worst first: what is no part of torch or numpy."""
    omegaconf = any(name in _OMEGACONF_NAMES for name in names)
    bad = [n for n in names if not _is_allowed(n) and not (omegaconf and n in _OMEGACONF_COMPANIONS)]
    return sorted(bad, key=lambda name: (name.startswith(("torch.", "numpy.")), name))


def _check_globals(path: Path, names: set[str]) -> list[Any]:
    """Refuse a file that names anything unknown; return what torch must additionally accept for this one."""
    bad = _refused(names)
    if bad:
        shown = ", ".join(repr(name)[1:-1] for name in bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise UserError(f"refused: this pickle wants to use {shown}", _CONVERT, where=str(path))
    allowed: list[Any] = []
    known = _numpy_names()
    # A dtype restores itself as an instance of its class, which the pickle does not name.
    implied = {name for name in known if name.startswith("numpy.dtypes.")} if "numpy.dtype" in names else set()
    for name in sorted(names | implied):
        if name in known:
            allowed.append((known[name], name))
        elif "ParameterDict" in name:
            import torch

            allowed.append((torch.nn.ParameterDict, name))
        elif name in _STUB_NAMES or name in _OMEGACONF_NAMES or name in _OMEGACONF_COMPANIONS:
            allowed.append((type("Forgotten", (_Forgotten,), {}), name))
    return allowed


def _torch_load(path: Path, allowed: list[Any], *, mmap: bool) -> Any:
    import pickle
    import warnings

    import torch

    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")
            # torch goes by the suffix; an open file has none, but cannot be mapped.
            misnamed = path.suffix.lower() == ".safetensors"
            file: Any = stack.enter_context(path.open("rb")) if misnamed else str(path)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and not misnamed)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"this pickle wants to use {found[1]}" if found else "this pickle does more than hold tensors"
        raise UserError(f"refused: {what}", _CONVERT, where=str(path)) from error
    except MemoryError as error:
        raise _damaged(path, "claims more memory than there is") from error
    except (RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OSError) as error:
        raise _damaged(path, "incomplete or damaged checkpoint") from error
    except (AssertionError, RecursionError, ImportError, OverflowError) as error:
        raise _damaged(path, "incomplete or damaged checkpoint") from error


def _check_tensors(path: Path, value: Any) -> None:
    """Refuse tensors that reach beyond what the file stores for them, or that are not plain arrays."""
    import torch

    limit = path.stat().st_size
    for name, tensor in _walk_tensors(value):
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise UserError(f"tensor {name!r} is not a plain array", where=str(path))
        held = tensor.untyped_storage().nbytes()
        if held > limit or tensor.numel() * tensor.element_size() > held:
            claimed = max(held, tensor.numel() * tensor.element_size())
            raise UserError(f"tensor {name!r} claims {claimed} bytes of a file of {limit}", where=str(path))


def _walk_tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    import torch

    if torch.is_tensor(value):
        yield name, value
    elif depth < 8 and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk_tensors(item, str(key), depth + 1)
    elif depth < 8 and isinstance(value, (list, tuple)):
        for item in value:
            yield from _walk_tensors(item, name, depth + 1)
