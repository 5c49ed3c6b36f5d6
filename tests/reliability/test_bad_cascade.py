"""Wrong files, data and options for everything about Stable Cascade: one clear line, before a model is built."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.models.random_cascade import TINY_C, make_random_cascade
from tests.conftest import PHOTOS
from tests.lora_files import save, small_lora
from tests.support import run_tool

SCRIPTS = {
    "c": "stable_cascade_train_stage_c",
    "b": "stable_cascade_train_stage_b",
    "network": "stable_cascade_train_c_network",
    "control": "stable_cascade_train_c_control_net",
    "draw": "stable_cascade_gen_img",
    "latents": "tools.stable_cascade_cache_latents",
    "texts": "tools.stable_cascade_cache_text_encoder_outputs",
    "convert": "tools.convert_stable_cascade",
    "lora": "networks.convert_stable_cascade_lora",
    "shards": "tools.make_webdataset",
}
TRAINING = "--train_data_dir=photos --output_dir=out --resolution=64 --max_train_steps=1 --max_data_loader_n_workers=0"
MODEL = "--effnet_checkpoint_path=m/effnet_encoder.safetensors --text_model_checkpoint_path=m/text_model.safetensors"
STAGE_C = f"--stage_c_checkpoint_path=m/stage_c.safetensors {MODEL}"
STAGE_B = "--stage_b_checkpoint_path=m/stage_b.safetensors --stage_a_checkpoint_path=m/stage_a.safetensors"
COMMANDS = {
    "c": f"{STAGE_C} {TRAINING}",
    "b": f"{STAGE_B} {MODEL} {TRAINING}",
    "network": f"{STAGE_C} {TRAINING} --network_module=networks.lora --network_train_unet_only",
    "control": f"{STAGE_C} {TRAINING} --controlnet_filter=canny",
    "draw": f"{STAGE_C} {STAGE_B} --outdir=out --W=64 --H=64 --steps=1 --prompt=cat",
    "latents": f"{STAGE_C} {TRAINING}",
    "texts": f"{STAGE_C} {TRAINING}",
}


class Payload:
    """Pickles as a call that makes a file."""

    def __reduce__(self):
        return os.system, ("touch witness",)


def tar(path: Path, members: dict[str, bytes | str]) -> None:
    """Write members by name; a text instead of bytes makes a symbolic link to it."""
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                file.addfile(member)
            else:
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def make_tars(place: Path, picture: bytes) -> None:
    facts = {"d/0.jpg": picture, "d/0.txt": b"a duck", "d/0.json": b'{"score": 3}'}
    tar(place / "good.tar", facts)
    tar(place / "silent.tar", {"d/0.jpg": picture})
    tar(place / "absolute.tar", {"/etc/0.jpg": picture, "/etc/0.txt": b"a"})
    tar(place / "dots.tar", {"../0.jpg": picture, "../0.txt": b"a"})
    tar(place / "link.tar", {"d/0.jpg": "/etc/passwd", "d/0.txt": b"a"})
    tar(place / "pickle.tar", {"d/0.pkl": pickle.dumps(Payload()), "d/0.pyd": pickle.dumps(Payload())})
    huge = tarfile.TarInfo("d/0.jpg")
    huge.size = 1 << 45
    (place / "huge.tar").write_bytes(huge.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    (place / "page.tar").write_text("<html>404</html>")
    (place / "cut.tar").write_bytes((place / "good.tar").read_bytes()[:2000])


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_cascade, tiny_sd1) -> Path:
    """A folder with models under `m`, photographs, and everything that can be wrong with files."""
    place = tmp_path_factory.mktemp("wrong")
    (place / "m").symlink_to(tiny_cascade.stage_c.parent)
    (place / "sd1.safetensors").symlink_to(tiny_sd1)
    (place / "photos" / "1_duck").mkdir(parents=True)
    for name in ("00.jpg", "00.caption"):
        shutil.copy(PHOTOS / "duck" / name, place / "photos" / "1_duck")
    make_tars(place, (PHOTOS / "duck" / "00.jpg").read_bytes())
    make_random_cascade(place / "wide", config_c=replace(TINY_C, c_text=64, c_pooled=64))
    save(place / "lora.safetensors", small_lora("sd15"))
    torch.save({"state_dict": {"a": Payload()}}, place / "hostile.ckpt")
    save_file({**load_file(tiny_cascade.effnet), "mapper.1.weight": torch.ones(16)}, place / "affine.safetensors")
    stage = load_file(tiny_cascade.stage_c)
    stage.pop("down_blocks.0.0.channelwise.0.bias")
    save_file(stage, place / "lacking.safetensors")
    stage = load_file(tiny_cascade.stage_b)
    stage.pop(next(name for name in stage if name.startswith("up_blocks")))
    save_file(stage, place / "lacking_b.safetensors")
    (place / "cut.safetensors").write_bytes(tiny_cascade.stage_c.read_bytes()[:-100])
    (place / "page.safetensors").write_text("<html>404</html>")
    return place


@pytest.fixture
def refused(place, tmp_path, monkeypatch, capsys):
    """Run a command line that must be refused with one line, which is returned."""

    def build(*_args, **_more):
        raise AssertionError("a model is built")

    modules = ("assemble", "cascade.sources", "cascade.base", "cascade.unet", "cascade.text")
    for module in modules:  # a module that is imported only after the patch would keep it for the tests that follow
        import_module(f"library.models.{module}")
    for module in modules:
        for name in ("build_module", "build_part_stage", "build_part_text"):
            monkeypatch.setattr(f"library.models.{module}.{name}", build, raising=False)
    monkeypatch.chdir(place)

    def run(script: str, words: str, *more: str) -> str:
        dropped = [word[1:] for word in words.split() if word.startswith("~")]
        kept = [word for word in COMMANDS.get(script, "").split() if word.partition("=")[0][2:] not in dropped]
        added = [word for word in words.split() if not word.startswith("~")]
        capsys.readouterr()
        status = run_tool(import_module(SCRIPTS[script]).main, *kept, *added, *more)
        said = capsys.readouterr().err
        assert (status, "Traceback" in said) == (2, False), said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and said.splitlines()[-1] == errors[0], said
        out = place / "out"
        assert not out.exists() or {path.name for path in out.iterdir()} <= {"run_summary.json"}
        shutil.rmtree(out, ignore_errors=True)
        assert not [path for path in place.iterdir() if path.name == "witness" or path.name.startswith("made")]
        return errors[0]

    return run


C, TEXT, EFFNET = "--stage_c_checkpoint_path", "--text_model_checkpoint_path", "--effnet_checkpoint_path"
B, A, PREVIEWER = "--stage_b_checkpoint_path", "--stage_a_checkpoint_path", "--previewer_checkpoint_path"
SALIENCY = "--controlnet_filter=inpaint --controlnet_filter_params saliency_model_path"

FILES = [
    ("c", f"{C}=m/stage_b.safetensors", f"{C} m/stage_b.safetensors: is Stable Cascade: stage B, not stage C", B),
    ("c", f"{C}=m/effnet_encoder.safetensors", "is Stable Cascade: the EfficientNet encoder", EFFNET),
    ("c", f"{C}=m/text_model.safetensors", "is Stable Cascade: a text encoder", TEXT),
    ("c", f"{C}=m/controlnet.safetensors", "a ControlNet for stage C", C),
    ("c", f"{C}=sd1.safetensors", "is Stable Diffusion 1.x, not stage C", C),
    ("c", f"{C}=lora.safetensors", "is a LoRA or another adapter", C),
    ("c", f"{C}=cut.safetensors", f"{C} cut.safetensors: incomplete", "Fetch the file again"),
    ("c", f"{C}=page.safetensors", f"{C} page.safetensors: this is a web page", "fetch the file"),
    ("c", f"{C}=hostile.ckpt", f"{C} hostile.ckpt: refused", "system"),
    ("c", f"{C}=lacking.safetensors", "stage C in lacking.safetensors", "down_blocks.0.0.channelwise.0.bias"),
    ("c", f"{C}=wide/stage_c.safetensors", f"{TEXT} m/text_model.safetensors: makes vectors of 32", "reads 64"),
    ("c", f"~stage_c_checkpoint_path {C}= --model_version=1B", "makes vectors of 32", "reads 1280"),
    ("c", f"{TEXT}=m/image_model.safetensors", TEXT, "is Stable Cascade: a CLIP image encoder"),
    ("c", f"{EFFNET}=affine.safetensors", f"{EFFNET} affine.safetensors: its last norm has weights", "Würstchen v2"),
    ("c", f"{EFFNET}=m/previewer.safetensors", f"{EFFNET} m/previewer.safetensors: is", f"{PREVIEWER} takes"),
    ("c", f"{PREVIEWER}=m/effnet_encoder.safetensors", f"{PREVIEWER} m/effnet_encoder.safetensors: is", EFFNET),
    ("c", "--image_model_checkpoint_path=sd1.safetensors --clip_image_cond_rate=0.1", "CLIP image encoder", "sd1"),
    ("b", f"{B}=m/stage_c.safetensors", f"{B} m/stage_c.safetensors: is Stable Cascade: stage C, not stage B", C),
    ("b", f"{A}=m/effnet_encoder.safetensors", f"{A} m/effnet_encoder.safetensors: is", f"{EFFNET} takes"),
    ("b", f"{A}=hostile.ckpt", f"{A} hostile.ckpt: refused", "safetensors"),
    ("b", f"~stage_b_checkpoint_path {B}= --model_version=700M", "makes vectors of 32", "reads 1280"),
    ("network", f"{C}=m/stage_b.safetensors", "stage B, not stage C", B),
    ("network", "--network_weights=lora.safetensors", "made for Stable Diffusion 1.x", "--network_weights"),
    ("network", "--network_weights=m/stage_c.safetensors", "not a LoRA but Stable Cascade", "--network_weights"),
    (
        "control",
        "--controlnet_checkpoint_path=hostile.ckpt",
        "--controlnet_checkpoint_path hostile.ckpt: ref",
        "system",
    ),
    ("control", "--controlnet_checkpoint_path=m/stage_c.safetensors", "--controlnet_checkpoint_path", "is Stable Cas"),
    ("control", f"{SALIENCY}=hostile.ckpt", "--controlnet_filter_params hostile.ckpt: refused", "system"),
    ("control", f"{SALIENCY}=m/stage_a.safetensors", "--controlnet_filter_params", "is no saliency model"),
    ("control", "--controlnet_backbone_path=m/previewer.safetensors", "holds no EfficientNet", "--controlnet_backbone"),
    ("draw", f"{C}=m/stage_b.safetensors", "stage B, not stage C", B),
    ("draw", f"{A}=m/effnet_encoder.safetensors", A, "the EfficientNet encoder, not stage A"),
    ("draw", "--network_weights=lora.safetensors", "made for Stable Diffusion 1.x", "--network_weights"),
    ("draw", f"{C}=lacking.safetensors", "stage C in lacking.safetensors", "down_blocks.0.0.channelwise.0.bias"),
    ("draw", f"{C}=wide/stage_c.safetensors", f"{TEXT} m/text_model.safetensors: makes vectors of 32", "reads 64"),
    ("draw", f"{B}=lacking_b.safetensors", "stage B in lacking_b.safetensors", "missing"),
    (
        "draw",
        "--controlnet_checkpoint_path=m/controlnet.safetensors",
        "which filter it was trained",
        "--controlnet_fil",
    ),
    ("latents", f"{EFFNET}=affine.safetensors", "its last norm has weights", "affine.safetensors"),
    ("texts", f"{TEXT}=m/image_model.safetensors", "is Stable Cascade: a CLIP image encoder", "image_model"),
    ("convert", "sd1.safetensors made", "is Stable Diffusion 1.x", "sd1.safetensors"),
    ("convert", "hostile.ckpt made", "refused", "system"),
    ("convert", "m/effnet_encoder.safetensors made --to diffusers", "diffusers has no place", "--to official"),
    ("convert", "lacking.safetensors made", "stage C in lacking.safetensors", "missing"),
    ("lora", "lora.safetensors made.safetensors", "made for Stable Diffusion 1.x", "lora.safetensors"),
    ("lora", "m/stage_c.safetensors made.safetensors", "not a LoRA but Stable Cascade", "m/stage_c"),
    ("shards", "photos made", "holds no pictures", "--recursive"),
]


@pytest.mark.parametrize(("script", "words", "first", "second"), FILES, ids=[f"{row[0]} {row[1]}" for row in FILES])
def test_wrong_files(refused, script, words, first, second):
    said = refused(script, words)
    assert first in said and second in said, said


@pytest.fixture
def nothing_runs(monkeypatch):
    """What a command line or a file says is never handed to Python or a shell; libraries may, for their own ends."""
    own = ("witness", "score >", ").__class__", "x.__class__", "cat good")

    def guard(original):
        def run(*args, **more):
            if any(word in str(args[0]) for word in own):
                raise AssertionError(f"executed: {args[0]}")
            return original(*args, **more)

        return run

    for name in ("builtins.eval", "builtins.exec", "os.system", "os.popen"):
        owner, _, function = name.rpartition(".")
        monkeypatch.setattr(name, guard(getattr(import_module(owner), function)))


FILTER = "an attribute that is not called is not allowed"
TARS = [
    ("--webdataset_path=silent.tar", (), "silent.tar: none of 1 samples has a caption"),
    ("--webdataset_path=absolute.tar", (), "/etc/0.jpg: a name that leads outside is passed over"),
    ("--webdataset_path=dots.tar", (), "../0.jpg: a name that leads outside is passed over"),
    ("--webdataset_path=link.tar", (), "d/0.jpg: a link is passed over"),
    ("--webdataset_path=pickle.tar", (), "may run code when it is opened, and is never opened"),
    ("--webdataset_path=page.tar", (), "page.tar: is no tar file"),
    ("--webdataset_path=nowhere.tar", (), "--webdataset_path: file 'nowhere.tar' not found"),
    ("--webdataset_path=no{0..99999999999}.tar", (), "stands for more than 1000000 files"),
    ("--webdataset_path", ("pipe:touch witness; cat good.tar",), "pipe:"),
    ("--webdataset_path", ("pipe:touch witness", "--webdataset_streaming"), "pipe:"),
    ("--webdataset_path=good.tar", ("--dataset_filter", "score: score > 9"), "none of 1 samples is left"),
    ("--webdataset_path=good.tar", ("--dataset_filter", "none: none > 9"), "none of 1 samples is left: no 'none'"),
    ("--webdataset_path=good.tar", ("--dataset_filter", "score: ().__class__"), f"column 1: {FILTER}"),
    ("--webdataset_path=good.tar", ("--dataset_filter", "score: score > 1 and 9**9**9"), "the operator ** is not all"),
    ("--webdataset_path=good.tar", ("--dataset_filter", "s: __import__('os').system('touch witness')"), ".system"),
    ("--webdataset_path=good.tar", ("--dataset_filter", f"s: '{'a' * 1_000_000}'"), "filter 1 (s)"),
    ("--webdataset_path=good.tar", ("--dataset_filter", f"s: {'(' * 400}s{')' * 400}"), "filter 1 (s)"),
    ("--webdataset_path=good.tar", ("--caption_field", "eval(x)"), "'eval(x)' is no field"),
    ("--webdataset_path=good.tar", ("--caption_field", "json", "lambda x: x.__class__"), f"column 11: {FILTER}"),
    ("--webdataset_path=good.tar", ("--cache_latents_to_disk", "--cache_latents"), "--cache_dir: is needed"),
    ("--webdataset_path=silent.tar", ("--webdataset_streaming",), "none of the first 1 samples has a caption"),
]


@pytest.mark.parametrize(("words", "more", "expected"), TARS, ids=[f"{row[0]} {row[2][:30]}" for row in TARS])
def test_wrong_data(refused, nothing_runs, words, more, expected):
    assert expected in refused("c", f"~train_data_dir {words}", *more)


@pytest.mark.parametrize("name", ["huge.tar", "cut.tar"])
def test_tar_files_that_end_too_early(place, monkeypatch, capsys, name):
    monkeypatch.chdir(place)
    words = COMMANDS["c"].replace("--train_data_dir=photos", f"--webdataset_path={name}").split()
    assert run_tool(import_module(SCRIPTS["c"]).main, *words) == 2
    assert f"error: {name}: cut off at byte 0" in capsys.readouterr().err


OPTIONS = [
    ("c", "--full_fp16 --mixed_precision=fp16", "--full_fp16: the weights of stage C overflow"),
    ("network", "--full_fp16 --mixed_precision=fp16", "--full_fp16: the weights of stage C overflow"),
    ("c", "--resolution=16", "16x16"),
    ("b", "--resolution=32", "--resolution: sides of pictures must have 64 to 16384 pixels, not 32x32"),
    ("c", "--resolution=100000", "must have 32 to 16384 pixels, not 100000x100000"),
    ("c", "--enable_bucket --bucket_reso_steps=48", "needs a multiple of 32. Use bucket_reso_steps = 64"),
    ("c", "--multi_aspect_ratio 1/0", "'1/0' is no ratio"),
    ("c", "--train_text_encoder --cache_text_encoder_outputs", "cannot be combined with --train_text_encoder"),
    ("network", "--cache_text_encoder_outputs --train_tokens [x]", "cannot be combined with --train_tokens"),
    ("c", "--cache_latents --random_crop", "--random_crop: cannot be combined with --cache_latents"),
    ("c", "--global_batch_size=4 --train_batch_size=2", "cannot be combined with --train_batch_size"),
    ("c", "--pretrained_model_name_or_path=x", "--stage_c_checkpoint_path"),
    ("network", "--network_args module_filters=.atn", "module_filters: leave none of the"),
    ("network", "--network_args block_dims=1,2", "block_dims is for the blocks of Stable Diffusion's U-Net, which"),
    ("network", "--train_tokens ^notaword", "no token of the vocabulary matches"),
    ("network", "--train_tokens (", "'(' is no regular expression"),
    ("network", "--train_tokens [x]=[", "is no regular expression"),
    ("network", "--train_tokens a", "tokens match"),
    ("network", "--stage_c_checkpoint_path= --model_version=1B", "belongs to a trained model"),
    ("control", "--controlnet_blocks 0 9", "residual blocks 0 to 3, not 9"),
    ("control", "--controlnet_filter=cany", "Did you mean canny?"),
    ("control", "--controlnet_filter_params rezise=1", "Did you mean resize?"),
    ("control", "--controlnet_filter=inpaint --controlnet_filter_params thresold=[2,3]", "two numbers between 0 and 1"),
    ("control", "--learning_rate=0", "0 trains nothing"),
    ("draw", "--fp16", "--fp16: the weights of stage C overflow"),
    ("convert", "m/stage_c.safetensors made.safetensors --to diffusers", "Leave out its suffix"),
    ("convert", "m/stage_c.safetensors made.bin", "made.bin: .bin is no suffix of a file that is written"),
    ("lora", "m/stage_c.safetensors made.ckpt", "End it with .safetensors"),
    ("shards", "photos/1_duck made --shard_size=0", "--shard_size"),
    ("latents", "~effnet_checkpoint_path", "--effnet_checkpoint_path: is required"),
]


@pytest.mark.parametrize(("script", "words", "expected"), OPTIONS, ids=[f"{row[0]} {row[1][:50]}" for row in OPTIONS])
def test_wrong_options(refused, script, words, expected):
    assert expected in refused(script, words)
