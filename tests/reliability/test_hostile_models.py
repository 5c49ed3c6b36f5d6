"""Model files made to do harm, or damaged: nothing in them runs, and all that comes out is one clear message."""

import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from library.checkpoints.ckpt_writer import write_ckpt
from library.checkpoints.detect import inspect
from library.checkpoints.headers import read_header
from library.checkpoints.load import load_parts, load_vae
from library.checkpoints.pickles import load_pickle
from library.checkpoints.tensor_files import open_tensors, write_safetensors
from library.errors import UserError


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Build:
    """Pickles as an object whose state is a call."""

    def __init__(self, inner):
        self.inner = inner

    def __reduce__(self):
        return dict, (), {"x": self.inner}


def payloads(witness):
    import builtins
    import os
    import subprocess

    code = f"open({str(witness)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch '{witness}'"),
        "eval": Call(builtins.eval, f"open({str(witness)!r}, 'w')"),
        "exec": Call(builtins.exec, code),
        "subprocess": Call(subprocess.Popen, ["touch", str(witness)]),
        "getattr": Call(builtins.getattr, "x", "upper"),
        "import": Call(builtins.__import__, "antigravity"),
        "open": Call(builtins.open, str(witness), "w"),
        "torch.load": Call(torch.load, str(witness)),
        "hub": Call(torch.hub.load_state_dict_from_url, "http://127.0.0.1:9/x"),
        "path": Path("/etc/passwd"),
        "slice": slice(1, 2),
        "module": torch.nn.Linear(2, 2),
        "in state": Build(Call(os.system, f"touch '{witness}'")),
        "bytearray bomb": Call(bytearray, 10**9),
    }


CASES = sorted(payloads("x"))
FORMS = ["zip", "legacy", "protocol 4", "plain pickle"]


def write(path, value, form):
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(value, protocol=2))
    elif form == "protocol 4":
        torch.save(value, path, pickle_protocol=4)
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_code_is_refused_and_not_run(tmp_path, name, form):
    witness = tmp_path / "witness"
    payload = payloads(witness)[name]
    path = write(tmp_path / "m.ckpt", {"state_dict": {"a": torch.ones(2), "x": payload}}, form)
    for opener in (load_pickle, open_tensors, inspect, lambda p: load_parts(str(p), "sd1"), lambda p: load_vae(str(p))):
        with pytest.raises(UserError) as caught:
            opener(path)
        assert str(path) in str(caught.value)
    assert not witness.exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "protocol 4"])
def test_the_message_names_the_offender_and_the_way_out(tmp_path, form):
    payload = payloads(tmp_path / "witness")["os.system"]
    with pytest.raises(UserError, match=r"(posix|nt)\.system") as caught:
        load_pickle(write(tmp_path / "m.ckpt", {"x": payload}, form))
    assert "refused" in str(caught.value) and "safetensors" in str(caught.value)


def test_a_payload_behind_the_first_pickles_of_a_legacy_file_is_refused(tmp_path):
    witness = tmp_path / "witness"
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"a": 1}, payloads(witness)["os.system"]]
    path = tmp_path / "m.ckpt"
    path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    with pytest.raises(UserError, match="refused"):
        load_pickle(path)
    assert not witness.exists()


def test_a_payload_that_only_the_fallback_of_a_careless_loader_would_run(tmp_path):
    """A file that fails the safe loader in its middle must not be tried again by another one."""
    witness = tmp_path / "witness"
    broken = pickle.dumps({"a": payloads(witness)["os.system"]}, protocol=2)[:-3] + b"\x00\x00\x00"
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", broken)
        archive.writestr("m/version", "3")
    with pytest.raises(UserError):
        load_pickle(path)
    assert not witness.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["os.system", "eval", "subprocess", "in state"])
def test_the_restricted_unpickler_holds_where_the_list_of_names_is_fooled(tmp_path, monkeypatch, name, form):
    witness = tmp_path / "witness"
    monkeypatch.setattr("library.checkpoints.pickles._refused", lambda names: [])
    path = write(tmp_path / "m.ckpt", {"x": payloads(witness)[name]}, form)
    with pytest.raises(UserError):
        load_pickle(path)
    assert not witness.exists()


