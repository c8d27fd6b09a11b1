"""Runs the tests of ``on_device/`` in a process whose torch has the simulated NPU."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "on_device"


@pytest.mark.timeout(1500)  # compiles the device
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_the_simulated_device(simulated, which):
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-m", which, str(TESTS)]
    done = subprocess.run(command, env=simulated, capture_output=True, text=True, timeout=1450)
    assert done.returncode == 0, done.stdout + done.stderr
