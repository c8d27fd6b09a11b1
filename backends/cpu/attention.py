"""Attention with log Σ exp by torch's flash kernel for hosts."""

import torch

from portmoe.backends.torch.attention import FlashKernel, log_sum_implementation

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


ALL = (log_sum_implementation("flash", FlashKernel(_forward, _backward)),)
