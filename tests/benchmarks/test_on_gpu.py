"""The script for a machine with an accelerator, with a stand-in for Python that notes what it is asked."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "benchmarks/on_gpu.sh"
STAND_IN = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in *" $FAILING "*) exit 4 ;; esac
"""


@pytest.fixture
def run(tmp_path):
    """``run(backend, PARTS=…, failing=…)``: the exit code, what was printed, and the calls of Python."""
    stand_in, calls = tmp_path / "python", tmp_path / "calls"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def call(backend, failing="nothing", **variables):
        calls.write_text("")
        environment = (
            os.environ | {"PYTHON": str(stand_in), "CALLS": str(calls), "FAILING": failing} | variables
        )
        done = subprocess.run(
            ["bash", SCRIPT, backend, str(tmp_path / "out")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return call


@pytest.mark.parametrize("script", [SCRIPT, "benchmarks/gpu.sh"])
def test_the_shell_can_read_it(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True, timeout=60)


def test_every_part_runs(run, tmp_path):
    code, printed, calls = run("someone")
    assert code == 0, printed
    assert "everything passed" in printed
    said = "\n".join(calls)
    for wanted in ("check-env", "validate", "bisect --reference cpu"):
        assert f"{wanted} --backend someone" in said
    for wanted in ("pytest", "benchmarks/peak.py"):
        assert wanted in said
    for name, config in (("tiny_moe4", "tiny_moe4"), ("7b_moe4-slice", "7b_moe4")):
        runs = {device: tmp_path / "out" / name / device for device in ("cpu", "someone")}
        for device, directory in runs.items():
            (train,) = [call for call in calls if call.endswith(f"run.directory={directory}")]
            assert f"train --config {config} --backend {device} " in train
        assert f"compare {runs['cpu']} {runs['someone']}" in said
    assert "model.num_layers=2" in said


def test_a_part_that_fails_is_named_and_the_others_go_on(run):
    code, printed, calls = run("someone", failing="validate")
    assert code == 1
    assert "failed: validate (exit code 4)" in printed
    assert any("benchmarks/peak.py" in call for call in calls)


def test_parts_and_settings_can_be_chosen(run):
    code, _, calls = run("cpu", PARTS="tiny_moe4", TINY="data.total_steps=3 model.num_layers=1")
    assert code == 0
    (train,) = calls
    assert "--set data.total_steps=3 --set model.num_layers=1" in train
    assert run("cpu", PARTS="nosuch")[0] == 2
