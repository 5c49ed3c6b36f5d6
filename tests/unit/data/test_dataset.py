import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loading_helpers import (
    FAMILY,
    FakeTokenizer,
    bucketed,
    encode,
    fill,
    picture,
    some_pictures,
    training_data,
)

from library.contracts import BatchKey, Position, RunLength, SampleKey, StepKey
from library.data import caches, latent_store
from library.data.dataset_spec import DatasetSpec, SubsetSpec
from library.data.latent_store import LatentMemory
from library.data.loader import validation_batches
from library.data.options import CacheOptions
from library.data.plan import batch_keys
from library.errors import UserError

TO_DISK = CacheOptions(cache_latents=True, cache_latents_to_disk=True)
IN_MEMORY = CacheOptions(cache_latents=True)


def key_of(rows, position=0, epoch=0, step=0):
    samples = tuple(SampleKey(row, epoch, position + i, step) for i, row in enumerate(rows))
    return BatchKey(StepKey(step, 0), epoch, 0, True, False, 1.0, samples)


def batches_of(data, seed=0, epochs=1):
    per_epoch = data.batch_count()
    length = RunLength(per_epoch * epochs, epochs, per_epoch, 1, 1, 1)
    dataset = data.dataset(seed, length.total_steps)
    return [dataset[key] for key in batch_keys(data.planner, length, seed, 0, Position())]


