"""Outputs of frozen text encoders, cached and served in training: the same conditions as without a cache."""

from __future__ import annotations

import logging
import pickle
import shutil
import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.checkpoints.tensor_files import open_tensors, write_safetensors
from library.contracts import Position, RunLength
from library.data.loader import PlannedBatches, validation_batches
from library.data.opening import open_data
from library.data.options import CacheOptions, DatasetOptions, LoaderOptions, SubsetOptions
from library.errors import StopTraining, UserError
from library.inference.prompts import PromptRequest
from library.inference.render import DiffusionRenderer
from library.models.clip_text import TextEncoder
from library.models.family import WeightPlan
from library.models.options import MemoryOptions, ModelOptions, TextOptions
from library.models.sd import StableDiffusion
from library.models.specs import stable_diffusion_family
from library.models.tokenizer import tokenizers_for
from library.training import text_caching
from library.training.caching import fill_caches
from library.training.ranks import Ranks
from tests.support import tensor_digest

ASKED = CacheOptions(cache_text_encoder_outputs=True)
TO_DISK = CacheOptions(cache_text_encoder_outputs=True, cache_text_encoder_outputs_to_disk=True)
AUTOMATIC = CacheOptions()
PLAIN = TextOptions()
SUBSET = SubsetOptions()


@dataclass
class SmallRun:
    """What caching asks of a run."""

    opts: Any
    rank: int = 0
    world_size: int = 1
    ranks: Ranks = Ranks()
    frozen_dtype: torch.dtype = torch.float32
    asked_to_stop: bool = False
    entered: int = 0
    device: torch.device = torch.device("cpu")

    def __post_init__(self):
        self.local_rank, self.local_world_size = self.rank, self.world_size
        self.is_main = self.is_local_main = self.rank == 0
        self.broadcast = self.ranks.broadcast
        self.stop = SimpleNamespace(check=self._check)

    def _check(self, what):
        if self.asked_to_stop:
            raise StopTraining(what, 130)

    def autocast(self):
        self.entered += 1
        return nullcontext() if self.frozen_dtype == torch.float32 else torch.autocast("cpu", dtype=self.frozen_dtype)

    def barrier(self):
        self.ranks.gather(None)


class Bench:
    """A model and photographs, opened as a training script opens them."""

    def __init__(self, model: Path, photos: Path, family: str = "sd1"):
        self.model, self.photos = model, photos
        self.spec = stable_diffusion_family(family)

    def open(self, cache=AUTOMATIC, text=PLAIN, subset=SUBSET, config=None):
        data = DatasetOptions(train_data_dir=str(self.photos), dataset_config=config, resolution="64", batch_size=2)
        return open_data(
            data, subset, cache, spec=self.spec, kinds=("dreambooth",), tokenizers=tokenizers_for(self.spec, text)
        )

    def family(self, text=PLAIN, dtype=torch.float32, model=None):
        options = ModelOptions(pretrained_model_name_or_path=str(model or self.model), v2=self.spec.name == "sd2")
        weights = WeightPlan(trained=("unet",), frozen_dtype=dtype)
        return StableDiffusion.load(options, text, MemoryOptions(), spec=self.spec, weights=weights)

    def filled(self, cache=AUTOMATIC, text=PLAIN, subset=SUBSET, **changes):
        """Return data whose text caches are filled, and the family."""
        data, family = self.open(cache, text, subset), self.family(text, model=changes.pop("model", None))
        run = SmallRun(SimpleNamespace(text=text), **changes)
        fill_caches(run, family, data, frozen_text=True)
        return data, family


@pytest.fixture
def bench(tiny_sd1, photo_folders):
    return Bench(tiny_sd1, photo_folders)


def batches_of(data, epochs=2, workers=0, seed=3):
    length = RunLength(data.batch_count() * epochs, epochs, data.batch_count(), 1, 1, 1)
    loader = LoaderOptions(max_data_loader_n_workers=workers)
    return list(PlannedBatches(data, length, rank=0, seed=seed, loader=loader).iterate(Position()))


def hidden_of(family, batch):
    with torch.no_grad():
        return family.condition(batch, None).hidden


def same_conditions(cached, plain, family, atol=2e-5):
    assert len(cached) == len(plain) > 0
    for one, other in zip(cached, plain, strict=True):
        assert one.captions == other.captions and not one.token_ids and other.text_arrays is None
        first, second = hidden_of(family, one), hidden_of(family, other)
        assert first.shape == second.shape and torch.allclose(first, second, atol=atol, rtol=1e-4)
        assert second.std() > 0.1


