"""Original LoRA files of Stable Cascade become files for ComfyUI, and come back the same bit by bit."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints import cascade_lora
from library.checkpoints.embedding_file import read_embedding
from library.checkpoints.lora_file import inspect_lora, read_lora
from library.models.random_cascade import TINY_C
from networks.convert_stable_cascade_lora import main
from tests.support import run_tool

FILTERS = {".attn": (".attn",), "attention and perceptrons": (".attn", "channelwise"), "all that can be": None}
EVERYTHING = ("clip_", "embedding", "channelwise", "mapper", "attention", "scalers", "clf")


@pytest.fixture(scope="module")
def models(tiny_cascade):
    return tiny_cascade


def official(path, filters=(".attn",), rank=4, *, words=True):
    """A file as the original trainer writes it."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for place, entry in enumerate(cascade_lora.walk(TINY_C, filters)):
        tensors[f"weights.{place}.lora_up"] = torch.randn(entry.shape[0], rank, generator=generator)
        tensors[f"weights.{place}.lora_down"] = torch.randn(rank, entry.shape[1], generator=generator)
    if words:
        tensors["embeddings.embeddings"] = torch.randn(2, 32, generator=generator)
        tensors["embeddings.indices"] = torch.tensor([49408, 1929])
    save_file(tensors, str(path))
    return tensors


def weight_of(file, path):
    """What a kohya file adds to a layer."""
    weights = file.modules["lora_unet_" + path.replace(".", "_")]
    up, down = weights.tensors["lora_up.weight"].flatten(1), weights.tensors["lora_down.weight"].flatten(1)
    return weights.scale * up @ down


@pytest.mark.parametrize("case", FILTERS)
def test_round_trip_is_exact(models, tmp_path, case):
    filters = FILTERS[case] or EVERYTHING
    there, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    given = official(tmp_path / "original.safetensors", filters)
    more = ("--stage_c_checkpoint_path", models.stage_c, "--module_filters", *filters)
    assert run_tool(main, tmp_path / "original.safetensors", there, *more) == 0
    names = set(load_file(there))
    assert "lora_unet_down_blocks_0_2_attention_attn_to_q.lora_down.weight" in names
    assert "lora_unet_down_blocks_0_2_attention_attn_to_q.alpha" in names
    assert inspect_lora(there).base == "stable_cascade" and not inspect_lora(there).unknown
    assert run_tool(main, there, back, *more) == 0
    found = load_file(back)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)
    # Ours say what their numbers mean, so they can be read without being told.
    again = read_lora(back)
    assert again.layout == "official" and again.modules.keys() == read_lora(there).modules.keys()


def test_the_same_change_of_the_weights(models, tmp_path):
    given = official(tmp_path / "original.safetensors")
    assert run_tool(main, tmp_path / "original.safetensors", tmp_path / "kohya.safetensors",
                    "--stage_c_checkpoint_path", models.stage_c) == 0  # fmt: skip
    file = read_lora(tmp_path / "kohya.safetensors")
    for place, entry in enumerate(cascade_lora.walk(TINY_C, (".attn",))):
        wanted = given[f"weights.{place}.lora_up"] @ given[f"weights.{place}.lora_down"] / 4
        found = torch.cat([weight_of(file, path) for path in entry.layers])
        torch.testing.assert_close(found, wanted)


def test_matrices_of_their_own_are_stacked(models, tmp_path):
    """Queries, keys and values as training makes them: with down matrices of their own, some missing, alpha not 1."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for layer, rank in (("to_q", 4), ("to_v", 4), ("out_proj", 4), ("to_k", 2)):
        for block in ("down_blocks_0_2", "up_blocks_1_2"):
            if (block, layer) == ("up_blocks_1_2", "to_k"):
                continue
            name = f"lora_unet_{block}_attention_attn_{layer}"
            tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 32, generator=generator)
            tensors[f"{name}.lora_up.weight"] = torch.randn(32, rank, generator=generator)
            tensors[f"{name}.alpha"] = torch.tensor(3.0)
    save_file(tensors, str(tmp_path / "kohya.safetensors"))
    more = ("--stage_c_checkpoint_path", models.stage_c)
    assert run_tool(main, tmp_path / "kohya.safetensors", tmp_path / "original.safetensors", *more) == 0
    before, after = (read_lora(tmp_path / f"{name}.safetensors") for name in ("kohya", "original"))
    assert {weights.rank for weights in after.modules.values()} == {10}
    for name, (_, path) in after.places.items():
        wanted = weight_of(before, path) if name in before.modules else torch.zeros(32, 32)
        torch.testing.assert_close(weight_of(after, path), wanted)


def test_words_become_vectors(models, tmp_path):
    given = official(tmp_path / "original.safetensors")
    out = tmp_path / "kohya.safetensors"
    more = ("--stage_c_checkpoint_path", models.stage_c, "--text_model_checkpoint_path", models.text)
    tokens = ("--train_tokens", "[fernando]=^dog</w>", "^dog</w>")
    assert run_tool(main, tmp_path / "original.safetensors", out, *more, *tokens) == 0
    table = load_file(models.text)["text_model.embeddings.token_embedding.weight"]
    word = read_embedding(out)
    assert word.name == "[fernando]"
    wanted = table[1929] + given["embeddings.embeddings"][0]
    torch.testing.assert_close(word.rows["clip_g"][0], wanted)


BAD = {
    "another size": (lambda path: official(path), (), "are not those of .attn in stage C 3.6B or 1B"),
    "modules outside the filters": (
        lambda path: save_file(
            {
                "lora_unet_clf_1.lora_down.weight": torch.zeros(1, 32, 1, 1),
                "lora_unet_clf_1.lora_up.weight": torch.zeros(16, 1, 1, 1),
            },
            str(path),
        ),
        ("--stage_c_checkpoint_path", "STAGE"),
        "none of module_filters",
    ),
    "text encoder": (
        lambda path: save_file(
            {
                f"lora_{part}.lora_{side}.weight": torch.ones(2, 2)
                for part in ("unet_clf_1", "te_text_model_encoder_layers_0_mlp_fc1")
                for side in ("down", "up")
            },
            str(path),
        ),
        (),
        "modules of the text encoder",
    ),
    "for another model": (
        lambda path: save_file(
            {
                f"lora_unet_mid_block_attentions_0_proj_in.lora_{side}.weight": torch.ones(2, 2, 1, 1)
                for side in ("down", "up")
            },
            str(path),
        ),
        (),
        "was made for Stable Diffusion 1.x, but the model is Stable Cascade",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_in_one_line(models, tmp_path, capsys, case):
    write, more, message = BAD[case]
    write(tmp_path / "in.safetensors")
    more = [str(models.stage_c) if item == "STAGE" else item for item in more]
    assert run_tool(main, tmp_path / "in.safetensors", tmp_path / "out.safetensors", *more) == 2
    printed = capsys.readouterr()
    assert message in printed.err + printed.out
    assert not (tmp_path / "out.safetensors").exists()
