"""Wrong files, pictures and prompts for gen_img.py: told in one line, before the model is loaded where that can be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import gen_img
from library.checkpoints.embedding_file import write_embedding
from tests.control_nets import control_net, write_control_net
from tests.lora_files import save, small_lora
from tests.support import run_tool


class Payload:
    """Pickles as a call that makes a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch '{self.witness}'",)


class Place:
    """A folder for what is spoilt, and gen_img.py run with the tiny model."""

    def __init__(self, folder: Path, model: Path, capsys) -> None:
        self.folder, self.model, self.capsys = folder, model, capsys
        self.out = folder / "out"

    def run(self, *words: object, model: object = None, prompt: str | None = "a cat --d 1") -> tuple[int, str]:
        """Return the status and standard error."""
        self.capsys.readouterr()
        argv = [f"--ckpt={model or self.model}", f"--outdir={self.out}", "--steps=1", "--W=64", "--H=64", *words]
        status = run_tool(gen_img.main, *argv, *([f"--prompt={prompt}"] if prompt else []))
        said = self.capsys.readouterr().err
        assert "Traceback" not in said, said
        assert not (self.folder / "witness").exists()
        return status, said

    def refused(self, *words: object, **more) -> str:
        """Run what must be refused with a single line, which is returned."""
        status, said = self.run(*words, **more)
        assert status == 2, said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and said.splitlines()[-1] == errors[0], said
        assert not list(self.out.rglob("*.png"))
        return errors[0]

    def file(self, name: str) -> Path:
        """Return a file that is not what it is taken for; `missing` is not made."""
        path = self.folder / name
        kind = name.partition(".")[0]
        if kind != "missing":
            MAKERS[kind](path, self.model)
        return path


def with_nan(path: Path, model: Path) -> None:
    tensors = load_file(model)
    tensors["model.diffusion_model.middle_block.1.norm.weight"].fill_(float("nan"))
    save_file(tensors, path)


MAKERS = {
    "hostile": lambda path, _: torch.save({"state_dict": {"a": Payload(path.with_name("witness"))}}, path),
    "text": lambda path, _: path.write_text("hello " * 100),
    "lora": lambda path, _: save(path, small_lora("sd15")),
    "sdxl_lora": lambda path, _: save(path, small_lora("sdxl")),
    "embedding": lambda path, _: write_embedding(path, {"clip_l": torch.ones(1, 64)}),
    "wide": lambda path, _: write_embedding(path, {"clip_l": torch.ones(1, 768)}),
    "sdxl_embedding": lambda path, _: write_embedding(
        path, {"clip_l": torch.ones(1, 64), "clip_g": torch.ones(1, 128)}
    ),
    "nan_embedding": lambda path, _: save_file({"emb_params": torch.full((1, 64), float("nan"))}, path),
    "vae": lambda path, model: save_file({k: v for k, v in load_file(model).items() if "first_stage" in k}, path),
    "cut": lambda path, model: path.write_bytes(model.read_bytes()[:-9]),
    "nan": with_nan,
    "control": lambda path, _: write_control_net(control_net("sd1"), path, "original"),
    "sd2_control": lambda path, _: write_control_net(control_net("sd2"), path, "original"),
    "sdxl_control": lambda path, _: write_control_net(control_net("sd1", cross_attention_dim=2048), path, "original"),
}


@pytest.fixture
def place(tmp_path, tiny_sd1, capsys):
    return Place(tmp_path, tiny_sd1, capsys)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("hostile.ckpt", "refused: this pickle wants to use"),
        ("text.ckpt", "text.ckpt: "),
        ("lora.safetensors", "the network with --network_weights"),
        ("embedding.safetensors", "embedding with --textual_inversion_embeddings"),
        ("vae.safetensors", "looks like a VAE alone"),
        ("cut.safetensors", "incomplete"),
        ("control.safetensors", "--control_net_models"),
    ],
)
def test_what_is_no_model(place, no_loading, name, word):
    assert word in place.refused(model=place.file(name))


