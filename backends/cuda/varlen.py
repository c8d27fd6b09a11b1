"""Attention over packed segments by torch's variable-length flash kernel. Untested on hardware."""

from functools import lru_cache
from inspect import signature

import torch

from portmoe.accelerator.probing import describe
from portmoe.backends.torch import ops as torch_ops
from portmoe.backends.torch.attention import as_wide
from portmoe.ops.attention import GROUPED_HEADS, VALUE_WIDTH, Segments, check_covers
from portmoe.ops.operation import Implementation
from portmoe.ops.workload import Workload

CAUSAL = (-1, 0)  # window_size: every token to the left, none to the right
OLDEST_CAPABILITY = (8, 0)
WIDEST_HEAD, HEAD_MULTIPLE = 256, 8


def attention(
    q_TND: torch.Tensor, k_TGD: torch.Tensor, v_TGW: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    """One call for all segments; where they are of one length, or there are none, as SDPA takes them."""
    check_covers(segments, q_TND)
    if segments.equal_length is not None or not segments.lengths:
        return torch_ops.ATTENTION_SDPA.function(q_TND, k_TGD, v_TGW, segments, scale)
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = _offsets(segments, q_TND.device), max(segments.lengths)
    width = v_TGW.shape[-1]
    if width != q_TND.shape[-1]:
        q_TND, k_TGD, v_TGW = as_wide(q_TND, k_TGD, v_TGW)
    grouped = {"enable_gqa": True} if k_TGD.shape[1] != q_TND.shape[1] else {}
    o_TND = varlen_attn(
        q_TND, k_TGD, v_TGW, offsets, offsets, longest, longest, scale=scale, window_size=CAUSAL, **grouped
    )
    return o_TND[..., :width]


@lru_cache(maxsize=8)  # a micro-batch's segments are those of all its layers
def _offsets(segments: Segments, device: torch.device) -> torch.Tensor:
    return torch.tensor(segments.offsets, dtype=torch.int32, device=device)


def supports(workload: Workload) -> str | None:
    """None if the flash kernel can take unequal segments of these heads, otherwise why not."""
    if workload.equal_segments:
        return "segments of one length go to sdpa as a batch"
    if lacking := flash_takes(workload):
        return lacking
    try:
        from torch.nn.attention.varlen import varlen_attn
    except Exception as error:
        return f"torch {torch.__version__} has no varlen_attn: {describe(error)}"
    needed = {"scale", "window_size"}
    if workload.kv_heads not in (None, workload.heads):
        needed.add("enable_gqa")
    if lacking := needed - signature(varlen_attn).parameters.keys():
        return f"varlen_attn of torch {torch.__version__} has no {' and no '.join(sorted(lacking))}"
    return None


def flash_takes(workload: Workload, spare: int = 0) -> str | None:
    """None if flash attention has these heads on this GPU, with so many columns to spare, else why not."""
    if workload.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention has no {workload.dtype}"
    widest = max(workload.head_dim, workload.value_dim or 0)
    if widest > WIDEST_HEAD - spare or widest % HEAD_MULTIPLE:
        return (
            f"the head dimension is {widest}, and allowed are multiples of {HEAD_MULTIPLE} "
            f"up to {WIDEST_HEAD - spare}"
        )
    if (
        workload.device.type == "cuda"
        and torch.cuda.get_device_capability(workload.device) < OLDEST_CAPABILITY
    ):
        return "flash attention needs a GPU of compute capability 8.0 or newer"
    return None


ATTENTION_VARLEN = Implementation(
    "attention",
    "varlen",
    attention,
    supports,
    "model.use_flash_attn",
    handles=(GROUPED_HEADS, VALUE_WIDTH),
)
