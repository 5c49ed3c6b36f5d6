"""gen_img.py as users run it, with a tiny model: command lines in, pictures and messages out."""

import io
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file

import gen_img
from library.checkpoints.embedding_file import write_embedding
from library.inference.generation import defaults
from library.inference.outputs import PictureFolder
from library.inference.picture_inputs import InputPictures, named_files, opened
from library.inference.prompt_files import PromptEntry
from library.inference.prompt_options import GENERATION
from library.inference.prompts import PromptRequest, parse_entry
from library.inference.render import DiffusionRenderer
from library.inference.rendering import NotFinite
from library.option_parser import parse

SMALL = ("--steps=2", "--W=64", "--H=64", "--sampler=euler_a")


@pytest.fixture
def draw(tiny_sd1, tmp_path, capsys):
    """Run the script with the tiny model; returns (exit status, pictures by name, standard error)."""

    def run(*words, model=tiny_sd1, out="out", options=SMALL):
        folder = tmp_path / out
        before = set(folder.rglob("*")) if folder.exists() else set()
        argv = [f"--ckpt={model}", f"--outdir={folder}", *options, *map(str, words)]
        try:
            gen_img.main(argv)
        except SystemExit as ended:
            code = int(ended.code or 0)
        made = sorted(set(folder.rglob("*.png")) - before, key=lambda path: path.stat().st_mtime_ns)
        return code, {path.relative_to(folder).as_posix(): Image.open(path) for path in made}, capsys.readouterr().err

    return run


CAT = "--prompt=a cat --d 1"


@pytest.fixture(scope="module")
def cat(tiny_sd1, tmp_path_factory):
    """What `CAT` draws without anything else."""
    folder = tmp_path_factory.mktemp("cat")
    with pytest.raises(SystemExit):
        gen_img.main([f"--ckpt={tiny_sd1}", f"--outdir={folder}", *SMALL, CAT])
    return Image.open(next(folder.glob("*.png")))


def test_without_a_usable_prompt_no_model_is_loaded(draw, monkeypatch):
    monkeypatch.setattr("library.inference.loading.load_family", None)
    code, _, error = draw("--prompt=a cat --zz 4")
    assert (code, "unknown '--zz'" in error) == (2, True), error


def levels(image):
    return np.asarray(image.convert("RGB")).astype(int)


def only(result):
    """The one picture of a run that went well."""
    code, pictures, error = result
    assert code == 0, error
    assert len(pictures) == 1
    return next(iter(pictures.values()))


def difference(one, two):
    return abs(levels(one) - levels(two)).max()


@pytest.fixture
def prompts(tmp_path):
    def write(*lines):
        path = tmp_path / "prompts.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


# Prompts and files ---------------------------------------------------------------------------------------------------


def test_a_prompt_becomes_a_picture_that_tells_how_it_was_made(draw):
    code, pictures, error = draw("--prompt", "a photo of a cat --w 96 --d 1 --n blurry --l 5")
    assert code == 0, error
    [(name, image)] = pictures.items()
    assert re.fullmatch(r"im_\d{14}_000_1\.png", name)
    assert image.size == (96, 64)
    assert image.text["prompt"] == "a photo of a cat"
    expected = {"seed": "1", "sampler": "euler_a", "steps": "2", "scale": "5.0", "negative-prompt": "blurry"}
    assert {key: image.text[key] for key in expected} == expected
    assert image.text["parameters"] == (
        "a photo of a cat\nNegative prompt: blurry\n"
        "Steps: 2, Sampler: Euler a, CFG scale: 5, Seed: 1, Size: 96x64, Model: tiny_sd1"
    )


def test_bad_lines_are_named_and_the_others_drawn(draw, prompts):
    path = prompts("# comment", "a cat --d 1", "", "a dog --s 0", "a fox --zz 3 --d 2", "a bear --d 3")
    code, pictures, error = draw("--from_file", path)
    assert code == 2
    assert [image.text["prompt"] for image in pictures.values()] == ["a cat", "a bear"]
    assert "line 4: --s is '0', but takes a whole number from 1 to 1000" in error
    assert "line 5: unknown '--zz'" in error
    assert error.splitlines()[-1] == "error: 2 mistakes in prompts; see the messages above."


