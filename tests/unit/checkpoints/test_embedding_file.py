"""Embedding files of every program are read, and those that are written are read by others."""

from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.embedding_file import read_embedding, read_embeddings, write_embedding
from library.checkpoints.tensor_files import NonFiniteWeights
from library.errors import UserError


def vectors(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


L, G, H = vectors(2, 768), vectors(2, 1280, 1), vectors(3, 1024, 2)


def old_parameter_dict(tables):
    """As torch before 1.12 pickled it: a module whose parameters are in `_parameters`."""
    made = torch.nn.ParameterDict()
    made.__dict__["_parameters"] = OrderedDict((name, torch.nn.Parameter(rows)) for name, rows in tables.items())
    return made


def webui(table, name="my-word"):
    return {
        "string_to_token": {"*": 265},
        "string_to_param": table,
        "name": name,
        "step": 100,
        "sd_checkpoint": "abcd",
        "sd_checkpoint_name": None,
    }


FILES = {
    "kohya.safetensors": ({"emb_params": L}, "kohya", {"clip_l": L}, "kohya"),
    "kohya.pt": ({"emb_params": L}, "kohya", {"clip_l": L}, "kohya"),
    "half.safetensors": ({"emb_params": L.half()}, "kohya", {"clip_l": L.half().float()}, "half"),
    "wide.pt": ({"emb_params": H}, "kohya", {"clip_l": H}, "wide"),
    "g_only.pt": ({"emb_params": G}, "kohya", {"clip_g": G}, "g_only"),
    "sdxl.safetensors": ({"clip_l": L, "clip_g": G}, "sdxl", {"clip_l": L, "clip_g": G}, "sdxl"),
    "a1111.pt": (webui({"*": L}), "a1111", {"clip_l": L}, "my-word"),
    "nameless.pt": (webui({"*": L}, name=None), "a1111", {"clip_l": L}, "nameless"),
    "old.pt": (webui(old_parameter_dict({"*": L})), "a1111", {"clip_l": L}, "my-word"),
    "new.pt": (webui(torch.nn.ParameterDict({"*": torch.nn.Parameter(L)})), "a1111", {"clip_l": L}, "my-word"),
    "one.bin": ({"<cat>": L[0].clone()}, "diffusers", {"clip_l": L[:1]}, "<cat>"),
    "several.safetensors": ({"<cat>": L}, "diffusers", {"clip_l": L}, "<cat>"),
    "trainer.safetensors": (
        {"clip_l": L, "clip_l_out": L + 1, "clip_g": G, "clip_g_out": G + 1},
        "onetrainer",
        {"clip_l": L, "clip_g": G},
        "trainer",
    ),
    "bundled.safetensors": (
        {
            "bundle_emb.zshs.v1.clip_l": L,
            "bundle_emb.zshs.v1.clip_g": G,
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": vectors(8, 2),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": vectors(2, 8),
        },
        "bundle",
        {"clip_l": L, "clip_g": G},
        "zshs.v1",
    ),
}


def put(path, content):
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in content.items()}, path, {"note": "hello"})
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_every_layout_is_read(tmp_path, name):
    content, layout, rows, word = FILES[name]
    found = read_embedding(put(tmp_path / name, content))
    assert (found.layout, found.name, found.count) == (layout, word, len(next(iter(rows.values()))))
    assert found.rows.keys() == rows.keys()
    for key, tensor in rows.items():
        assert found.rows[key].dtype == torch.float32
        assert torch.equal(found.rows[key], tensor)
    assert found.metadata == ({"note": "hello"} if name.endswith("safetensors") else {})


def test_files_of_the_oldest_format(tmp_path):
    torch.save(webui({"*": L}), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_embedding(tmp_path / "legacy.pt").rows["clip_l"], L)


def test_words_beside_a_lora(tmp_path):
    path = put(tmp_path / "l.safetensors", {"bundle_emb.aa.clip_l": L, "bundle_emb.bb.clip_l": L + 1})
    assert [embedding.name for embedding in read_embeddings(path)] == ["aa", "bb"]
    with pytest.raises(UserError, match=r"several words \(aa, bb\)"):
        read_embedding(path)


