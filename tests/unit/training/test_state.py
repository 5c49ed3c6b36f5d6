"""States: what is saved is what comes back, in the reference's layout, and nothing broken is ever accepted."""

import json
import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from library.checkpoints.parameter_order import in_reference_order, sort_as_reference
from library.contracts import Position, RunLength
from library.errors import StopTraining, UserError
from library.faults import VARIABLE
from library.files import CannotSave
from library.training.state import (
    Identity,
    Ranks,
    StateInfo,
    StateParts,
    find_state,
    load_state,
    save_state,
    state_bytes,
    verify_state,
)

LENGTH = RunLength(10, 2, 10, 2, 2, 1)


def model(seed=0, dtype=torch.float32, width=64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 3)).to(dtype)


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


def sgd(params):
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9)


def adamw8bit(params):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(params, lr=1e-2, min_8bit_size=16)


def lion(params):
    return pytest.importorskip("lion_pytorch").Lion(params, lr=1e-3)


def adafactor(params):
    return pytest.importorskip("transformers").optimization.Adafactor(params, lr=1e-2, relative_step=False)


def prodigy(params):
    return pytest.importorskip("prodigyopt").Prodigy(params, lr=1.0)


def dadapt(params):
    return pytest.importorskip("dadaptation").DAdaptAdam(params, lr=1.0)


def schedule_free(params):
    return pytest.importorskip("schedulefree").AdamWScheduleFree(params, lr=1e-2, warmup_steps=2)


OPTIMIZERS = [adamw, sgd, adamw8bit, lion, adafactor, prodigy, dadapt, schedule_free]


def build(make=adamw, seed=0, dtype=torch.float32, text=True):
    """Parts of a small run, freshly made: two modules, one optimizer, a falling schedule."""
    modules = {"unet": model(seed, dtype)} | ({"text_encoder": model(seed + 1, dtype, 32)} if text else {})
    optimizer = make([parameter for module in modules.values() for parameter in module.parameters()])
    if hasattr(optimizer, "train"):
        optimizer.train()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    return StateParts(modules, optimizer, schedule)