def same(one, other):
    assert one.captions == other.captions and one.record_keys == other.record_keys
    for name in ("pixels", "latents", "mask", "sizes_hw", "loss_weight"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert torch.equal(a, b), name
    assert all(torch.equal(a, b) for a, b in zip(one.token_ids, other.token_ids, strict=True))


def test_a_batch_of_pictures(tmp_path):
    data = training_data(some_pictures(tmp_path), [bucketed(tmp_path)])
    batch = data.dataset(0, 10)[key_of([0, 3], step=4)]
    assert batch.pixels.shape == (2, 3, 48, 80) and batch.pixels.dtype == torch.float32
    assert batch.pixels.min() >= -1 and batch.pixels.max() <= 1
    assert batch.latents is None and batch.mask is None and batch.token_weights is None
    assert batch.captions == ("picture 0, red, blue", "picture 3, red, blue")
    assert batch.record_keys == (f"{tmp_path.name}/00.png", f"{tmp_path.name}/03.png")
    assert [ids.shape for ids in batch.token_ids] == [(2, 1, 77)] and batch.token_ids[0].dtype == torch.int64
    assert batch.loss_weight.tolist() == [1, 1] and batch.loss_weight.dtype == torch.float32
    assert batch.sizes_hw.dtype == torch.int64 and batch.sizes_hw[0].tolist() == [64, 96, 0, 4, 48, 80]
    assert batch.size == 2 and batch.key.step_key == StepKey(4, 0)
    assert batch.replaced == ()


def test_every_batch_is_pure_and_every_image_served(tmp_path):
    data = training_data(some_pictures(tmp_path, 8), [bucketed(tmp_path)])
    batches = batches_of(data)
    assert len(batches) == data.batch_count()
    assert sorted(key for batch in batches for key in batch.record_keys) == sorted(data.table.keys())


def test_prior_loss_weight_multiplier_and_attributes(tmp_path):
    rows = some_pictures(tmp_path, 2, ((64, 64),))
    rows[1] |= {"is_reg": True, "subset": 1}
    spec = bucketed(tmp_path, custom_attributes={"a": 1})
    spec = replace(
        spec,
        network_multiplier=0.5,
        subsets=(*spec.subsets, SubsetSpec(index=1, image_dir=str(tmp_path), is_reg=True)),
    )
    data = training_data(rows, [spec], prior_loss_weight=0.25)
    batch = data.dataset(0, 1)[key_of([0, 1])]
    assert batch.loss_weight.tolist() == [1.0, 0.25]
    assert batch.network_multiplier == 0.5
    assert batch.custom_attributes == ({"a": 1}, {})
    assert (data.num_train_images, data.num_reg_images) == (1, 1)


def test_tokenizers_with_chunks_and_weights(tmp_path):
    tokenizers = (FakeTokenizer(3, weighted=True), FakeTokenizer(1, weighted=True))
    data = training_data(some_pictures(tmp_path, 2, ((64, 64),)), [bucketed(tmp_path)], tokenizers=tokenizers)
    batch = data.dataset(0, 1)[key_of([0, 1])]
    assert [ids.shape for ids in batch.token_ids] == [(2, 3, 77), (2, 1, 77)]
    assert [weights.shape for weights in batch.token_weights] == [(2, 3, 77), (2, 1, 77)]


def test_flips_are_half_and_follow_the_position(tmp_path):
    data = training_data(some_pictures(tmp_path, 1, ((64, 64),)), [bucketed(tmp_path, flip_aug=True, batch_size=1)])
    dataset = data.dataset(0, 1)
    upright = training_data(some_pictures(tmp_path, 1, ((64, 64),)), [bucketed(tmp_path)]).dataset(0, 1)
    plain = upright[key_of([0])].pixels
    flipped = []
    for position in range(200):
        pixels = dataset[key_of([0], position)].pixels
        flipped.append(not torch.equal(pixels, plain))
        if flipped[-1]:
            assert torch.equal(pixels, plain.flip(-1))
    assert 75 < sum(flipped) < 125
    again = [not torch.equal(dataset[key_of([0], position)].pixels, plain) for position in range(20)]
    assert again == flipped[:20]
    assert [not torch.equal(data.dataset(1, 1)[key_of([0], p)].pixels, plain) for p in range(20)] != again


def test_captions_see_the_epoch_from_one_and_the_step(tmp_path):
    rows = some_pictures(tmp_path, 1, ((64, 64),))
    data = training_data(rows, [bucketed(tmp_path, caption_dropout_every_n_epochs=2)])
    dataset = data.dataset(0, 1)
    assert [bool(dataset[key_of([0], epoch=epoch)].captions[0]) for epoch in range(4)] == [True, False, True, False]
    data = training_data(rows, [bucketed(tmp_path, token_warmup_step=0.5, token_warmup_min=1)])
    captions = [data.dataset(0, 20)[key_of([0], step=step)].captions[0] for step in (0, 5, 10)]
    assert captions == ["picture 0", "picture 0, red", "picture 0, red, blue"]


def test_alpha_masks_fill_with_ones(tmp_path):
    rows = [
        {"path": picture(tmp_path / "a.png", (64, 64), mode="RGBA"), "size_wh": (64, 64)},
        {"path": picture(tmp_path / "b.png", (64, 64)), "size_wh": (64, 64)},
    ]
    batch = training_data(rows, [bucketed(tmp_path, alpha_mask=True)]).dataset(0, 1)[key_of([0, 1])]
    assert batch.mask.shape == (2, 1, 64, 64) and batch.mask.dtype == torch.float32
    assert batch.mask[1].min() == 1 and batch.mask[0].min() < 0.1 and batch.mask[0].max() <= 1
    assert training_data(rows, [bucketed(tmp_path)]).dataset(0, 1)[key_of([0, 1])].mask is None


def mask_rows(folder):
    (folder / "masks").mkdir()
    pixels = np.zeros((90, 160, 3), np.uint8)
    pixels[:, :, 0] = np.linspace(0, 255, 160).astype(np.uint8)
    from PIL import Image

    Image.fromarray(pixels.repeat(1, 2)).save(folder / "a.png")
    Image.fromarray(pixels).save(folder / "masks/a.png")
    return [{"path": folder / "a.png", "size_wh": (160, 90), "mask_path": folder / "masks/a.png"}]


@pytest.mark.parametrize("random_crop", [False, True])
def test_mask_pictures_follow_the_image(tmp_path, random_crop):
    data = training_data(mask_rows(tmp_path), [bucketed(tmp_path, flip_aug=True, random_crop=random_crop)])
    dataset = data.dataset(0, 1)
    for position in range(6):
        batch = dataset[key_of([0], position)]
        red = (batch.pixels[:, :1] + 1) / 2
        assert torch.allclose(batch.mask, red, atol=1e-6)


# Bad entries


def test_a_deleted_image_is_replaced_by_one_of_its_bucket(tmp_path):
    data = training_data(some_pictures(tmp_path, 6), [bucketed(tmp_path)])
    (tmp_path / "00.png").unlink()
    dataset = data.dataset(0, 1)
    batch = dataset[key_of([0, 3])]
    assert batch.record_keys == (f"{tmp_path.name}/03.png",) * 2
    assert batch.captions[0] == "picture 3, red, blue"
    assert len(batch.replaced) == 1 and "00.png" in batch.replaced[0]
    same(batch, dataset[key_of([0, 3])])


def test_a_changed_image_is_replaced_too(tmp_path):
    data = training_data(some_pictures(tmp_path, 6), [bucketed(tmp_path)])
    picture(tmp_path / "00.png", (64, 64))
    batch = data.dataset(0, 1)[key_of([0])]
    assert "is 64x64, was 96x64" in batch.replaced[0]


def test_a_bucket_without_any_readable_image_counts_nothing(tmp_path):
    data = training_data(some_pictures(tmp_path, 3), [bucketed(tmp_path)])
    (tmp_path / "00.png").unlink()
    batch = data.dataset(0, 1)[key_of([0])]
    assert batch.loss_weight.tolist() == [0] and batch.pixels.shape == (1, 3, 48, 80)
    assert not batch.pixels.any() and "left blank" in batch.replaced[0]


# Latent caches


@pytest.mark.parametrize("cache", [TO_DISK, IN_MEMORY])
@pytest.mark.parametrize("alpha", [False, True])
def test_cached_latents_are_those_of_the_pixels(tmp_path, cache, alpha):
    rows = some_pictures(tmp_path)
    if alpha:
        for row in rows:
            picture(row["path"], row["size_wh"], mode="RGBA")
    spec = bucketed(tmp_path, flip_aug=True, alpha_mask=alpha, shuffle_caption=True)
    plain = batches_of(training_data(rows, [spec]), epochs=2)
    data = training_data(rows, [spec], cache=cache)
    assert data.uses_latent_cache and not data.reads_only_latents
    plan = fill(data)
    assert (plan.total, plan.reused) == (6, 0) and data.reads_only_latents
    served = batches_of(data, epochs=2)
    for one, other in zip(plain, served, strict=True):
        assert other.pixels is None
        expected = np.stack([encode(pixels.numpy()) for pixels in one.pixels])
        assert torch.allclose(other.latents, torch.from_numpy(expected), atol=1e-6)
        assert one.captions == other.captions and one.record_keys == other.record_keys
        if alpha:
            assert torch.equal(one.mask, other.mask)
        else:
            assert other.mask is None


def test_memory_and_disk_serve_the_same_bits(tmp_path):
    rows = some_pictures(tmp_path)
    spec = bucketed(tmp_path, flip_aug=True)
    stores = [training_data(rows, [spec], cache=cache) for cache in (TO_DISK, IN_MEMORY)]
    for data in stores:
        fill(data)
    for one, other in zip(*(batches_of(data) for data in stores), strict=True):
        same(one, other)


def test_disk_caches_are_reused_and_rebuilt_for_a_reason(tmp_path):
    rows = some_pictures(tmp_path)
    data = training_data(rows, [bucketed(tmp_path)], cache=TO_DISK)
    assert fill(data).reasons == {caches.MISSING: 6}
    assert len(list(tmp_path.glob("*_sd.npz"))) == 6
    plan = data.latent_plan("vae")
    assert (plan.reused, len(plan.missing), plan.memory_bytes) == (6, 0, 0)
    assert plan.describe() == "6 reused, 0 to encode"
    assert data.latent_plan("another").reasons == {caches.OTHER_VAE: 6}
    picture(tmp_path / "00.png", (96, 64), seed=99)
    (tmp_path / "01_0064x0096_sd.npz").write_bytes(b"")
    data = training_data(rows, [bucketed(tmp_path)], cache=TO_DISK)
    plan = data.latent_plan("vae")
    assert plan.describe() == "4 reused, 2 to encode (1 unreadable, 1 image changed)"
    assert {data.table.key(row)[-6:] for row in plan.missing} == {"00.png", "01.png"}
    fill(data)
    assert data.latent_plan("vae").reused == 6
    larger = training_data(rows, [bucketed(tmp_path, resolution=(128, 128))], cache=TO_DISK)
    assert larger.latent_plan("vae").reasons == {caches.OTHER_RESOLUTION: 6}
    fill(larger)
    assert larger.latent_plan("vae").reused == data.latent_plan("vae").reused == 6


def test_a_broken_entry_is_replaced_set_aside_and_rebuilt_at_the_next_start(tmp_path):
    rows = some_pictures(tmp_path)
    data = training_data(rows, [bucketed(tmp_path)], cache=TO_DISK)
    fill(data)
    path = tmp_path / "00_0096x0064_sd.npz"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    assert data.latent_plan("vae").reused == 6, "the start looks at headers only"
    batch = data.dataset(0, 1)[key_of([0, 3])]
    assert batch.record_keys == (f"{tmp_path.name}/03.png",) * 2 and "bad CRC" in batch.replaced[0]
    assert not path.exists() and path.with_name(path.name + ".corrupt").exists()
    assert data.latent_plan("vae").reasons == {caches.MISSING: 1}


def test_training_from_caches_alone(tmp_path):
    rows = some_pictures(tmp_path)
    fill(training_data(rows, [bucketed(tmp_path)], cache=TO_DISK))
    for path in tmp_path.glob("*.png"):
        path.unlink()
    data = training_data(rows, [bucketed(tmp_path)], cache=TO_DISK)
    plan = fill(data)
    assert plan.reused == 6
    assert not any(batch.replaced for batch in batches_of(data))


def test_one_image_in_two_subsets_is_encoded_once(tmp_path):
    rows = some_pictures(tmp_path, 3)
    doubled = rows + [row | {"subset": 1} for row in rows]
    spec = bucketed(tmp_path, batch_size=4)
    flipping = SubsetSpec(index=1, image_dir=str(tmp_path), flip_aug=True)
    spec = replace(spec, subsets=(*spec.subsets, flipping))
    data = training_data(doubled, [spec], cache=TO_DISK)
    plan = fill(data)
    assert (plan.total, len(plan.missing)) == (3, 3)
    assert not any(batch.replaced for batch in batches_of(data, epochs=4))


def test_two_filters_for_one_file_do_not_mix(tmp_path):
    rows = some_pictures(tmp_path, 2)
    doubled = rows + [row | {"dataset": 1, "subset": 1} for row in rows]
    specs = [bucketed(tmp_path), replace(bucketed(tmp_path, index=1, subset=1), resize_interpolation="nearest")]
    data = training_data(doubled, specs, cache=TO_DISK)
    plan = fill(data)
    assert plan.reasons == {caches.MISSING: 2, latent_store.SHARED_NAME: 2} and plan.memory_bytes > 0
    dataset = data.dataset(0, 1)
    one, other = dataset[key_of([0])], dataset[key_of([2])]
    assert not torch.equal(one.latents, other.latents) and not one.replaced and not other.replaced
    again = training_data(doubled, specs, cache=TO_DISK).latent_plan("vae")
    assert again.reasons == {latent_store.SHARED_NAME: 2}


def test_unwritable_folders_fall_back_to_memory(tmp_path, monkeypatch):
    rows = some_pictures(tmp_path, 2)
    monkeypatch.setattr("library.files.check_writable_folder", lambda folder: ["no"])
    data = training_data(rows, [bucketed(tmp_path)], cache=TO_DISK)
    plan = fill(data)
    assert plan.reasons == {latent_store.READ_ONLY_FOLDER: 2}
    assert list(tmp_path.glob("*.npz")) == []
    assert not any(batch.replaced for batch in batches_of(data))


def test_litter_of_a_killed_writer_is_removed(tmp_path):
    import os
    import re

    from library import files

    data = training_data(some_pictures(tmp_path, 2), [bucketed(tmp_path)], cache=TO_DISK)
    with files.atomic_file(tmp_path / "x.npz") as temporary:
        name = re.sub(r"-\d+-", "-4194301-", temporary.name)  # a process number beyond any that is given out
    left = tmp_path / name
    left.write_bytes(b"half")
    os.utime(left, (left.stat().st_mtime - 90_000,) * 2)
    fill(data)
    assert not left.exists()


def test_cache_dir_keeps_the_image_folder_clean(tmp_path):
    images = tmp_path / "10_cat"
    images.mkdir()
    cache = replace(TO_DISK, cache_dir=str(tmp_path / "cache"))
    data = training_data(some_pictures(images, 2), [bucketed(images)], cache=cache)
    fill(data)
    assert list(images.glob("*.npz")) == []
    assert len(list((tmp_path / "cache/10_cat").glob("*_sd.npz"))) == 2
    assert data.latent_plan("vae").reused == 2


def test_latent_batches_are_pure_full_and_split_over_ranks(tmp_path):
    path = picture(tmp_path / "a.png", (64, 64))
    sizes = [(64, 64), (64, 96), (96, 64), (64, 128), (160, 64)]
    rows = []
    for number in range(200):
        copy = tmp_path / f"{number}.png"
        copy.write_bytes(path.read_bytes())
        rows.append({"path": copy, "size_wh": sizes[number * 7 % 5]})
    data = training_data(rows, [bucketed(tmp_path)], cache=TO_DISK)
    plan = data.latent_plan("vae")
    for world in (1, 2, 3):
        shares = [list(plan.batches(4, rank=rank, world_size=world)) for rank in range(world)]
        everything = sorted(row for share in shares for batch in share for row in batch)
        assert everything == list(range(200))
        for batch in (batch for share in shares for batch in share):
            assert len({tuple(data.placements.bucket_wh[row]) for row in batch}) == 1
        for share in shares:
            assert sum(map(len, share)) / (4 * len(share)) > 0.85
    assert sum(map(len, plan.batches(4))) / (4 * len(list(plan.batches(4)))) >= 0.95
    assert pickle.loads(pickle.dumps(plan)).describe() == plan.describe()


def test_sizes_of_one_image_stay_on_one_rank(tmp_path):
    rows = some_pictures(tmp_path, 4)
    both = rows + [row | {"dataset": 1, "subset": 1} for row in rows]
    specs = [bucketed(tmp_path), bucketed(tmp_path, index=1, subset=1, resolution=(128, 128))]
    data = training_data(both, specs, cache=TO_DISK)
    plan = data.latent_plan("vae")
    owner = {}
    for rank in range(3):
        for row in (row for batch in plan.batches(2, rank=rank, world_size=3) for row in batch):
            assert owner.setdefault(data.table.path(row), rank) == rank
    fill(data)
    assert data.latent_plan("vae").reused == 8
    assert not any(batch.replaced for batch in batches_of(data))


def test_draw_names_depend_on_image_and_variant_only(tmp_path):
    data = training_data(some_pictures(tmp_path, 2), [bucketed(tmp_path, flip_aug=True)], cache=TO_DISK)
    given = data.latent_input(0)
    assert given.draw_name(flipped=False) == f"{tmp_path.name}/00.png|80x48|plain"
    assert given.draw_name(flipped=True) != given.draw_name(flipped=False)
    assert np.array_equal(given.flipped, given.pixels[:, :, ::-1])


def test_latents_that_are_not_finite_are_refused(tmp_path):
    for cache in (TO_DISK, IN_MEMORY):
        data = training_data(some_pictures(tmp_path, 1), [bucketed(tmp_path)], cache=cache)
        data.use_latents(data.latent_plan("vae"), "vae")
        with pytest.raises(UserError, match=r"00\.png.*--no_half_vae"):
            data.store_latents(0, np.full((4, 6, 10), np.inf, np.float32))


def test_memory_is_shared_by_path_and_by_pickle(tmp_path):
    data = training_data(some_pictures(tmp_path, 2), [bucketed(tmp_path)], cache=IN_MEMORY)
    plan = data.latent_plan("vae")
    memory = data.create_latent_memory(plan)
    data.use_latents(plan, "vae", memory)
    other_rank = training_data(some_pictures(tmp_path, 2), [bucketed(tmp_path)], cache=IN_MEMORY)
    other_rank.use_latents(plan, "vae", memory.path)
    for row in (0, 1):
        other_rank.store_latents(row, encode(other_rank.latent_input(row).pixels))
    same(batches_of(data)[0], batches_of(other_rank)[0])
    served = pickle.loads(pickle.dumps(data.dataset(0, 1)))
    same(served[key_of([0])], data.dataset(0, 1)[key_of([0])])
    unfilled = LatentMemory.create(plan.slots)
    data.use_latents(plan, "vae", unfilled)
    assert data.dataset(0, 1)[key_of([0])].replaced


def test_memory_files_do_not_outlive_their_owner(tmp_path):
    memory = LatentMemory.create(np.array([100, 0, 8]), str(tmp_path))
    path = Path(memory.path)
    assert path.stat().st_size == 108 and memory.slot(2).nbytes == 8
    del memory
    assert not path.exists() and list(tmp_path.iterdir()) == []


def test_memory_files_of_killed_runs_are_removed(tmp_path):
    import os

    ended = 2**22 - 3  # above any number that this system gives out
    for name, age in ((f"latents-{ended}-a", 3600), (f"latents-{ended}-b", 0), (f"latents-{os.getpid()}-c", 3600)):
        (tmp_path / name).mkdir()
        stamp = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (stamp, stamp))
    memory = LatentMemory.create(np.array([8]), str(tmp_path))
    left = {path.name for path in tmp_path.iterdir()} - {Path(memory.path).parent.name}
    assert left == {f"latents-{ended}-b", f"latents-{os.getpid()}-c"}


