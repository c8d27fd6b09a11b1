"""Running `portmoe train` as a user does, on a model small enough for many runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def command(directory: Path, nproc: int = 1, **overrides: object) -> list[str]:
    """The command line; ``overrides`` name config keys with "__" for the dot."""
    keys = SMALL | {key.replace("__", "."): value for key, value in overrides.items()}
    settings = [part for key, value in keys.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    train = [sys.executable, "-m", "portmoe", "train", "--backend", "cpu", "--nproc", str(nproc)]
    return [*train, "--set", f"run.directory={directory}", *settings]


def environment() -> dict[str, str]:
    """One thread per rank: several ranks share few cores."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(directory: Path, nproc: int = 1, **overrides: object) -> list[dict]:
    """Train to the end; the records of metrics.jsonl."""
    done = subprocess.run(
        command(directory, nproc, **overrides), env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return records(directory)


def records(directory: Path) -> list[dict]:
    """The complete records of metrics.jsonl so far."""
    file = directory / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(metrics: list[dict]) -> list[float]:
    return [record["loss"] for record in metrics]
