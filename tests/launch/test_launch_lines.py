"""The README's srun line for 32 cards, as it stands there but for a small model and two ranks."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from free_port import free_port

README = Path(__file__).parents[2] / "README.md"
SMALL = (
    "model.hidden_size=32",
    "model.vocab_size=448",
    "model.multiple_of=16",
    "data.seq_len=32",
    "data.global_batch_size=16",
    "data.num_samples=400",
    "data.total_steps=3",
)
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def line(program):
    """The words of the README's line that starts ``program`` on several machines."""
    lines = [text for text in README.read_text().splitlines() if text.startswith(f"{program} --n")]
    (words,) = [shlex.split(text) for text in lines if "nodes" in text and "7b_moe4" in text]
    return words


def small(directory):
    settings = [part for key in (*SMALL, f"run.directory={directory}") for part in ("--set", key)]
    return ["--config", "tiny_moe4", "--backend", "cpu", *settings]


def start(command, **variables):
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    return subprocess.Popen(
        command,
        env=kept | {"OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_trained(processes, ranks, directory):
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    records = [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert f"{ranks} ranks: data {ranks}" in (directory / "train.log").read_text()


def test_srun_on_two_machines(tmp_path):
    words = line("srun")
    given = dict(zip(words[1::2], words[2::2], strict=False))
    assert int(given["--nodes"]) * int(given["--ntasks-per-node"]) == 32
    command = words[words.index("portmoe") + 1 : words.index("--config")]
    command = [sys.executable, "-m", "portmoe", *command, *small(tmp_path / "run")]
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURM_NODELIST": "localhost,elsewhere",  # rank 0 is met on the first
        "MASTER_PORT": str(free_port()),
    }
    places = [{"SLURM_PROCID": rank, "SLURM_LOCALID": "0", "SLURM_NODEID": rank} for rank in ("0", "1")]
    assert_trained([start(command, **job, **place) for place in places], 2, tmp_path / "run")