def test_a_model_with_nan(place):
    said = place.refused(model=place.file("nan.safetensors"))
    assert "1 tensors hold NaN or infinity" in said and "nan.safetensors" in said


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("hostile.pt", "refused: this pickle wants to use"),
        ("text.pt", "text.pt: "),
        ("lora.safetensors", "is no embedding but a LoRA"),
        ("nan_embedding.safetensors", "NaN or infinity"),
        ("missing.pt", "no such file"),
    ],
)
def test_what_is_no_embedding(place, no_loading, name, word):
    assert word in place.refused(f"--textual_inversion_embeddings={place.file(name)}")


@pytest.mark.parametrize("name", ["wide.safetensors", "sdxl_embedding.safetensors"])
def test_embeddings_of_other_models(place, name):
    said = place.refused(f"--textual_inversion_embeddings={place.file(name)}")
    assert "but those of this model have 64" in said and name in said


def test_all_wrong_embeddings_are_told_together(place, no_loading):
    names = ("hostile.pt", "text.pt")
    status, said = place.run("--textual_inversion_embeddings", *(place.file(name) for name in names))
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 2 and all(name in line for name, line in zip(names, errors, strict=True))


@pytest.mark.parametrize(
    ("module", "name", "word"),
    [
        ("networks.lora", "hostile.pt", "refused: this pickle wants to use"),
        ("networks.lora", "embedding.safetensors", "not a LoRA but a textual inversion embedding"),
        ("networks.lora", "sdxl_lora.safetensors", "this LoRA was made for SDXL"),
        ("networks.lora", "missing.safetensors", "no such file"),
        ("networks.hypernetwork", "hostile.pt", "refused: this pickle wants to use"),
        ("networks.hypernetwork", "lora.safetensors", "is no hypernetwork"),
        ("networks.hypernetwork", "embedding.safetensors", "is no hypernetwork"),
        ("no_such_module", "lora.safetensors", "no such Python module"),
    ],
)
def test_what_is_no_network(place, no_loading, module, name, word):
    said = place.refused(f"--network_module={module}", f"--network_weights={place.file(name)}")
    assert word in said and (name in said or module in said)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("hostile.pt", "refused: this pickle wants to use"),
        ("lora.safetensors", "is no ControlNet"),
        ("sd2_control.safetensors", "is a ControlNet for Stable Diffusion 2.x"),
        ("sdxl_control.safetensors", "text width 2048, and the U-Net has 64"),
    ],
)
def test_what_is_no_control_net(place, name, word):
    Image.new("RGB", (64, 64)).save(place.folder / "guide.png")
    guide = f"--guide_image_path={place.folder / 'guide.png'}"
    assert word in place.refused(f"--control_net_models={place.file(name)}", guide)


@pytest.mark.parametrize("name", ["hostile.pt", "lora.safetensors"])
def test_what_is_no_vae(place, name):
    assert name in place.refused(f"--vae={place.file(name)}")


# Pictures ------------------------------------------------------------------------------------------------------------


def wrong_pictures(folder: Path) -> list[Path]:
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.png").write_text("<html></html>")
    paths = [folder / "empty.png", folder / "page.png"]
    if os.name != "nt":
        os.mkfifo(folder / "pipe.png")
        paths.append(folder / "pipe.png")
    return paths


@pytest.mark.parametrize("option", ["--image_path", "--mask_path", "--guide_image_path"])
def test_pictures_that_are_none_are_told_first(place, no_loading, option):
    Image.new("RGB", (64, 64)).save(place.folder / "image.png")
    more = [f"--image_path={place.folder / 'image.png'}"] if option == "--mask_path" else []
    if option == "--guide_image_path":
        more.append(f"--control_net_models={place.file('control.safetensors')}")
    (place.folder / "pictures").mkdir()
    paths = wrong_pictures(place.folder / "pictures")
    for path in [*paths, place.folder / "pictures"]:
        said = place.refused(f"{option}={path}", *more)
        assert str(path) in said
        assert any(word in said for word in ("empty file", "not an image", "is not a regular file"))