def honest(tmp_path):
    write_ckpt(tmp_path / "m.ckpt", {"a": torch.arange(300.0), "b": torch.ones(7)}, {"epoch": 1})
    with zipfile.ZipFile(tmp_path / "m.ckpt") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"archive/code/x.py": b"import os"}, "does not write"),
        (lambda m: m | {"archive/constants.pkl": b"\x80\x02N."}, "does not write"),
        (lambda m: m | {"../escape": b"x"}, "does not write"),
        (lambda m: m | {"archive/data/../../escape": b"x"}, "does not write"),
        (lambda m: m | {"other/data.pkl": m["archive/data.pkl"]}, "not one checkpoint"),
        (lambda m: {k: v for k, v in m.items() if not k.endswith("data.pkl")}, "not one checkpoint"),
        (lambda m: {}, "not one checkpoint"),
    ],
)
def test_archives_that_torch_would_not_write_are_refused(tmp_path, change, message):
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in change(honest(tmp_path)).items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match=message):
        load_pickle(path)


@pytest.mark.parametrize("twice", ["data.pkl", "data/0", "version"])
def test_two_members_of_one_name_are_refused(tmp_path, twice):
    """Readers that take the first and readers that take the last would see different contents."""
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr(f"m/{twice}", b"\x80\x02].")
        archive.writestr(f"m/{twice}", b"\x80\x02)")
    with pytest.raises(UserError, match="not one checkpoint"):
        load_pickle(path)


def test_compressed_members_are_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in honest(tmp_path).items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match="member .* is compressed"):
        load_pickle(path)


