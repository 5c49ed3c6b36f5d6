"""LoRA files: what is refused and how it is said, and that what we write is what was read."""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.checkpoints.detect import inspect
from library.checkpoints.lora_file import inspect_lora, read_lora, require_base, write_lora
from library.checkpoints.lora_layouts import sort_keys
from library.checkpoints.tensor_files import NonFiniteWeights
from library.errors import UserError
from tests.lora_files import save, small_lora, some

NAME = "lora_unet_mid_block_attentions_0_proj_in"
OTHER = "lora_unet_mid_block_attentions_0_proj_out"
ROOT = Path(__file__).resolve().parents[3]


def module(name=NAME, **changed):
    tensors = {
        "lora_down.weight": torch.ones(4, 8),
        "lora_up.weight": torch.ones(6, 4),
        "alpha": torch.tensor(2.0),
        **{key.replace("_weight", ".weight"): tensor for key, tensor in changed.items()},
    }
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items() if tensor is not None}


# Reading -----------------------------------------------------------------------------------------------------------


def test_values_of_a_module(tmp_path):
    path = save(tmp_path / "lora.safetensors", module(), {"ss_base_model_version": "sd_v1"})
    found = read_lora(path)
    weights = found.modules[NAME]
    assert (found.layout, found.base, found.metadata) == ("kohya", "sd1", {"ss_base_model_version": "sd_v1"})
    assert (weights.kind, weights.rank, weights.alpha, weights.scale) == ("lora", 4, 2.0, 0.5)
    assert found.places == {NAME: ("unet", "mid_block.attentions.0.proj_in")}


@pytest.mark.parametrize("alpha", [torch.tensor(2), torch.tensor([2.0]), torch.tensor(2.0, dtype=torch.float16)])
def test_forms_of_alpha(tmp_path, alpha):
    weights = read_lora(save(tmp_path / "lora.safetensors", module(alpha=alpha))).modules[NAME]
    assert weights.scale == 0.5 and weights.tensors["alpha"].shape == ()


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin"])
def test_pickles_are_read_too(tmp_path, suffix):
    torch.save(module(), tmp_path / f"lora{suffix}")
    assert read_lora(tmp_path / f"lora{suffix}").modules[NAME].scale == 0.5
    assert inspect_lora(tmp_path / f"lora{suffix}").ranks == {4}


