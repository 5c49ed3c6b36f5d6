"""tools/cache_latents.py in two processes: the same files as from one, and one bad picture is told once."""

import socket
import time

import numpy as np


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, port: int) -> dict[str, str]:
    """Variables that `accelerate launch` gives each process."""
    return {
        "ACCELERATE_USE_CPU": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


def written(tree):
    return {path.name + path.parent.name: dict(np.load(path)) for path in sorted(tree.rglob("*.npz"))}


def test_two_processes_share_the_work(fork_server, tiny_sd1, photo_folders):
    bears = photo_folders / "1_sks bear"
    (bears / "cut.jpg").write_bytes((bears / "00.jpg").read_bytes()[:999])
    command = (
        f"--pretrained_model_name_or_path={tiny_sd1}",
        f"--train_data_dir={photo_folders}",
        "--resolution=64",
        "--cache_text_encoder_outputs",
    )
    port = free_port()
    children = [fork_server.start("tools/cache_latents.py", command, env=environment(rank, port)) for rank in range(2)]
    assert [child.wait() for child in children] == [0, 0], "\n".join(child.output() for child in children)
    first, second = (child.output() for child in children)
    assert "caching latents: 5 pictures done, 1 failed" in first
    assert "cut.jpg" in first and "pictures done" not in second
    shared = written(photo_folders)
    assert len(shared) == 5
    for path in photo_folders.rglob("*.npz"):
        path.unlink()
    assert fork_server.run("tools/cache_latents.py", command).returncode == 0
    alone = written(photo_folders)
    assert alone.keys() == shared.keys()
    for name, arrays in alone.items():
        assert all(np.array_equal(arrays[key], shared[name][key]) for key in arrays)


def test_what_is_done_when_the_tool_is_stopped_counts(fork_server, tiny_sd1, photo_folders):
    command = (f"--pretrained_model_name_or_path={tiny_sd1}", f"--train_data_dir={photo_folders}", "--resolution=64")
    child = fork_server.start("tools/cache_latents.py", command, env={"SD_FAULT": "cache.before_replace:kill9:3"})
    assert child.wait() == -9
    time.sleep(0.1)
    assert len(written(photo_folders)) == 2
    again = fork_server.run("tools/cache_latents.py", command)
    assert again.returncode == 0
    assert "3 pictures done, 2 skipped because their result exists" in again.output()
