"""Whatever bytes a network file has and whatever `--network_args` says: a result, or a message for the user."""

from __future__ import annotations

import importlib
import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from library.checkpoints.lora_blocks import parse_block_weights
from library.checkpoints.lora_file import inspect_lora, read_lora
from library.errors import UserError
from library.option_values import BadValue

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PEFT = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def tensors():
    return {
        f"{MODULE}.lora_down.weight": torch.ones(2, 8),
        f"{MODULE}.lora_up.weight": torch.ones(8, 2),
        f"{MODULE}.alpha": torch.tensor(1.0),
        f"{MODULE.replace('to_q', 'to_k')}.hada_w1_a": torch.ones(8, 2),
        f"{MODULE.replace('to_q', 'to_k')}.hada_w1_b": torch.ones(2, 8),
        f"{MODULE.replace('to_q', 'to_k')}.hada_w2_a": torch.ones(8, 2),
        f"{MODULE.replace('to_q', 'to_k')}.hada_w2_b": torch.ones(2, 8),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of a small LoRA in every format."""
    folder = tmp_path_factory.mktemp("files")
    torch.save(tensors(), folder / "zip.pt")
    torch.save(tensors(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return {
        "safetensors": save(tensors(), {"ss_network_module": "networks.lora", "ss_network_args": '{"unit": "2"}'}),
        "zip": (folder / "zip.pt").read_bytes(),
        "legacy": (folder / "legacy.pt").read_bytes(),
    }


def look(path) -> None:
    """Read a file in both ways; an error names it."""
    for reader in (inspect_lora, read_lora):
        try:
            found = reader(path)
        except UserError as error:
            assert path.name in str(error)
        else:
            assert found.modules or found.bundled


DAMAGE = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=6)


@QUICK
@given(form=st.sampled_from(["safetensors", "zip", "legacy"]), damage=DAMAGE, cut=st.integers(0, 1 << 20) | st.none())
def test_damaged_files(tmp_path, files, form, damage, cut):
    data = bytearray(files[form])
    for position, value in damage:
        data[position % len(data)] = value
    path = tmp_path / f"damaged.{form}"
    path.write_bytes(data if cut is None else data[: cut % len(data)])
    look(path)


SHAPE = st.lists(st.integers(-1, 9) | st.sampled_from([1 << 31, 1 << 63]), max_size=5)
SUFFIX = st.sampled_from(
    ["lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "diff", "scalar", "oft_blocks"]
    + ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"]
    + ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "a1.weight", "a2.weight", "w_norm", "on_input"]
)
NAME = st.sampled_from(
    [MODULE, PEFT, "lora_te_text_model_encoder_layers_0_mlp_fc1", "oft_unet_x", "lycoris_y", "bundle_emb.z"]
)
KEY = st.builds("{}.{}".format, NAME, SUFFIX) | st.text(max_size=12)
METADATA = st.dictionaries(
    st.sampled_from(["ss_network_args", "ss_base_model_version", "lora_adapter_metadata", "modelspec.architecture"]),
    st.sampled_from(["{", "[]", '{"unet.r": "x"}', '{"unet": {"r": 0, "lora_alpha": null}}', "sd_v1", "\0"])
    | st.integers(),
)


@QUICK
@given(
    st.dictionaries(KEY, st.tuples(st.sampled_from(["F32", "F16", "I64", "F8_E4M3", "BOOL", "X"]), SHAPE), max_size=6),
    METADATA,
)
def test_headers_that_say_anything(tmp_path, entries, metadata):
    """Tensors of any names, shapes and types, whose bytes are there as far as that can be."""
    header, position = {"__metadata__": metadata}, 0
    for key, (dtype, shape) in entries.items():
        size = {"F32": 4, "F16": 2, "I64": 8, "F8_E4M3": 1, "BOOL": 1, "X": 4}[dtype]
        for length in shape:
            size *= max(length, 0)
        end = position + size if size < 1 << 16 else position
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    path = tmp_path / "any.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(position))
    look(path)


MODULES = ["networks.lora", "networks.lora_fa", "networks.dylora", "networks.oft", "networks.loha", "networks.lokr"]
KEYS = st.sampled_from(
    ["conv_dim", "conv_alpha", "rank_dropout", "module_dropout", "dropout", "block_dims", "block_alphas", "unit"]
    + ["conv_block_dims", "conv_block_alphas", "down_lr_weight", "mid_lr_weight", "up_lr_weight", "loraplus_lr_ratio"]
    + ["block_lr_zero_threshold", "dora_wd", "enable_conv", "use_tucker", "exclude_patterns", "include_patterns"]
    + ["factor", "network_reg_dims", "network_reg_lrs", "verbose", "algo", "preset", "bypass_mode"]
) | st.text(max_size=5)  # fmt: skip
VALUES = st.one_of(
    st.integers(-3, 40).map(str),
    st.floats().map(str),
    st.text(max_size=10),
    st.sampled_from(
        ["", "None", "True", "sine", "cosine+.5", "+", ",", "['(']", "[1]", "x=1", "x=1,y", "1e999", "9" * 5000]
    ),
    st.lists(st.sampled_from(["1", "0", "", "x", "nan", "-1"]), max_size=26).map(",".join),
    st.lists(st.text(max_size=3), max_size=3).map(repr),
)


@QUICK
@given(
    st.sampled_from(MODULES),
    st.none() | st.integers(1, 400),
    st.floats(0, 100),
    st.dictionaries(KEYS, VALUES, max_size=4),
)
@example("networks.loha", 4, 1.0, {"exclude_patterns": "[" * 5000})
@example("networks.lokr", 4, 1.0, {"network_reg_dims": "(a+)+=4"})
def test_any_arguments(name, dim, alpha, arguments):
    for problem in importlib.import_module(name).check_network_args(dim, alpha, arguments):
        assert problem.where.startswith("--network_") and problem.what


@QUICK
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_arguments_of_lycoris(arguments):
    from types import SimpleNamespace

    from library.models.lycoris_args import lycoris_problems

    module = SimpleNamespace(network_module_dict={"lora": 1, "loha": 2}, PRESET={"full": {}})
    for problem in lycoris_problems(module, arguments):
        assert problem.where == "--network_args"


@QUICK
@given(VALUES | st.text(max_size=30))
@example("[" * 100000)
@example("[1e999" + ",1" * 16 + "]")
def test_any_text_as_a_table_or_a_list(text):
    from tools.convert_diffusers20_original_sd import metadata_table

    for reader, allowed in ((metadata_table, BadValue), (parse_block_weights, UserError)):
        try:
            reader(text)
        except allowed as error:
            assert str(error)
