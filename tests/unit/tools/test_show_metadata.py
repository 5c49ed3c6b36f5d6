"""tools/show_metadata.py: everything that a file says, readable and harmless."""

import json

import pytest
import torch

from library.checkpoints.lora_file import write_lora
from tests.lora_files import save, small_lora, some
from tools.show_metadata import main, parsed, safe_json


def shown(capsys, path, status=0):
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(path)])
    assert ended.value.code == status
    return capsys.readouterr()


@pytest.fixture
def lora(tmp_path):
    metadata = {"ss_tag_frequency": '{"cat": {"a": 1}}', "ss_network_args": "[1", "ss_v2": "False"}
    return write_lora(tmp_path / "lora.safetensors", some(small_lora("sd15"), "mid_block"), metadata)


def test_a_lora(capsys, lora):
    found = json.loads(shown(capsys, lora).out)
    assert found["metadata"]["ss_tag_frequency"] == {"cat": {"a": 1}}
    assert found["metadata"]["ss_network_args"] == "[1" and found["metadata"]["ss_v2"] == "False"
    file = found["file"]
    assert (file["layout"], file["base"], file["ranks"], file["kinds"]) == ("kohya", "sd1", [4], {"lora": 12})
    assert (file["unet"], file["text_encoder"], file["as_saved"]) == (True, False, True)
    assert len(file["sha256"]) == 64 and len(file["legacy_hash"]) == 8


def test_changed_weights_are_noticed(capsys, lora):
    data = bytearray(lora.read_bytes())
    data[-1] ^= 1
    lora.write_bytes(data)
    assert json.loads(shown(capsys, lora).out)["file"]["as_saved"] is False


def test_damaged_modules_do_not_hide_the_metadata(capsys, tmp_path):
    path = save(tmp_path / "l.safetensors", {"lora_unet_conv_in.lora_up.weight": torch.ones(4, 2)}, {"a": "b"})
    found = json.loads(shown(capsys, path).out)
    assert "half of the module is missing" in found["file"]["damaged"][0]
    assert found["metadata"] == {"a": "b"}


def test_pickles_and_other_files(capsys, tmp_path):
    torch.save(some(small_lora("sd15"), "mid_block"), tmp_path / "lora.pt")
    assert json.loads(shown(capsys, tmp_path / "lora.pt").out)["metadata"] == {}
    path = save(tmp_path / "emb.safetensors", {"emb_params": torch.ones(1, 8)}, {"a": "b"})
    found = json.loads(shown(capsys, path).out)
    assert (found["file"]["is"], found["metadata"]) == ("a textual inversion embedding", {"a": "b"})


def test_a_missing_file_is_one_line(capsys, tmp_path):
    assert shown(capsys, tmp_path / "no.safetensors", 2).err.count("\n") == 1


HOSTILE = "\x1b[2J\x9b31m\u202egnp.exe\udc80\0"


def test_hostile_text_is_escaped(capsys, tmp_path, lora):
    key = "lora_unet_\x1b[31m.lora_"
    tensors = {f"{key}down.weight": torch.ones(2, 3), f"{key}up.weight": torch.ones(3, 2), "\x1b]0;": torch.ones(1)}
    path = save(tmp_path / "l.safetensors", tensors, {"\x1b[1m": HOSTILE.replace("\udc80", "")})
    text = shown(capsys, path).out
    assert all(character.isprintable() or character == "\n" for character in text)
    assert json.loads(text)["metadata"]["\x1b[1m"] == HOSTILE.replace("\udc80", "")
    assert json.loads(text)["file"]["unknown"] == ["\x1b]0;"]


def test_every_text_survives_the_escapes():
    value = {"a": HOSTILE, "b": "ü é 猫 😀\n\U000e0041"}
    text = safe_json(value)
    assert json.loads(text) == value and "ü é 猫 😀" in text
    assert all(character.isprintable() or character == "\n" for character in text)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', "[1", "{} {}", "[" + "1" * 5000 + "]", "12", ""])
def test_what_is_no_table_stays_text(text):
    assert parsed(text) == text
