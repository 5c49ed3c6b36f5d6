"""ControlNets for stage C from pictures to files: every filter and backbone, what trains, what is refused in time."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.cascade_yaml import read_config
from library.checkpoints.cascade_parts import ControlNetConfig, stored_control_filter
from library.checkpoints.load_cascade import load_control_net, load_effnet
from library.checkpoints.parts import SaveSettings
from library.checkpoints.save_cascade import save_part
from library.models.cascade.control_net import CascadeControlNet, build_control_net
from library.models.cascade.stage_c import StageC
from library.models.random_cascade import random_part
from tests.conftest import ROOT
from tests.control_training import FINAL, STAGE, control_words, train_control_net
from tests.support import tensor_digest

BLOCKS = STAGE.residual_blocks


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def trained(files, photos, out, *more):
    assert train_control_net(*control_words(files, photos, out, *more)) == 0
    return out / FINAL


def test_a_file_for_use(control_cascade, photo_folders, tmp_path):
    path = trained(control_cascade, photo_folders, tmp_path, "--controlnet_filter_params", "resize=64")
    tensors, told = load_file(path), header(path)
    assert {name.split(".")[0] for name in tensors} == {"backbone", "projections"}
    assert json.loads(told["stable_cascade.controlnet_blocks"]) == [0, 1, 4, 5]
    assert told["stable_cascade.controlnet_bottleneck_mode"] == "effnet"
    assert stored_control_filter(told) == ("canny", ("resize=64",))
    assert told["modelspec.architecture"] == "stable-cascade/controlnet"
    assert not any(str(tmp_path) in value or str(control_cascade.effnet) in value for value in told.values())
    # Everything has learnt, but batch norms kept what they knew of pictures.
    before = load_effnet(control_cascade.effnet).tensors
    for name, tensor in tensors.items():
        if "running_" in name or name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before[name]), name
        elif name.startswith("backbone.") and name != "backbone.0.0.weight":
            assert not torch.equal(tensor, before[name]), name
    assert all(tensors[f"projections.{number}.2.weight"].any() for number in range(4))
    loaded = load_control_net(path, BLOCKS)
    build_control_net(loaded.config, loaded.tensors, device=torch.device("cpu"), dtype=torch.float32)


def test_stage_c_stays_and_steering_begins_at_nothing(control_cascade, photo_folders, tmp_path, monkeypatch):
    seen, families = [], []
    denoise = StageC.denoise

    def watched(self, noisy, t, condition, control=None):
        families.append(self)
        with torch.no_grad():
            plain = denoise(self, noisy, t, condition)
        steered = denoise(self, noisy, t, condition, control)
        seen.append((sorted(control), float((steered.detach() - plain).abs().max())))
        return steered

    monkeypatch.setattr(StageC, "denoise", watched)
    trained(control_cascade, photo_folders, tmp_path, "--controlnet_blocks", "1", "4", "2")
    assert [blocks for blocks, _ in seen] == [[1, 2, 4]] * 4
    assert seen[0][1] == 0
    assert all(difference > 1e-4 for _, difference in seen[1:])
    family = families[-1]
    stage = {name: tensor for name, tensor in family.unet.state_dict().items()}
    assert all(torch.equal(tensor, family.sources.stage.tensors[name]) for name, tensor in stage.items())
    assert not any(module.training for module in family.unet.modules())
    assert all(parameter.grad is None for parameter in family.unet.parameters())


FILTERS = {
    "inpainting": "--controlnet_filter=InpaintFilter --controlnet_filter_params thresold=[0.04,0.4] p_outpaint=0.4",
    "super-resolution of latents": "--controlnet_filter=sr_effnet --controlnet_bottleneck_mode=simple",
    "super-resolution of pixels, cached latents": "--controlnet_filter=sr --cache_latents --flip_aug",
    "adaptive weights, checkpointing, average": "--adaptive_loss_weight --gradient_checkpointing --ema_decay=0.5",
    "bfloat16, accumulation": "--mixed_precision=bf16 --gradient_accumulation_steps=2 --noise_offset=0.1",
    "bfloat16 altogether": "--mixed_precision=bf16 --full_bf16 --optimizer_type=Adafactor",
}


@pytest.mark.parametrize("variant", FILTERS)
def test_filters_and_settings(control_cascade, photo_folders, tmp_path, variant):
    path = trained(control_cascade, photo_folders, tmp_path, *FILTERS[variant].split(), "--max_train_steps=2")
    assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    assert (tmp_path / "net_ema.safetensors").exists() == ("average" in variant)


def test_the_same_with_loader_processes(control_cascade, photo_folders, tmp_path):
    words = ("--controlnet_filter=inpaint", "--max_train_steps=2")
    alone = trained(control_cascade, photo_folders, tmp_path / "a", *words)
    helped = trained(control_cascade, photo_folders, tmp_path / "b", *words, "--max_data_loader_n_workers=2")
    assert tensor_digest(alone) == tensor_digest(helped)


def test_cached_latents_change_nothing(control_cascade, photo_folders, tmp_path):
    words = ("--controlnet_filter=sr_effnet", "--controlnet_bottleneck_mode=simple", "--flip_aug")
    pictures = load_file(trained(control_cascade, photo_folders, tmp_path / "a", *words))
    cached = load_file(trained(control_cascade, photo_folders, tmp_path / "b", *words, "--cache_latents"))
    for name, tensor in pictures.items():
        assert torch.allclose(tensor, cached[name], atol=2e-4), name


def test_kept_edges_change_nothing_but_the_time(control_cascade, photo_folders, tmp_path, monkeypatch):
    from library.models.cascade.control_filters import CannyFilter

    looked = []
    find = CannyFilter.find
    monkeypatch.setattr(CannyFilter, "find", lambda self, picture: looked.append(1) or find(self, picture))
    words = ("--flip_aug", "--max_train_epochs=1")
    plain = trained(control_cascade, photo_folders, tmp_path / "a", *words)
    for name, looks in (("b", True), ("c", False)):
        looked.clear()
        kept = trained(control_cascade, photo_folders, tmp_path / name, *words, "--cache_conditions_to_disk")
        assert tensor_digest(kept) == tensor_digest(plain)
        assert bool(looked) == looks


def test_stage_c_s_own_dropout_is_off_unless_it_is_asked_for(control_cascade, photo_folders, tmp_path):
    digests = []
    for number, more in enumerate(
        ((), ("--stage_c_dropout=0.3",), ("--stage_c_dropout=0.3", "--gradient_checkpointing"))
    ):
        words = (*more, "--max_train_steps=1")
        digests.append(tensor_digest(trained(control_cascade, photo_folders, tmp_path / str(number), *words)))
    assert digests[0] != digests[1] == digests[2]


@pytest.fixture
def pairs(tmp_path):
    """Black pictures with a white half, and a folder that tells which half."""
    for folder in ("pictures", "edges"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        half = np.zeros((64, 64), np.uint8)
        half[:, 32 * (number % 2) : 32 * (number % 2) + 32] = 255
        picture = np.repeat(half[:, :, None], 3, 2)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
        Image.fromarray(255 - half if number % 2 else half).save(tmp_path / "edges" / f"{number}.png")
    return tmp_path


def test_ready_pictures_of_a_folder(control_cascade, pairs, monkeypatch):
    seen = []
    forward = CascadeControlNet.forward
    monkeypatch.setattr(CascadeControlNet, "forward", lambda net, guide: seen.append(guide) or forward(net, guide))
    words = ("--controlnet_filter=folder", f"--conditioning_data_dir={pairs / 'edges'}", "--max_train_steps=2")
    path = trained(control_cascade, pairs / "pictures", pairs / "out", *words)
    assert load_file(path)["backbone.0.0.weight"].shape[1] == 1
    # In all of them the left half is white.
    for guide in seen:
        assert guide.shape[1:] == (1, 64, 64)
        assert (guide[..., :32] == 1).all()
        assert not guide[..., 32:].any()


def test_a_picture_without_its_pair_is_told(control_cascade, pairs, capsys):
    (pairs / "edges" / "2.png").unlink()
    words = ("--controlnet_filter=folder", f"--conditioning_data_dir={pairs / 'edges'}")
    assert train_control_net(*control_words(control_cascade, pairs / "pictures", pairs / "out", *words)) == 2
    assert "2.png" in capsys.readouterr().err


def test_going_on_with_a_file(control_cascade, photo_folders, tmp_path):
    first = trained(control_cascade, photo_folders, tmp_path / "a", "--controlnet_blocks", "1", "3", "4")
    more = (f"--controlnet_checkpoint_path={first}", "--learning_rate=1e-9", "--max_train_steps=1")
    again = trained(control_cascade, photo_folders, tmp_path / "b", *more)
    assert json.loads(header(again)["stable_cascade.controlnet_blocks"]) == [1, 3, 4]
    before, after = load_file(first), load_file(again)
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_other_backbones(control_cascade, photo_folders, tmp_path):
    """Weights of torchvision's classifier, and a large backbone of small width from a file."""
    tensors = {
        name.replace("backbone.", "features.", 1): tensor.clone()
        for name, tensor in load_effnet(control_cascade.effnet).tensors.items()
        if name.startswith("backbone.")
    }
    save_file({**tensors, "classifier.1.weight": torch.zeros(2, 2)}, tmp_path / "v2_s.safetensors")
    words = ("--max_train_steps=1", f"--controlnet_backbone_path={tmp_path / 'v2_s.safetensors'}")
    own = trained(control_cascade, photo_folders, tmp_path / "a", *words)
    usual = trained(control_cascade, photo_folders, tmp_path / "b", "--max_train_steps=1")
    assert tensor_digest(own) == tensor_digest(usual)
    config = ControlNetConfig("large", 16, 32, (0, 5), features=12, wide=(24, 8), depth=2)
    start = tmp_path / "large.safetensors"
    save_part(start, "controlnet", random_part("controlnet", config).tensors, config, SaveSettings())
    words = ("--controlnet_filter=sr_effnet", f"--controlnet_checkpoint_path={start}", "--max_train_steps=1")
    assert (
        header(trained(control_cascade, photo_folders, tmp_path / "c", *words))[
            "stable_cascade.controlnet_bottleneck_mode"
        ]
        == "large"
    )


