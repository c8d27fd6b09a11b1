"""Tests of the Triton kernels: on a GPU, or in a process with Triton's interpreter on the CPU.

Whether Triton interprets is settled when it is imported, so ``kernels/`` is collected only where a GPU is, or
where TRITON_INTERPRET=1; ``test_interpreted_kernels.py`` starts such a process.
"""

import os

import torch

READY = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if READY else ["kernels"]
