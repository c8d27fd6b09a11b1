"""Attention by torch's scaled dot product attention."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from portmoe.ops.attention import GROUPED_HEADS, LOG_SUM, VALUE_WIDTH, Segments, check_covers
from portmoe.ops.operation import Implementation
from portmoe.ops.workload import Workload

SPARE = 8  # columns: the kernels of 16-bit types want widths that are multiples of it


def _sdpa(
    q_TND: torch.Tensor, k_TGD: torch.Tensor, v_TGW: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    check_covers(segments, q_TND)
    width = v_TGW.shape[-1]
    if width != q_TND.shape[-1]:
        q_TND, k_TGD, v_TGW = as_wide(q_TND, k_TGD, v_TGW)
    if not segments.lengths:
        return q_TND[..., :width]
    (out_TNW,) = _by_length(lambda *batch: (_sdpa_batch(*batch, scale),), segments, q_TND, k_TGD, v_TGW)
    return out_TNW[..., :width]


def _by_length(
    compute: Callable[..., tuple[torch.Tensor, ...]], segments: Segments, *tensors: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """``compute`` of batches [B, L, …] of segments, as results [T, …].

    One call per length that occurs, without a mask: memory stays linear where the kernel's is.
    """
    if segments.equal_length is not None:
        batch = [t.unflatten(0, (-1, segments.equal_length)) for t in tensors]
        return tuple(y.flatten(0, 1) for y in compute(*batch))
    parts = [t.split(segments.lengths) for t in tensors]
    same_length = defaultdict(list)
    for number, length in enumerate(segments.lengths):
        same_length[length].append(number)
    out: list[tuple[torch.Tensor, ...]] = [()] * len(segments.lengths)
    for numbers in same_length.values():
        results = compute(*(torch.stack([part[number] for number in numbers]) for part in parts))
        for number, *of_segment in zip(numbers, *results, strict=True):
            out[number] = tuple(of_segment)
    return tuple(map(torch.cat, zip(*out, strict=True)))


def as_wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """All of the widest one's width: zeros change no score, and give columns of zeros that are cut off.

    The kernels whose memory is linear want one width.
    """
    widest = max(t.shape[-1] for t in tensors)
    return [F.pad(t, (0, widest - t.shape[-1])) for t in tensors]


def _sdpa_batch(
    q_BLND: torch.Tensor, k_BLGD: torch.Tensor, v_BLGD: torch.Tensor, scale: float
) -> torch.Tensor:
    q_BNLD, k_BGLD, v_BGLD = (t.transpose(1, 2) for t in (q_BLND, k_BLGD, v_BLGD))
    grouped = q_BNLD.shape[1] != k_BGLD.shape[1]
    o_BNLD = F.scaled_dot_product_attention(
        q_BNLD, k_BGLD, v_BGLD, is_causal=True, scale=scale, enable_gqa=grouped
    )
    return o_BNLD.transpose(1, 2)


ATTENTION_SDPA = Implementation(
    "attention",
    "sdpa",
    _sdpa,
    requested_by="model.use_flash_attn",
    handles=(GROUPED_HEADS, VALUE_WIDTH),
)


class FlashKernel(NamedTuple):
    """A kernel of torch's that gives log Σ exp beside its result, by its two operations.

    Attributes:
        forward: q, k, v, each [B, N, L, D], and the scale → the result, log Σ exp [B, N, L] float32, and more
            that the backward pass takes.
        backward: the result's gradient, q, k, v, the result, log Σ exp, the rest and the scale → the three
            gradients.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor, tuple]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def with_log_sum(kernel: FlashKernel) -> Callable[..., Any]:
    """The operation ``attention``, ``log_sum`` too, by a kernel whose backward pass has no gradient of it."""

    def attention(
        q_TND: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGW: torch.Tensor,
        segments: Segments,
        scale: float,
        log_sum: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        check_covers(segments, q_TND)
        width, shared = v_TGW.shape[-1], q_TND.shape[1] // k_TGD.shape[1]
        if width != q_TND.shape[-1]:
            q_TND, k_TGD, v_TGW = as_wide(q_TND, k_TGD, v_TGW)
        if not segments.lengths:
            return (q_TND[..., :width], q_TND.sum(-1).float()) if log_sum else q_TND[..., :width]
        if shared > 1:
            k_TGD, v_TGW = (t.repeat_interleave(shared, 1) for t in (k_TGD, v_TGW))

        def compute(*batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out_BNLD, log_sum_BNL = _Flash.apply(*(t.transpose(1, 2) for t in batch), kernel, scale)
            return out_BNLD.transpose(1, 2), log_sum_BNL.transpose(1, 2)

        out_TND, log_sum_TN = _by_length(compute, segments, q_TND, k_TGD, v_TGW)
        return (out_TND[..., :width], log_sum_TN) if log_sum else out_TND[..., :width]

    return attention


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BNLD: torch.Tensor,
        k_BNLD: torch.Tensor,
        v_BNLD: torch.Tensor,
        kernel: FlashKernel,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out_BNLD, log_sum_BNL, rest = kernel.forward(q_BNLD, k_BNLD, v_BNLD, scale)
        ctx.save_for_backward(q_BNLD, k_BNLD, v_BNLD, out_BNLD, log_sum_BNL)
        ctx.rest = kernel, rest, scale
        return out_BNLD, log_sum_BNL

    @staticmethod
    def backward(
        ctx: Any, grad_BNLD: torch.Tensor, grad_sum_BNL: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """The kernel has dS = P · (grad · v − Σ grad · out), and g of log Σ exp adds P · g.

        A column that is 0 in v, −1 in the result and g in its gradient makes that of the second sum.
        """
        q_BNLD, k_BNLD, v_BNLD, out_BNLD, log_sum_BNL = ctx.saved_tensors
        kernel, rest, scale = ctx.rest
        width = q_BNLD.shape[-1]
        wide = [F.pad(t, (0, SPARE)) for t in (grad_BNLD, q_BNLD, k_BNLD, v_BNLD, out_BNLD)]
        wide[0][..., width], wide[-1][..., width] = grad_sum_BNL, -1
        grads = kernel.backward(*wide, log_sum_BNL, rest, scale)
        return *(grad[..., :width] for grad in grads), None, None


def asked_for_log_sum(workload: Workload) -> str | None:
    """None where the logarithm of the softmax's sum is asked for; else there is no need of it."""
    return (
        None if workload.log_sum else "it is for parts of an attention, which a ring of ranks puts together"
    )


def log_sum_implementation(
    name: str, kernel: FlashKernel, supports: Callable[[Workload], str | None] = asked_for_log_sum
) -> Implementation:
    """``attention.<name>``: the operation by ``kernel``."""
    return Implementation(
        "attention",
        name,
        with_log_sum(kernel),
        supports,
        requested_by="model.use_flash_attn",
        handles=(GROUPED_HEADS, VALUE_WIDTH, LOG_SUM),
    )
