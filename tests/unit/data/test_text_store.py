import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from loading_helpers import FAMILY, bucketed, picture, some_pictures, training_data

from library.contracts import BatchKey, SampleKey, StepKey
from library.data import cache_files, text_caches, text_store
from library.data.cache_files import BrokenCache
from library.data.dataset_spec import SubsetSpec
from library.data.npz import NpzFile
from library.data.options import CacheOptions
from library.data.text_caches import TextLayout, caption_hash, read_texts
from library.data.text_store import EMPTY, TextMemory, TextRows, TextStore, plan_texts
from library.errors import UserError

TO_DISK = CacheOptions(cache_text_encoder_outputs=True, cache_text_encoder_outputs_to_disk=True)
ORIGIN = {"family": "sd1", "text_encoder": "weights", "clip_skip": None, "weighted": False}
SUFFIX = "_te_outputs"


def arrays_of(text, length=77):
    """A stand-in for text encoders: two arrays that tell texts apart."""
    seed = int(caption_hash(text)[:8], 16)
    hidden = np.random.default_rng(seed).standard_normal((length, 8)).astype(np.float32)
    return {"hidden_state1": hidden, "pool2": hidden[0, :3].astype(np.float16)}


class Filled:
    """Data with their text caches planned and filled."""

    def __init__(self, *parts, cache=None, origin=ORIGIN, length=77, fill=True):
        self.parts = parts
        cache = cache or parts[0].cache
        rules = replace(parts[0].cache_rules(SUFFIX), skip_check=cache.skip_cache_check)
        self.rows = TextRows([part.catalogue for part in parts], rules)
        self.layout = TextLayout.of(arrays_of("", length))
        to_disk = cache.cache_text_encoder_outputs_to_disk
        self.plan = plan_texts(self.rows, self.layout, origin, rules, to_disk=to_disk)
        memory = TextMemory.create(self.plan, self.layout)
        self.store = TextStore(self.rows, self.plan, memory, self.layout, origin)
        self.encoded = []
        for in_memory in (False, True) if fill else ():
            for job in (job for batch in self.plan.batches(2, in_memory=in_memory) for job in batch):
                text = self.rows.text(job.rows[0])
                self.encoded.append(text)
                self.store.store(job, arrays_of(text, length))
        for part, source in zip(parts, self.store.sources(trusting=cache.skip_cache_check), strict=True):
            part.use_texts(source)


def batch_of(data, rows, epoch=0, seed=0):
    samples = tuple(SampleKey(row, epoch, index, 0) for index, row in enumerate(rows))
    return data.dataset(seed, 1)[BatchKey(StepKey(0, 0), epoch, 0, True, False, 1.0, samples)]


def serves(batch, texts):
    assert not batch.token_ids and set(batch.text_arrays) == {"hidden_state1", "pool2"}
    for name, tensor in batch.text_arrays.items():
        expected = np.stack([arrays_of(text)[name] for text in texts])
        assert tensor.dtype == torch.from_numpy(expected).dtype and np.array_equal(tensor.numpy(), expected)


def caption(number):
    return f"picture {number}, red, blue"


def test_every_caption_is_kept_once_and_the_empty_one_always(tmp_path):
    rows = some_pictures(tmp_path)
    for row in rows[2:]:
        row["caption"] = "the same"
    data = training_data(rows, [bucketed(tmp_path)])
    filled = Filled(data)
    assert sorted(filled.encoded) == ["", caption(0), caption(1), "the same"]
    assert filled.plan.memory_bytes == 4 * filled.layout.slot_bytes
    assert filled.plan.describe() == "0 reused, 3 to encode (3 kept in memory)"
    serves(batch_of(data, [0, 3]), [caption(0), "the same"])


def test_what_is_served_is_the_processed_caption(tmp_path):
    subset = {"caption_prefix": "a", "caption_suffix": "end", "secondary_separator": ";;"}
    rows = some_pictures(tmp_path, 3, caption="one;;two\nother line")
    data = training_data(rows, [bucketed(tmp_path, **subset)])
    Filled(data)
    batch = batch_of(data, [0])
    assert batch.captions == ("a one,two",)
    serves(batch, ["a one,two"])


@pytest.mark.parametrize("setting", [{"caption_dropout_rate": 1.0}, {"caption_dropout_every_n_epochs": 1}])
@pytest.mark.parametrize("cache", [CacheOptions(cache_text_encoder_outputs=True), TO_DISK])
def test_dropped_captions_get_the_empty_one(tmp_path, setting, cache):
    data = training_data(some_pictures(tmp_path), [bucketed(tmp_path, **setting)], cache=cache)
    Filled(data)
    serves(batch_of(data, [0, 3]), ["", ""])


