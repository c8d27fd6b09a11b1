"""A rank that dies or hangs in a step: the others end in time and name it; spawned ranks start again."""

import os
import signal
import subprocess
import sys
import time

import pytest
from free_port import free_port
from worlds import MODEL, records

LONG = ("data.total_steps=100000", "run.collective_timeout=15")
PIPELINE = ("parallel.pipeline.size=2",)


def settings(directory, *overrides):
    keys = (*MODEL, f"run.directory={directory}", *overrides)
    return [part for key in keys for part in ("--set", key)]


@pytest.fixture
def ranks(tmp_path):
    """Starts the ranks of one run as torchrun would, but without an agent to watch them."""
    started = []

    def start(size, *overrides):
        common = {
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        for rank in range(size):
            place = common | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
            process = subprocess.Popen(
                [sys.executable, "-m", "portmoe", "train", *settings(tmp_path / "run", *overrides)],
                env=os.environ | {key: str(value) for key, value in place.items()},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(process)
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert all(process.poll() is None for process in started), [p.communicate() for p in started]
            time.sleep(0.1)
        return list(started)

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("victim", "signal_number", "layout"),
    [
        (2, signal.SIGKILL, PIPELINE),
        pytest.param(0, signal.SIGKILL, (), marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, PIPELINE, marks=pytest.mark.slow),
    ],
)
def test_the_others_end_and_name_it(ranks, victim, signal_number, layout):
    processes = ranks(4, *LONG, *layout)
    processes[victim].send_signal(signal_number)
    for rank, process in enumerate(processes):
        if rank != victim:
            _, said = process.communicate(timeout=100)  # 15 s and what a loaded machine adds
            assert process.returncode == 4, said
            assert f"error: rank {rank} (" in said
            assert f"lost rank {victim}: " in said
            assert "Traceback" not in said


def test_spawned_ranks_start_again_and_go_on(tmp_path):
    directory = tmp_path / "run"
    keys = ("ckpt.enable_save_ckpt=true", "ckpt.checkpoint_every=5", "data.total_steps=30", *PIPELINE)
    options = ("--nproc", "2", "--max-restarts", "1", *settings(directory, *keys))
    launcher = subprocess.Popen(
        [sys.executable, "-m", "portmoe", "train", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not directory.exists() or len(list((directory / "checkpoints").glob("step-*[0-9]"))) < 1:
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.05)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True
    )
    victim = next(pid for pid in children.stdout.split() if rank_of(pid) == "1")
    os.kill(int(victim), signal.SIGKILL)
    _, said = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, said
    assert f"rank 1 of 2 (process {victim}) was ended by SIGKILL" in said
    assert "restart 1 of 1" in said
    done = records(directory)
    assert [record["step"] for record in done] == list(range(30))


def rank_of(pid: str) -> str | None:
    with open(f"/proc/{pid}/environ", encoding="utf-8") as file:
        variables = dict(part.split("=", 1) for part in file.read().split("\0") if "=" in part)
    return variables.get("RANK")
