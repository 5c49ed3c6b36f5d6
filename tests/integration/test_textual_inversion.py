"""train_textual_inversion.py from command line to file: the vectors of the word learn, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from library.checkpoints.embedding_file import read_embedding, write_embedding
from library.contracts import StepKey
from library.draws import Draws
from library.models.sd import StableDiffusion
from library.models.specs import SD_V1_TOKENIZER
from library.models.tokenizer import ClipTokenizer
from library.training.methods.inversion_templates import object_sentences, style_sentences
from library.training.methods.textual_inversion import TextualInversion
from library.training.step import TrainStep
from tests.conftest import PHOTOS
from tests.support import train_textual_inversion

WORD = "zshs"


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two photographs of 64x64 pixels whose captions are the name of their folder."""
    folder = tmp_path / "photos" / f"4_a {WORD} duck"
    folder.mkdir(parents=True)
    for number in range(2):
        with Image.open(PHOTOS / "duck" / f"0{number}.jpg") as photo:
            photo.convert("RGB").resize((64, 64)).save(folder / f"{number}.png")
    return folder.parent


def options(model: Path, photos: Path, out: Path, *more: object) -> list[object]:
    return [
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={photos}",
        f"--output_dir={out}",
        "--resolution=64",
        f"--token_string={WORD}",
        "--save_model_as=safetensors",
        "--learning_rate=0.05",
        "--max_train_steps=2",
        "--max_data_loader_n_workers=0",
        "--seed=3",
        *more,
    ]


@pytest.fixture
def seen(monkeypatch):
    """The captions of all micro-steps, the last batch, and the method with the values that it began with."""
    record = {"captions": [], "ids": []}
    forward, attach = TrainStep.forward, TextualInversion.attach

    def step(self, batch):
        result = forward(self, batch)
        record["step"], record["batch"] = self, batch
        record["captions"] += batch.captions
        record["ids"].append(batch.token_ids[0])
        return result

    def note(self):
        record["method"], record["begun"] = self, self.rows[0].rows.detach().clone()
        attach(self)

    monkeypatch.setattr(TrainStep, "forward", step)
    monkeypatch.setattr(TextualInversion, "attach", note)
    return record


def rows_of(path: Path) -> torch.Tensor:
    return read_embedding(path).rows["clip_l"]


def loss_with(seen, begun=False):
    """The loss of the vectors, or of what they began with, on the last batch at timesteps and noises that are fixed."""
    step, batch, rows = seen["step"], seen["batch"], seen["method"].rows[0].rows
    now = rows.detach().clone()
    with torch.no_grad():
        rows.copy_(seen["begun"] if begun else now)
        draws = [Draws(0, StepKey(number, 0), batch.size, torch.device("cpu")) for number in range(8)]
        losses = [step.losses(batch, draw, 950)[0].mean().item() for draw in draws]
        rows.copy_(now)
    return sum(losses)


def test_the_word_learns_and_the_model_stays_as_it_is(tiny_sd1, photos, tmp_path, seen, monkeypatch):
    weights = {}
    load = StableDiffusion.load.__func__

    def loading(cls, *args, **kwargs):
        family = load(cls, *args, **kwargs)
        for part, module in family.parts().items():
            weights.update({f"{part}.{name}": tensor.clone() for name, tensor in module.state_dict().items()})
        return family

    monkeypatch.setattr(StableDiffusion, "load", classmethod(loading))
    more = ("--num_vectors_per_token=4", "--init_word=dog", "--train_batch_size=2", "--cache_latents")
    more += ("--min_timestep=900", "--max_train_steps=60", "--save_every_n_steps=20", "--learning_rate=0.006")
    more += ("--lr_scheduler=cosine",)
    assert train_textual_inversion(*options(tiny_sd1, photos, tmp_path / "out", *more)) == 0
    assert loss_with(seen) < 0.992 * loss_with(seen, begun=True)
    family = seen["method"].family
    for part, module in family.parts().items():
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, weights[f"{part}.{name}"]), name
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in module.parameters())
    rows = rows_of(tmp_path / "out" / f"{WORD}.safetensors")
    assert rows.shape == (4, 64) and rows.dtype == torch.float32
    assert not torch.equal(rows, rows_of(tmp_path / "out" / f"{WORD}-step00000020.safetensors"))
    assert torch.equal(rows, seen["method"].rows[0].rows)
    assert {tuple(parameter.shape) for group in seen["method"].param_groups() for parameter in group.params} == {
        (4, 64)
    }


def first_rows(model, photos, tmp_path, name, *more):
    argv = options(model, photos, tmp_path / name, "--optimizer_type=SGD", "--learning_rate=1e-12", *more)
    assert train_textual_inversion(*argv) == 0
    return rows_of(tmp_path / name / f"{WORD}.safetensors")


