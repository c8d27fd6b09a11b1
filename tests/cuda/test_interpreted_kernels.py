"""Runs the tests of ``kernels/`` in a process where Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parent / "kernels"


def test_the_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(KERNELS)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
