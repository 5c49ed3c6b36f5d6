"""Tokens that are trained beside a network: what the patterns find, what rows begin with, what files hold."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from library.checkpoints.embedding_file import read_embedding
from library.errors import UserError
from library.models.cascade.specs import STAGE_C
from library.models.cascade.text import make_projected_text_encoder
from library.models.options import TextOptions
from library.models.random_cascade import TINY_TEXT
from library.models.token_rows import ChangedRows
from library.models.tokenizer import vocabulary
from library.option_values import BadValue
from library.training.options_tokens import TokenOptions, token_list
from library.training.train_tokens import TokenPlan, TrainedTokens, match_tokens

DOG = 1929


def plan(*items, **options):
    found = TokenPlan.of(TokenOptions(train_tokens=items, **options), TextOptions(), STAGE_C)
    assert found is not None
    return found


def encoder(dtype=torch.float32):
    torch.manual_seed(0)
    made = make_projected_text_encoder(TINY_TEXT).to(dtype)
    return made.requires_grad_(False).eval()


def family(text_encoder):
    return SimpleNamespace(text_encoders=(text_encoder,), tokenizers=())


def attached(*items, dtype=torch.float32, **options):
    """(Tokens attached to an encoder, the encoder, ids of a text)."""
    text_encoder = encoder(dtype)
    tokens = TrainedTokens(plan(*items, **options))
    model = family(text_encoder)
    tokens.attach(model, 3)

    def ids(text):
        return torch.from_numpy(model.tokenizers[0].encode(text)[0])

    return tokens, text_encoder, ids


@pytest.mark.parametrize(("pattern", "count"), [("^dog</w>", 1), ("^dog", 15), ("dog", 26), ("^snail", 2)])
def test_patterns_search_the_vocabulary_s_own_spelling(pattern, count):
    (token,) = match_tokens(TokenOptions(train_tokens=(pattern,)))
    assert (len(token.found), token.rows, token.row) == (count, token.found, None)
    (new,) = match_tokens(TokenOptions(train_tokens=(f"[x]={pattern}",)))
    assert (new.found, new.rows) == (token.found, (49408,))


def test_new_words_are_numbered_and_known_tokens_never_match_them():
    tokens = match_tokens(TokenOptions(train_tokens=("[dogzz]=^dog</w>", "^dog</w>", "<two>")))
    assert [token.rows for token in tokens] == [(49408,), (DOG,), (49409,)]


def test_pairs_of_a_configuration():
    given = [["[fernando]", "^dog</w>"], ["[other]", None], ["^snail</w>", None]]
    assert token_list(given) == ("[fernando]=^dog</w>", "[other]", "^snail</w>")
    with pytest.raises(BadValue, match="give null"):
        token_list([["snail", "dog"]])
    with pytest.raises(BadValue, match="expected a token"):
        token_list([["snail"]])


BAD = {
    "^notinthevocabulary": "no token of the vocabulary matches",
    "a": "tokens match",
    "^(dog": "is no regular expression",
    "[x]=(": "is no regular expression",
    "slow": "takes too long",
}


@pytest.mark.parametrize("item", BAD)
def test_bad_patterns_are_named(item, monkeypatch):
    monkeypatch.setattr("library.models.token_choice._SECONDS", 0 if "too long" in BAD[item] else 10)
    with pytest.raises(UserError) as caught:
        match_tokens(TokenOptions(train_tokens=(item, "[y]")))
    assert len(caught.value.problems) == 1
    assert BAD[item] in str(caught.value) and f"--train_tokens {item}" in str(caught.value)


def test_a_limit_can_be_raised():
    assert len(match_tokens(TokenOptions(train_tokens=("dog",), train_tokens_limit=26))[0].rows) == 26
    with pytest.raises(UserError, match="train_tokens_limit=26"):
        match_tokens(TokenOptions(train_tokens=("dog",), train_tokens_limit=25))


@pytest.mark.parametrize(
    ("item", "message"),
    [("[]", "names no token"), ("", "names no token"), ("[x]=", "no pattern after ="), ("x" * 201, "201 letters")],
)
def test_what_is_no_token_is_refused_by_the_options(item, message):
    assert message in " ".join(problem.what for problem in TokenOptions(train_tokens=(item,)).check())


def test_twice_the_same_word():
    (problem,) = TokenOptions(train_tokens=("[x]", "[x]=dog")).check()
    assert problem.what == "[x] is given twice"


def test_no_match_for_a_beginning_warns_and_begins_at_zero(caplog):
    with caplog.at_level(logging.WARNING):
        tokens, _, _ = attached("[x]=^notinthevocabulary")
    assert "begins at zero" in caplog.text
    assert not tokens.file_tensors()["bundle_emb.[x].clip_g"].any()


def test_captions_find_the_word_in_any_case_and_place():
    tokenizer = plan("[fernando]").tokenizers[0]
    assert tokenizer.token_ids("x[fernando]y") == [*tokenizer.token_ids("x"), 49408, *tokenizer.token_ids("y")]
    assert tokenizer.token_ids("a [Fernando] dog") == tokenizer.token_ids("a [fernando] dog")
    weighted = tokenizer.for_prompts(None, weighted=True)
    ids, weights = weighted.weighted_ids("a ([FERNANDO]:1.5)")
    assert ids[-1] == 49408 and weights[-1] == 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_begin_with_tokens_means_zeros_or_at_random(dtype):
    tokens, text_encoder, ids = attached("[one]=^dog</w>", "[mean]=^dog", "[zero]", "^snail</w>", dtype=dtype)
    table = text_encoder.get_input_embeddings().weight
    found = tokens.file_tensors()
    dogs = [number for word, number in vocabulary().items() if word.startswith("dog")]
    torch.testing.assert_close(found["bundle_emb.[one].clip_g"][0], table[DOG].float())
    torch.testing.assert_close(found["bundle_emb.[mean].clip_g"][0], table[dogs].float().mean(0))
    assert not found["bundle_emb.[zero].clip_g"].any()
    assert found["embeddings.indices"].tolist() == [49408, 49409, 49410, vocabulary()["snail</w>"]]
    assert not found["embeddings.embeddings"].any()
    # Nothing has changed yet, so texts of known words are what they were.
    look_up = text_encoder.get_input_embeddings()
    same = ids("a snail and a dog")
    assert torch.equal(look_up(same), torch.nn.functional.embedding(same, table))
    assert torch.equal(look_up(ids("[one]")), look_up(ids("dog")))
    random = [attached("[x]", train_tokens_init="random")[0].file_tensors()["bundle_emb.[x].clip_g"] for _ in range(2)]
    assert torch.equal(*random)
    assert 0.3 < random[0].std() / table.float().std() < 3


def test_only_the_rows_learn():
    tokens, text_encoder, ids = attached("[x]=^dog</w>", "^snail</w>")
    hidden, pooled = text_encoder(ids("a [x] with a snail"))
    (hidden.sum() + pooled.square().sum()).backward()
    (group,) = tokens.param_groups(0.1)
    (change,) = group.params
    assert (group.name, group.lr, tuple(change.shape)) == ("tokens", 0.1, (2, 32))
    assert change.grad.abs().sum(1).gt(0).all()
    assert all(parameter.grad is None for parameter in text_encoder.parameters())


def test_the_rows_of_one_table_equal_an_enlarged_one():
    """Splicing rows in is what putting them into the table would be."""
    table = torch.nn.Embedding(10, 4)
    rows = ChangedRows((10, 3), torch.randn(2, 4))
    rows.load_changes({3: torch.ones(4), 10: torch.full((4,), 2.0)})
    whole = torch.cat([table.weight.detach(), rows.values()[:1].detach()])
    whole[3] = rows.values()[1].detach()
    ids = torch.randint(0, 11, (5, 7), generator=torch.Generator().manual_seed(0))
    rows.attach(table)
    assert torch.equal(table(ids), whole[ids])


def test_known_rows_alone_leave_later_ids_as_they_are():
    table = torch.nn.Embedding(10, 4)
    rows = ChangedRows((3,), table.weight.detach()[[3]])
    rows.load_changes({3: torch.ones(4)})
    wanted = table.weight.detach().clone()
    wanted[3] += 1
    rows.attach(table)
    assert torch.equal(table(torch.arange(10)), wanted)


def test_files_bring_the_vectors_back(tmp_path):
    tokens, _, _ = attached("[x]=^dog</w>", "^snail</w>")
    (change,) = tokens.param_groups(1.0)[0].params
    with torch.no_grad():
        change.copy_(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
    tensors = tokens.file_tensors()
    again, _, _ = attached("[x]=^dog</w>", "^snail</w>")
    again.load(tensors, "x")
    assert all(torch.equal(tensor, again.file_tensors()[name]) for name, tensor in tensors.items())
    # A file of another program holds vectors of words alone.
    third, _, _ = attached("^snail</w>", "[x]=^dog</w>")
    third.load({name: tensor for name, tensor in tensors.items() if name.startswith("bundle_emb")}, "x")
    name = "bundle_emb.[x].clip_g"
    torch.testing.assert_close(third.file_tensors()[name], tensors[name])
    assert not third.file_tensors()["embeddings.embeddings"][0].any()
    tokens.save_beside(tmp_path / "lora.safetensors", None, {"modelspec.architecture": "stable-cascade/lora"})
    word = read_embedding(tmp_path / "lora_x.safetensors")
    assert np.array_equal(word.rows["clip_g"].numpy(), tensors[name].numpy())
    assert word.metadata["placeholder"] == "[x]"
    assert tokens.saved_beside == ("_x",)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"embeddings.embeddings": torch.zeros(2, 32), "embeddings.indices": torch.tensor([49408])}, "is damaged"),
        ({"embeddings.embeddings": torch.zeros(1, 31), "embeddings.indices": torch.tensor([49408])}, "have 31 values"),
        ({"bundle_emb.[x].clip_g": torch.zeros(1, 33)}, "have 33 values, but those of this model have 32"),
    ],
)
def test_files_with_words_that_do_not_fit_are_refused(tensors, message):
    with pytest.raises(UserError, match=f"lora.safetensors: .*{message}"):
        attached("[x]")[0].load(tensors, "lora.safetensors")


def test_what_patterns_find_is_told(caplog):
    with caplog.at_level(logging.INFO):
        match_tokens(TokenOptions(train_tokens=("[x]=^snail", "^dog")))
    assert "--train_tokens [x]=^snail: begins with the mean of snail</w>, snails</w>" in caplog.text
    assert "--train_tokens ^dog: trains dog</w>, dogs</w>, dog," in caplog.text and " and 3 more" in caplog.text


def test_new_words_that_no_caption_contains_are_told(caplog):
    tokens = plan("[one]", "[two]", "[three]", "^dog</w>")
    subsets = [SimpleNamespace(caption_prefix="[Three] ", caption_suffix=None)]
    table = SimpleNamespace(captions=lambda: ["a photo of [ONE]", "a dog"])
    tokens.check_data(SimpleNamespace(table=table, specs=[SimpleNamespace(subsets=subsets)]))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "--train_tokens: no caption contains [two], so nothing is learnt about it"
    ]


def test_rows_have_a_rate_of_their_own_if_it_is_given():
    assert attached("[x]")[0].param_groups(0.1)[0].lr == 0.1
    assert attached("[x]", embedding_lr=0.02)[0].param_groups(0.1)[0].lr == 0.02
    assert attached("[x]", embedding_lr=0.0)[0].param_groups(0.1)[0].lr == 0


def test_names_of_files_work_everywhere():
    assert TrainedTokens(plan("[a/b]", "<con>", "[c]")).saved_beside == ("_a_b", "_word2", "_c")
    assert TrainedTokens(plan("[a/b]", "<a/b>", "[A?b]")).saved_beside == ("_a_b", "_a_b_2", "_A_b_3")
    assert TrainedTokens(plan("[ema]")).saved_beside == ("_ema_1",)