# Whole data


def test_bucketing_off_resizes_and_crops_to_the_resolution(tmp_path):
    spec = DatasetSpec(resolution_wh=(64, 48), subsets=(SubsetSpec(image_dir=str(tmp_path)),))
    batch = training_data(some_pictures(tmp_path, 3), [spec]).dataset(0, 1)[key_of([0, 1, 2])]
    assert batch.pixels.shape == (3, 3, 48, 64)


def test_fingerprint_notices_changes_and_nothing_else(tmp_path):
    rows = some_pictures(tmp_path)
    first = training_data(rows, [bucketed(tmp_path)]).fingerprint()
    assert training_data(rows, [bucketed(tmp_path)]).fingerprint() == first

    def changed(rows=rows, **spec):
        other = training_data(rows, [bucketed(tmp_path, **spec)]).fingerprint()
        return {name for name in first if first[name] != other[name]}

    assert changed([rows[0] | {"caption": "x"}, *rows[1:]]) == {"captions"}
    assert changed([rows[0] | {"repeats": 2}, *rows[1:]]) == {"repeats", "batches per epoch"}
    assert "images" in changed(rows[1:])
    assert changed(resolution=(128, 128)) == {"buckets"}
    assert changed(flip_aug=True) == {"data sets"}
    import json

    assert json.loads(json.dumps(first)) == first


