"""The vendor's fused functions: registered schemas, documented constraints, and torch's operations inside.

A file a theme. Each function is registered as the plug-in registers it, with the schema read from its wheel
(``tests/vendors/signatures.json``), so torch itself binds the arguments of a call; and it has rows, one a
documented constraint, which a call must meet (``registry.py``). Where the documentation leaves memory
undefined, the result is NaN. What a function documents and portmoe has no use for (dropout, position biases,
quantisation) is refused as not simulated.
"""

from torch_npu.operations import (  # noqa: F401  registers what they define
    attention,
    cross_entropy,
    elementwise,
    gating,
    grouped,
    optimizer,
    permutation,
    routing_map,
)
from torch_npu.operations.registry import DOCUMENTED, ROWS

__all__ = ["DOCUMENTED", "ROWS"]