def _one_tensor(size, stride):
    """A pickle of one float tensor with any size and stride over a storage of four numbers."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            from collections import OrderedDict

            return torch._utils._rebuild_tensor_v2, (Storage(), 0, size, stride, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, Storage) else None

    import io

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"t": Tensor()})
    return buffer.getvalue()


@pytest.mark.parametrize(("size", "stride"), [((10**12,), (0,)), ((10**6, 10**6), (1, 0)), ((4000,), (1,))])
def test_tensors_larger_than_their_data_are_refused(tmp_path, size, stride):
    path = tmp_path / "m.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", _one_tensor(size, stride))
        archive.writestr("m/data/0", bytes(16))
        archive.writestr("m/version", "3\n")
    with pytest.raises(UserError):
        load_pickle(path)


def cuts(size, count=25):
    generator = random.Random(7)
    return sorted({0, 1, 2, 7, 8, 9, size - 1, *(generator.randrange(size) for _ in range(count))})


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_a_file_cut_anywhere_is_refused_in_our_own_words(tmp_path, form):
    path = tmp_path / "m"
    tensors = {"a": torch.arange(300.0), "b": torch.ones(7)}
    if form == "safetensors":
        write_safetensors(path, tensors)
    else:
        write(path, {"state_dict": tensors}, form)
    whole = path.read_bytes()
    for length in cuts(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            open_tensors(path)["a"].sum()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_a_damaged_file_gives_tensors_or_a_user_error(tmp_path, form):
    path = tmp_path / "m"
    tensors = {"a": torch.arange(60.0), "b": torch.ones(7)}
    if form == "safetensors":
        write_safetensors(path, tensors, {"k": "v"})
    else:
        write(path, {"state_dict": tensors, "epoch": 3}, form)
    whole = path.read_bytes()
    generator = random.Random(11)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 6)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(bytes(damaged))
        try:
            for tensor in open_tensors(path).values():
                assert tensor.numel() <= 10**6
                tensor.float().sum()
        except UserError as error:
            assert str(path) in str(error)


def test_bytes_at_random_give_a_user_error(tmp_path):
    path = tmp_path / "m"
    generator = random.Random(3)
    starts = [
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x04",
        struct.pack("<Q", 40) + b"{",
        b"\x80\x02}q\x00(",
        b"{}",
        b"\x1f\x8b",
    ]
    for round_number in range(200):
        path.write_bytes(starts[round_number % len(starts)] + generator.randbytes(generator.randrange(300)))
        with pytest.raises(UserError):
            list(open_tensors(path).values())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
        (b"\n\n  <html>login</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 4\n", "git lfs pull"),
        (bytes(4096), "zeros"),
        (b"this is just some text, longer than a few bytes", "neither a safetensors"),
        (b"MZ" + bytes(range(100)), "neither a safetensors"),
    ],
)
@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "vae.pt"])
def test_files_that_are_no_models_are_named_as_what_they_are(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    for opener in (open_tensors, inspect, lambda p: load_parts(str(p), "sd1"), lambda p: load_vae(str(p))):
        with pytest.raises(UserError, match=words):
            opener(tmp_path / name)


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BAD_HEADERS = {
    "missing data": (safetensors_bytes({"a": entry(0, 8, (2,))}, bytes(4)), "expected .* bytes, has"),
    "missing header": (safetensors_bytes(b"{" + b" " * 100)[:50], "expected 109 bytes, has 50"),
    "trailing": (safetensors_bytes({"a": entry()}, bytes(8)), "4 bytes too many"),
    "absurd length": ((2**60).to_bytes(8, "little") + b"{" + bytes(50), "header claims"),
    "too long": ((40 * 2**20).to_bytes(8, "little") + b"{" + bytes(50), "header claims"),
    "overlap": (safetensors_bytes({"a": entry(), "b": entry(2, 6)}, bytes(6)), "overlaps"),
    "hole": (safetensors_bytes({"a": entry(), "b": entry(8, 12)}, bytes(12)), "hole"),
    "not from zero": (safetensors_bytes({"a": entry(4, 8)}, bytes(8)), "hole"),
    "dtype": (safetensors_bytes({"a": entry(dtype="Q4")}, bytes(4)), "unknown type"),
    "dtype no text": (safetensors_bytes({"a": entry(dtype=["F32"])}, bytes(4)), "unknown type"),
    "size": (safetensors_bytes({"a": entry(shape=(2,))}, bytes(4)), "does not agree"),
    "negative": (safetensors_bytes({"a": entry(shape=(-1, -1))}, bytes(4)), "shape"),
    "float": (safetensors_bytes({"a": entry(shape=(1.0,))}, bytes(4)), "shape"),
    "true": (safetensors_bytes({"a": entry(shape=(True,))}, bytes(4)), "shape"),
    "overflow": (safetensors_bytes({"a": entry(0, 4, (2**62, 2**62, 2**62))}, bytes(4)), "does not agree"),
    "many dims": (safetensors_bytes({"a": entry(0, 4, (1,) * 40)}, bytes(4)), "shape"),
    "offsets": (safetensors_bytes({"a": entry(4, 0)}, bytes(4)), "offsets"),
    "three offsets": (safetensors_bytes({"a": {**entry(), "data_offsets": [0, 4, 8]}}, bytes(4)), "offsets"),
    "no offsets": (safetensors_bytes({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "offsets"),
    "entry": (safetensors_bytes({"a": [1]}, bytes(4)), "not a table"),
    "list": (safetensors_bytes(b"{}  ".replace(b"{}", b'{"a"'), bytes(4)), "JSON"),
    "nested": (safetensors_bytes(b'{"a":' + b"[" * 100_000, bytes(4)), "JSON"),
    "not utf-8": (safetensors_bytes(b'{"\xff\xfe": 1}', bytes(4)), "JSON"),
    "digits": (safetensors_bytes(b'{"a": ' + b"9" * 10_000 + b"}", bytes(4)), "JSON"),
    "twice": (
        safetensors_bytes(f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry(4, 8))}}}'.encode(), bytes(8)),
        "'a' twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_bad_header_is_refused_with_its_reason(tmp_path, name):
    content, words = BAD_HEADERS[name]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_too_many_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("library.checkpoints.headers.MAX_TENSORS", 3)
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {str(i): torch.empty(0) for i in range(3)})
    assert len(read_header(path).tensors) == 3
    path.write_bytes(safetensors_bytes({str(i): entry(0, 0, (0,)) for i in range(4)}))
    with pytest.raises(UserError, match="limit 3"):
        read_header(path)


@pytest.mark.parametrize("metadata", [[1], "text", {"a": 1, "b": None, "c": "kept"}, {"x": {"y": "z"}}])
def test_odd_metadata_is_ignored(tmp_path, metadata):
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes({"__metadata__": metadata, "a": entry()}, bytes(4)))
    kept = read_header(path).metadata
    assert kept == ({"c": "kept"} if isinstance(metadata, dict) and "c" in metadata else {})


def test_names_in_a_file_are_never_used_as_paths(tmp_path):
    path = tmp_path / "in" / "m.safetensors"
    path.parent.mkdir()
    write_safetensors(path, {"../../escape": torch.ones(1), "/etc/x": torch.ones(1)})
    assert set(open_tensors(path)) == {"../../escape", "/etc/x"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\\y", "C:x"])
def test_shards_outside_the_folder_are_refused(tmp_path, shard):
    from library.checkpoints.folders import open_folder_weights

    write_safetensors(tmp_path / "secret.safetensors", {"a": torch.ones(1)})
    folder = tmp_path / "unet"
    folder.mkdir()
    index = {"weight_map": {"a": shard}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not a plain file name"):
        open_folder_weights(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "gone.safetensors"}}',
    ],
)
def test_damaged_shard_indexes_are_refused(tmp_path, text):
    from library.checkpoints.folders import open_folder_weights

    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        open_folder_weights(tmp_path)