def test_vectors_for_a_model(tmp_path):
    single = read_embedding(put(tmp_path / "a.pt", {"emb_params": H}))
    assert torch.equal(single.rows_for((1024,))[0], H)
    with pytest.raises(UserError, match="holds vectors of 1024 values, but those of this model have 768"):
        single.rows_for((768,))
    double = read_embedding(put(tmp_path / "b.safetensors", {"clip_g": G, "clip_l": L}))
    assert [tensor.shape[1] for tensor in double.rows_for((768, 1280))] == [768, 1280]
    with pytest.raises(UserError, match="--weights x: holds vectors of 768 and 1280 values.*have 768"):
        double.rows_for((768,), "--weights x")
    with pytest.raises(UserError, match="of 768 values, but those of this model have 768 and 1280"):
        read_embedding(put(tmp_path / "c.pt", {"emb_params": L})).rows_for((768, 1280))


class Evil:
    def __reduce__(self):
        return eval, ("1/0",)


BAD = {
    "model.safetensors": ({"model.diffusion_model.input_blocks.0.0.weight": L, "x": L}, "no embedding but"),
    "lora.safetensors": (
        {
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": vectors(8, 2),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": vectors(2, 8),
        },
        "no embedding but a",
    ),
    "numbers.safetensors": ({"emb_params": torch.ones(2, 768, dtype=torch.int64)}, "no embedding"),
    "deep.safetensors": ({"emb_params": torch.ones(2, 3, 768)}, "no embedding"),
    "empty.safetensors": ({"emb_params": torch.ones(0, 768)}, "no embedding"),
    "nan.safetensors": ({"emb_params": torch.full((2, 768), torch.nan)}, "NaN or infinity"),
    "layers.safetensors": ({"IN01": L, "MID": L, "OUT11": L}, "each layer of the U-Net"),
    "uneven.safetensors": ({"clip_l": L, "clip_g": vectors(3, 1280)}, "not as many vectors"),
    "list.pt": ([1, 2], "holds no table of tensors"),
    "text.pt": ({"emb_params": "hello"}, "no embedding"),
    "odd.pt": ({"state_dict": L, "x": L}, "no embedding but a file of 2 tensors"),
    "words.pt": (webui({"*": L, "+": L}), "holds 2 words"),
    "damaged.pt": (webui("nothing"), "no table of vectors"),
    "evil.pt": ({"emb_params": Evil()}, "refused: this pickle wants to use builtins.eval"),
}


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_refused_in_one_line(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(UserError, match=message) as caught:
        read_embedding(put(tmp_path / name, content))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_that_is_cut_off(tmp_path):
    path = put(tmp_path / "a.pt", {"emb_params": L})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="damaged"):
        read_embedding(path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a.ckpt"])
@pytest.mark.parametrize("precision", [None, torch.float16])
def test_what_is_written_is_read(tmp_path, name, precision):
    path = write_embedding(tmp_path / name, {"clip_l": L}, {"ss_a": "b"}, precision=precision)
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    # The A1111 web interface asks for exactly this type and for exactly one tensor.
    assert type(tensors) is dict and type(tensors["emb_params"]) is torch.Tensor and len(tensors) == 1
    assert torch.equal(tensors["emb_params"], L if precision is None else L.half())
    assert read_embedding(path).metadata == ({"ss_a": "b"} if path.suffix == ".safetensors" else {})


def test_names_of_tensors(tmp_path):
    assert read_embedding(write_embedding(tmp_path / "a.pt", {"clip_l": L}, tensor_name="<cat>")).name == "<cat>"
    both = write_embedding(tmp_path / "b.safetensors", {"clip_g": G, "clip_l": L}, tensor_name="<cat>")
    assert load_file(both).keys() == {"clip_l", "clip_g"}


def test_nan_is_not_written(tmp_path):
    with pytest.raises(NonFiniteWeights):
        write_embedding(tmp_path / "a.pt", {"clip_l": torch.full((1, 4), torch.nan)})
    assert not list(tmp_path.iterdir())
