from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from library.errors import UserError
from library.models.clip_text import encode_tokens, make_text_encoder
from library.models.specs import SD_V1_TOKENIZER
from library.models.token_rows import TokenRows, add_words, embedding_widths, typical_rows
from library.models.tokenizer import ClipTokenizer

CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
}
FIRST = 49408


def encoder(dtype=torch.float32, width=16):
    torch.manual_seed(0)
    made = make_text_encoder({**CONFIG, "hidden_size": width}).to(dtype)
    return made.requires_grad_(False).eval()


def family(*encoders):
    tokenizers = tuple(ClipTokenizer(SD_V1_TOKENIZER) for _ in encoders)
    return SimpleNamespace(text_encoders=encoders, tokenizers=tokenizers)


def ids_of(tokenizer, *texts):
    return torch.from_numpy(np.stack([tokenizer.encode(text)[0] for text in texts]))


def enlarged(encoder, rows):
    """What other programs do: a larger table."""
    table = nn.Embedding(FIRST + len(rows), rows.shape[1])
    table.weight = nn.Parameter(torch.cat([encoder.get_input_embeddings().weight.detach(), rows.to(encoder.dtype)]))
    encoder.text_model.embeddings.token_embedding = table
    return encoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_as_a_larger_table(dtype):
    rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)) * 0.02
    spliced, larger = encoder(dtype), enlarged(encoder(dtype), rows)
    made = family(spliced)
    (module,) = add_words(made, {"zshs": (rows,)})
    ids = ids_of(made.tokenizers[0], "a zshs cat", "a dog", "zshs1")
    assert ids.max() == FIRST + 1
    for one in (spliced, larger):
        one.get_input_embeddings().weight.requires_grad_(one is larger)
    found, wanted = encode_tokens(spliced, ids), encode_tokens(larger, ids)
    assert torch.equal(found, wanted)
    for result in (found, wanted):
        result.float().square().sum().backward()
    gradient = larger.get_input_embeddings().weight.grad[FIRST:]
    assert module.rows.dtype == torch.float32
    tolerance = 1e-6 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(module.rows.grad, gradient.float(), rtol=tolerance, atol=1e-6)
    assert spliced.get_input_embeddings().weight.grad is None


def test_only_the_rows_are_parameters_and_nothing_is_registered_in_the_encoder():
    made = family(encoder())
    names = set(made.text_encoders[0].state_dict())
    (module,) = add_words(made, {"zshs": (torch.zeros(3, 16),)})
    assert [tuple(parameter.shape) for parameter in module.parameters()] == [(3, 16)]
    assert set(made.text_encoders[0].state_dict()) == names


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_the_same_under_checkpointing(autocast):
    gradients = []
    for checkpointing in (False, True):
        made = family(encoder())
        (module,) = add_words(made, {"zshs": (torch.full((1, 16), 0.02),)})
        if checkpointing:
            made.text_encoders[0].enable_gradient_checkpointing()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            hidden = encode_tokens(made.text_encoders[0], ids_of(made.tokenizers[0], "a zshs cat"))
        hidden.float()[0, :, 0].sum().backward()
        gradients.append(module.rows.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_rows_that_do_not_occur_get_zeros_as_gradient():
    made = family(encoder())
    (module,) = add_words(made, {"zshs": (torch.ones(2, 16),)})
    encode_tokens(made.text_encoders[0], ids_of(made.tokenizers[0], "a zshs1 cat")).sum().backward()
    assert module.rows.grad[0].eq(0).all() and module.rows.grad[1].abs().sum() > 0
    module.zero_grad()
    encode_tokens(made.text_encoders[0], ids_of(made.tokenizers[0], "a cat")).sum().backward()
    assert module.rows.grad.eq(0).all()


def test_words_are_added_one_after_the_other():
    made = family(encoder())
    rows = [torch.full((count, 16), float(count)) for count in (1, 2, 3)]
    add_words(made, {"zaa": (rows[0],), "zbb": (rows[1],)})
    add_words(made, {"zcc": (rows[2],)})
    ids = torch.tensor(made.tokenizers[0].token_ids("zcc zaa zbb cat"))
    found = made.text_encoders[0].get_input_embeddings()(ids)
    assert found[:, 0].tolist()[:6] == [3, 3, 3, 1, 2, 2]
    assert torch.equal(found[6], made.text_encoders[0].get_input_embeddings().weight[ids[6]])


def test_several_encoders_have_rows_of_their_own():
    made = family(encoder(), encoder(width=32))
    first, second = add_words(made, {"zshs": (torch.ones(2, 16), torch.ones(2, 32) * 2)})
    assert embedding_widths(made) == (16, 32)
    assert (first.rows.shape, second.rows.shape) == ((2, 16), (2, 32))
    for one, value in zip(made.text_encoders, (1, 2), strict=True):
        assert one.get_input_embeddings()(torch.tensor([FIRST + 1])).unique().tolist() == [value]


def test_vectors_that_do_not_fit_change_nothing():
    made = family(encoder())
    before = made.tokenizers
    with pytest.raises(UserError, match="a.pt: the vectors of 'zshs' have 24 values, but this model's have 16"):
        add_words(made, {"zshs": (torch.ones(2, 24),)}, where="a.pt")
    with pytest.raises(UserError, match="--token_string: the word 'cat'"):
        add_words(made, {"cat": (torch.ones(2, 16),)})
    assert made.tokenizers is before
    assert made.text_encoders[0].get_input_embeddings()(torch.tensor([5])).shape == (1, 16)
    with pytest.raises(UserError, match="not as many"):
        add_words(family(encoder(), encoder()), {"zshs": (torch.ones(2, 16), torch.ones(1, 16))})


def test_typical_rows_are_like_words_and_depend_on_seeds_alone():
    table = nn.Embedding(500, 8)
    with torch.no_grad():
        table.weight.mul_(0.02).add_(1.0)
    rows = typical_rows(table, range(400))
    assert torch.allclose(rows.mean(0), table.weight.mean(0), atol=0.01)
    assert torch.allclose(rows.std(0), table.weight.std(0), rtol=0.2)
    assert torch.equal(rows[7], typical_rows(table, [7])[0])


def test_rows_follow_their_encoder_to_another_type():
    module = TokenRows(torch.ones(1, 4, dtype=torch.float16), 3)
    assert module.rows.dtype == torch.float32
    known = torch.zeros(2, 4, dtype=torch.bfloat16)
    assert module(torch.tensor([2, 3]), known).dtype == torch.bfloat16