def test_what_the_vectors_begin_with(tiny_sd1, photos, tmp_path, seen, caplog):
    many = first_rows(tiny_sd1, photos, tmp_path, "many", "--init_word=dog cat", "--num_vectors_per_token=3")
    table = seen["method"].family.text_encoder.get_input_embeddings().weight
    dog, cat = (table[ClipTokenizer(SD_V1_TOKENIZER).token_ids(word)[0]] for word in ("dog", "cat"))
    torch.testing.assert_close(many, torch.stack([dog, cat, dog]))
    assert "has 2 tokens for 3 vectors, so several begin alike" in caplog.text
    torch.testing.assert_close(first_rows(tiny_sd1, photos, tmp_path, "one", "--init_word=dog cat"), dog[None])
    assert "has 2 tokens, of which only the first of them begins a vector" in caplog.text
    random = first_rows(tiny_sd1, photos, tmp_path, "random")
    assert 0.5 < (random.std() / table.std()).item() < 2
    torch.testing.assert_close(random, first_rows(tiny_sd1, photos, tmp_path, "again"))
    assert not torch.allclose(random, first_rows(tiny_sd1, photos, tmp_path, "other", "--seed=4"))
    start = torch.randn(2, 64)
    file = write_embedding(tmp_path / "start.pt", {"clip_l": start})
    found = first_rows(tiny_sd1, photos, tmp_path, "file", f"--weights={file}", "--num_vectors_per_token=2")
    torch.testing.assert_close(found, start)


def test_templates_take_the_place_of_captions(tiny_sd1, photos, tmp_path, seen, capsys):
    regularization = tmp_path / "regularization" / "1_duck"
    regularization.mkdir(parents=True)
    shutil.copy(photos / f"4_a {WORD} duck" / "0.png", regularization / "0.png")
    argv = options(
        tiny_sd1, photos, tmp_path / "out", f"--reg_data_dir={regularization.parent}", "--max_train_steps=16"
    )
    argv += ["--num_vectors_per_token=2", "--use_object_template", "--use_style_template"]
    assert train_textual_inversion(*argv) == 0
    captions = set(seen["captions"])
    assert "duck" in captions
    assert captions - {"duck"} < set(object_sentences(WORD)) and len(captions) > 5
    with_word = [ids for ids in torch.cat(seen["ids"]).flatten(1).tolist() if 49408 in ids]
    assert with_word and all(ids[ids.index(49408) + 1] == 49409 for ids in with_word)
    assert "--use_style_template: has no effect" in capsys.readouterr().err


def test_templates_are_those_that_everybody_uses():
    objects, styles = object_sentences("{}"), style_sentences("{}")
    assert (len(objects), len(set(objects)), len(styles), len(set(styles))) == (27, 27, 19, 17)
    assert {"a photo of a {}", "a photo of one {}", "a rendition of the {}", "a dark photo of the {}"} <= set(objects)
    assert {"a painting in the style of {}", "a weird painting in the style of {}"} <= set(styles)


def test_the_files(tiny_sd2_v, photos, tmp_path):
    argv = options(tiny_sd2_v, photos, tmp_path / "out", "--v2", "--v_parameterization", "--save_precision=fp16")
    argv += ["--save_tensor_name=token", "--metadata_author=me", "--gradient_checkpointing", "--mixed_precision=bf16"]
    assert train_textual_inversion(*argv) == 0
    with safe_open(tmp_path / "out" / f"{WORD}.safetensors", "pt") as file:
        metadata = file.metadata()
        assert list(file.keys()) == [WORD]
        assert file.get_tensor(WORD).dtype == torch.float16
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/textual-inversion"
    assert metadata["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert (metadata["modelspec.title"], metadata["modelspec.author"]) == (WORD, "me")
    assert metadata["ss_token_string"] == WORD and metadata["ss_steps"] == "2"
    assert str(tmp_path) not in json.dumps(metadata)


def test_the_usual_file_and_its_name(tiny_sd1, photos, tmp_path):
    argv = [item for item in options(tiny_sd1, photos, tmp_path / "out", "--log_config") if "save_model_as" not in item]
    argv += [f"--logging_dir={tmp_path / 'logs'}", "--token_string=<zshs>", "--use_style_template", "--save_state"]
    assert train_textual_inversion(*argv) == 0
    content = torch.load(tmp_path / "out" / "_zshs_.pt", weights_only=True)
    assert type(content) is dict and content["emb_params"].shape == (1, 64)
    assert (tmp_path / "out" / "_zshs_-state").is_dir()
    (run,) = (tmp_path / "logs").iterdir()
    assert (run / "textual_inversion").is_dir()


def test_samples_know_the_word(tiny_sd1, photos, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text(f"a photo of {WORD} --w 64 --h 64 --s 1 --d 1\na photo of cat --w 64 --h 64 --s 1 --d 1\n")
    argv = options(tiny_sd1, photos, tmp_path / "out", f"--sample_prompts={prompts}", "--sample_every_n_steps=1")
    assert train_textual_inversion(*argv, "--learning_rate=5", "--sample_at_first") == 0
    pictures = sorted((tmp_path / "out" / "sample").glob("*.png"))
    assert len(pictures) == 6
    drawn = [Image.open(path).tobytes() for path in pictures]
    word, cat = drawn[0::2], drawn[1::2]
    assert len(set(word)) > 1 and len(set(cat)) == 1


def test_the_report_shows_the_templates(photos, tmp_path):
    argv = [item for item in options(tmp_path / "none", photos, tmp_path / "out") if "pretrained" not in str(item)]
    assert train_textual_inversion(*argv, "--debug_dataset", "--use_object_template", "--num_vectors_per_token=2") == 0
    report = json.loads((tmp_path / "out" / "dataset_report.json").read_text(encoding="utf-8"))
    (dataset,) = report["datasets"]
    assert {image["caption"] for image in dataset["images"]} <= set(object_sentences(WORD))
    assert all(49408 in sum(image["token_ids"], []) for image in dataset["images"])