def updates(parts, first, last):
    """Train from update `first` to `last` with gradients that depend on the number of the update only."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for module in parts.modules.values():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.grad = (noise + parameter.detach().float()).to(parameter.dtype)
        parts.optimizer.step()
        parts.lr_schedule.step()
        parts.optimizer.zero_grad()


def bits(parts):
    return {
        f"{part}.{name}": value.clone()
        for part, module in parts.modules.items()
        for name, value in module.state_dict().items()
    }


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def info(step=3, run="out", **extra):
    return StateInfo(Position(step, 0, step), seed=7, length=LENGTH, output_name=run, **extra)


def saved(tmp_path, name="out-step00000003-state", parts=None, **extra):
    folder = tmp_path / name
    save_state(folder, parts or build(), info(**extra))
    return folder


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("make", OPTIMIZERS)
    def test_a_resumed_run_ends_with_the_same_bits(self, tmp_path, make, dtype):
        straight = build(make, dtype=dtype)
        updates(straight, 0, 3)
        save_state(tmp_path / "s", straight, info())
        updates(straight, 3, 6)

        resumed = build(make, seed=50, dtype=dtype)
        assert load_state(verify_state(tmp_path / "s"), resumed) == replace(
            info(), modules=("unet", "text_encoder"), world=1
        )
        updates(resumed, 3, 6)
        assert same(bits(straight), bits(resumed))
        for name, parts in (("one", straight), ("other", resumed)):
            save_state(tmp_path / name, parts, info(6))
        one, other = ((tmp_path / name / "optimizer.bin").read_bytes() for name in ("one", "other"))
        assert one == other

    def test_saving_does_not_disturb_training(self, tmp_path):
        quiet, saving = build(), build()
        for step in range(4):
            updates(quiet, step, step + 1)
            updates(saving, step, step + 1)
            save_state(tmp_path / f"{step}-state", saving, info(step))
        assert same(bits(quiet), bits(saving))

    def test_nothing_stays_mapped_from_the_folder(self, tmp_path):
        """The folder may be overwritten in place while training goes on."""
        trained = build()
        updates(trained, 0, 2)
        folder = saved(tmp_path, parts=trained)
        parts = build(seed=9)
        load_state(verify_state(folder), parts)
        for path in folder.iterdir():
            with path.open("rb+") as file:
                file.write(b"\xff" * path.stat().st_size)
        updates(trained, 2, 4)
        updates(parts, 2, 4)
        assert same(bits(trained), bits(parts))

    def test_all_information_comes_back(self, tmp_path):
        full = info(
            identity=Identity({"loss": {"huber_c": 0.1}}, {"files": ["a", "b"]}, {"hash": "x"}, {"threads": 1}),
            loss_average={"losses": [0.1, 1 / 3]},
            tracker={"run": "20260101000000"},
            saver={"created": ["out-000001.safetensors"]},
        )
        save_state(tmp_path / "s", build(), full)
        found = verify_state(tmp_path / "s").info
        assert found == replace(full, modules=("unet", "text_encoder"))
        assert found.exact

    def test_scaler_and_objective_and_averages(self, tmp_path):
        class Memory:
            def __init__(self, state):
                self.state = state

            def state_dict(self):
                return self.state

            def load_state_dict(self, state):
                self.state = state

        class Averages:
            def __init__(self, value):
                self.value, self.updates = value, 5

            def tensors(self):
                return {"w": self.value}

            def numbers(self):
                return {"decay": 0.999, "updates": self.updates}

            def restore(self, tensors, numbers):
                self.value, self.updates = tensors["w"].clone(), numbers["updates"]

        def parts(number):
            plain = build()
            average = Averages(torch.full((2,), float(number)))
            return replace(
                plain, scaler=Memory({"scale": number}), objective=Memory({"t": torch.tensor(number)}), ema=average
            )

        before, after = parts(3), parts(4)
        save_state(tmp_path / "s", before, info())
        load_state(verify_state(tmp_path / "s"), after)
        assert after.scaler.state == {"scale": 3}
        assert after.objective.state["t"] == 3
        assert after.ema.value.tolist() == [3.0, 3.0]

    def test_the_size_is_estimated(self, tmp_path):
        parts = build()
        updates(parts, 0, 1)
        folder = saved(tmp_path, parts=parts)
        real = sum(path.stat().st_size for path in folder.iterdir())
        assert 0.7 * real < state_bytes(parts.modules) < real


class TestLayout:
    def test_files(self, tmp_path):
        folder = saved(tmp_path)
        names = {path.name for path in folder.iterdir()}
        assert names == {
            "model.safetensors", "model_1.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl",
            "train_state.json", "resume.json",
        }  # fmt: skip
        listed = json.loads((folder / "resume.json").read_text())["files"]
        assert set(listed) == names - {"resume.json"}
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]

    @pytest.mark.parametrize(("position", "epoch"), [((3, 0, 3), 1), ((5, 1, 0), 1), ((6, 1, 1), 2), ((0, 0, 0), 1)])
    def test_the_references_counters(self, tmp_path, position, epoch):
        folder = tmp_path / "s"
        save_state(folder, build(), replace(info(), position=Position(*position)))
        counters = json.loads((folder / "train_state.json").read_text())
        assert (counters["current_epoch"], counters["current_step"]) == (epoch, position[0])

    def test_plain_accelerate_loads_it(self, tmp_path):
        from accelerate import Accelerator

        parts = build()
        updates(parts, 0, 3)
        generator = np.random.get_state()[1].tolist()
        folder = saved(tmp_path, parts=parts)
        np.random.seed(3)
        other = build(seed=50)
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(*other.modules.values(), other.optimizer, other.lr_schedule)
        np.random.rand(3)
        accelerator.load_state(str(folder))
        assert same(bits(parts), bits(other))
        assert np.random.get_state()[1].tolist() == generator, "accelerate restores random generators, or keeps silent"
        assert other.lr_schedule.last_epoch == 3
        updates(parts, 3, 5)
        updates(other, 3, 5)
        assert same(bits(parts), bits(other))

    def test_several_ranks(self, tmp_path):
        main = Ranks(0, 2, gather=lambda value: [value, value], broadcast=lambda value: value)
        save_state(tmp_path / "s", build(), info(), main)
        stored = verify_state(tmp_path / "s")
        assert stored.info.world == 2
        assert (tmp_path / "s" / "random_states_1.pkl").exists()
        for rank in (0, 1, 5):
            load_state(stored, build(), ranks=Ranks(rank, 8))

    def test_other_ranks_write_nothing_and_learn_of_failures(self, tmp_path):
        other = Ranks(1, 2, gather=lambda value: [value, value], broadcast=lambda value: None)
        save_state(tmp_path / "s", build(), info(), other)
        assert not (tmp_path / "s").exists()
        failed = Ranks(1, 2, gather=lambda value: [value], broadcast=lambda value: ("disk full", 4))
        with pytest.raises(StopTraining, match="disk full") as caught:
            save_state(tmp_path / "s", build(), info(), failed)
        assert caught.value.exit_code == 4

    def test_global_generators_come_back(self, tmp_path):
        import random

        folder = saved(tmp_path)
        expected = (torch.rand(1), random.random(), np.random.rand())
        load_state(verify_state(folder), build())
        assert (torch.rand(1), random.random(), np.random.rand()) == expected


class TestRefusals:
    def test_every_damage_is_named(self, tmp_path):
        whole = saved(tmp_path, "whole-state")
        for path in sorted(whole.iterdir()):
            for damage in ("missing", "cut", "flipped"):
                folder = tmp_path / "broken-state"
                shutil.copytree(whole, folder)
                data = bytearray((folder / path.name).read_bytes())
                if damage == "missing":
                    (folder / path.name).unlink()
                elif damage == "cut":
                    (folder / path.name).write_bytes(data[: len(data) // 2])
                else:
                    data[len(data) // 2] ^= 1
                    (folder / path.name).write_bytes(data)
                if (path.name, damage) == ("resume.json", "missing"):
                    assert not verify_state(folder).info.exact
                elif (path.name, damage) != ("resume.json", "flipped"):
                    with pytest.raises(UserError, match=path.name):
                        verify_state(folder)
                shutil.rmtree(folder)

    def test_fast_checks_sizes_only(self, tmp_path):
        folder = saved(tmp_path)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        verify_state(folder, fast=True)
        (folder / "model.safetensors").write_bytes(data[:-1])
        with pytest.raises(UserError, match="bytes instead of"):
            verify_state(folder, fast=True)

    def test_a_planted_pickle(self, tmp_path):
        folder = saved(tmp_path)
        (folder / "custom_checkpoint_0.pkl").write_bytes(b"")
        with pytest.raises(UserError, match=r"custom_checkpoint_0\.pkl.*could run code"):
            verify_state(folder)

    def test_a_planted_optimizer_does_not_run(self, tmp_path):
        class Attack:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        folder = saved(tmp_path)
        torch.save({"state": {}, "param_groups": [Attack()]}, folder / "optimizer.bin")
        (folder / "resume.json").unlink()
        with pytest.raises(UserError):
            load_state(verify_state(folder), build())
        (folder / "optimizer.bin").write_bytes(pickle.dumps(Attack()))
        with pytest.raises(UserError):
            load_state(verify_state(folder), build())
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", ""])
    def test_file_names_stay_inside(self, tmp_path, name):
        folder = saved(tmp_path)
        manifest = json.loads((folder / "resume.json").read_text())
        manifest["files"][name] = {"size": 1, "sha256": ""}
        (folder / "resume.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="not a plain file name"):
            verify_state(folder)

    def test_a_file_taken_off_the_list(self, tmp_path):
        folder = saved(tmp_path)
        manifest = json.loads((folder / "resume.json").read_text())
        del manifest["files"]["model_1.safetensors"]
        (folder / "resume.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"model_1\.safetensors: is not listed"):
            verify_state(folder)

    @pytest.mark.parametrize(
        "change",
        [
            {"format_version": 99},
            {"info": {}},
            {"info": None},
            {"files": []},
            {"files": {"optimizer.bin": 3}},
            {"info": {"position": {"step": -1, "epoch": 0, "update_in_epoch": 0}, "identity": {}}},
            {"info": {"position": {"step": "x", "epoch": 0, "update_in_epoch": 0}, "identity": {}}},
        ],
    )
    def test_manifests_that_make_no_sense(self, tmp_path, change):
        folder = saved(tmp_path)
        manifest = json.loads((folder / "resume.json").read_text()) | change
        (folder / "resume.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=r"resume\.json"):
            verify_state(folder)

    @pytest.mark.parametrize("text", ["", "[]", "[" * 100000, "\x00"])
    def test_manifests_that_are_no_json_object(self, tmp_path, text):
        folder = saved(tmp_path)
        (folder / "resume.json").write_text(text)
        with pytest.raises(UserError, match=r"resume\.json"):
            verify_state(folder)

    def test_no_state_at_all(self, tmp_path):
        saved(tmp_path, "near-state")
        with pytest.raises(UserError, match="no such state folder.*near-state"):
            verify_state(tmp_path / "far-state")
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="neither resume.json nor"):
            verify_state(tmp_path / "empty")

    def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(self, tmp_path):
        parts = build()
        with torch.no_grad():
            parts.modules["unet"][0].weight[1, 2] = float("nan")
        with pytest.raises(StopTraining, match=r"unet\.0\.weight") as caught:
            save_state(tmp_path / "s", parts, info())
        assert caught.value.exit_code == 5
        assert list(tmp_path.iterdir()) == []

        from safetensors.torch import save_file

        folder = saved(tmp_path)
        save_file(parts.modules["unet"].state_dict(), folder / "model.safetensors")
        (folder / "resume.json").unlink()
        with pytest.raises(UserError, match=r"model\.safetensors: 1 tensors hold NaN"):
            load_state(verify_state(folder), build())

    def test_another_model_or_optimizer(self, tmp_path):
        stored = verify_state(saved(tmp_path))
        with pytest.raises(UserError, match="holds 2 trained models, this run trains 1"):
            load_state(stored, build(text=False))
        wider = replace(build(), modules={"unet": model(width=32), "text_encoder": model(width=32)})
        with pytest.raises(UserError, match=r"0\.bias is \(64,\), not \(32,\)"):
            load_state(stored, wider)
        renamed = replace(build(), modules={"unet": nn.ModuleDict({"x": model()}), "text_encoder": model()})
        with pytest.raises(UserError, match="8 tensors missing|6 tensors missing"):
            load_state(stored, renamed)

        def two_groups(params):
            return torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=1e-2)

        with pytest.raises(UserError, match="1 group of 12 parameters, this run has 2 groups of 2, 10 parameters"):
            load_state(stored, build(two_groups))

    def test_an_optimizer_of_another_kind(self, tmp_path):
        parts = build()
        updates(parts, 0, 1)
        folder = saved(tmp_path, parts=parts)
        state = torch.load(folder / "optimizer.bin")
        state["state"][0]["exp_avg"] = torch.zeros(7, 7)
        torch.save(state, folder / "optimizer.bin")
        (folder / "resume.json").unlink()
        with pytest.raises(UserError, match="exp_avg of parameter 0"):
            load_state(verify_state(folder), build())

    def test_an_optimizer_that_keeps_objects_is_refused_when_saving(self, tmp_path):
        parts = build()
        parts.optimizer.param_groups[0]["path"] = Path("x")
        with pytest.raises(StopTraining, match=r"optimizer\.bin.*cannot be stored safely"):
            save_state(tmp_path / "s", parts, info())
        assert list(tmp_path.iterdir()) == []

    def test_schedule_free_must_be_in_training_mode(self, tmp_path):
        parts = build(schedule_free)
        updates(parts, 0, 1)
        parts.optimizer.eval()
        with pytest.raises(ValueError, match="training mode"):
            save_state(tmp_path / "s", parts, info())

    @pytest.mark.parametrize(
        "point", ["state.between_files:eio:2", "state.before_manifest:enospc", "save.mid:enospc:3"]
    )
    def test_a_failed_save_leaves_the_old_state(self, tmp_path, monkeypatch, point):
        parts = build()
        folder = saved(tmp_path, parts=parts)
        updates(parts, 0, 1)
        monkeypatch.setenv(VARIABLE, point)
        with pytest.raises(CannotSave, match="out-step00000003-state"):
            save_state(folder, parts, info())
        monkeypatch.delenv(VARIABLE)
        fresh = build(seed=9)
        load_state(verify_state(folder), fresh)
        assert same(bits(fresh), bits(build()))
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]


class TestFind:
    def test_latest_is_the_last_saved_whatever_its_step(self, tmp_path):
        saved(tmp_path, "out-state", step=9)
        saved(tmp_path, "out-step00000003-state")
        assert find_state("latest", tmp_path, "out").folder.name == "out-step00000003-state"
        saved(tmp_path, "out-000002-state")
        assert find_state("latest", tmp_path, "out").folder.name == "out-000002-state"

    def test_other_names_do_not_count(self, tmp_path):
        saved(tmp_path, "out-state")
        saved(tmp_path, "out-dog-state", run="out-dog")
        saved(tmp_path, "out-x-000002-state", run="out-x")
        assert find_state("latest", tmp_path, "out").folder.name == "out-state"
        assert find_state("latest", tmp_path, "new") is None
        assert find_state("latest", tmp_path / "missing", "new") is None

    def test_default_names(self, tmp_path):
        for name in ("epoch-000001-state", "at-step00000002-state", "last-state"):
            saved(tmp_path, name, run="")
            assert find_state("latest", tmp_path, None).folder.name == name

    def test_broken_ones_are_named_and_passed_over(self, tmp_path, caplog):
        saved(tmp_path, "out-000001-state")
        broken = saved(tmp_path, "out-000002-state")
        (broken / "scheduler.bin").unlink()
        (tmp_path / "out-000003-state").mkdir()
        with caplog.at_level(logging.WARNING):
            assert find_state("latest", tmp_path, "out").folder.name == "out-000001-state"
        assert "out-000002-state" in caplog.text
        assert "out-000003-state" in caplog.text
        shutil.rmtree(tmp_path / "out-000001-state")
        with pytest.raises(UserError, match="no state of this run is whole"):
            find_state("latest", tmp_path, "out")

    def test_a_state_set_aside_by_a_killed_save_is_found(self, tmp_path):
        from library.files import _host_mark

        folder = saved(tmp_path)
        folder.rename(tmp_path / f".{folder.name}.old-4194301-{_host_mark()}01234567")
        assert find_state(str(folder), None, None).folder == folder

    def test_finished(self, tmp_path):
        stored = verify_state(saved(tmp_path, step=3))
        assert [stored.finished(total) for total in (2, 3, 4)] == [True, True, False]


def reference_state(folder, parts, step_counter=False):
    """A folder as plain accelerate writes it (several schedule steps per update, as with two processes)."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(*parts.modules.values(), parts.optimizer, parts.lr_schedule)
    accelerator.save_state(str(folder))
    if step_counter:
        (folder / "train_state.json").write_text('{"current_epoch": 2, "current_step": 7}')
    return folder