NAN = torch.full((6, 4), float("nan"))
BAD = {
    "rank 0": (
        module(lora_down_weight=torch.ones(0, 8), lora_up_weight=torch.ones(6, 0)),
        f"'{NAME}.lora_down.weight' of shape [0, 8] is empty (rank 0)",
    ),
    "up without down": (
        module(lora_down_weight=None, alpha=None),
        f"'{NAME}.lora_up.weight' lacks its counterpart lora_down.weight: half of the module is missing",
    ),
    "down without up": (module(lora_up_weight=None, alpha=None), "lacks its counterpart lora_up.weight"),
    "ranks that differ": (
        module(lora_up_weight=torch.ones(6, 3)),
        f"'{NAME}.lora_up.weight' of shape [6, 3] does not fit '{NAME}.lora_down.weight' of shape [4, 8]",
    ),
    "a vector": (module(lora_up_weight=torch.ones(6)), "of shape [6] is neither a matrix nor a convolution"),
    "alpha is a list": (module(alpha=torch.ones(3)), f"'{NAME}.alpha' of shape [3] is not a single number"),
    "core that does not fit": (
        module(lora_mid_weight=torch.ones(3, 4, 3, 3)),
        "does not fit",
    ),
    "half a LoHa": ({f"{NAME}.hada_w1_a": torch.ones(2, 2)}, "lacks its counterpart hada_w1_b, hada_w2_a, hada_w2_b"),
    "half a LoKr": ({f"{NAME}.lokr_w1": torch.ones(2, 2)}, "lacks its counterpart lokr_w2"),
    "the same tensor twice": (
        {**module(), "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(4, 8)},
        "are the same tensor",
    ),
}
BAD_VALUES = {
    "NaN": (module(lora_up_weight=NAN), f"NaN or infinity in '{NAME}.lora_up.weight'"),
    "infinity": (module(lora_up_weight=NAN.nan_to_num(float("inf"))), "NaN or infinity in"),
    "alpha NaN": (module(alpha=torch.tensor(float("nan"))), f"NaN or infinity in '{NAME}.alpha'"),
    "alpha 0": (module(alpha=torch.tensor(0.0)), f"'{NAME}.alpha' is 0, so its module would do nothing"),
}


def only_problem(path, call):
    """The one line that the user sees; it names the file."""
    with pytest.raises(UserError) as caught:
        call(path)
    (problem,) = caught.value.problems
    assert str(path) == problem.where and "\n" not in str(problem)
    return problem.what


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_right_is_refused_by_its_header(tmp_path, case):
    tensors, message = BAD[case]
    path = save(tmp_path / "lora.safetensors", {**module(OTHER), **tensors})
    for call in (inspect_lora, read_lora):
        assert message in only_problem(path, call)


@pytest.mark.parametrize("case", BAD_VALUES)
def test_values_that_cannot_be_right_are_refused(tmp_path, case):
    tensors, message = BAD_VALUES[case]
    assert message in only_problem(save(tmp_path / "lora.safetensors", {**module(OTHER), **tensors}), read_lora)


def test_all_problems_of_a_file_come_together(tmp_path):
    bad = {key: t for i in range(20) for key, t in module(f"lora_unet_x_{i}", lora_up_weight=None).items()}
    with pytest.raises(UserError) as caught:
        inspect_lora(save(tmp_path / "lora.safetensors", bad))
    assert len(caught.value.problems) == 9
    assert caught.value.problems[-1].what == "and 12 more problems of this kind"


NOT_LORAS = {
    "an embedding": ({"emb_params": torch.ones(1, 768)}, "not a LoRA but a textual inversion embedding"),
    "only embeddings in a LoRA": ({"bundle_emb.cat.clip_l": torch.ones(1, 768)}, "not a LoRA but a textual inversion"),
    "a checkpoint": (
        {
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(4, 768),
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(4, 8),
        },
        "not a LoRA but Stable Diffusion 1.x",
    ),
    "anything": ({"a": torch.ones(1)}, "not a LoRA but an unknown kind of model"),
    "a LoRA for a transformer": (
        {"transformer.blocks.0.to_q.lora_A.weight": torch.ones(2, 2)},
        "no usable LoRA module in it, only tensors such as 'transformer.blocks.0.to_q.lora_A.weight'",
    ),
    "no tensors": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("case", NOT_LORAS)
def test_files_that_are_no_loras(tmp_path, case):
    tensors, message = NOT_LORAS[case]
    path = save(tmp_path / "file.safetensors", tensors)
    for call in (inspect_lora, read_lora):
        assert message in only_problem(path, call)


def test_damaged_files(tmp_path):
    whole = save(tmp_path / "lora.safetensors", module()).read_bytes()
    cut, empty = tmp_path / "cut.safetensors", tmp_path / "empty.safetensors"
    cut.write_bytes(whole[:-10])
    empty.write_bytes(b"")
    for call in (inspect_lora, read_lora):
        assert "incomplete: expected" in only_problem(cut, call)
        assert "the file is empty" in only_problem(empty, call)
        assert "no such file" in only_problem(tmp_path / "missing.safetensors", call)
        assert "a folder without LoRA weights" in only_problem(tmp_path, call)


def test_the_header_is_enough_and_torch_is_not_loaded(tmp_path):
    path = save(tmp_path / "lora.safetensors", module())
    code = (
        "import sys; from library.checkpoints.lora_file import inspect_lora, require_base;"
        f"require_base(inspect_lora({str(path)!r}), 'sd2'); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_detection_of_checkpoints_agrees(tmp_path):
    for version in ("sd15", "sdxl"):
        assert inspect(save(tmp_path / "lora.safetensors", some(small_lora(version), "layers_0_"))).family == "lora"


@pytest.mark.parametrize(
    ("version", "family", "message"),
    [
        ("sdxl", "sd1", "this LoRA was made for SDXL base, but the model is Stable Diffusion 1.x"),
        ("sd21", "sd1", "this LoRA was made for Stable Diffusion 2.x, but the model is Stable Diffusion 1.x"),
        ("sd15", "sd2", "this LoRA was made for Stable Diffusion 1.x, but the model is Stable Diffusion 2.x"),
    ],
)
def test_a_lora_for_another_base_is_refused(tmp_path, version, family, message):
    path = save(tmp_path / "lora.safetensors", some(small_lora(version), "mid_block", "middle_block"))
    with pytest.raises(UserError, match=re.escape(f"--network_weights {path}: {message}")):
        require_base(inspect_lora(path), family, "--network_weights")
    with pytest.raises(UserError, match=re.escape(message)):
        require_base(read_lora(path), family)


def test_a_lora_for_this_base_or_an_unknown_one_passes(tmp_path):
    require_base(inspect_lora(save(tmp_path / "a.safetensors", some(small_lora("sd15"), "mid_block"))), "sd1")
    unknown = {key.replace("proj_in", "attn1_to_q"): tensor for key, tensor in module().items()}
    require_base(inspect_lora(save(tmp_path / "b.safetensors", unknown)), "sd2")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"ss_base_model_version": "sd_v2_v"}, "v_prediction"),
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({}, None),
    ],
)
def test_the_prediction_is_told_by_metadata(tmp_path, metadata, expected):
    assert inspect_lora(save(tmp_path / "lora.safetensors", module(), metadata)).prediction_type == expected


