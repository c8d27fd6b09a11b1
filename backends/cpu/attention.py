"""Attention by compiled kernels, and with log Σ exp by torch's flash kernel for hosts."""

from typing import Any

import torch

from portmoe.backends.cpu import compiler
from portmoe.backends.cpu.compiler import addresses, require
from portmoe.backends.torch.attention import FlashKernel, log_sum_implementation
from portmoe.ops.attention import GROUPED_HEADS, LOG_SUM, VALUE_WIDTH, Segments, check_covers
from portmoe.ops.operation import Implementation
from portmoe.ops.workload import Workload

BLOCK, LANES = 64, 16  # of attention.c
WIDE, LONG = 64, 2048  # head width, tokens of a segment
_ATEN = torch.ops.aten


def _forward(
    q_BNLD: torch.Tensor, k_BNLD: torch.Tensor, v_BNLD: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    out_BNLD, log_sum_BNL = _ATEN._scaled_dot_product_flash_attention_for_cpu(
        q_BNLD, k_BNLD, v_BNLD, 0.0, True, scale=scale
    )
    return out_BNLD, log_sum_BNL, ()


def _backward(
    grad_BNLD: torch.Tensor,
    q_BNLD: torch.Tensor,
    k_BNLD: torch.Tensor,
    v_BNLD: torch.Tensor,
    out_BNLD: torch.Tensor,
    log_sum_BNL: torch.Tensor,
    rest: tuple,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_BNLD, q_BNLD, k_BNLD, v_BNLD, out_BNLD, log_sum_BNL, 0.0, True, scale=scale
    )


def compiled(
    q_TND: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGW: torch.Tensor,
    segments: Segments,
    scale: float,
    log_sum: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The contract of ``attention``, for float32 and bfloat16; all between is float32."""
    check_covers(segments, q_TND)
    out_TNW, log_sum_TN = _Compiled.apply(q_TND, k_TGD, v_TGW, segments, scale)
    return (out_TNW, log_sum_TN) if log_sum else out_TNW


class _Compiled(torch.autograd.Function):
    """Keeps its arguments as they lie, the result, and log Σ exp."""

    @staticmethod
    def forward(
        ctx: Any,
        q_TND: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGW: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_TND, k_TGD, v_TGW = (t if t.stride(2) == 1 else t.contiguous() for t in (q_TND, k_TGD, v_TGW))
        out_TNW = q_TND.new_empty(*q_TND.shape[:2], v_TGW.shape[2])
        log_sum_TN = torch.empty(q_TND.shape[:2], dtype=torch.float32)
        call = _Call(q_TND, k_TGD, v_TGW, segments, scale)
        require().attention(*call.sizes, *call.inputs, *addresses(out_TNW, log_sum_TN), *call.scratch())
        ctx.save_for_backward(q_TND, k_TGD, v_TGW, out_TNW, log_sum_TN)
        ctx.segments, ctx.scale = segments, scale
        ctx.set_materialize_grads(False)
        return out_TNW, log_sum_TN

    @staticmethod
    def backward(
        ctx: Any, grad_TNW: torch.Tensor | None, grad_sum_TN: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q_TND, k_TGD, v_TGW, out_TNW, log_sum_TN = ctx.saved_tensors
        call = _Call(q_TND, k_TGD, v_TGW, ctx.segments, ctx.scale)
        grad_TNW = torch.zeros_like(out_TNW) if grad_TNW is None else grad_TNW.contiguous()
        grad_sum_TN = None if grad_sum_TN is None else grad_sum_TN.contiguous()
        of_sum = None if grad_sum_TN is None else addresses(grad_sum_TN)[0]
        grads = [torch.empty(t.shape, dtype=t.dtype) for t in (q_TND, k_TGD, v_TGW)]
        require().attention_backward(
            *call.sizes,
            *call.inputs,
            *addresses(out_TNW, log_sum_TN, grad_TNW),
            of_sum,
            *addresses(*grads),
            *call.scratch(),
        )
        return *grads, None, None


class _Call:
    """The arguments that both kernels take; they point into tensors that are kept here."""

    def __init__(
        self,
        q_TND: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGW: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> None:
        tensors = (q_TND, k_TGD, v_TGW)
        self._offsets = torch.tensor(segments.offsets)
        self._strides = torch.tensor([stride for t in tensors for stride in t.stride()[:2]])
        self._longest, (width, value_width) = (
            max(segments.lengths, default=0),
            (q_TND.shape[2], v_TGW.shape[2]),
        )
        numbers = (len(segments.lengths), q_TND.shape[1], k_TGD.shape[1], width, value_width, self._longest)
        first, *rest = numbers
        offsets, strides = addresses(self._offsets, self._strides)
        self.sizes = (first, offsets, *rest, scale, q_TND.dtype == torch.bfloat16, strides)
        self.inputs = tuple(compiler.address(t) for t in tensors)
        self._widths = [-(-size // LANES) * LANES for size in (width, value_width)]

    def scratch(self) -> tuple[int, int, int]:
        """Address and numbers of each thread's part of the memory to compute in, and the threads."""
        threads, of_keys = torch.get_num_threads(), -(-self._longest // BLOCK) * BLOCK
        both = sum(self._widths)
        size = 2 * BLOCK * both + 2 * BLOCK * BLOCK + 2 * BLOCK + 3 * of_keys * both
        self._scratch = torch.empty(threads, size, dtype=torch.float32)
        return *addresses(self._scratch), size, threads


def _quicker(workload: Workload) -> str | None:
    """Supports where the kernels take less time than torch's, as measured (docs/performance.md)."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":  # a product took twenty times as long with AVX2
        return "the kernels are written for vectors of 512 bits, which this processor has not"
    wide = max(workload.head_dim, workload.value_dim or 0) >= WIDE
    if wide and workload.dtype == torch.bfloat16 and workload.equal_segments and workload.seq_len >= LONG:
        return f"torch's kernel is quicker at bfloat16 heads of {WIDE} or more in segments of {LONG} or more"
    return compiler.supports(workload)


ALL = (
    Implementation(
        "attention",
        "compiled",
        compiled,
        _quicker,
        requested_by="model.use_flash_attn",
        handles=(GROUPED_HEADS, VALUE_WIDTH, LOG_SUM),
    ),
    log_sum_implementation("flash", FlashKernel(_forward, _backward)),
)
