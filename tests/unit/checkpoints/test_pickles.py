"""What an honest pickle may hold. What a hostile one tries is in tests/reliability."""

import io
import itertools
import sys
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from library.checkpoints.pickles import load_pickle, load_state_dict
from library.errors import UserError


@pytest.fixture
def fake_class(monkeypatch):
    """Return a function that makes a class importable under a dotted name, as long as the test runs."""

    def make(name, base=object, **members):
        module_name, _, class_name = name.rpartition(".")
        cls = type(class_name, (base,), {"__module__": module_name, **members})
        for parent in itertools.accumulate(module_name.split("."), "{}.{}".format):
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setattr(sys.modules[module_name], class_name, cls, raising=False)
        return cls

    return make


def save(path, value, legacy=False):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def rewrite_pickle(path, old, new):
    """Replace bytes of a checkpoint's pickle, as if another version of a library had written it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_plain_contents_load(tmp_path, legacy):
    value = {
        "t": torch.arange(6.0).reshape(2, 3),
        "half": torch.ones(3, dtype=torch.float16),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "ordered": OrderedDict(a=1),
        "counter": Counter("aab"),
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "size": torch.Size([1, 2]),
        "list": [1, 2.5, None, True, "text", (1,)],
    }
    found = load_pickle(save(tmp_path / "m.pt", value, legacy))
    assert set(found) == set(value)
    assert torch.equal(found["t"], value["t"]) and found["bytes"] == b"\x00\xff"
    assert found["list"] == value["list"] and found["counter"] == value["counter"]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "name",
    [
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    ],
)
def test_training_callbacks_become_empty_objects(tmp_path, fake_class, monkeypatch, name, legacy):
    cls = fake_class(name)
    callback = cls()
    callback.monitor, callback.secret = "val/loss", [1, 2, 3]
    value = {"state_dict": {"a": torch.ones(2)}, "callbacks": {cls: {"best": 1}, "object": callback}, "epoch": 3}
    path = save(tmp_path / "m.ckpt", value, legacy)
    monkeypatch.delitem(sys.modules, name.rpartition(".")[0])
    found = load_pickle(path)
    kept = found["callbacks"]["object"]
    assert not vars(kept) and type(kept).__module__ != name.rpartition(".")[0]
    assert name.rpartition(".")[0] not in sys.modules


def test_classic_checkpoints_of_numpy_1_load(tmp_path):
    value = {
        "state_dict": {"a": torch.ones(2)},
        "epoch": 6,
        "global_step": 470000,
        "best": np.float64(0.5),
        "count": np.int64(7),
        "array": np.arange(3),
        "random": np.random.RandomState(3).get_state(),
        "text": np.array(["a", "bc"]),
    }
    path = save(tmp_path / "m.ckpt", value)
    found = load_pickle(path)
    assert found["best"] == 0.5 and list(found["array"]) == [0, 1, 2]
    rewrite_pickle(path, b"numpy._core.multiarray", b"numpy.core.multiarray")
    found = load_pickle(path)
    assert found["best"] == 0.5 and found["count"] == 7 and list(found["array"]) == [0, 1, 2]


def test_configurations_of_omegaconf_become_empty_objects(tmp_path, fake_class):
    metadata = fake_class("omegaconf.base.ContainerMetadata")
    node = fake_class("omegaconf.nodes.AnyNode")
    config_class = fake_class("omegaconf.dictconfig.DictConfig")
    inner = metadata()
    inner.__dict__.update(object_type=dict, element_type=str, cache=defaultdict(dict))
    config = config_class()
    value = node()
    value.__dict__.update(_val="x")
    config.__dict__.update(_metadata=inner, _content={"lr": value})
    path = save(tmp_path / "m.ckpt", {"state_dict": {"a": torch.ones(1)}, "hyper_parameters": config})
    found = load_pickle(path)
    assert not vars(found["hyper_parameters"])
    # The same helper classes are refused where there is no such container.
    with pytest.raises(UserError, match=r"collections\.defaultdict"):
        load_pickle(save(tmp_path / "other.ckpt", {"a": defaultdict(dict)}))


def test_attribute_dictionaries_become_empty_objects(tmp_path, fake_class):
    cls = fake_class("pytorch_lightning.utilities.parsing.AttributeDict")
    config = cls()
    config.__dict__.update(learning_rate=1.0)
    found = load_pickle(save(tmp_path / "m.ckpt", {"a": torch.ones(1), "config": config}))
    assert not vars(found["config"])


def test_an_original_embedding_loads(tmp_path):
    value = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": torch.nn.ParameterDict({"*": torch.ones(1, 8)}),
    }
    found = load_pickle(save(tmp_path / "e.pt", value))
    assert torch.equal(found["string_to_param"]["*"], torch.ones(1, 8))


def test_tensors_of_an_archive_are_mapped(tmp_path):
    path = save(tmp_path / "m.ckpt", {"a": torch.ones(100_000)})
    tensor = load_pickle(path)["a"]
    path.unlink()
    assert tensor.sum() == 100_000
    if sys.platform == "linux":
        assert "m.ckpt" in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_state_dict_is_found_wrapped_or_bare(tmp_path, wrapped):
    table = {"a": torch.ones(2), "note": "text", "b": torch.nn.Parameter(torch.zeros(3))}
    value = {"state_dict": table, "epoch": 4, "global_step": 9, "lr_schedulers": [{"a": 1}]} if wrapped else table
    found = load_state_dict(save(tmp_path / "m.ckpt", value))
    assert set(found.tensors) == {"a", "b"} and found.wrapped is wrapped
    assert dict(found.counters) == ({"epoch": 4, "global_step": 9} if wrapped else {})
    assert not found.tensors["b"].requires_grad


@pytest.mark.parametrize("value", [{}, [1, 2], {"state_dict": {"a": 1}}, torch.ones(2)])
def test_a_file_without_named_tensors_is_refused(tmp_path, value):
    with pytest.raises(UserError, match="holds no table of tensors"):
        load_state_dict(save(tmp_path / "m.ckpt", value))


def test_what_our_list_allows_is_restored_for_other_loaders(tmp_path, fake_class):
    """The allow-list is in force only while one of our files is read."""
    cls = fake_class("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    path = save(tmp_path / "m.ckpt", {"c": cls})
    load_pickle(path)
    with pytest.raises(Exception, match="ModelCheckpoint"):
        torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