def test_sample_pictures_are_steered(control_cascade, photo_folders, tmp_path):
    guide = next(photo_folders.rglob("*.jpg"))
    shutil.copy(guide, tmp_path / "guide.jpg")
    prompts = tmp_path / "prompts.txt"
    line = "a duck --w 256 --h 256 --s 2 --d 5"
    prompts.write_text(f"{line}\n{line} --cn {tmp_path / 'guide.jpg'}\n{line} --cn nowhere.png\n", encoding="utf-8")
    words = (f"--previewer_checkpoint_path={control_cascade.previewer}", f"--sample_prompts={prompts}")
    out = tmp_path / "out"
    quiet = trained(control_cascade, photo_folders, tmp_path / "quiet")
    busy = trained(control_cascade, photo_folders, out, *words, "--sample_at_first", "--sample_every_n_steps=4")
    assert tensor_digest(quiet) == tensor_digest(busy)
    first = [np.asarray(Image.open(path)) for path in sorted((out / "sample").glob("net_e*.png"))]
    last = [np.asarray(Image.open(path)) for path in sorted((out / "sample").glob("net_0*4_*.png"))]
    assert np.array_equal(first[0], first[1])
    assert np.array_equal(first[0], last[0])
    assert not np.array_equal(last[0], last[1])


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(control_cascade, photo_folders, tmp_path, monkeypatch, capsys):
    """Run a command line that must be refused before models are loaded; returns what is said."""

    def load(*_args, **_more):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("library.models.cascade.base.CascadeFamily.load", load)

    def run(*more):
        capsys.readouterr()
        assert train_control_net(*control_words(control_cascade, photo_folders, tmp_path / "out", *more)) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return "\n".join(line for line in said.splitlines() if line.startswith("error: "))

    return run


