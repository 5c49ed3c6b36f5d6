"""What srun tells its processes, in the words of other launchers."""

import pytest

from library.slurm import variables

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "gpu[03-04,12]",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}


def test_a_process_of_several():
    found = variables(STEP)
    port = int(found.pop("MASTER_PORT"))
    assert found == {
        "WORLD_SIZE": "20",
        "RANK": "17",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu03",
    }
    assert 1024 < port < 65536
    other = {**STEP, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert variables(other)["MASTER_PORT"] == str(port)
    assert variables(other)["LOCAL_WORLD_SIZE"] == "8"
    assert variables({**STEP, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != str(port)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu-a-1,gpu-a-2", "gpu-a-1"),
        ("rack[1,3]-gpu,login", "rack1-gpu"),
        ("n[0009-0012]", "n0009"),
        ("", "10.0.0.3"),
    ],
)
def test_the_first_node_is_where_processes_meet(nodes, first):
    environment = {**STEP, "SLURM_STEP_NODELIST": nodes, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3"}
    assert variables(environment)["MASTER_ADDR"] == first


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},  # torchrun, started by srun
        {"SLURM_STEP_NUM_TASKS": None, "SLURM_NTASKS": "20"},  # the batch script itself: one process
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": "x"},
    ],
)
def test_other_processes_are_left_alone(changes):
    environment = {name: value for name, value in {**STEP, **changes}.items() if value is not None}
    assert variables(environment) == {}


def test_what_the_user_sets_stays(monkeypatch):
    import os

    from library.slurm import adopt_slurm

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "none")
        monkeypatch.delenv(name)
    for name, value in {**STEP, "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    adopt_slurm()
    assert (os.environ["MASTER_ADDR"], os.environ["RANK"]) == ("here", "17")