def test_dropping_some_leaves_the_others(tmp_path):
    data = training_data(some_pictures(tmp_path), [bucketed(tmp_path, caption_dropout_rate=0.5)])
    Filled(data)
    found = [batch_of(data, [0, 3], seed=seed) for seed in range(10)]
    for batch in found:
        serves(batch, batch.captions)
    assert {text for batch in found for text in batch.captions} == {"", caption(0), caption(3)}


def test_workers_get_little_and_read_the_same_memory(tmp_path):
    rows = some_pictures(tmp_path)
    data = training_data(rows, [bucketed(tmp_path)])
    filled = Filled(data)
    assert len(pickle.dumps(filled.store.memory)) < 1000
    again = pickle.loads(pickle.dumps(data.catalogue.texts))
    assert np.array_equal(again.read(1, caption(1))["hidden_state1"], arrays_of(caption(1))["hidden_state1"])
    with pytest.raises(BrokenCache, match=cache_files.MISSING):
        again.read(1, "a caption that nobody encoded")


def test_unfilled_memory_serves_nothing(tmp_path):
    data = training_data(some_pictures(tmp_path, 1), [bucketed(tmp_path)])
    filled = Filled(data, fill=False)
    with pytest.raises(BrokenCache, match=cache_files.MISSING):
        filled.store.memory.read(caption_hash(""))


def test_parts_share_one_memory(tmp_path):
    rows = some_pictures(tmp_path, 6)
    rows[5]["caption"] = caption(0)
    train, kept_apart = (training_data(rows[start:end], [bucketed(tmp_path)]) for start, end in ((0, 3), (3, 6)))
    filled = Filled(train, kept_apart)
    assert len(filled.plan.numbers) == 6
    serves(batch_of(train, [2]), [caption(2)])
    serves(batch_of(kept_apart, [0]), [caption(3)])
    serves(batch_of(kept_apart, [2]), [caption(0)])


# Files


def test_files_are_reused_and_rebuilt_for_a_reason(tmp_path):
    rows = some_pictures(tmp_path)
    data = training_data(rows, [bucketed(tmp_path)], cache=TO_DISK)
    assert Filled(data).plan.reasons == {cache_files.MISSING: 6}
    assert len(list(tmp_path.glob(f"*{SUFFIX}.npz"))) == 6
    again = Filled(data)
    assert again.plan.describe() == "6 reused, 0 to encode" and again.encoded == [""]
    serves(batch_of(data, [0, 3]), [caption(0), caption(3)])

    def reasons(**origin):
        return Filled(data, origin={**ORIGIN, **origin}, fill=False).plan.reasons

    assert reasons(text_encoder="other") == {text_caches.OTHER_ENCODER: 6}
    assert reasons(clip_skip=2) == reasons(weighted=True) == {text_caches.OTHER_SETTINGS: 6}
    assert reasons(family="sdxl") == {cache_files.OTHER_FAMILY: 6}
    assert Filled(data, length=152, fill=False).plan.reasons == {text_caches.OTHER_LENGTH: 6}
    rows[2]["caption"] = "edited"
    (tmp_path / f"01{SUFFIX}.npz").write_bytes(b"")
    (tmp_path / f"04{SUFFIX}.npz").unlink()
    data = training_data(rows, [bucketed(tmp_path)], cache=TO_DISK)
    changed = Filled(data)
    assert sorted(changed.encoded) == sorted(["", "edited", caption(1), caption(4)])
    assert changed.plan.describe() == "3 reused, 3 to encode (1 unreadable, 1 caption changed, 1 not cached yet)"
    serves(batch_of(data, [2, 5]), ["edited", caption(5)])


def test_what_a_file_holds(tmp_path):
    data = training_data(some_pictures(tmp_path, 1), [bucketed(tmp_path)], cache=TO_DISK)
    Filled(data)
    with np.load(tmp_path / f"00{SUFFIX}.npz", allow_pickle=False) as file:
        assert set(file) == {"hidden_state1", "pool2", "meta_json"}
        assert file["hidden_state1"].shape == (77, 8) and file["pool2"].dtype == np.float16
        meta = json.loads(str(file["meta_json"][()]))
    assert meta == {"format": 1, "text": {**ORIGIN, "caption": caption_hash(caption(0))}}


