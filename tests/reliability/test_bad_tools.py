"""Wrong files, names and numbers for the tools: one clear line each, inputs as they were, nothing half written."""

from __future__ import annotations

import importlib
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.lora_files import save

LORA_KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight"
MODEL_KEYS = (
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight",
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
)

LORA_TOOLS = {
    "merge_lora": ("networks.merge_lora", "--models {src} {lora} --save_to {out}"),
    "merge_lora into a model": ("networks.merge_lora", "--sd_model {model} --models {src} --save_to {out}"),
    "svd_merge_lora": ("networks.svd_merge_lora", "--models {lora} {src} --save_to {out}"),
    "resize_lora": ("networks.resize_lora", "--model {src} --save_to {out} --new_rank 2"),
    "extract_lora_from_dylora": ("networks.extract_lora_from_dylora", "--model {src} --save_to {out} --unit 2"),
    "check_lora_weights": ("networks.check_lora_weights", "{src}"),
    "lora_interrogator": ("networks.lora_interrogator", "--sd_model {model} --model {src}"),
    "convert_lora": ("tools.convert_lora", "{src} {out} --to peft"),
    "show_metadata": ("tools.show_metadata", "--model {src}"),
}
MODEL_TOOLS = {
    "merge_lora's model": ("networks.merge_lora", "--sd_model {src} --models {lora} --save_to {out}"),
    "extract_lora_from_models": (
        "networks.extract_lora_from_models",
        "--model_org {model} --model_tuned {src} --save_to {out}",
    ),
    "lora_interrogator": ("networks.lora_interrogator", "--sd_model {src} --model {lora}"),
    "convert_diffusers20_original_sd": ("tools.convert_diffusers20_original_sd", "{src} {out}"),
    "merge_models": ("tools.merge_models", "--models {model} {src} --output {out}"),
}
WRITERS = {name: tool for name, tool in (LORA_TOOLS | MODEL_TOOLS).items() if "{out}" in tool[1]}


class Place:
    """A folder with a LoRA and a model, and the tools run in it."""

    def __init__(self, folder: Path, lora: Path, model: Path, capsys) -> None:
        self.folder, self.lora, self.model, self.capsys = folder, lora, model, capsys

    def run(self, tool: tuple[str, str], more: str = "", **names: object) -> tuple[int, str]:
        """Run a tool; returns its exit status, and all lines of errors after a look at everything else."""
        module, words = tool
        names = {
            "lora": self.lora,
            "model": self.model,
            "src": self.model if tool in MODEL_TOOLS.values() else self.lora,
            "out": self.folder / "out" / "new.safetensors",
        } | names
        argv = [word.format(**names) for word in f"{words} {more}".split()]
        before = self.contents()
        self.capsys.readouterr()
        try:
            importlib.import_module(module).main(argv)
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        shown = self.capsys.readouterr()
        said = shown.err
        if not status:
            said += shown.out
        else:
            assert "Traceback" not in said, said
            assert self.contents() == before
            assert said.splitlines()[-1].startswith("error: "), said
        return status, said

    def contents(self) -> dict[str, bytes]:
        """All files here and the two that are read, by name."""
        files = [*self.folder.rglob("*"), self.lora, self.model]
        return {str(path): path.read_bytes() for path in files if path.is_file()}

    def refused(self, tool: tuple[str, str], more: str = "", *, status=2, **names: object) -> str:
        """Run a tool that must refuse its input with a single line; returns that."""
        found, said = self.run(tool, more, **names)
        assert found == status, said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, said
        return errors[0]


@pytest.fixture
def place(tmp_path, trained_lora, tiny_sd1, capsys):
    return Place(tmp_path, trained_lora, tiny_sd1, capsys)


# What is read --------------------------------------------------------------------------------------------------------


