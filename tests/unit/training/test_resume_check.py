"""What may differ between a state and the run that goes on from it, and how the difference is shown."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.contracts import Position, RunLength
from library.errors import UserError
from library.training.options import StateOptions
from library.training.resume_check import compare, start_position
from library.training.state import Identity, StateInfo, StateParts, load_state, save_state, verify_state

OPTIONS = {
    "optimizer": {"learning_rate": 1e-6, "optimizer_type": "AdamW", "optimizer_args": ["weight_decay=0.1", "eps=1e-8"]},
    "tune": {"learning_rate_te": None, "learning_rate_te1": None},
    "trained tokens": {"embedding_lr": None},
    "schedule": {"lr_scheduler": "cosine", "lr_warmup_steps": 0},
    "length": {"max_train_steps": 100, "max_train_epochs": None, "seed": None, "gradient_accumulation_steps": 2},
    "data": {"resolution": (512, 512)},
    "subset": {"shuffle_caption": False},
    "loss": {"huber_c": 0.1},
}
DATA = {"images": 3, "files": ["a.png", "b.png", "c.png"], "captions": "0f0f"}
LENGTH = RunLength(100, 10, 20, 2, 2, 1)


def identity(**changes):
    options = {title: dict(values) for title, values in OPTIONS.items()}
    data, base, environment = dict(DATA), {"hash": "abc"}, {"torch": "2.13", "threads": 1}
    for name, value in changes.items():
        if name in ("data", "base", "environment"):
            {"data": data, "base": base, "environment": environment}[name].update(value)
        else:
            next(values for values in options.values() if name in values)[name] = value
    return Identity(options, data, base, environment)


def stored(step=25, length=LENGTH, world=1):
    position = Position(step, *divmod(step, length.updates_per_epoch))
    saved = StateInfo(position, seed=7, length=length, identity=identity(), world=world)
    return StateInfo.from_json(saved.to_json())


def check(now, *override, length=LENGTH, seed=None, info=None):
    return compare(info or stored(), now, length, StateOptions(resume_override=override).allows, seed=seed)


class TestDifferences:
    def test_equal_runs(self):
        changes = check(identity())
        assert (changes.refused, changes.allowed, changes.notes) == ((), (), ())
        changes.raise_refused("x")

    @pytest.mark.parametrize(
        ("change", "override"),
        [
            ({"learning_rate": 5e-6}, "lr"),
            ({"learning_rate_te": 5e-6}, "lr"),
            ({"learning_rate_te1": 5e-6}, "lr"),
            ({"embedding_lr": 5e-6}, "lr"),
            ({"lr_scheduler": "linear"}, "scheduler"),
            ({"lr_warmup_steps": 10}, "scheduler"),
            ({"optimizer_args": ["weight_decay=0.2"]}, "optimizer_args"),
            ({"max_train_steps": 200}, "steps"),
            ({"max_train_epochs": 5}, "steps"),
            ({"data": {"files": ["a.png"]}}, "data"),
            ({"resolution": (768, 768)}, "data"),
            ({"shuffle_caption": True}, "data"),
            ({"huber_c": 0.2}, "huber_c"),
            ({"huber_c": 0.2}, "loss"),
            ({"base": {"hash": "other"}}, "model"),
        ],
    )
    def test_each_needs_to_be_allowed(self, change, override):
        now = identity(**change)
        with pytest.raises(UserError, match="--resume_override") as caught:
            check(now).raise_refused("--resume x")
        changes = check(now, override)
        assert changes.refused == ()
        assert len(changes.allowed) > 0
        if override != "loss":
            assert f"--resume_override {override}" in str(caught.value)

    def test_other_overrides_do_not_help(self):
        assert check(identity(learning_rate=5e-6), "data", "scheduler").refused

    def test_the_table(self):
        now = identity(learning_rate=5e-6, lr_scheduler="linear", data={"files": ["a.png", "x.png", "c.png"]})
        with pytest.raises(UserError) as caught:
            check(now).raise_refused("--resume out-state")
        assert str(caught.value).splitlines() == [
            "--resume out-state: this run differs from the one that was saved. ",
            "                   saved   now",
            "  --learning_rate  1e-06   5e-06",
            "  --lr_scheduler   cosine  linear",
            "  data: files[1]   b.png   x.png",
            "Give the saved values, or allow the changes with --resume_override data lr scheduler. A new run has "
            "another --output_name (`experiment_id` in a YAML file).",
        ]

    def test_a_long_table_is_cut(self):
        now = identity(data={"files": [f"{number}.png" for number in range(1000)]})
        with pytest.raises(UserError, match="and 988 more") as caught:
            check(now).raise_refused("x")
        assert len(str(caught.value).splitlines()) < 20

    @pytest.mark.parametrize(("seed", "refused"), [(None, False), (7, False), (8, True)])
    def test_the_seed(self, seed, refused):
        assert bool(check(identity(seed=seed), seed=seed).refused) is refused

    def test_states_belong_to_one_script_and_family(self):
        saved = stored()
        saved = replace(saved, identity=replace(saved.identity, training="network (c)"))
        assert check(replace(identity(), training="network (c)"), info=saved).refused == ()
        assert check(replace(identity(), training="network (c)")).refused == ()
        with pytest.raises(UserError, match=r"one of another training: network \(c\), and this is network \(b\)"):
            check(replace(identity(), training="network (b)"), info=saved)

    def test_machine_differences_are_only_noted(self):
        changes = check(identity(environment={"threads": 4}))
        assert changes.refused == ()
        assert changes.notes == ("threads was 1, is 4: the run continues, but perhaps not bit for bit",)

    def test_more_processes_with_less_accumulation(self):
        two = RunLength(100, 10, 20, 2, 1, 2)
        changes = check(identity(gradient_accumulation_steps=1), length=two)
        assert changes.refused == ()
        assert "not bit-exact" in changes.notes[0]
        wider = RunLength(100, 10, 20, 4, 2, 2)
        assert "order of the samples" in check(identity(), length=wider).notes[0]
        assert check(
            identity(gradient_accumulation_steps=1), length=replace(LENGTH, micro_batches_per_update=1)
        ).refused

    def test_states_of_the_reference_know_nothing_to_compare(self):
        assert check(identity(learning_rate=5e-6), info=StateInfo(Position(3), exact=False)).refused == ()

    def test_an_option_that_is_new_or_gone(self):
        now = Identity({**OPTIONS, "loss": {"huber_c": 0.1, "new": 1}}, DATA, {"hash": "abc"})
        (change,) = check(now).refused
        assert (change.name, change.saved, change.now) == ("new", "(none)", 1)


class TestPosition:
    def test_the_same_place(self):
        assert start_position(stored(25), LENGTH, check(identity())) == Position(25, 2, 5)

    def test_other_data_begin_the_epoch_again(self):
        changes = check(identity(data={"captions": "1"}), "data")
        assert start_position(stored(25), LENGTH, changes) == Position(25, 2, 0)

    @pytest.mark.parametrize(("per_update", "inside"), [(1, 10), (2, 5), (4, 2), (20, 0)])
    def test_another_number_of_batches_per_update(self, per_update, inside):
        length = replace(LENGTH, micro_batches_per_update=per_update)
        assert start_position(stored(25), length, check(identity())) == Position(25, 2, inside)

    def test_of_a_reference_state(self):
        info = StateInfo(Position(25), exact=False)
        assert start_position(info, LENGTH, check(identity(), info=info)) == Position(25, 2, 5)


def run(lr=1e-2, total=10, decay=0.1, steps=()):
    """A run of one tensor; returns (parts, weights after the given updates)."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    parts = StateParts({"unet": module}, optimizer, schedule)
    go(parts, steps)
    return parts


