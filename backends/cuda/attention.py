"""Attention with log Σ exp by torch's flash kernel for GPUs. Untested on hardware."""

from typing import Any

import torch

from portmoe.backends.cuda.varlen import flash_takes
from portmoe.backends.torch.attention import SPARE, FlashKernel, asked_for_log_sum, log_sum_implementation
from portmoe.ops.workload import Workload

_ATEN = torch.ops.aten
FORWARD, BACKWARD = (
    _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_backward,
)


def _forward(
    q_BNLD: torch.Tensor, k_BNLD: torch.Tensor, v_BNLD: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]:
    out_BNLD, log_sum_BNL, *rest = FORWARD(q_BNLD, k_BNLD, v_BNLD, 0.0, True, False, scale=scale)
    return out_BNLD, log_sum_BNL, tuple(rest[:6])


def _backward(
    grad_BNLD: torch.Tensor,
    q_BNLD: torch.Tensor,
    k_BNLD: torch.Tensor,
    v_BNLD: torch.Tensor,
    out_BNLD: torch.Tensor,
    log_sum_BNL: torch.Tensor,
    rest: tuple[Any, ...],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    offsets_and_longest, state = rest[:4], rest[4:]
    return BACKWARD(
        *(grad_BNLD, q_BNLD, k_BNLD, v_BNLD, out_BNLD, log_sum_BNL),
        *(*offsets_and_longest, 0.0, True, *state),
        scale=scale,
    )


def supports(workload: Workload) -> str | None:
    """None if the kernel can take these heads, and the spare columns of the backward pass, else why not."""
    return asked_for_log_sum(workload) or flash_takes(workload, spare=SPARE)


ATTENTION_FLASH = log_sum_implementation("flash", FlashKernel(_forward, _backward), supports)