def test_equal_captions_are_encoded_once_for_all_files(tmp_path):
    rows = some_pictures(tmp_path, 6, caption="a duck")
    for row in rows:
        row["caption"] = "a duck"
    data = training_data(rows, [bucketed(tmp_path)], cache=TO_DISK)
    assert Filled(data).encoded == ["a duck", ""]
    assert Filled(data).plan.reused == 6


def test_files_of_sd_scripts_are_taken_as_they_are(tmp_path):
    data = training_data(some_pictures(tmp_path, 3), [bucketed(tmp_path)], cache=TO_DISK)
    foreign = arrays_of("whatever it was")
    np.savez(tmp_path / f"00{SUFFIX}.npz", **{k: v.astype(np.float16) for k, v in foreign.items()})
    np.savez(tmp_path / f"01{SUFFIX}.npz", hidden_state1=foreign["hidden_state1"])
    filled = Filled(data)
    assert filled.plan.reused == filled.plan.unknown == 1 and "1 tell no origin" in filled.plan.describe()
    assert sorted(filled.encoded) == ["", caption(1), caption(2)]
    batch = batch_of(data, [0])
    assert torch.allclose(batch.text_arrays["hidden_state1"][0], torch.from_numpy(foreign["hidden_state1"]), atol=1e-2)


@pytest.mark.parametrize("second_caption", ["same", "other"])
def test_two_pictures_of_one_stem(tmp_path, second_caption):
    rows = [
        {"path": picture(tmp_path / "a.png", (64, 64)), "size_wh": (64, 64), "caption": "same"},
        {"path": picture(tmp_path / "a.jpg", (64, 64)), "size_wh": (64, 64), "caption": second_caption},
    ]
    data = training_data(rows, [bucketed(tmp_path)], cache=TO_DISK)
    for _ in range(2):
        plan = Filled(data).plan
        serves(batch_of(data, [0, 1]), ["same", second_caption])
    expected = {text_store.SHARED_NAME: 1} if second_caption == "other" else {}
    assert plan.reasons == expected and plan.reused == 1


def test_one_picture_in_two_subsets_with_other_prefixes(tmp_path):
    rows = some_pictures(tmp_path, 3)
    spec = bucketed(tmp_path)
    spec = replace(spec, subsets=(*spec.subsets, SubsetSpec(index=1, image_dir=str(tmp_path), caption_prefix="my")))
    data = training_data(rows + [row | {"subset": 1} for row in rows], [spec], cache=TO_DISK)
    assert Filled(data).plan.reasons == {cache_files.MISSING: 3, text_store.SHARED_NAME: 3}
    serves(batch_of(data, [0, 3]), [caption(0), "my " + caption(0)])


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch):
    data = training_data(some_pictures(tmp_path), [bucketed(tmp_path)], cache=TO_DISK)
    monkeypatch.setattr("library.files.check_writable_folder", lambda folder: ["no"])
    assert Filled(data).plan.reasons == {cache_files.READ_ONLY_FOLDER: 6}
    assert list(tmp_path.glob("*.npz")) == []
    serves(batch_of(data, [0, 3]), [caption(0), caption(3)])


def test_cache_dir_keeps_the_image_folder_clean(tmp_path):
    images = tmp_path / "10_cat"
    images.mkdir()
    cache = replace(TO_DISK, cache_dir=str(tmp_path / "cache"))
    data = training_data(some_pictures(images, 2), [bucketed(images)], cache=cache)
    Filled(data)
    assert list(images.glob("*.npz")) == []
    assert len(list((tmp_path / "cache/10_cat").glob(f"*{SUFFIX}.npz"))) == 2
    assert Filled(data).plan.reused == 2


def test_skip_cache_check_looks_at_names_only(tmp_path):
    rows = some_pictures(tmp_path, 3)
    Filled(training_data(rows, [bucketed(tmp_path)], cache=TO_DISK))
    rows[0]["caption"] = "edited"
    data = training_data(rows, [bucketed(tmp_path)], cache=replace(TO_DISK, skip_cache_check=True))
    assert Filled(data, origin={**ORIGIN, "clip_skip": 2}).plan.reused == 3
    serves(batch_of(data, [0]), [caption(0)])


def test_a_broken_file_is_replaced_set_aside_and_rebuilt_at_the_next_start(tmp_path):
    data = training_data(some_pictures(tmp_path), [bucketed(tmp_path)], cache=TO_DISK)
    Filled(data)
    path = tmp_path / f"00{SUFFIX}.npz"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    assert Filled(data).plan.reused == 6, "the start looks at headers only"
    batch = batch_of(data, [0])
    assert batch.captions == (caption(3),) and "bad CRC" in batch.replaced[0]
    serves(batch, [caption(3)])
    assert not path.exists() and path.with_name(path.name + ".corrupt").exists()
    assert Filled(data).plan.reasons == {cache_files.MISSING: 1}