KEYS = st.one_of(
    st.text(max_size=60),
    st.builds(
        lambda parts, suffix: "".join(parts) + suffix,
        st.lists(
            st.sampled_from(
                [
                    "lora_unet_",
                    "unet.",
                    "base_model.model.",
                    "lycoris_",
                    "to_q",
                    ".processor.",
                    "$$",
                    "_lora",
                    "mid_block.attentions.0.",
                    "text_model.",
                    "input_blocks.1.",
                    "te_",
                    ".",
                ]
            ),  # fmt: skip
            max_size=4,
        ),
        st.sampled_from([".alpha", ".lora_up.weight", ".lora_A.x.weight", ".hada_w1_a", ".lora.up.weight", ".weight"]),
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, st.lists(st.integers(0, 9), max_size=4).map(tuple), max_size=8), st.booleans())
def test_no_name_is_lost_whatever_it_is(shapes, sdxl):
    listing = sort_keys(shapes, {}, base="sdxl" if sdxl else None)
    placed = [key for keys in listing.modules.values() for key in keys.values()]
    again = [second for _, second in listing.twice]
    assert sorted([*placed, *again, *listing.bundled, *listing.unknown]) == sorted(shapes)


# Writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 40_000], ids=["small", "beyond the window of the older hash"])
@pytest.mark.parametrize("precision", [None, torch.float16])
def test_hashes_are_those_of_the_serialised_file(tmp_path, rows, precision):
    tensors = module(lora_up_weight=torch.randn(rows, 4), lora_down_weight=torch.randn(4, rows))
    metadata = {"ss_network_dim": "4", "ss_text": 'ü"\n\x01', "modelspec.title": "t", "sshs_model_hash": "stale"}
    path = write_lora(tmp_path / "lora.safetensors", tensors, metadata, precision=precision)
    stored = {key: tensor.to(precision or tensor.dtype) for key, tensor in tensors.items()}
    plain = safetensors.torch.save(stored, {key: text for key, text in metadata.items() if key.startswith("ss_")})
    data = plain[8 + int.from_bytes(plain[:8], "little") :]
    assert inspect_lora(path).metadata == {
        **metadata,
        "sshs_model_hash": hashlib.sha256(data).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(plain[0x100000:0x110000]).hexdigest()[:8],
    }
    assert path.read_bytes().endswith(data)


def test_the_hash_does_not_depend_on_metadata(tmp_path):
    hashes = {
        inspect_lora(write_lora(tmp_path / f"{i}.safetensors", module(), metadata)).metadata["sshs_model_hash"]
        for i, metadata in enumerate((None, {"a": "b"}, {"ss_tag_frequency": "x" * 5000}))
    }
    assert len(hashes) == 1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=4),
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["float32", "float16", "bfloat16"])), min_size=1, max_size=4),
)
def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path, metadata, modules):
    tensors = {}
    for number, (rank, dtype) in enumerate(modules):
        kind = getattr(torch, dtype)
        name = f"lora_unet_down_blocks_{number}_attentions_0_proj_in"
        down, up = torch.ones(rank, 5, dtype=kind), torch.ones(3, rank, dtype=kind)
        tensors |= module(name, lora_down_weight=down, lora_up_weight=up, alpha=torch.tensor(float(rank), dtype=kind))
    first = write_lora(tmp_path / "1.safetensors", tensors, metadata)
    loaded = read_lora(first)
    second = write_lora(tmp_path / "2.safetensors", loaded.tensors(), loaded.metadata)
    assert first.read_bytes() == second.read_bytes()


def test_alpha_is_written_as_a_float(tmp_path):
    path = write_lora(tmp_path / "lora.safetensors", module(alpha=torch.tensor([2])), None)
    alpha = safetensors.torch.load_file(path)[f"{NAME}.alpha"]
    assert (alpha.dtype, alpha.shape, float(alpha)) == (torch.float32, (), 2.0)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_pickles_hold_the_bare_tensors(tmp_path, suffix):
    path = write_lora(tmp_path / f"lora{suffix}", module(), {"a": "b"}, precision=torch.bfloat16)
    loaded = torch.load(path, weights_only=True)
    assert loaded.keys() == module().keys()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(("bad", "precision"), [(NAN, None), (torch.full((6, 4), 1e6), torch.float16)])
def test_nothing_is_written_that_is_not_finite(tmp_path, suffix, bad, precision):
    with pytest.raises(NonFiniteWeights):
        write_lora(tmp_path / f"lora{suffix}", module(lora_up_weight=bad), None, precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_metadata_may_be_json(tmp_path):
    table = json.dumps({"cat": 3})
    assert inspect_lora(write_lora(tmp_path / "l.safetensors", module(), {"ss_tag": table})).metadata["ss_tag"] == table
