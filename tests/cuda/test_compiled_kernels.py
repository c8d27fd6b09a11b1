"""Every kernel, as it is launched, compiles to machine code for a GPU; none is needed for that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"


# 90 takes every step a GPU of today does; 80 is the oldest with bfloat16.
@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_the_kernels_compile(capability, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(done.stdout.split()) == {
        "swiglu._forward",
        "swiglu._backward",
        "dispatch._spread_kernel",
        "dispatch._gather_kernel",
        "dispatch._product_kernel",
        "topk_gating._choose_kernel",
        "topk_gating._place_kernel",
        "topk_gating._gradient_kernel",
    }
