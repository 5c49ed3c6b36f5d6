import json
import zipfile

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.checkpoints.ckpt_writer import write_ckpt
from library.checkpoints.tensor_files import (
    LazyTensor,
    NonFiniteWeights,
    all_finite,
    all_zero,
    open_tensors,
    read_header,
    write_safetensors,
)
from library.checkpoints.zip_writer import ZipWriter
from library.errors import UserError
from library.files import NewFile

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def sample(dtype, shape=(3, 4)):
    values = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape) % 2
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_from_both_formats(tmp_path, dtype):
    tensors = {"a": sample(dtype), "empty": torch.empty(0, 3, dtype=dtype), "scalar": sample(dtype, ())}
    write_safetensors(tmp_path / "m.safetensors", tensors)
    write_ckpt(tmp_path / "m.ckpt", tensors, {"epoch": 1})
    for name in ("m.safetensors", "m.ckpt"):
        found = open_tensors(tmp_path / name)
        assert set(found) == set(tensors)
        for key, tensor in tensors.items():
            assert found[key].dtype == dtype and found[key].shape == tensor.shape
            assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else True


def test_the_file_is_byte_for_byte_what_the_library_writes(tmp_path):
    tensors = {f"t.{i}.{dtype}": sample(dtype) for i, dtype in enumerate(DTYPES)} | {"Ünï": torch.ones(5)}
    write_safetensors(tmp_path / "ours.safetensors", tensors, {"note": 'quotes " and \n'})
    theirs = safetensors.torch.save(tensors, {"note": 'quotes " and \n'})
    assert (tmp_path / "ours.safetensors").read_bytes() == theirs


def test_views_and_lazy_tensors_are_written_by_value(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "t": base.T,
        "half": base[:, ::2],
        "lazy": LazyTensor((8, 6), torch.float32, lambda: torch.cat([base] * 2)),
    }
    write_safetensors(tmp_path / "m.safetensors", tensors)
    found = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert torch.equal(found["t"], base.T)
    assert torch.equal(found["half"], base[:, ::2])
    assert torch.equal(found["lazy"], torch.cat([base, base]))


@pytest.mark.parametrize("writer", ["safetensors", "ckpt"])
def test_precision_converts_floating_point_only(tmp_path, writer):
    tensors = {"f": torch.randn(4, 4), "i": torch.arange(4), "b": torch.tensor([True, False])}
    path = tmp_path / "m"
    if writer == "ckpt":
        write_ckpt(path, tensors, None, precision=torch.bfloat16)
    else:
        write_safetensors(path, tensors, precision=torch.bfloat16)
    found = open_tensors(path)
    assert torch.equal(found["f"], tensors["f"].bfloat16())
    assert found["i"].dtype == torch.int64 and found["b"].dtype == torch.bool


def test_writing_a_large_tensor_in_pieces_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("library.checkpoints.tensor_files._CHUNK_BYTES", 64)
    tensor = torch.randn(7, 13)
    write_safetensors(tmp_path / "m.safetensors", {"t": tensor}, precision=torch.float16)
    write_ckpt(tmp_path / "m.ckpt", {"t": tensor}, None, precision=torch.float16)
    assert torch.equal(open_tensors(tmp_path / "m.safetensors")["t"], tensor.half())
    assert torch.equal(open_tensors(tmp_path / "m.ckpt")["t"], tensor.half())


@pytest.mark.parametrize("writer", [write_safetensors, write_ckpt])
def test_not_finite_numbers_stop_a_save_and_leave_the_old_file(tmp_path, writer):
    path = tmp_path / "m"
    path.write_bytes(b"old")
    tensors = {"good": torch.ones(4), "bad": torch.tensor([1.0, float("nan")])}
    with pytest.raises(NonFiniteWeights, match="bad") as caught:
        writer(path, tensors, None, require_finite=True)
    assert caught.value.exit_code == 5
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and path.read_bytes() == b"old"


def test_overflow_made_by_the_precision_stops_a_save(tmp_path):
    tensors = {"large": torch.tensor([1e6])}
    with pytest.raises(NonFiniteWeights, match=r"too large for float16, choose another --save_precision \(large\)"):
        write_safetensors(tmp_path / "m", tensors, precision=torch.float16, require_finite=True)
    write_safetensors(tmp_path / "m", tensors, precision=torch.bfloat16, require_finite=True)


def test_reading_maps_the_file_and_writing_to_a_tensor_does_not_reach_it(tmp_path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"t": torch.ones(1000)})
    before = path.read_bytes()
    tensor = open_tensors(path)["t"]
    tensor.add_(1)
    assert path.read_bytes() == before
    path.unlink()
    assert tensor.sum() == 2000