def go(parts, steps):
    (module,) = parts.modules.values()
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        parts.optimizer.step()
        parts.lr_schedule.step()


def rates(parts):
    return [group["lr"] for group in parts.optimizer.param_groups]


class TestAllowedChanges:
    @pytest.fixture
    def saved(self, tmp_path):
        info = StateInfo(Position(4, 0, 4), 7, LENGTH, identity())
        save_state(tmp_path / "s", run(steps=range(4)), info)
        return verify_state(Path(tmp_path / "s"))

    def test_without_changes_the_stored_rate_wins(self, saved):
        parts = run(lr=5e-2, total=1000)
        load_state(saved, parts, check(identity(), info=saved.info))
        assert rates(parts) == [1e-2 * 0.6]

    def test_a_new_rate_follows_the_schedule(self, saved):
        parts = run(lr=5e-2)
        load_state(saved, parts, check(identity(learning_rate=5e-2), "lr", info=saved.info))
        assert rates(parts) == [5e-2 * 0.6]
        go(parts, [4])
        assert rates(parts) == [5e-2 * 0.5]

    def test_a_longer_run_stretches_the_schedule(self, saved):
        parts = run(total=20)
        load_state(saved, parts, check(identity(max_train_steps=200), "steps", info=saved.info))
        assert rates(parts) == [1e-2 * 0.8]

    def test_new_optimizer_arguments_replace_only_what_changed(self, saved):
        parts = run(decay=0.5)
        now = identity(optimizer_args=["weight_decay=0.5", "eps=1e-8"])
        load_state(saved, parts, check(now, "optimizer_args", info=saved.info))
        (group,) = parts.optimizer.param_groups
        assert group["weight_decay"] == 0.5
        assert rates(parts) == [1e-2 * 0.6]
        moments = next(iter(parts.optimizer.state.values()))
        assert moments["step"] == 4

    def test_allowing_what_did_not_change_keeps_it_exact(self, saved):
        straight, resumed = run(steps=range(7)), run()
        allowed = ("lr", "scheduler", "steps", "data", "optimizer_args")
        load_state(saved, resumed, check(identity(), *allowed, info=saved.info))
        go(resumed, range(4, 7))
        pairs = zip(straight.modules["unet"].parameters(), resumed.modules["unet"].parameters(), strict=True)
        assert all(torch.equal(first, second) for first, second in pairs)