def test_wrong_choices_are_refused_before_models_are_loaded(refused, control_cascade, tmp_path):
    assert "residual blocks 0 to 5, not 6, 63" in refused("--controlnet_blocks", "0", "6", "63")
    assert "given twice" in refused("--controlnet_blocks", "1", "1")
    assert "must be at least 0" in refused("--controlnet_blocks", "-1")
    assert "there is no filter" in refused("--controlnet_filter=PidiFilter")
    assert "expected a whole number" in refused("--controlnet_filter_params", "resize=x")
    assert "not found" in refused("--controlnet_checkpoint_path=nowhere.safetensors")
    assert "not a ControlNet" in refused(f"--controlnet_checkpoint_path={control_cascade.effnet}")
    net = control_cascade.controlnet
    assert "looks at 1 channels, and the filter makes 4" in refused(
        "--controlnet_filter=inpaint", f"--controlnet_checkpoint_path={net}"
    )
    assert "has the backbone effnet" in refused(
        f"--controlnet_checkpoint_path={net}", "--controlnet_bottleneck_mode=simple"
    )
    assert "block numbers for a ControlNet" in refused(
        f"--controlnet_checkpoint_path={net}", "--controlnet_blocks", "0"
    )
    assert "holds no EfficientNet" in refused(f"--controlnet_backbone_path={control_cascade.previewer}")
    assert "is required by --controlnet_filter folder" in refused("--controlnet_filter=folder")