class TestReferenceStates:
    def test_weights_optimizer_and_step_are_taken(self, tmp_path):
        parts = build()
        updates(parts, 0, 3)
        folder = reference_state(tmp_path / "peer-000001-state", parts)
        stored = verify_state(folder)
        assert "position in the epoch is unknown" in " ".join(stored.notes)
        assert stored.info.position.step == 3
        assert not stored.info.exact
        fresh = build(seed=9)
        load_state(stored, fresh)
        assert same(bits(parts), bits(fresh))
        assert fresh.lr_schedule.last_epoch == 3
        updates(parts, 3, 5)
        updates(fresh, 3, 5)
        assert same(bits(parts), bits(fresh))

    @pytest.mark.parametrize(
        ("name", "counter", "step"),
        [("p-step00000012-state", False, 12), ("p-step00000012-state", True, 7), ("p", False, 2)],
    )
    def test_where_the_step_comes_from(self, tmp_path, name, counter, step):
        parts = build()
        updates(parts, 0, 2)
        assert verify_state(reference_state(tmp_path / name, parts, counter)).info.position.step == step

    def test_without_any_counter_the_schedule_tells(self, tmp_path):
        parts = build(sgd)
        updates(parts, 0, 2)
        assert verify_state(reference_state(tmp_path / "p-state", parts)).info.position.step == 2

    def test_the_rates_of_the_state_win_with_a_warning(self, tmp_path, caplog):
        parts = build(lambda params: torch.optim.AdamW(params, lr=5e-2))
        updates(parts, 0, 2)
        stored = verify_state(reference_state(tmp_path / "p-state", parts))
        fresh = build()
        with caplog.at_level(logging.WARNING):
            load_state(stored, fresh)
        assert "learning rates of the state" in caplog.text
        assert fresh.optimizer.param_groups[0]["lr"] == parts.optimizer.param_groups[0]["lr"]


