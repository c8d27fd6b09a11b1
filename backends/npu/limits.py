"""What the documentation of torch_npu's functions allows, asked of a workload.

Each function answers None, or which limit the workload is over. Tests hold them to the constraints that the
simulated device enforces.
"""

import torch

from portmoe.accelerator.probing import installed_version, release
from portmoe.ops.workload import Workload

MOST_HEADS = 256
WIDEST_HEAD = 768
LONGEST = 2**20  # tokens of a pack
ROTATED = 896  # a head that is rotated is narrower
ROTATED_HEADS = 1000  # and there are fewer of them
MOST_CHOICES = 512
LARGEST_INDEX = 16_777_215  # rows that npu_moe_token_permute can sort
MOST_GROUPS = 1024
INNER = 65536  # the last dimension of a grouped product's factors is smaller
FEWEST_CLASSES = 128  # of one rank's part of the vocabulary
ALL_TYPES = (2, 13)  # the release from which the pages of the permutation know more types than bfloat16

Reason = str | None


def none(workload: Workload) -> Reason:
    return None


def attention(workload: Workload) -> Reason:
    if workload.head_dim > WIDEST_HEAD:
        return f"the head dimension is {workload.head_dim}, over {WIDEST_HEAD}"
    if workload.heads > MOST_HEADS:
        return f"there are {workload.heads} heads, over {MOST_HEADS}"
    keys, width = workload.kv_heads or workload.heads, workload.value_dim or workload.head_dim
    if workload.heads % keys:
        return f"{keys} heads of the keys do not divide {workload.heads}"
    if width > workload.head_dim:
        return f"values are {width} wide, over the keys' {workload.head_dim}"
    if workload.tokens > LONGEST:
        return f"there are {workload.tokens} tokens, over {LONGEST}"
    return None


def rotary(workload: Workload) -> Reason:
    if workload.head_dim >= ROTATED:
        return f"the head dimension is {workload.head_dim}, and must be below {ROTATED}"
    if workload.heads >= ROTATED_HEADS:
        return f"there are {workload.heads} heads, and must be below {ROTATED_HEADS}"
    if workload.rotary_magnitude > 1:
        return f"cosines and sines reach {workload.rotary_magnitude:.4g}, and must lie in −1 … 1"
    return None


def permutation(workload: Workload) -> Reason:
    if not workload.dropless:
        return (
            "it permutes all choices, and a static buffer drops some and leaves rows empty; "
            "it serves dropless layers (moe_type MegaBlock-D)"
        )
    if workload.top_k > MOST_CHOICES or workload.tokens * workload.top_k >= LARGEST_INDEX:
        return f"{workload.tokens} tokens with {workload.top_k} choices each are over what it can sort"
    return None


def permuted_types(workload: Workload) -> Reason:
    """npu_moe_token_permute's tokens, which keep their type."""
    if workload.dtype == torch.bfloat16:
        return permutation(workload)
    return permutation(workload) or _bfloat16_alone(workload.dtype)


def weighted_types(workload: Workload) -> Reason:
    """npu_moe_token_unpermute's rows and weights, which are float32."""
    return permutation(workload) or _bfloat16_alone(torch.float32)


def _bfloat16_alone(dtype: torch.dtype) -> Reason:
    plugin = installed_version("torch_npu")
    if plugin and release(plugin)[:2] < ALL_TYPES:
        return f"its page in torch_npu {plugin} knows bfloat16 alone, and this is {dtype}; 2.13 knows all"
    return None


def grouped(workload: Workload) -> Reason:
    if workload.experts > MOST_GROUPS:
        return f"there are {workload.experts} experts, over {MOST_GROUPS}"
    widest = max(workload.hidden, workload.ffn_width)
    if widest >= INNER:
        return f"a matrix is {widest} wide, and must be below {INNER}"
    return None


def cut_vocabulary(workload: Workload) -> Reason:
    if workload.dtype == torch.float32:
        return "its factors are float16 or bfloat16"
    if workload.vocab < FEWEST_CLASSES:
        return f"there are {workload.vocab} classes, fewer than {FEWEST_CLASSES}"
    return None
