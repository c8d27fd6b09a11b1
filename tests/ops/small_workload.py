"""A workload small enough to choose implementations by in a moment."""

import torch

from portmoe.ops import Workload

WORKLOAD = Workload(
    device=torch.device("cpu"),
    dtype=torch.float32,
    tokens=8,
    seq_len=8,
    hidden=8,
    heads=2,
    head_dim=4,
    ffn_width=8,
    vocab=16,
    experts=4,
    top_k=2,
    capacity=4,
    equal_segments=True,
)