def hostile(path: Path, _source: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (Path.touch, (path.with_name("executed"),))

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": Payload()}, protocol=2))
        archive.writestr("archive/version", "3")


def with_nan(path: Path, source: Path) -> None:
    tensors = load_file(source)
    for key in {LORA_KEY, *MODEL_KEYS} & set(tensors):
        tensors[key].fill_(float("nan"))
    save_file(tensors, path)


SOURCES = {
    "missing": ("gone.safetensors", lambda path, _: None, "no such file"),
    "an empty folder": ("folder.safetensors", lambda path, _: path.mkdir(), "folder"),
    "too long a name": ("n" * 300 + ".safetensors", lambda path, _: None, "nnnnn"),
    "cut": ("cut.safetensors", lambda path, source: path.write_bytes(source.read_bytes()[:-9]), "incomplete"),
    "empty": ("empty.safetensors", lambda path, _: path.write_bytes(b""), "empty"),
    "a web page": ("page.safetensors", lambda path, _: path.write_text("<html>404</html>"), "HTML"),
    "NaN": ("nan.safetensors", with_nan, "NaN"),
    "hostile": ("hostile.ckpt", hostile, "refused"),
    "an embedding": (
        "embedding.safetensors",
        lambda path, _: save_file({"emb_params": torch.ones(1, 768)}, path),
        "embedding",
    ),
}
LOOKERS = {("show_metadata", "NaN"), ("show_metadata", "an embedding")}
"""What is no reason to refuse a file that is only looked at."""


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", LORA_TOOLS)
def test_wrong_lora_files(place, tmp_path, name, source):
    file, make, word = SOURCES[source]
    make(tmp_path / file, place.lora)
    if (name, source) in LOOKERS:
        assert place.run(LORA_TOOLS[name], src=tmp_path / file)[0] == 0
        return
    said = place.refused(LORA_TOOLS[name], src=tmp_path / file)
    assert file[:20] in said and word in said
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", MODEL_TOOLS)
def test_wrong_models(place, tmp_path, name, source):
    file, make, word = SOURCES[source]
    make(tmp_path / file, place.model)
    said = place.refused(MODEL_TOOLS[name], src=tmp_path / file)
    assert file[:20] in said and word in said
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", LORA_TOOLS)
def test_a_model_is_no_lora(place, name):
    if name != "show_metadata":
        said = place.refused(LORA_TOOLS[name], src=place.model)
        assert place.model.name in said and "not a LoRA but Stable Diffusion 1" in said


@pytest.mark.parametrize("name", MODEL_TOOLS)
def test_a_lora_is_no_model(place, name):
    said = place.refused(MODEL_TOOLS[name], src=place.lora)
    assert place.lora.name in said and "LoRA" in said


@pytest.mark.parametrize("name", ["merge_lora into a model", "merge_lora", "lora_interrogator"])
def test_a_lora_for_another_model(place, tmp_path, name):
    key = LORA_KEY.replace("attn1_to_q", "attn2_to_k")
    down, up = torch.ones(2, 1024), torch.ones(32, 2)
    path = save(tmp_path / "v2.safetensors", {key.replace("_up", "_down"): down, key: up})
    said = place.refused(LORA_TOOLS[name], src=path)
    assert "Stable Diffusion 2" in said and "Stable Diffusion 1" in said


# What is written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_wrong_names_of_results(place, tmp_path, name):
    for wrong in (tmp_path / "out.txt", tmp_path / "folder.d"):
        if wrong.suffix == ".d":
            wrong.mkdir()
        if wrong.suffix == ".d" and name.startswith("convert_diffusers"):
            continue
        assert str(wrong) in place.refused(WRITERS[name], out=wrong)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_in_the_place_of_the_folder(place, tmp_path, name):
    (tmp_path / "out").write_text("a note")
    assert f"{tmp_path / 'out'} is a file, not a folder" in place.refused(WRITERS[name])


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_cannot_be_written(place, tmp_path, name, monkeypatch):
    """Said before the work; the tests may run as a user who can write everywhere."""
    monkeypatch.setattr("os.access", lambda path, _mode: Path(path) != tmp_path)
    assert f"cannot write into {tmp_path}" in place.refused(WRITERS[name])


@pytest.mark.parametrize("name", WRITERS)
def test_the_name_of_what_is_read(place, tmp_path, name):
    own = tmp_path / "own.safetensors"
    if name in ("extract_lora_from_dylora", "merge_models"):  # writes own-0002.safetensors; may replace a source
        return
    shutil.copy(place.model if name in MODEL_TOOLS else place.lora, own)
    said = place.refused(WRITERS[name], src=own, out=own)
    assert str(own) in said and "is the file that is read" in said


SEVENTEEN = f"[{','.join('1' * 17)}]"
NUMBERS = {
    "ratios": ("merge_lora", "--ratios 1", ["--ratios", "1 value", "2 files"]),
    "ratios of svd": ("svd_merge_lora", "--ratios 1 1 1", ["--ratios", "3 values", "2 files"]),
    "ratios of models": ("merge_models", "--ratios 1", ["--ratios", "1 ratio", "2 models"]),
    "a ratio": ("merge_lora", "--ratios 1 much", ["--ratios", "much"]),
    "block weights": ("merge_lora", f"--lbws [1,2] {SEVENTEEN}", ["--lbws [1,2]: has 2 numbers"]),
    "block weights for one": (
        "svd_merge_lora",
        f"--lbws {SEVENTEEN}",
        ["--lbws", "1 value", "2 files"],
    ),
    "block weights of SDXL": (
        "merge_lora",
        " ".join(["--lbws", *[f"[{','.join('1' * 12)}]"] * 2]),
        ["--lbws", "12", "SDXL"],
    ),
    "no JSON": ("merge_lora", f"--lbws {SEVENTEEN} 1,2", ["--lbws 1,2", "JSON list"]),
    "rank": ("resize_lora", "--new_rank 0", ["--new_rank", "at least 1"]),
    "method": ("resize_lora", "--dynamic_method sv_rato --dynamic_param 2", ["--dynamic_method", "sv_ratio"]),
    "no parameter": ("resize_lora", "--dynamic_method sv_ratio", ["--dynamic_param", "required"]),
    "share": ("resize_lora", "--dynamic_method sv_fro --dynamic_param 2", ["--dynamic_param", "share"]),
    "unit": ("extract_lora_from_dylora", "--unit 9", ["--unit 9", "rank 4"]),
    "precision": ("convert_lora", "--save_precision fp17", ["--save_precision", "fp16"]),
    "layout": ("convert_lora", "--to kohia", ["--to", "kohya"]),
    "device": ("resize_lora", "--device warp", ["--device warp"]),
    "typo": ("merge_models", "--ratio 1 1", ["--ratio", "--ratios"]),
    "quantile": ("svd_merge_lora", "--clamp_quantile 2", ["--clamp_quantile"]),
    "metadata": ("convert_diffusers20_original_sd", "--metadata print(1)", ["--metadata", "table"]),
    "two precisions": ("convert_diffusers20_original_sd", "--fp16 --bf16", ["fp16 and bf16"]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_wrong_values(place, name):
    tool, more, words = NUMBERS[name]
    said = place.refused(WRITERS[tool], more)
    for word in words:
        assert word in said, said


def test_what_is_needed_is_named_together(place):
    for module, count in (
        ("networks.merge_lora", 2),
        ("networks.svd_merge_lora", 2),
        ("networks.resize_lora", 2),
        ("networks.extract_lora_from_models", 3),
        ("networks.extract_lora_from_dylora", 2),
        ("networks.lora_interrogator", 2),
        ("tools.merge_models", 2),
        ("tools.show_metadata", 1),
    ):
        status, said = place.run((module, ""))
        assert status == 2
        assert len([line for line in said.splitlines() if "required" in line]) == count, said


@pytest.mark.parametrize("name", [name for name in LORA_TOOLS if name != "lora_interrogator"])
def test_what_nobody_understands_is_listed(place, tmp_path, name):
    path = tmp_path / "more.safetensors"
    save_file(load_file(place.lora) | {"some.other.tensor": torch.ones(2)}, path)
    status, said = place.run(LORA_TOOLS[name], src=path)
    assert status == 0, said
    assert "some.other.tensor" in said


@pytest.mark.parametrize("point", ["save.mid", "save.before_fsync", "save.before_replace"])
def test_a_tool_that_is_killed_leaves_the_old_file(fork_server, tmp_path, trained_lora, point):
    out = tmp_path / "out.safetensors"
    shutil.copy(trained_lora, out)
    before = out.read_bytes()
    argv = ["--model", trained_lora, "--save_to", out, "--new_rank", "2"]
    child = fork_server.run("networks/resize_lora.py", argv, env={"SD_FAULT": f"{point}:kill9"})
    assert child.returncode == -9, child.output()
    assert out.read_bytes() == before
    assert fork_server.run("networks/resize_lora.py", argv).returncode == 0
    assert out.read_bytes() != before
