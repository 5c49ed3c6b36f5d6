"""finetune/prepare_buckets_latents.py, and training on what it leaves behind; data that older tools prepared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.prepare_buckets_latents import main
from library.data.opening import open_data
from library.data.options import CacheOptions, DatasetOptions, SubsetOptions
from library.models.specs import stable_diffusion_family
from tests import support

PHOTOS = sorted((Path(__file__).parents[2] / "examples" / "photos").glob("*/*.jpg"))
SIZES = {"wide": (320, 120), "tall": (100, 220), "square": (200, 200)}
BUCKETS = {"wide": [192, 64], "tall": [64, 192], "square": [128, 128]}
RESOLUTION = ("--max_resolution=128,128", "--min_bucket_reso=64")


def run(*argv):
    with pytest.raises(SystemExit) as ended:
        main([str(item) for item in argv])
    return ended.value.code


@pytest.fixture
def pictures(tmp_path):
    """A folder with a wide, a tall and a square picture."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        Image.open(PHOTOS[number]).convert("RGB").resize(size).save(folder / f"{name}.png")
    return folder


def write(path, entries):
    path.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return path


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def train(model, folder, metadata, out, *more):
    return support.train_network(
        f"--pretrained_model_name_or_path={model}",
        f"--train_data_dir={folder}",
        f"--in_json={metadata}",
        f"--output_dir={out}",
        "--network_module=networks.lora",
        "--resolution=128",
        "--max_train_steps=3",
        "--seed=3",
        "--max_data_loader_n_workers=0",
        *more,
    )


def test_metadata_and_latents(pictures, tiny_sd2, tmp_path, caplog):
    """The family of the model is found out, unknown keys stay, and new entries are made for new pictures."""
    entries = {"wide": {"caption": "a café", "score": 5}, "tall": {"tags": "x"}, "no picture": {"caption": "z"}}
    metadata = write(tmp_path / "in.json", entries)
    out = tmp_path / "out.json"
    assert run(pictures, metadata, out, tiny_sd2, *RESOLUTION, "--flip_aug", "--batch_size=2") == 0
    assert read(out) == {
        "wide": {"caption": "a café", "score": 5, "train_resolution": [192, 64]},
        "tall": {"tags": "x", "train_resolution": [64, 192]},
        "no picture": {"caption": "z"},
        "square": {"train_resolution": [128, 128]},
    }
    assert "1 pictures have no entry" in caplog.text and "1 entries have no picture" in caplog.text
    assert sorted(path.name for path in pictures.glob("*.npz")) == [
        "square_0200x0200_sd.npz",
        "tall_0100x0220_sd.npz",
        "wide_0320x0120_sd.npz",
    ]
    with np.load(pictures / "wide_0320x0120_sd.npz") as arrays:
        assert arrays["latents_8x24"].shape == arrays["latents_flipped_8x24"].shape == (4, 8, 24)
    assert run(pictures, out, out, tiny_sd2, *RESOLUTION, "--skip_existing", "--flip_aug") == 0
    assert "0 pictures done, 3 skipped" in caplog.text


def test_keys_with_folders_and_paths(pictures, tiny_sd1, tmp_path):
    (pictures / "inside").mkdir()
    shutil.move(pictures / "tall.png", pictures / "inside" / "tall.png")
    full = write(tmp_path / "full.jsonl", {"image_path": str(pictures / "wide.png"), "caption": "c"})
    assert run(pictures, full, tmp_path / "o.jsonl", tiny_sd1, *RESOLUTION, "--full_path", "--recursive") == 0
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line["image_path"] for line in lines] == [
        str(pictures / "wide.png"),
        str(pictures / "square.png"),
        str(pictures / "inside" / "tall.png"),
    ]
    stems = write(tmp_path / "stems.json", {"tall": {"caption": "c"}, "square.png": {}})
    assert run(pictures, stems, tmp_path / "o.json", tiny_sd1, *RESOLUTION, "--recursive") == 0
    assert {key: entry["train_resolution"] for key, entry in read(tmp_path / "o.json").items()} == {
        "tall": [64, 192],
        "square.png": [128, 128],
        "wide": [192, 64],
    }


@pytest.mark.parametrize("gone", [False, True], ids=["pictures", "pictures gone"])
@pytest.mark.parametrize("options", [(), ("--enable_bucket", "--min_bucket_reso=64")], ids=["plain", "buckets"])
def test_training_on_prepared_data(pictures, tiny_sd1, tmp_path, caplog, gone, options):
    metadata = write(tmp_path / "in.json", {name: {"caption": f"a {name} photo"} for name in SIZES})
    assert run(pictures, metadata, tmp_path / "out.json", tiny_sd1, *RESOLUTION) == 0
    if gone:
        for path in pictures.glob("*.png"):
            path.unlink()
    caplog.clear()
    more = (*options, "--cache_latents_to_disk") if options and not gone else options
    assert train(tiny_sd1, pictures, tmp_path / "out.json", tmp_path / "lora", *more) == 0
    assert "latent cache: 3 reused, 0 to encode" in caplog.text
    assert ("3 buckets of the metadata (train_resolution) are used" in caplog.text) == (not options)
    assert "some images are gone" in caplog.text or not gone
    assert (tmp_path / "lora" / "last.safetensors").is_file()