def test_nothing_to_replace_a_broken_file_with(tmp_path):
    data = training_data(some_pictures(tmp_path, 1), [bucketed(tmp_path)], cache=TO_DISK)
    Filled(data)
    (tmp_path / f"00{SUFFIX}.npz").write_bytes(b"PK")
    batch = batch_of(data, [0])
    assert batch.loss_weight.tolist() == [0.0] and "left blank" in batch.replaced[0]
    serves(batch, [""])


def test_a_file_rewritten_for_another_caption_is_not_trained_on(tmp_path):
    rows = some_pictures(tmp_path)
    data = training_data(rows, [bucketed(tmp_path)], cache=TO_DISK)
    Filled(data)
    rows[0]["caption"] = "edited"
    Filled(training_data(rows, [bucketed(tmp_path)], cache=TO_DISK))
    batch = batch_of(data, [0])
    assert batch.captions == (caption(3),) and text_caches.CAPTION_CHANGED in batch.replaced[0]
    assert (tmp_path / f"00{SUFFIX}.npz").exists()


def test_damaged_files_never_give_other_values(tmp_path):
    data = training_data(some_pictures(tmp_path, 1), [bucketed(tmp_path)], cache=TO_DISK)
    filled = Filled(data)
    path = tmp_path / f"00{SUFFIX}.npz"
    whole, key = path.read_bytes(), caption_hash(caption(0))
    random = np.random.default_rng(0)
    refused = 0
    for trial in range(120):
        content = bytearray(whole)
        if trial % 2:
            content[random.integers(len(whole))] ^= 1 << random.integers(8)
        else:
            content = content[: random.integers(len(whole))]
        path.write_bytes(content)
        try:
            found = read_texts(str(path), filled.layout, key)
        except BrokenCache:
            refused += 1
        else:
            assert all(np.array_equal(found[name], array) for name, array in arrays_of(caption(0)).items())
    assert refused > 80


def test_outputs_that_are_not_finite_are_refused(tmp_path):
    data = training_data(some_pictures(tmp_path, 1), [bucketed(tmp_path)], cache=TO_DISK)
    filled = Filled(data, fill=False)
    (job,) = next(filled.plan.batches(1))
    arrays = {**arrays_of(""), "pool2": np.full(3, np.nan, np.float16)}
    with pytest.raises(UserError, match="picture 0.*--mixed_precision"):
        filled.store.store(job, arrays)
    assert list(tmp_path.glob("*.npz")) == []


@pytest.mark.parametrize("cache", [CacheOptions(cache_text_encoder_outputs=True), TO_DISK])
def test_batches_are_full_and_split_over_ranks(tmp_path, cache):
    path = picture(tmp_path / "p.png", (64, 64))
    rows = []
    for number in range(50):
        copy = tmp_path / f"{number}.png"
        copy.write_bytes(path.read_bytes())
        rows.append({"path": copy, "size_wh": (64, 64), "caption": f"text {number % 40}"})
    data = training_data(rows, [bucketed(tmp_path)], cache=cache)
    filled = Filled(data, fill=False)
    for world in (1, 2, 3):
        for in_memory in (False, True):
            shares = [list(filled.plan.batches(4, rank=r, world_size=world, in_memory=in_memory)) for r in range(world)]
            jobs = [job for share in shares for batch in share for job in batch]
            assert all(len(batch) == 4 for share in shares for batch in share[:-1])
            found = sorted(row for job in jobs for row in job.rows if row != EMPTY)
            if cache is TO_DISK:
                assert found == ([] if in_memory else list(range(50)))
            else:
                assert found == (list(range(40)) if in_memory else [])
    assert pickle.loads(pickle.dumps(filled.plan)).describe() == filled.plan.describe()


def test_array_names_of_the_family_stand_for_every_kind(tmp_path):
    """Families with several encoders need nothing else from the store."""
    family = replace(FAMILY, text_array_names=("hidden_state1", "pool2"))
    data = training_data(some_pictures(tmp_path, 2), [bucketed(tmp_path)], cache=TO_DISK, family=family)
    Filled(data)
    with NpzFile(tmp_path / f"01{SUFFIX}.npz") as file:
        assert set(family.text_array_names) < set(file.names)