def test_summary_for_metadata(tmp_path):
    folder = tmp_path / "3_cat"
    folder.mkdir()
    rows = [row | {"repeats": 3} for row in some_pictures(folder)]
    data = training_data(rows, [bucketed(folder, num_repeats=3)])
    summary = data.summary()
    assert summary["num_train_images"] == 18 and summary["num_batches_per_epoch"] == data.batch_count() == 9
    assert summary["dataset_dirs"] == {"3_cat": {"n_repeats": 3, "img_count": 6}}
    assert summary["reg_dataset_dirs"] == {}
    assert summary["tag_frequency"]["3_cat"]["red"] == 6 and summary["tag_frequency"]["3_cat"]["picture 0"] == 1
    info = summary["bucket_info"]
    assert [bucket["count"] for bucket in info["buckets"].values()] == [6, 6, 6]
    assert info["buckets"]["0"]["resolution"] == [48, 80] and 0 < info["mean_img_ar_error"] < 0.2
    assert str(tmp_path) not in repr(summary)


def test_validation_batches_are_fixed_and_split_over_ranks(tmp_path):
    data = training_data(some_pictures(tmp_path), [bucketed(tmp_path)])
    whole = list(validation_batches(data, 0))
    assert len(whole) == data.batch_count()
    for one, other in zip(whole, validation_batches(data, 0), strict=True):
        same(one, other)
    shares = [list(validation_batches(data, 0, rank=rank, world_size=2)) for rank in range(2)]
    assert [b.record_keys for b in shares[0]] == [b.record_keys for b in whole[::2]]
    assert len(list(validation_batches(data, 0, limit=2))) == 2


def test_images_that_fit_no_bucket_are_all_named(tmp_path):
    rows = [{"path": tmp_path / name, "size_wh": (4, 4)} for name in ("a.png", "b.png")]
    with pytest.raises(UserError) as caught:
        training_data(rows, [bucketed(tmp_path)])
    assert len(caught.value.problems) == 2


def test_families_that_read_pixels_beside_latents(tmp_path):
    family = replace(FAMILY, needs_pixels=True)
    data = training_data(some_pictures(tmp_path, 2), [bucketed(tmp_path, flip_aug=True)], cache=TO_DISK, family=family)
    fill(data)
    for position in range(6):
        batch = data.dataset(0, 1)[key_of([0], position)]
        assert torch.allclose(batch.latents[0], torch.from_numpy(encode(batch.pixels[0].numpy())), atol=1e-6)
