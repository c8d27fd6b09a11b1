"""Implementations in torch's own operators that more than one backend can offer.

A backend's ``ops.py`` lists those that serve its device, in its order of preference. What each
computes is the contract of its operation, in that operation's file of ``portmoe.ops``.
"""

from portmoe.backends.torch.adamw import ADAMW_FOREACH, ADAMW_FUSED
from portmoe.backends.torch.attention import ATTENTION_SDPA
from portmoe.backends.torch.attention_blocks import ATTENTION_BLOCKS
from portmoe.backends.torch.cross_entropy import CROSS_ENTROPY_CHUNKED
from portmoe.backends.torch.dispatch import COMBINE_GATHER, DISPATCH_GATHER
from portmoe.backends.torch.expert_ffn import EXPERT_FFN_GROUPED_MM, EXPERT_FFN_LOOP, EXPERT_FFN_RAGGED_LOOP
from portmoe.backends.torch.rms_norm import RMS_NORM
from portmoe.backends.torch.router import ROUTER_LEAN
from portmoe.backends.torch.swiglu import SWIGLU

# The usually faster one of each operation first.
ALL = (
    RMS_NORM,
    SWIGLU,
    ATTENTION_SDPA,
    ATTENTION_BLOCKS,
    ROUTER_LEAN,
    DISPATCH_GATHER,
    COMBINE_GATHER,
    EXPERT_FFN_LOOP,
    EXPERT_FFN_GROUPED_MM,
    EXPERT_FFN_RAGGED_LOOP,
    CROSS_ENTROPY_CHUNKED,
    ADAMW_FUSED,
    ADAMW_FOREACH,
)
