"""Embedding files of ours mean in diffusers what they mean here: the same prompt, the same hidden states."""

from pathlib import Path

import pytest
import torch

from library.checkpoints.embedding_file import read_embedding, write_embedding
from library.models.family import WeightPlan
from library.models.options import MemoryOptions, ModelOptions, TextOptions
from library.models.random_models import make_random_sd
from library.models.sd import StableDiffusion
from library.models.specs import SD1
from library.models.token_rows import add_words, embedding_widths
from tests.compat.test_saved_folders import LIBRARIES, read_child

pytestmark = pytest.mark.compat

CHILD = Path(__file__).with_name("load_embeddings.py")
PROMPT = "a photo of zshs, cat"
CASES = {"a.safetensors": "emb_params", "b.pt": "emb_params", "c.safetensors": "zshs", "d.pt": "zshs"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("embeddings")
    rows = {"clip_l": torch.randn(3, 64, generator=torch.Generator().manual_seed(1)) * 0.02}
    files = {}
    for name, tensor_name in CASES.items():
        path = write_embedding(root / name, rows, {}, tensor_name=tensor_name)
        files[name] = str(path), None if tensor_name == "zshs" else "zshs", PROMPT
    return str(make_random_sd(root / "model", layout="diffusers_safetensors")), files


@pytest.fixture(scope="module")
def expected(made):
    """Ids and hidden states by this toolkit."""
    folder, files = made
    model = ModelOptions(pretrained_model_name_or_path=folder)
    family = StableDiffusion.load(model, TextOptions(), MemoryOptions(), spec=SD1, weights=WeightPlan(trained=()))
    embedding = read_embedding(files["a.safetensors"][0])
    add_words(family, {"zshs": embedding.rows_for(embedding_widths(family))})
    ids = torch.from_numpy(family.tokenizers[0].encode(PROMPT)[0])[None]
    with torch.no_grad():
        return ids.flatten().tolist()[:12], family.encode_text((ids,)).hidden[0].flatten()


@pytest.mark.parametrize("libraries", LIBRARIES)
def test_a_prompt_means_the_same(made, expected, libraries):
    found = read_child(CHILD, *made, libraries=LIBRARIES[libraries])
    ids, hidden = expected
    for name in CASES:
        assert found[name]["ids"] == ids
        torch.testing.assert_close(torch.tensor(found[name]["hidden"]), hidden, rtol=1e-4, atol=1e-5)