VARIANTS = {
    "plain": TextOptions(),
    "two chunks, weights": TextOptions(max_token_length=150, weighted_captions=True),
    "clip skip": TextOptions(clip_skip=2),
    "no padding, weights": TextOptions(no_token_padding=True, weighted_captions=True),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cache", [AUTOMATIC, TO_DISK], ids=["memory", "disk"])
def test_cached_conditions_are_those_of_the_step(bench, name, cache):
    text = VARIANTS[name]
    for number, path in enumerate(sorted(bench.photos.glob("*/*.caption"))):
        path.write_text(f"a (photo:1.{number}) of [sks] duck" + " on grass" * number)
    subset = SubsetOptions(caption_dropout_rate=0.3)
    data, family = bench.filled(cache, text, subset)
    plain = batches_of(bench.open(text=text, subset=subset))
    assert {caption for batch in plain for caption in batch.captions} > {""}
    same_conditions(batches_of(data), plain, family)


def test_stable_diffusion_2(tiny_sd2, photo_folders):
    bench = Bench(tiny_sd2, photo_folders, "sd2")
    data, family = bench.filled(TO_DISK)
    same_conditions(batches_of(data), batches_of(bench.open()), family)


def test_half_precision(bench):
    """bfloat16 is widened, float16 is kept; the U-Net sees what it would have seen."""
    data = bench.open()
    family = bench.family(dtype=torch.bfloat16)
    run = SmallRun(SimpleNamespace(text=PLAIN), frozen_dtype=torch.bfloat16)
    fill_caches(run, family, data, frozen_text=True)
    assert run.entered == 4, "the empty caption for its shapes, then five in three batches"
    cached, plain = batches_of(data)[0], batches_of(bench.open())[0]
    assert cached.text_arrays["hidden_state1"].dtype == torch.float32
    with run.autocast():
        assert torch.allclose(hidden_of(family, cached).bfloat16(), hidden_of(family, plain).bfloat16(), atol=0.05)
    half = bench.open()
    run.frozen_dtype = torch.float16
    family.text_encoder.to(torch.float16)
    fill_caches(run, family, half, frozen_text=True)
    assert batches_of(half)[0].text_arrays["hidden_state1"].dtype == torch.float16


@pytest.mark.parametrize("cache", [AUTOMATIC, TO_DISK], ids=["memory", "disk"])
def test_workers_do_not_change_what_is_served(bench, cache):
    data, _ = bench.filled(cache, subset=SubsetOptions(caption_dropout_rate=0.3))
    alone, helped = batches_of(data), batches_of(data, workers=2)
    for one, other in zip(alone, helped, strict=True):
        assert one.captions == other.captions
        assert torch.equal(one.text_arrays["hidden_state1"], other.text_arrays["hidden_state1"])
    assert pickle.loads(pickle.dumps(data.catalogue.texts)).read(0, "")


def test_files_follow_captions_settings_and_weights(bench, tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def told(text=PLAIN, **changes):
        caplog.clear()
        bench.filled(TO_DISK, text, **changes)
        return next(message for message in caplog.messages if message.startswith("text encoder outputs: "))

    assert "0 reused, 5 to encode (5 not cached yet)" in told()
    assert len(list(bench.photos.glob("*/*_sd_te_outputs.npz"))) == 5
    assert "5 reused, 0 to encode" in told()
    next(iter(sorted(bench.photos.glob("*/*.caption")))).write_text("another text")
    assert "4 reused, 1 to encode (1 caption changed)" in told()
    next(iter(sorted(bench.photos.glob("*/*.npz")))).write_bytes(b"PK broken")
    assert "4 reused, 1 to encode (1 unreadable)" in told()
    assert "5 to encode (5 other settings of captions)" in told(TextOptions(clip_skip=2))
    assert "5 to encode (5 other token length or width)" in told(TextOptions(max_token_length=150))
    told()
    assert "5 to encode (5 other settings of captions)" in told(TextOptions(weighted_captions=True))
    told()
    tensors = {name: tensor.clone() for name, tensor in open_tensors(bench.model).items()}
    changed = next(name for name in tensors if "final_layer_norm.bias" in name)
    tensors[changed] += 0.5
    write_safetensors(tmp_path / "other.safetensors", tensors, {})
    assert "5 to encode (5 other text encoder)" in told(model=tmp_path / "other.safetensors")


def test_weights_merged_in_memory_count(bench, caplog):
    caplog.set_level(logging.INFO)
    bench.filled(TO_DISK)
    data, family = bench.open(TO_DISK), bench.family()
    with torch.no_grad():
        family.text_encoder.text_model.final_layer_norm.bias.add_(0.5)
    fill_caches(SmallRun(SimpleNamespace(text=PLAIN)), family, data, frozen_text=True)
    assert any("5 other text encoder" in message for message in caplog.messages)


def test_two_ranks_share_work_and_memory(bench):
    gate, box = threading.Barrier(2, timeout=60), {}

    def gather_as(rank):
        def gather(value):
            box[rank] = value
            gate.wait()
            found = [box[0], box[1]]
            gate.wait()
            return found

        return gather

    def rank_run(rank):
        gather = gather_as(rank)
        ranks = Ranks(rank, 2, gather, lambda value: gather(value)[0])
        return SmallRun(SimpleNamespace(text=PLAIN), rank=rank, world_size=2, ranks=ranks)

    parts, families, counts = [bench.open(), bench.open()], [bench.family(), bench.family()], [0, 0]
    for rank, family in enumerate(families):
        family.text_encoder.register_forward_hook(
            lambda module, inputs, output, rank=rank: counts.__setitem__(rank, counts[rank] + len(output))
        )

    def work(rank):
        fill_caches(rank_run(rank), families[rank], parts[rank], frozen_text=True)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Each rank encodes the empty caption to learn the shapes; the four captions and the empty one are shared out.
    assert sorted(counts) == [3, 4]
    plain = batches_of(bench.open())
    for part in parts:
        same_conditions(batches_of(part), plain, families[0])


def test_the_validation_part_is_cached_too(bench, tmp_path):
    config = tmp_path / "data.toml"
    config.write_text(
        "[general]\nresolution = 64\ncaption_extension = '.caption'\n[[datasets]]\nvalidation_split = 0.4\n"
        f"[[datasets.subsets]]\nimage_dir = '{bench.photos}/2_sks duck'\ncaption_dropout_rate = 0.5\n"
    )
    plain = bench.open(config=str(config))
    data, family = bench.open(TO_DISK, config=str(config)), bench.family()
    assert data.validation is not None
    fill_caches(SmallRun(SimpleNamespace(text=PLAIN)), family, data, frozen_text=True)
    same_conditions(list(validation_batches(data.validation, 1)), list(validation_batches(plain.validation, 1)), family)
    assert all("" not in batch.captions for batch in validation_batches(data.validation, 1))
    same_conditions(batches_of(data), batches_of(plain), family)


# When captions are not cached


def uncached(data):
    return all(batch.text_arrays is None and batch.token_ids for batch in batches_of(data))


def test_too_many_captions_for_memory(bench, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(text_caching, "AUTOMATIC_BYTES", 77 * 64 * 4 * 3)
    data, _ = bench.filled()
    assert uncached(data)
    assert any("runs in every step: the outputs for 4 captions need" in message for message in caplog.messages)
    for cache in (ASKED, TO_DISK):
        assert not uncached(bench.filled(cache)[0])


def test_no_room_for_memory(bench, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("library.data.mapped_file._reserve", refuse)
    assert uncached(bench.filled()[0])
    assert any("runs in every step: --cache_text_encoder_outputs: cannot reserve" in text for text in caplog.messages)
    with pytest.raises(UserError, match="cannot reserve .* for texts"):
        bench.filled(ASKED)


VARYING = {
    "shuffle_caption": {"shuffle_caption": True},
    "caption_tag_dropout_rate": {"caption_tag_dropout_rate": 0.1},
    "token_warmup_step": {"token_warmup_step": 0.5},
    "enable_wildcard": {"enable_wildcard": True},
}


@pytest.mark.parametrize("name", VARYING)
def test_captions_that_vary(bench, name):
    subset = SubsetOptions(**VARYING[name])
    assert uncached(bench.filled(subset=subset)[0])
    for cache in (ASKED, TO_DISK):
        with pytest.raises(UserError) as raised:
            bench.open(cache, subset=subset)
        texts = [str(problem) for problem in raised.value.problems]
        assert len(texts) == 2 and all(name in text and "--cache_text_encoder_outputs" in text for text in texts)
        assert {Path(problem.where).name for problem in raised.value.problems} == {"2_sks duck", "1_sks bear"}


def test_encoders_that_train(bench):
    run = SmallRun(SimpleNamespace(text=PLAIN))
    data = bench.open()
    fill_caches(run, bench.family(), data)
    assert uncached(data)
    with pytest.raises(UserError, match="--cache_text_encoder_outputs: the text encoder is trained"):
        fill_caches(run, bench.family(), bench.open(ASKED))


class Batches:
    """A data set class of a user, as `--dataset_class` names it."""

    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset):
        """Called as sd-scripts calls it."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"images": torch.zeros(1, 3, 64, 64), "captions": [f"text {index}"]}


def test_batches_of_a_users_class_are_left_alone(bench, caplog, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    data = open_data(
        DatasetOptions(dataset_class="test_text_caches.Batches", resolution="64"),
        SubsetOptions(),
        ASKED,
        spec=bench.spec,
        kinds=("dreambooth",),
        tokenizers=tokenizers_for(bench.spec, PLAIN),
    )
    family = bench.family()
    fill_caches(SmallRun(SimpleNamespace(text=PLAIN)), family, data, frozen_text=True)
    assert uncached(data)
    assert any("--cache_text_encoder_outputs: has no effect on the batches" in text for text in caplog.messages)


def test_a_signal_ends_caching_and_finished_files_count(bench):
    with pytest.raises(StopTraining, match="caching text encoder outputs"):
        bench.filled(TO_DISK, asked_to_stop=True)
    data, _ = bench.filled(TO_DISK)
    assert not uncached(data)


# The encoder afterwards


def test_a_parked_encoder_still_encodes_prompts(bench):
    request = PromptRequest(prompt="a (duck:1.2)", width=64, height=64, steps=2, seed=1)
    _, parked = bench.filled()
    pictures = [DiffusionRenderer(family).render([request])[0].tobytes() for family in (parked, bench.family())]
    assert pictures[0] == pictures[1]


def test_a_parked_encoder_comes_back_to_the_device_of_the_model(bench):
    data, family = bench.filled()
    family.weights = replace(family.weights, device=torch.device("meta"))
    family.park_text_encoders()
    assert family.text_encoder.device.type == "cpu"
    assert hidden_of(family, batches_of(data)[0]).device.type == "meta"
    assert family.text_encoder.device.type == "cpu", "a cached condition needs no encoder"
    tokens = torch.from_numpy(family.tokenizers[0].encode("a duck")[0])[None]
    assert family.encode_text((tokens,)).hidden.device.type == "meta"


def test_a_resumed_run_ends_with_the_same_bits(train_db, base_options, tmp_path):
    frozen = (*base_options, "--stop_text_encoder_training=-1", "--train_batch_size=2")
    assert train_db(*frozen, "--save_state", "--save_every_n_steps=2", "--save_precision=float") == 0
    straight = tmp_path / "straight"
    shutil.move(tmp_path / "out", straight)
    assert train_db(*frozen, f"--resume={straight / 'duck-step00000002-state'}", "--save_precision=float") == 0
    assert tensor_digest(tmp_path / "out" / "duck.safetensors") == tensor_digest(straight / "duck.safetensors")


def final_weights(folder):
    return dict(open_tensors(folder / "duck.safetensors").items())


def test_training_with_a_frozen_encoder_does_not_run_it(train_db, base_options, tmp_path, monkeypatch):
    calls = []
    forward = TextEncoder.forward

    def counted(self, input_ids, skip=0):
        calls.append(len(input_ids))
        return forward(self, input_ids, skip)

    monkeypatch.setattr(TextEncoder, "forward", counted)
    frozen = (*base_options, "--stop_text_encoder_training=-1", "--train_batch_size=2", "--max_train_steps=4")
    assert train_db(*frozen) == 0
    # Shapes are learned from the empty caption; then it and four captions are encoded, two at a time.
    assert sorted(calls) == [1, 1, 2, 2]
    calls.clear()
    monkeypatch.setattr(text_caching, "AUTOMATIC_BYTES", 0)
    shutil.move(tmp_path / "out", tmp_path / "cached")
    assert train_db(*frozen) == 0
    assert calls == [1, 2, 2, 2, 2]
    cached, plain = final_weights(tmp_path / "cached"), final_weights(tmp_path / "out")
    assert cached.keys() == plain.keys()
    for name, tensor in cached.items():
        assert torch.allclose(tensor, plain[name], atol=1e-4), name