def test_a_source_can_be_saved_over_itself(tmp_path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"a": torch.arange(100.0), "b": torch.ones(3)})
    write_safetensors(path, dict(open_tensors(path)), {"saved": "twice"})
    assert torch.equal(open_tensors(path)["a"], torch.arange(100.0))


def test_a_header_that_is_not_padded_is_read_all_the_same(tmp_path):
    header = json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - len(header) % 2)
    data = torch.tensor([1.5, -2.0])
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data.numpy().tobytes())
    assert torch.equal(open_tensors(path)["t"], data)


def test_the_suffix_does_not_matter(tmp_path):
    write_safetensors(tmp_path / "model.ckpt", {"a": torch.ones(2)})
    write_ckpt(tmp_path / "model.safetensors", {"a": torch.ones(2)}, {})
    assert torch.equal(open_tensors(tmp_path / "model.ckpt")["a"], torch.ones(2))
    assert torch.equal(open_tensors(tmp_path / "model.safetensors")["a"], torch.ones(2))


def test_finite_check_names_the_bad_ones_only():
    tensors = {
        "good": torch.randn(100),
        "nan": torch.tensor([0.0, float("nan")]),
        "inf": torch.tensor([[float("-inf")]], dtype=torch.bfloat16),
        "both": torch.tensor([float("inf"), float("-inf")]),
        "sum overflows": torch.full((100,), 60000.0, dtype=torch.float16),
        "whole numbers": torch.tensor([1, 2]),
        "fp8": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn),
        "empty": torch.empty(0),
    }
    assert all_finite(tensors) == ["nan", "inf", "both", "fp8"]


def test_zero_matrices_are_named():
    assert all_zero({"w": torch.zeros(3, 3), "bias": torch.zeros(3), "v": torch.eye(2)}) == ["w"]


def test_a_tensor_without_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="'t' has no data"):
        write_safetensors(tmp_path / "m", {"t": torch.empty(3, device="meta")})
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_the_format_lacks_is_named(tmp_path):
    with pytest.raises(UserError, match="'t' has type torch.complex128"):
        write_safetensors(tmp_path / "m", {"t": torch.ones(2, dtype=torch.complex128)})


def test_the_header_is_read_without_torch(tmp_path):
    import subprocess
    import sys

    write_safetensors(tmp_path / "m.safetensors", {"a": torch.ones(2, 3)}, {"k": "v"})
    code = (
        "import sys; from library.checkpoints.tensor_files import read_header; from library.checkpoints import detect;"
        f"h = read_header({str(tmp_path / 'm.safetensors')!r});"
        "assert h.shapes == {'a': (2, 3)} and h.metadata['k'] == 'v';"
        f"detect.inspect({str(tmp_path / 'm.safetensors')!r});"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ckpt_is_an_ordinary_archive_with_aligned_data(tmp_path):
    write_ckpt(tmp_path / "m.ckpt", {"a": torch.ones(5), "b": torch.ones(3)}, {"epoch": 2, "global_step": 7})
    with zipfile.ZipFile(tmp_path / "m.ckpt") as archive:
        assert archive.testzip() is None
    found = torch.load(tmp_path / "m.ckpt", weights_only=True, mmap=True)
    assert found["epoch"] == 2 and found["global_step"] == 7
    assert list(found["state_dict"]) == ["a", "b"]
    start = found["state_dict"]["a"].untyped_storage().data_ptr()
    assert start % 64 == 0


def test_archives_with_many_members_are_valid(tmp_path):
    with NewFile(tmp_path / "many.zip") as file, ZipWriter(file) as archive:
        for i in range(65600):
            archive.add(str(i), [b"%d" % i], len(str(i)))
    with zipfile.ZipFile(tmp_path / "many.zip") as archive:
        assert len(archive.infolist()) == 65600 and archive.read("65599") == b"65599"


def test_archives_with_offsets_beyond_4_gib_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("library.checkpoints.zip_writer._ZIP64_FROM", 300)
    tensors = {name: torch.full((200,), float(i)) for i, name in enumerate("abc")}
    write_ckpt(tmp_path / "m.ckpt", tensors, None)
    for mmap in (False, True):
        found = torch.load(tmp_path / "m.ckpt", weights_only=True, mmap=mmap)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with zipfile.ZipFile(tmp_path / "m.ckpt") as archive:
        assert archive.testzip() is None


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_what_the_library_reads(tmp_path_factory, described):
    folder = tmp_path_factory.mktemp("round")
    tensors = {name: sample(dtype, tuple(shape)) for name, (dtype, shape) in described.items()}
    try:
        write_safetensors(folder / "m", tensors, {"a": "b"})
    except UnicodeEncodeError:
        return
    found = safetensors.torch.load_file(folder / "m")
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    assert read_header(folder / "m").metadata == {"a": "b"}
    assert set(open_tensors(folder / "m")) == set(tensors)