def test_files_name_no_code(control_cascade, photo_folders, tmp_path, capsys):
    config = tmp_path / "run.toml"
    config.write_text('controlnet_filter = "os:getcwd"\n', encoding="utf-8")
    words = control_words(control_cascade, photo_folders, tmp_path / "out", f"--config_file={config}")
    assert train_control_net(*[word for word in words if not word.startswith("--controlnet_filter=")]) == 2
    assert "'os:getcwd' is code of your own, which files may not name" in capsys.readouterr().err
    assert stored_control_filter({"stable_cascade.controlnet_filter": "os:getcwd"}) == (None, ())
    params = json.dumps(["saliency_model_path=//host/a.pt", "p_outpaint=0"])
    told = {"stable_cascade.controlnet_filter": "inpaint", "stable_cascade.controlnet_filter_params": params}
    assert stored_control_filter(told) == ("inpaint", ("p_outpaint=0",))


# Configuration files and filters of the user's own ----------------------------------------------------------------

EXAMPLES = ("canny", "inpainting", "super_resolution")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_files(control_cascade, photo_folders, tmp_path, name, monkeypatch):
    """The examples run as they are written, but for the models, the data and how long."""
    import tarfile

    with tarfile.open(tmp_path / "dataset.tar", "w") as tar:
        for number, path in enumerate(sorted((photo_folders / "2_sks duck").glob("*.jpg"))):
            tar.add(path, f"dataset/{number:04d}.jpg")
            tar.add(path.with_suffix(".caption"), f"dataset/{number:04d}.txt")
    monkeypatch.chdir(tmp_path)
    small = {
        "model_version": None,
        "generator_checkpoint_path": str(control_cascade.stage_c),
        "effnet_checkpoint_path": str(control_cascade.effnet),
        "previewer_checkpoint_path": str(control_cascade.previewer),
        "text_model_checkpoint_path": str(control_cascade.text),
        "controlnet_blocks": [0, 2, 5],
        "webdataset_path": "dataset.tar",
        "image_size": 64,
        "multi_aspect_ratio": ["1/1", "3/4"],
        "batch_size": 8,
        "updates": 1,
    }
    if name == "super_resolution":  # its backbone has 200 million values
        small |= {"controlnet_bottleneck_mode": "simple"}
    config = read_config(ROOT / "examples" / "stable_cascade" / f"controlnet_{name}.yaml")
    assert small.keys() <= config.keys() | {"controlnet_bottleneck_mode"}
    (tmp_path / "run.yaml").write_text(json.dumps(config | small), encoding="utf-8")
    assert train_control_net("run.yaml", "--max_data_loader_n_workers=0", "--seed=1") == 0
    told = header(tmp_path / "output" / f"controlnet_{name}" / f"controlnet_{name}.safetensors")
    assert json.loads(told["stable_cascade.controlnet_blocks"]) == [0, 2, 5]
    assert stored_control_filter(told)[0] == config["controlnet_filter"]


def test_a_filter_of_ones_own(control_cascade, photo_folders, tmp_path, monkeypatch):
    (tmp_path / "own_filter_for_training.py").write_text(
        "import torch\n"
        "class Noisy:\n"
        "    num_channels = 2\n"
        "    def __call__(self, images):\n"
        "        return images[:, :2] + torch.rand(len(images), 2, *images.shape[2:])\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ("--controlnet_filter=own_filter_for_training:Noisy", "--save_state", "--save_every_n_steps=2")
    straight = trained(control_cascade, photo_folders, tmp_path / "a", *words)
    assert load_file(straight)["backbone.0.0.weight"].shape[1] == 2
    again = trained(
        control_cascade, photo_folders, tmp_path / "b", *words, f"--resume={tmp_path / 'a' / 'net-step00000002-state'}"
    )
    assert tensor_digest(straight) == tensor_digest(again)