def test_seeds_and_batches(draw, prompts):
    path = prompts("a cat", "a dog --n blurry", "a fox --w 96")
    code, alone, _ = draw("--from_file", path, "--seed=7", "--images_per_prompt=2", out="alone")
    _, together, _ = draw("--from_file", path, "--seed=7", "--images_per_prompt=2", "--batch_size=4", out="together")
    assert code == 0
    assert len({image.text["seed"] for image in alone.values()}) == 6
    for one, two in zip(alone.values(), together.values(), strict=True):
        assert one.text == two.text
        assert difference(one, two) <= 1


def test_names_never_overwrite(draw):
    for _ in range(2):
        code, pictures, _ = draw("--prompt=a cat --d 1", "--sequential_file_name", "--images_per_prompt=2")
        assert code == 0
    assert list(pictures) == ["im_000003.png", "im_000004.png"]
    for name in ("fox.png", "fox_1.png"):
        assert list(draw("--prompt=a cat --d 1 --f fox.png")[1]) == [name]


def test_a_file_name_cannot_leave_the_folder(draw, tmp_path):
    code, pictures, error = draw("--prompt=a cat --f ../fox")
    assert (code, pictures) == (2, {})
    assert "--f is '../fox', but takes a file name without folders" in error
    assert not (tmp_path / "fox.png").exists()


def test_prompts_from_standard_input(draw, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat --d 1\n\n# nothing\na dog --w x\na fox --d 2\n"))
    code, pictures, error = draw("--interactive", "--no_preview", "--batch_size=4")
    assert code == 2
    assert [image.text["prompt"] for image in pictures.values()] == ["a cat", "a fox"]
    assert "line 4: --w is 'x'" in error


def test_ctrl_c_while_nothing_is_drawn_ends_an_interactive_run(draw, monkeypatch):
    class Typing(io.StringIO):
        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Typing())
    code, pictures, error = draw("--interactive", "--n_iter=3")
    assert (code, pictures) == (0, {})
    assert "--n_iter and --shuffle_prompts have no effect" in error


def test_prompts_from_a_module(draw, tmp_path):
    module = tmp_path / "prompter.py"
    module.write_text(
        "def get_prompter(args, pipe, networks):\n"
        "    prompts = [f'{args.prompter_module_args[0]} --d 1', 'a dog --d 2']\n"
        "    return lambda args, pipe, chance, seed, index, count: prompts[index] if index < 2 else None\n"
    )
    code, pictures, error = draw("--from_module", module, "--prompter_module_args", "a cat")
    assert code == 0, error
    assert [image.text["prompt"] for image in pictures.values()] == ["a cat", "a dog"]


def test_variants_and_rounds(draw):
    code, pictures, _ = draw("--prompt=a {e$$red|green} cat", "--n_iter=2", "--iter_same_seed")
    assert code == 0
    made = [(image.text["prompt"], image.text["seed"]) for image in pictures.values()]
    assert [prompt for prompt, _ in made] == ["a red cat", "a green cat"] * 2
    assert made[0][1] == made[1][1] != made[2][1] == made[3][1]
    assert next(iter(pictures.values())).text["raw-prompt"] == "a {e$$red|green} cat"


# What goes wrong while pictures are drawn ---------------------------------------------------------------------------


def test_a_failing_picture_is_reported_and_the_rest_goes_on(draw, prompts, monkeypatch):
    whole = DiffusionRenderer.render

    def render(self, requests, *rest, **named):
        if any(request.prompt == "a dog" for request in requests):
            raise NotFinite("the picture holds values that are not numbers")
        return whole(self, requests, *rest, **named)

    monkeypatch.setattr(DiffusionRenderer, "render", render)
    path = prompts("a cat --d 1", "a dog --d 2", "a fox --d 3")
    code, pictures, error = draw("--from_file", path, "--batch_size=3")
    assert code == 2
    assert [image.text["prompt"] for image in pictures.values()] == ["a cat", "a fox"]
    assert "line 2, seed 2: no picture: NotFinite: the picture holds values that are not numbers" in error
    assert "error: 1 of 3 pictures could not be made" in error


