"""Peak memory of the head and loss, measured in a process of its own."""

import os
import sys

import pytest
from zygote import python

from portmoe.backends.cpu import compiler

T, H, V = 1024, 32, 65536
LOGITS = T * V * 4  # bytes in float32: 256 MiB

MEASURE = f"""
import ctypes, gc, sys, torch
from portmoe import get_accelerator
from portmoe.backends.cpu import cross_entropy as compiled_cross_entropy
from portmoe.ops.cross_entropy import cross_entropy as plain

compiled, chunked = (i.function for i in compiled_cross_entropy.ALL)
function, memory = locals()[sys.argv[1]], get_accelerator("cpu").memory
x_TH, weight_VH = torch.randn({T}, {H}, requires_grad=True), torch.randn({V}, {H}, requires_grad=True)
labels_T = torch.randint({V}, ({T},))
peaks = []
for _ in range(4):  # the first call also loads libraries, and what the allocator keeps differs
    x_TH.grad = weight_VH.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory.reset_peak()
    before = memory.allocated()
    function(x_TH, weight_VH, labels_T, 0.0)[0].mean().backward()
    peaks.append(memory.peak() - before)
print(min(peaks[1:]))
"""


def peak(function):
    done = python(MEASURE, os.environ | {"OMP_NUM_THREADS": "1"}, function)
    assert done.returncode == 0, done.stdout
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")
def test_the_logits_are_never_held_whole():
    assert peak("plain") > 1.9 * LOGITS  # the measurement sees them: once, and their gradient
    # 16 MiB kept, some slices of 8 MiB, and the gradients, 8 MiB
    assert peak("chunked") < LOGITS / 2
    if not isinstance(compiler.kernels(), str):
        assert peak("compiled") < LOGITS / 2
