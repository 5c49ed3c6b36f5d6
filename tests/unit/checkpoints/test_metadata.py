import base64
import datetime
import re
import types
from pathlib import Path

from library.checkpoints import metadata

NAMES = ("title", "author", "description", "license", "tags", "usage_hint", "thumbnail", "merged_from",
         "trigger_phrase", "preprocessor", "is_negative_embedding")  # fmt: skip


def described(**given):
    return types.SimpleNamespace(**{f"metadata_{name}": given.get(name) for name in NAMES})


def test_the_entries_of_a_plain_run(spec_of):
    table = metadata.modelspec_metadata(spec_of("sd1"), described(), output_name="frog")
    date = datetime.datetime.fromisoformat(table.pop("modelspec.date"))
    assert date.microsecond == 0 and date.tzinfo is None
    assert table == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.implementation_version": f"sd-finetune-toolkit/{metadata.VERSION}",
        "modelspec.title": "frog",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
    }


def test_what_is_given_is_written(spec_of):
    given = {name: f"the {name}" for name in NAMES if name != "thumbnail"}
    table = metadata.modelspec_metadata(
        spec_of("sd2", "v_prediction"),
        described(**given),
        output_name="frog",
        resolution_wh=(640, 448),
        clip_skip=2,
        timesteps=(None, 600),
    )
    assert {name: table[f"modelspec.{name}"] for name in given} == given
    assert table["modelspec.prediction_type"] == "v"
    assert table["modelspec.resolution"] == "640x448"
    assert table["modelspec.encoder_layer"] == "2"
    assert table["modelspec.timestep_range"] == "0,600"
    assert "modelspec.thumbnail" not in table
    low = metadata.modelspec_metadata(spec_of("sd1"), described(), output_name="x", timesteps=(100, None))
    assert low["modelspec.timestep_range"] == "100,1000"


def test_the_resolution_of_the_family_is_the_default(spec_of):
    table = metadata.modelspec_metadata(spec_of("sd2", "v_prediction"), described(), output_name=None)
    assert table["modelspec.resolution"] == "768x768"
    assert re.fullmatch(r"Checkpoint@\d+\.\d+", table["modelspec.title"])


def test_adapters_have_a_suffix_and_their_own_implementation(spec_of):
    table = metadata.modelspec_metadata(spec_of("sd1"), described(), output_name=None, kind="lora")
    assert table["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert table["modelspec.implementation"] == "diffusers"
    assert table["modelspec.title"].startswith("LoRA@")


def test_a_thumbnail_becomes_a_data_url(tmp_path, caplog):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG...")
    url = metadata.thumbnail_url(str(picture))
    assert url == "data:image/png;base64," + base64.b64encode(b"\x89PNG...").decode()
    assert metadata.thumbnail_url("data:image/webp;base64,AA") == "data:image/webp;base64,AA"
    assert metadata.thumbnail_url(None) is None
    assert metadata.thumbnail_url(str(tmp_path / "gone.png")) is None
    assert "left out" in caplog.text
    picture.write_bytes(bytes(5 * 1024**2))
    assert metadata.thumbnail_url(str(picture)) is None


def test_the_version_is_that_of_the_package():
    text = (Path(__file__).resolve().parents[3] / "setup.py").read_text()
    found = re.search(r'version="([^"]+)"', text)
    assert found is None or found[1] == metadata.VERSION
