"""The options of stable_cascade_gen_img.py: old command lines still work, and what is wrong with others is told."""

import pytest

import stable_cascade_gen_img
from library.cli import run_script
from library.option_parser import parse


def test_a_documented_command_line_parses(tmp_path):
    words = []
    for name in ("stage_c", "stage_b", "stage_a", "effnet", "previewer", "text_model"):
        (tmp_path / name).touch()
        words += [f"--{name}_checkpoint_path", str(tmp_path / name)]
    (tmp_path / "lora.safetensors").touch()
    words += ["--outdir", str(tmp_path / "out"), "--bf16", "--sdpa", "--lowvram", "--network_module", "networks.lora"]
    words += ["--network_weights", str(tmp_path / "lora.safetensors"), "--network_mul", "0.8"]
    opts = parse(stable_cascade_gen_img.Options, words)
    assert opts.networks.network_mul == (0.8,)
    assert not opts.warnings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--stage_c_checkpoint_path: is required"),
        (["--stage_c_checkpoint_path=none"], "--stage_c_checkpoint_path none: no such file or folder"),
        (["--stage_c_checkpoint_path=.", "--fp16"], "--fp16: the weights of stage C overflow in float16"),
        (["--stage_c_checkpoint_path=.", "--controlnet_filter=canny"], "needs --controlnet_checkpoint_path"),
        (["--stage_c_checkpoint_path=.", "--sampler=euler"], "--sampler"),
        (["--stage_c_checkpoint_path=.", "--image=none.png"], "--image none.png: no such file or folder"),
        (["--stage_c_checkpoint_path=.", "--cfg_t_start=0.1", "--cfg_t_stop=0.5"], "so nothing is guided"),
        (["--stage_c_checkpoint_path=.", "--clip_skip=2"], "--clip_skip"),
        (["--stage_c_checkpoint_path=.", "--save_text_model"], "--save_text_model: needs --text_model_checkpoint_path"),
    ],
)
def test_mistakes_are_told_in_one_line_each(words, message, capsys, tmp_path):
    words = [*words, "--prompt=a", f"--outdir={tmp_path}"]
    refused = run_script(stable_cascade_gen_img.Options, lambda opts: pytest.fail("it was to be refused"), words)
    assert refused == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'controlnet_filter = ["os:getcwd"]'),
        ("a.yaml", "controlnet_filter: 'os:getcwd'\ncontrolnet_checkpoint_path: net"),
    ],
)
def test_code_of_the_users_own_is_named_by_typing_it(name, text, capsys, tmp_path):
    config, net = tmp_path / name, tmp_path / "net"
    net.touch()
    config.write_text(text.replace(": net", f": {net}"))
    words = [f"--config_file={config}", f"--controlnet_checkpoint_path={net}", f"--stage_c_checkpoint_path={net}"]
    words += ["--prompt=a", f"--outdir={tmp_path}"]
    refused = run_script(stable_cascade_gen_img.Options, lambda opts: pytest.fail("it was to be refused"), words)
    assert refused == 2
    assert "'os:getcwd' is code of your own, which files may not name" in capsys.readouterr().err
    assert parse(stable_cascade_gen_img.Options, [*words[1:], "--controlnet_filter=os:getcwd"]).control