def test_bad_pictures_are_left_out(pictures, tiny_sd1, tmp_path, caplog):
    whole = (pictures / "wide.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    metadata = write(tmp_path / "in.json", {"wide": {}, "cut": {"caption": "c", "train_resolution": [1, 1]}})
    assert run(pictures, metadata, tmp_path / "out.json", tiny_sd1, *RESOLUTION) == 0
    assert "3 pictures done, 1 failed" in caplog.text
    assert read(tmp_path / "out.json")["cut"] == {"caption": "c"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_json": "none.json"}, "no such metadata file"),
        ({"out_json": "out.txt"}, "is no name of a metadata file"),
        ({"train_data_dir": "none"}, "no such folder"),
        ({"model": "none.safetensors"}, "no such file"),
        ({"more": ("--max_resolution=2048,512",)}, "Raise max_bucket_reso"),
        ({"more": ("--bucket_reso_steps=20",)}, "is not a multiple of 8"),
    ],
)
def test_refusals(pictures, tiny_sd1, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.json", {"wide": {}})
    values = {"train_data_dir": pictures, "in_json": "in.json", "out_json": "out.json", "model": tiny_sd1, **changes}
    more = values.pop("more", ())
    assert run(*values.values(), *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


# What older tools left behind ----------------------------------------------------------------------------------------


def legacy(folder, tmp_path, buckets, *, keep_pictures):
    """Make metadata and `<stem>.npz` files as older preparation tools wrote them; latents tell their picture."""
    entries = {}
    for number, (name, (width, height)) in enumerate(buckets.items()):
        latents = np.full((4, height // 8, width // 8), number + 1, np.float32)
        size = np.array(SIZES[name])
        np.savez(folder / f"{name}.npz", latents=latents, original_size=size, crop_ltrb=np.zeros(4))
        entries[name] = {"caption": name, "train_resolution": [width, height]}
        if not keep_pictures:
            (folder / f"{name}.png").unlink()
    return write(tmp_path / "meta_lat.json", entries)


@pytest.mark.parametrize("keep_pictures", [True, False])
def test_older_preparations_are_trained_on(pictures, tiny_sd1, tmp_path, caplog, keep_pictures):
    metadata = legacy(pictures, tmp_path, BUCKETS, keep_pictures=keep_pictures)
    assert train(tiny_sd1, pictures, metadata, tmp_path / "lora") == 0
    assert "latent cache: 3 reused, 0 to encode" in caplog.text
    assert "3 buckets of the metadata (train_resolution) are used" in caplog.text


def test_buckets_of_older_preparations_are_exact(pictures, tmp_path):
    """Without upscaling, buckets of one ratio differ in size: each picture keeps its own."""
    Image.new("RGB", (100, 100)).save(pictures / "tall.png")
    buckets = {"wide": (192, 64), "tall": (64, 64), "square": (192, 192)}
    metadata = legacy(pictures, tmp_path, buckets, keep_pictures=True)
    data = open_data(
        DatasetOptions(train_data_dir=str(pictures), in_json=str(metadata), resolution="128"),
        SubsetOptions(),
        CacheOptions(),
        spec=stable_diffusion_family("sd1"),
        kinds=("finetuning",),
        tokenizers=(),
    )
    found = dict(zip(data.table.captions(), map(tuple, data.placements.bucket_wh.tolist()), strict=True))
    assert found == buckets
    plan = data.latent_plan("")
    assert len(plan.missing) == 0
    data.use_latents(plan, "")
    rows = {data.table.caption(row): row for row in range(3)}
    for number, name in enumerate(buckets):
        latents = data.catalogue.latents.read(rows[name], flipped=False, with_mask=False).latents
        assert (latents == number + 1).all()


def test_pictures_are_read_where_buckets_are_asked_for(pictures, tiny_sd1, tmp_path, caplog):
    """New names of caches tell what they hold, so other options mean other buckets, and no cache is written unasked."""
    metadata = write(tmp_path / "in.json", {name: {"caption": name} for name in SIZES})
    assert run(pictures, metadata, tmp_path / "out.json", tiny_sd1, *RESOLUTION) == 0
    options = ("--enable_bucket", "--min_bucket_reso=64", "--resolution=64")
    assert train(tiny_sd1, pictures, tmp_path / "out.json", tmp_path / "lora", *options) == 0
    assert "latent cache" not in caplog.text.partition("pictures done")[2]