def test_one_bad_picture_costs_its_prompt_only(place):
    folder = place.folder / "pictures"
    folder.mkdir()
    for number in (0, 2):
        Image.new("RGB", (64, 64), "red").save(folder / f"{number}.png")
    (folder / "1.png").write_bytes(b"")
    (place.folder / "prompts.txt").write_text("a\nb\nc\n")
    status, said = place.run(
        f"--image_path={folder}", f"--from_file={place.folder / 'prompts.txt'}", "--strength=1", prompt=None
    )
    assert status == 2 and "1.png: empty file" in said
    assert said.splitlines()[-1] == "error: 1 of 3 pictures could not be made; see the messages above."
    assert sorted(Image.open(path).text["prompt"] for path in place.out.glob("*.png")) == ["a", "c"]


def test_pictures_of_every_kind_are_painted_on(place):
    folder = place.folder / "pictures"
    folder.mkdir()
    Image.new("CMYK", (64, 64), (10, 20, 30, 40)).save(folder / "cmyk.jpg")
    Image.new("I;16", (64, 64), 40000).save(folder / "sixteen.png")
    Image.new("P", (64, 64)).save(folder / "palette.png")
    Image.new("LA", (64, 64), (100, 50)).save(folder / "alpha.png")
    frames = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in (0, 99)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (64, 96)).save(folder / "turned.jpg", exif=exif)
    (place.folder / "prompts.txt").write_text("".join(f"{number}\n" for number in range(6)))
    status, said = place.run(
        f"--image_path={folder}", f"--from_file={place.folder / 'prompts.txt'}", "--strength=1", prompt=None
    )
    assert status == 0, said
    assert len(list(place.out.glob("*.png"))) == 6


# Prompts -------------------------------------------------------------------------------------------------------------

UNUSUAL = (
    "\x1b[31mred\x07 and \x00",
    "😀" * 50,
    "word " * 5000,
    "((((((a",
    "(a:1e999) (a:nan) a:1.2.3)",
    "{a|b",
    "{" * 3000,
    "BREAK " * 100,
    "AND",
    "--n nothing else",
)
REFUSED = (
    ("{e$$" + "|".join("abcdefghij") + "}") * 9,
    "x --f " + "n" * 10 + " --zz 1",
    "x --l nan",
    "x --d 99999999999999999999999",
    "x --w 100000",
    "x --s 1001",
    "x --am 1,b",
)


def test_prompts_of_all_kinds(place):
    lines = ["first --d 1", *UNUSUAL, *REFUSED, "last --d 2"]
    path = place.folder / "prompts.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    status, said = place.run(f"--from_file={path}", prompt=None)
    assert status == 2
    left_out = [line for line in said.splitlines() if "prompt left out" in line]
    for number, line in enumerate(lines, 1):
        assert any(f"line {number}: " in one for one in left_out) == (line in REFUSED), line
    assert "\x1b[31m" not in said and "\x07" not in said
    made = [Image.open(one).text.get("prompt") for one in place.out.glob("*.png")]
    assert {"first", "last"} <= set(made) and len(made) == 2 + len(UNUSUAL)


OUTSIDE = ("../../outside", "/tmp/outside", "..\\..\\outside", "~/outside", "CON", "a/../../outside", "a" * 4000)


def test_names_stay_in_the_folder(place):
    path = place.folder / "prompts.txt"
    path.write_text("".join(f"a cat --f {name}\n" for name in (*OUTSIDE, ".hidden")), encoding="utf-8")
    before = set(place.folder.rglob("*"))
    status, said = place.run(f"--from_file={path}", prompt=None)
    assert status == 2
    for number in range(1, len(OUTSIDE) + 1):
        assert f"line {number}: --f is " in said
    made = {one for one in place.folder.rglob("*") if one.is_file()} - before
    assert all(one.is_relative_to(place.out) for one in made) and len(made) <= 1
    assert not Path("/tmp/outside.png").exists()


def test_seeds_that_no_generator_takes(place, no_loading):
    assert "--seed: must be" in place.refused("--seed=99999999999999999999999", prompt="a cat")