def test_ctrl_c_finishes_the_picture_and_ends(draw, monkeypatch):
    write = PictureFolder.write

    def interrupted(self, *rest, **named):
        os.kill(os.getpid(), signal.SIGINT)
        return write(self, *rest, **named)

    monkeypatch.setattr(PictureFolder, "write", interrupted)
    code, pictures, error = draw("--prompt=a cat", "--images_per_prompt=5")
    assert (code, len(pictures)) == (130, 1)
    assert "error: interrupted; 1 picture" in error


def test_several_processes_are_refused(draw, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", sys.exit)
    code, pictures, error = draw("--prompt=a cat")
    assert (code, pictures) == (2, {})
    assert "this script draws in one process, not in 2" in error


# Networks and embeddings --------------------------------------------------------------------------------------------


def save_network(family, module, path, **arguments):
    """Write a network with random values for a model."""
    torch.manual_seed(0)
    network = module.create_network(1.0, 4, 4, None, family.text_encoder, family.unet, **arguments)
    network.apply_to(family.text_encoder, family.unet, True, True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for values in network.parameters():
            values.add_(0.15 * torch.randn(values.shape, generator=generator))
    network.save_weights(str(path), None, {})
    return path


@pytest.fixture(scope="module")
def network_files(tiny_sd1, tmp_path_factory):
    from pathlib import Path

    import networks.loha
    import networks.lora
    from library.inference.loading import load_family, recognise

    opts = gen_img.Options()
    folder = tmp_path_factory.mktemp("networks")

    def family():
        return load_family(opts, Path(tiny_sd1), recognise(Path(tiny_sd1), opts.model), torch.device("cpu"))

    files = {
        "lora": save_network(family(), networks.lora, folder / "lora.safetensors", conv_dim="2"),
        "loha": save_network(family(), networks.loha, folder / "loha.safetensors"),
    }
    try:
        import lycoris.kohya
    except ImportError:
        return files
    files["lycoris"] = save_network(family(), lycoris.kohya, folder / "lycoris.safetensors", algo="lokr")
    return files


MODULES = {"lora": "networks.lora", "loha": "networks.loha", "lycoris": "lycoris.kohya"}


@pytest.mark.parametrize("kind", MODULES)
def test_applied_merged_and_calculated_networks_draw_the_same(draw, cat, network_files, kind):
    if kind not in network_files:
        pytest.skip("LyCORIS is not installed")
    words = (CAT, "--network_module", MODULES[kind], "--network_weights", network_files[kind])
    applied = only(draw(*words, "--network_mul=0.7"))
    assert abs(levels(applied) - levels(cat)).mean() > 2
    assert difference(applied, only(draw(*words, "--network_mul=0.7", "--network_merge"))) <= 2
    assert difference(cat, only(draw(*words, "--network_mul=0"))) == 0
    code, pictures, error = draw(*words, "--network_mul=0.7", "--network_pre_calc")
    assert difference(applied, pictures.popitem()[1]) <= 2
    assert ("--network_pre_calc has no effect" in error) == (kind == "lycoris")


def test_several_networks_with_strengths_for_each_prompt(draw, cat, network_files, prompts):
    files = [network_files["lora"], network_files["loha"]]
    both = ("--network_module", "networks.lora", "networks.loha", "--network_weights", *files)
    alone = [
        only(draw(CAT, "--network_module", MODULES[kind], "--network_weights", network_files[kind])) for kind in MODULES
        if kind != "lycoris"
    ]  # fmt: skip
    path = prompts("a cat --d 1 --am 1,0", "a cat --d 1 --am 0,1", "a cat --d 1 --am 0", "a cat --d 1")
    for more in ([], ["--network_pre_calc"]):
        code, pictures, error = draw("--from_file", path, "--batch_size=4", *both, *more)
        assert code == 0, error
        first, second, none, together = pictures.values()
        assert difference(first, alone[0]) <= 2
        assert difference(second, alone[1]) <= 2
        assert difference(none, cat) == 0
        assert abs(levels(together) - levels(first)).mean() > 2
    merged = only(draw(CAT, *both, "--network_merge_n_models=1"))
    assert difference(merged, together) <= 2


def test_calculated_networks_beside_those_that_cannot_be(draw, network_files):
    if "lycoris" not in network_files:
        pytest.skip("LyCORIS is not installed")
    files = [network_files["lora"], network_files["lycoris"]]
    words = (CAT, "--network_module", "networks.lora", "lycoris.kohya", "--network_weights", *files)
    assert difference(only(draw(*words)), only(draw(*words, "--network_pre_calc"))) <= 2


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("networks.lora", "rank=4", "the network module knows no argument 'rank'"),
        ("lycoris.kohya", "conv_dmi=4", "lycoris.kohya reads no 'conv_dmi'. Did you mean conv_dim?"),
    ],
)
def test_arguments_of_modules_are_checked_before_the_model_is_loaded(
    draw, network_files, monkeypatch, module, arguments, message
):
    if module == "lycoris.kohya":
        pytest.importorskip("lycoris.kohya")
    monkeypatch.setattr("library.inference.loading.load_family", lambda *_: pytest.fail("was loaded"))
    words = ("--network_module", module, "--network_weights", network_files["lora"], "--network_args", arguments)
    code, pictures, error = draw(CAT, *words)
    assert (code, pictures) == (2, {})
    assert message in error


