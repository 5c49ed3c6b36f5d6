"""The options of ControlNet training for stage C, and what is said about wrong ones before any file is opened."""

import pytest

from library.errors import UserError
from library.option_parser import parse
from library.training.options_control_net import ControlNetTrainingOptions


@pytest.fixture
def words(tmp_path):
    for name in ("stage.safetensors", "effnet.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "photos").mkdir()
    return [
        f"--stage_c_checkpoint_path={tmp_path / 'stage.safetensors'}",
        f"--effnet_checkpoint_path={tmp_path / 'effnet.safetensors'}",
        f"--train_data_dir={tmp_path / 'photos'}",
        f"--output_dir={tmp_path / 'out'}",
        "--resolution=64",
    ]


def complaints(words, *more):
    with pytest.raises(UserError) as caught:
        parse(ControlNetTrainingOptions, [*words, *more])
    return [str(problem) for problem in caught.value.problems]


def test_values(words):
    given = ["--controlnet_filter=InpaintFilter", "--controlnet_filter_params", "thresold=[0.1,0.2]", "p_outpaint=0"]
    found = parse(ControlNetTrainingOptions, [*words, *given, "--controlnet_blocks", "0", "4"])
    assert found.control_net.controlnet_blocks == (0, 4)
    assert found.control_net.controlnet_filter_params == ("thresold=[0.1,0.2]", "p_outpaint=0")
    assert not found.warnings


def test_what_is_missing_or_contradicts(words):
    assert complaints(words) == ["--controlnet_filter: is required. Name one, such as canny."]
    (said,) = complaints(words[1:], "--controlnet_filter=canny", "--model_version=1B")
    assert said.startswith("--stage_c_checkpoint_path: is required: what is trained here belongs to a trained model")
    (said,) = complaints(words, "--controlnet_filter=folder")
    assert said.startswith("--conditioning_data_dir: is required")
    folder = ("--controlnet_filter=folder", f"--conditioning_data_dir={words[2].partition('=')[2]}")
    (said,) = complaints(words, *folder, "--masked_loss")
    assert said.startswith("--masked_loss: cannot be combined")
    found = parse(ControlNetTrainingOptions, [*words, "--controlnet_filter=canny", folder[1]])
    assert [problem.where for problem in found.warnings] == ["--conditioning_data_dir"]
