"""Running `portmoe train` as a user does, on a model small enough for many runs."""

import json
import os
import sys
from pathlib import Path

from free_port import free_port
from zygote import start_portmoe

SMALL = {
    "data.seq_len": 32,
    "data.total_steps": 20,
    "data.num_samples": 300,
    "model.vocab_size": 512,
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.multiple_of": 32,
    "ckpt.enable_save_ckpt": False,
}


def arguments(directory: Path, nproc: int = 1, **overrides: object) -> list[str]:
    """Those of ``portmoe``; ``overrides`` name config keys with "__" for the dot."""
    keys = SMALL | {key.replace("__", "."): value for key, value in overrides.items()}
    settings = [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    train = ["train", "--backend", "cpu", "--nproc", str(nproc)]
    return [*train, "--set", f"run.directory={directory}", *settings]


def command(directory: Path, nproc: int = 1, **overrides: object) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-m", "portmoe", *arguments(directory, nproc, **overrides)]


def environment() -> dict[str, str]:
    """One thread per rank: several ranks share few cores."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(directory: Path, nproc: int = 1, **overrides: object) -> list[dict]:
    """Train to the end, as so many ranks; the records of metrics.jsonl."""
    line = arguments(directory, **overrides)
    if nproc == 1:
        ranks = [start_portmoe(line, environment())]
    else:
        port = str(free_port())
        common = {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "MASTER_PORT": port}
        common |= environment() | {"MASTER_ADDR": "127.0.0.1"}
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]
        ranks = [start_portmoe(line, common | place) for place in places]
    try:
        said = [rank.communicate(280)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * nproc, "\n".join(said)
    return records(directory)


def records(directory: Path) -> list[dict]:
    """The complete records of metrics.jsonl so far."""
    file = directory / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(metrics: list[dict]) -> list[float]:
    return [record["loss"] for record in metrics]