def test_what_a_network_file_says_is_shown(draw, network_files):
    _, _, error = draw(CAT, "--network_weights", network_files["lora"], "--network_show_meta")
    assert '"sshs_model_hash": "' in error


def test_a_network_for_another_model_is_refused(draw, network_files, tiny_sd2):
    code, pictures, error = draw(CAT, "--network_weights", network_files["lora"], model=tiny_sd2)
    assert (code, pictures) == (2, {})
    last = error.splitlines()[-1]
    assert "this LoRA was made for Stable Diffusion 1.x, but the model is Stable Diffusion 2.x" in last


def test_a_hypernetwork(draw, cat, tmp_path):
    from networks.hypernetwork import create_network

    path = tmp_path / "hyper.safetensors"
    network = create_network(1.0, None, None, None, None, None, sizes="64")
    with torch.no_grad():
        for number, values in enumerate(network.parameters()):
            values.copy_(0.2 * torch.randn(values.shape, generator=torch.Generator().manual_seed(number)))
    network.save_weights(str(path), None, {})
    words = ("--network_module", "networks.hypernetwork", "--network_weights", path)
    assert difference(cat, only(draw(CAT, *words))) > 3
    assert difference(cat, only(draw(f"{CAT} --am 0", *words))) == 0
    code, _, error = draw(CAT, *words, "--network_merge")
    assert (code, "its network cannot be merged" in error) == (2, True)
    code, _, error = draw(CAT, "--network_weights", path)
    assert (code, "is a hypernetwork. Give --network_module networks.hypernetwork." in error) == (2, True)


def test_an_embedding_is_called_like_its_file(draw, tmp_path):
    rows = 0.3 * torch.randn((2, 64), generator=torch.Generator().manual_seed(1))
    path = tmp_path / "sks-style.safetensors"
    write_embedding(path, {"clip_l": rows}, {})
    with_file = ("--prompt=a cat, sks-style --d 1", "--textual_inversion_embeddings", path)
    assert abs(levels(only(draw(*with_file))) - levels(only(draw(with_file[0])))).mean() > 0.5
    bad = tmp_path / "wide.safetensors"
    write_embedding(bad, {"clip_l": torch.zeros((1, 32))}, {})
    code, _, error = draw(CAT, "--textual_inversion_embeddings", bad)
    assert code == 2
    assert "holds vectors of 32 values, but those of this model have 64" in error


def test_words_in_a_lora_are_those_of_an_embedding_file(draw, network_files, tmp_path):
    row = 0.3 * torch.randn((2, 64), generator=torch.Generator().manual_seed(1))
    write_embedding(tmp_path / "felix.safetensors", {"clip_l": row}, {})
    with safe_open(network_files["lora"], "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file({**tensors, "bundle_emb.felix.clip_l": row}, tmp_path / "both.safetensors", metadata)
    words = ("--prompt=a felix --d 1", "--network_weights")
    known = only(draw(*words, tmp_path / "both.safetensors"))
    beside = ("--textual_inversion_embeddings", tmp_path / "felix.safetensors")
    assert difference(known, only(draw(*words, network_files["lora"], *beside))) == 0
    assert difference(known, only(draw(*words, network_files["lora"]))) > 0


# The model ----------------------------------------------------------------------------------------------------------


def test_models_are_recognised(draw, tiny_sd2, tiny_sd2_v):
    for model, label, kind in ((tiny_sd2, "2.x", "noise"), (tiny_sd2_v, "2.x", "velocity")):
        _, pictures, error = draw(CAT, model=model)
        assert len(pictures) == 1
        assert f"Stable Diffusion {label}, predicts {kind}" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--v2"], "looks like Stable Diffusion 1.x, not what --v2 says. Remove --v2."),
        (["--v_parameterization"], "this model predicts noise (epsilon), not velocity. Remove --v_parameterization."),
    ],
)
def test_flags_that_contradict_the_model(draw, words, message):
    code, pictures, error = draw(CAT, *words)
    assert (code, pictures) == (2, {})
    assert message in error.splitlines()[-1]


