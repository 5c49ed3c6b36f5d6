"""Tiny images and folders for the tests of the scan."""

import io
from pathlib import Path

from PIL import Image

from library.data.dataset_config import load_dataset_specs
from library.data.options import DatasetOptions, SubsetOptions
from library.data.scan import ScanContext, scan_datasets


def image_bytes(size=(64, 64), kind="PNG", color=(90, 120, 30), **save):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind, **save)
    return buffer.getvalue()


def write_image(path, size=(64, 64), caption=None, extension=".txt", **save):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}.get(path.suffix.lower(), "PNG")
    path.write_bytes(image_bytes(size, kind, **save))
    if caption is not None:
        path.with_suffix(extension).write_text(caption, encoding="utf-8")
    return path


def load(kinds=("dreambooth",), *, step=64, in_json=None, caption_dropout=True, subset=None, **data):
    data.setdefault("resolution", "64")
    return load_dataset_specs(
        DatasetOptions(**data),
        SubsetOptions(**{"caption_extension": ".txt", **(subset or {})}),
        kinds=kinds,
        bucket_step_multiple=step,
        in_json=in_json,
        caption_dropout=caption_dropout,
    )


def scan(kinds=("dreambooth",), *, in_json=None, subset=None, context=None, **data):
    data.setdefault("resolution", "64")
    data.setdefault("check_images", "none")
    specs = load(kinds, in_json=in_json, subset=subset, **data)
    return scan_datasets(specs, DatasetOptions(**data), context or ScanContext())


def config(folder, text, name="data.toml"):
    path = Path(folder) / name
    path.write_text(text, encoding="utf-8")
    return str(path)