class TestParameterOrder:
    def test_only_the_inside_of_transformer_blocks_moves(self):
        block = "down_blocks.0.attentions.0.transformer_blocks.0."
        children = ["norm1.weight", "norm1.bias", "attn1.to_q.weight", "norm2.weight", "attn2.to_q.weight"]
        children += ["norm3.weight", "ff.net.0.proj.weight", "ff.net.2.weight"]
        names = ["conv_in.weight", *(block + name for name in children), "mid.norm1.weight"]
        names += [f"{block.replace('.0.transformer', '.1.transformer')}{name}" for name in children]
        ordered = [name for name, _ in sort_as_reference((name, None) for name in names)]
        expected = ["attn1.to_q.weight", "ff.net.0.proj.weight", "ff.net.2.weight", "attn2.to_q.weight", "norm1.weight",
                    "norm1.bias", "norm2.weight", "norm3.weight"]  # fmt: skip
        assert ordered[:9] == ["conv_in.weight", *(block + name for name in expected)]
        assert ordered[9] == "mid.norm1.weight"
        assert [name.rpartition("blocks.0.")[2] for name in ordered[10:]] == expected
        assert sorted(ordered) == sorted(names)

    def test_two_blocks_in_a_row_do_not_mix(self):
        names = [f"transformer_blocks.{block}.{name}.weight" for block in (0, 1) for name in ("norm1", "attn1", "ff")]
        ordered = [name for name, _ in sort_as_reference((name, None) for name in names)]
        assert ordered == [f"transformer_blocks.{b}.{n}.weight" for b in (0, 1) for n in ("attn1", "ff", "norm1")]

    def test_a_diffusers_block(self):
        from diffusers.models.attention import BasicTransformerBlock

        module = nn.Module()
        module.transformer_blocks = nn.ModuleList([BasicTransformerBlock(8, 2, 4, cross_attention_dim=8)])
        names = [name.split(".")[2] for name, _ in in_reference_order(module)]
        assert list(dict.fromkeys(names)) == ["attn1", "ff", "attn2", "norm1", "norm2", "norm3"]
        assert {id(p) for _, p in in_reference_order(module)} == {id(p) for p in module.parameters()}