def test_a_pattern_must_fit_one_model(draw, tiny_sd1, network_files):
    assert only(draw(CAT, model=str(tiny_sd1).replace("tiny_sd1", "t?ny_sd1")))
    code, _, error = draw(CAT, model=tiny_sd1.parent / "no*.safetensors")
    assert (code, "fits no file" in error) == (2, True)
    code, _, error = draw(CAT, model=network_files["lora"])
    assert "looks like a LoRA or another adapter" in error
    assert "--network_weights" in error


# Pictures from pictures ----------------------------------------------------------------------------------------------


@pytest.fixture
def photograph(tmp_path):
    """A picture of 100x70 pixels."""
    gradient = np.linspace(0, 255, 100 * 70 * 3).reshape(70, 100, 3).astype(np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(gradient).save(path)
    return path


def test_pictures_from_a_picture(draw, photograph):
    words = (CAT, "--image_path", photograph, "--use_original_file_name")
    code, pictures, error = draw(*words, "--strength=0.6", options=("--steps=4",))
    assert code == 0, error
    assert list(pictures) == ["photo.png"]
    image = pictures["photo.png"]
    assert image.size == (96, 64)
    assert "Denoising strength: 0.6" in image.text["parameters"]
    other = only(draw(*words, "--strength=1", options=("--steps=4",)))
    assert difference(image, other) > 10
    assert only(draw(*words)).size == (64, 64), "a size that was asked for"


def test_a_mask_keeps_what_is_black(draw, photograph, tmp_path):
    mask = Image.new("L", (100, 70), 0)
    ImageDraw.Draw(mask).rectangle((50, 0, 100, 70), fill=255)
    mask.save(tmp_path / "mask.png")
    code, pictures, error = draw(
        CAT, "--image_path", photograph, "--mask_path", tmp_path / "mask.png", options=("--steps=4",)
    )
    assert code == 0, error
    made = levels(next(iter(pictures.values())))
    original = levels(Image.open(photograph).resize((96, 64), Image.Resampling.LANCZOS))
    assert abs(made[:, :46] - original[:, :46]).max() <= 1
    assert abs(made[:, 50:] - original[:, 50:]).mean() > 5


def test_a_folder_of_pictures_is_taken_in_turn(draw, photograph, tmp_path, prompts):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, side in (("b", 128), ("a", 64)):
        Image.open(photograph).resize((side, 64)).save(folder / f"{name}.png")
    (folder / "c.png").write_bytes(b"no picture")
    path = prompts("a cat --d 1", "a dog --d 2", "a fox --d 3", "a bear --d 4")
    code, pictures, error = draw(
        "--from_file", path, "--image_path", folder, "--use_original_file_name", options=("--steps=2",)
    )
    assert code == 2
    assert [(name, image.size[0], image.text["prompt"]) for name, image in pictures.items()] == [
        ("a.png", 64, "a cat"),
        ("b.png", 128, "a dog"),
        ("a_1.png", 64, "a bear"),
    ]
    assert "c.png" in error


def test_a_bad_prompt_has_its_turn_too(draw, photograph, tmp_path, prompts):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abc":
        Image.open(photograph).save(folder / f"{name}.png")
    path = prompts("a cat --d 1", "a dog --zz", "a fox --d 3")
    _, pictures, _ = draw("--from_file", path, "--image_path", folder, "--use_original_file_name")
    assert {name: image.text["prompt"] for name, image in pictures.items()} == {"a.png": "a cat", "c.png": "a fox"}


def test_the_pictures_of_a_prompt_work_through_the_folder(draw, photograph, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abc":
        Image.open(photograph).save(folder / f"{name}.png")
    words = ("--prompt=a cat", "--images_per_prompt=4", "--image_path", folder, "--use_original_file_name")
    _, pictures, _ = draw(*words)
    assert sorted(pictures) == ["a.png", "a_1.png", "b.png", "c.png"]


@pytest.mark.parametrize(
    ("line", "words", "size"),
    [
        ("a cat", [], (96, 64)),
        ("a cat --w 512 --h 512", [], (512, 512)),
        ("a cat --w 64", [], (64, 32)),
        ("a cat", ["--H=128"], (160, 128)),
        ("a cat --h 64 --w 64", ["--H=128"], (64, 64)),
        ("a cat", ["--H=128", "--W=128"], (128, 128)),
    ],
)
def test_the_size_of_pictures_from_pictures(photograph, tmp_path, line, words, size):
    words = ("--ckpt=x", f"--outdir={tmp_path / 'out'}", f"--image_path={photograph}", "--prompt=a", *words)
    opts = parse(gen_img.Options, words)
    request, problems = parse_entry(PromptEntry("line 1", line), defaults(opts), GENERATION, [])
    assert not problems
    made = InputPictures(named_files(opts)).picture(0, request)
    assert (made.request.width, made.request.height) == size


def test_a_picture_that_changes_is_read_again(photograph):
    before = opened(photograph)
    assert opened(photograph) is before
    Image.new("RGB", (64, 64)).save(photograph)
    os.utime(photograph, ns=(1, 1))
    assert opened(photograph).size == (64, 64)


def test_prompts_stay_with_their_pictures(draw):
    for name in ("one", "two", "three"):
        draw(f"--prompt={name} --d 1 --f {name}", out="made")
    folder = next(iter(draw("--prompt=four --d 1 --f four", out="made")[1].values())).filename.rpartition("/")[0]
    words = ("--image_path", folder, "--shuffle_prompts", "--use_original_file_name", "--seed=3")
    code, pictures, error = draw(*words, out="again")
    assert code == 0, error
    assert list(pictures) != sorted(pictures), "an order that does not show anything"
    assert all(name == f"{image.text['prompt']}.png" for name, image in pictures.items())


def test_prompts_from_the_pictures_themselves(draw, photograph):
    _, made, _ = draw("--prompt=a cat --n blurry --d 1 --f first")
    folder = next(iter(made.values())).filename
    code, pictures, error = draw("--image_path", folder, "--seed=1", out="again")
    assert code == 0, error
    assert next(iter(pictures.values())).text["negative-prompt"] == "blurry"
    code, pictures, error = draw("--image_path", photograph, out="again")
    assert (code, pictures) == (2, {})
    assert "photo.png: says nothing about a prompt" in error


def test_two_passes(draw):
    words = ("--prompt=a cat --d 1", "--highres_fix_scale=0.5", "--highres_fix_steps=3", "--W=128", "--H=128")
    code, pictures, error = draw(*words, "--highres_fix_save_1st", "--sequential_file_name")
    assert code == 0, error
    sizes = {name: (image.size, image.text["steps"]) for name, image in pictures.items()}
    assert sizes == {"im_0000001.png": ((64, 64), "3"), "im_1000001.png": ((128, 128), "2")}
    together = ("--prompt=a cat", "--images_per_prompt=2", "--batch_size=2", "--highres_fix_save_1st")
    code, both, error = draw(*together, *words[1:], "--sequential_file_name", out="both")
    assert code == 0, error
    assert list(both) == [f"im_{mark}{number:06d}.png" for number in (1, 2) for mark in (0, 1)]
    seeds = [image.text["seed"] for image in both.values()]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    latents = only(draw(*words, "--highres_fix_latents_upscaling"))
    assert difference(latents, pictures["im_1000001.png"]) > 10


def test_a_guide_picture(draw, cat, photograph, tmp_path):
    from tests.control_nets import control_net, original_names

    path = tmp_path / "control.safetensors"
    save_file(original_names(control_net()), path)
    words = (CAT, "--control_net_models", path, "--control_net_preps", "canny_63_191")
    guided = only(draw(*words, "--guide_image_path", photograph))
    assert difference(cat, guided) > 3
    assert difference(guided, only(draw(f"{CAT} --cn {photograph}", *words[1:]))) == 0
    assert difference(cat, only(draw(*words, "--guide_image_path", photograph, "--control_net_weights", "0"))) == 0
    code, pictures, error = draw(*words)
    assert (code, len(pictures)) == (0, 1)
    assert "--control_net_models has no effect on prompts without --cn" in error


def test_a_picture_to_start_from_guides_all_control_nets(photograph, tmp_path):
    for name in "ab":
        Image.open(photograph).save(tmp_path / f"{name}.png")
    nets = ("--control_net_models", str(photograph), str(photograph))  # any files: nothing is loaded
    words = ("--ckpt=x", f"--outdir={tmp_path / 'out'}", "--prompt=a", f"--image_path={tmp_path}", *nets)
    inputs = InputPictures(named_files(parse(gen_img.Options, words)))
    for number, name in enumerate(("a", "b", "photo")):
        made = inputs.picture(number, PromptRequest(prompt="a"))
        assert made.origin == tmp_path / f"{name}.png"
        assert made.inputs.guides == (made.inputs.image,) * 2


def test_regions(draw, network_files, tmp_path):
    regions = Image.new("RGB", (64, 64), (255, 0, 0))
    ImageDraw.Draw(regions).rectangle((32, 0, 64, 64), fill=(0, 255, 0))
    regions.save(tmp_path / "regions.png")
    words = ("--network_weights", network_files["lora"], "--mask_path", tmp_path / "regions.png", "--network_pre_calc")
    code, pictures, error = draw("--prompt=a cat AND a dog --d 1", *words)
    assert (code, len(pictures)) == (0, 1), error
    assert "--network_pre_calc has no effect: networks with regions" in error
    assert difference(pictures.popitem()[1], only(draw("--prompt=a cat AND a dog --d 1", *words[:2]))) > 3
    code, pictures, error = draw(
        CAT, *words[:2], network_files["loha"], *words[2:4], "--network_module", "networks.lora", "networks.loha"
    )
    assert (code, pictures) == (2, {})
    assert "2 networks with regions for 1 parts of the prompt" in error
    code, pictures, error = draw(CAT, *words[:-1], "--network_merge")
    assert (code, pictures) == (2, {})
    assert "networks that --network_merge adds to the model have no regions" in error


# Everything else that changes pictures ------------------------------------------------------------------------------


def test_options_that_change_the_picture(draw, cat):
    for words in (
        ["--clip_skip=2"],
        ["--negative_scale=3", "--scale=5"],
        ["--zero_terminal_snr"],
        ["--pyramid_noise_prob=1", "--pyramid_noise_discount_range", "0.5", "0.9"],
        ["--noise_offset_prob=1", "--noise_offset_range", "0.2", "0.4"],
    ):
        assert difference(cat, only(draw(CAT, *words))) > 3, words
    bent = "--prompt=(a cat on a mat:6) --d 1"
    assert difference(only(draw(bent)), only(draw(bent, "--emb_normalize_mode=none"))) > 3
    shrunk = only(draw(CAT, "--ds_depth_1=1"))
    assert difference(cat, shrunk) > 3
    assert difference(shrunk, only(draw(f"{CAT} --dsd1 1"))) == 0
    wide = ("--W=128", "--H=128", "--steps=4")
    grown = only(draw(CAT, *wide, "--gradual_latent_timesteps=900", "--gradual_latent_unsharp_params=3,0.5,0.5,1"))
    assert difference(only(draw(CAT, *wide)), grown) > 3
    code, _, error = draw(CAT, "--gradual_latent_timesteps=900", "--gradual_latent_unsharp_params=much")
    assert (code, "takes an odd kernel size, sigma, strength and 1 or 0" in error) == (2, True)


def test_options_that_only_change_time_and_memory(draw, cat):
    for words in (["--vae_slices=2"], ["--xformers"], ["--opt_channels_last"], ["--vae_batch_size=2"]):
        assert difference(cat, only(draw(CAT, *words))) <= 2, words
    assert difference(cat, only(draw(CAT, "--bf16", "--no_half_vae"))) <= 40
