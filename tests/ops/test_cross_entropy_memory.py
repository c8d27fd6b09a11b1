"""Peak memory of the head and loss, measured in a process of its own."""

import subprocess
import sys

import pytest

T, H, V = 1024, 32, 32768
LOGITS = T * V * 4  # bytes in float32: 128 MiB

MEASURE = f"""
import ctypes, gc, sys, torch
from portmoe import get_accelerator
from portmoe.ops.chunked_cross_entropy import chunked_cross_entropy as chunked
from portmoe.ops.cross_entropy import cross_entropy as plain

function, memory = locals()[sys.argv[1]], get_accelerator("cpu").memory
x_TH, weight_VH = torch.randn({T}, {H}, requires_grad=True), torch.randn({V}, {H}, requires_grad=True)
labels_T = torch.randint({V}, ({T},))
for _ in range(2):  # the first call also loads libraries
    x_TH.grad = weight_VH.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory.reset_peak()
    before = memory.allocated()
    function(x_TH, weight_VH, labels_T, 0.0)[0].mean().backward()
    peak = memory.peak() - before
print(peak)
"""


def peak(function):
    command = [sys.executable, "-c", MEASURE, function]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")
def test_the_logits_are_never_held_whole():
    assert peak("plain") > 1.9 * LOGITS  # the measurement sees them: once, and their gradient
    assert peak("chunked") < LOGITS / 2  # 16 MiB kept, some slices of 4 MiB, and the gradients, also 4 MiB
