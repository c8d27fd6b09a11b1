"""SwiGLU in one Triton kernel forward and one backward. Imported inside functions only: it needs triton."""

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """The contract of ``swiglu``, for dtypes up to float32."""
    return _Swiglu.apply(gate_TF, up_TF)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
        gate, up = gate_TF.contiguous(), up_TF.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        if out.numel():
            _forward[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad_TF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        if gate.numel():
            grid = (triton.cdiv(gate.numel(), BLOCK),)
            _backward[grid](gate, up, grad_TF.contiguous(), grad_gate, grad_up, gate.numel(), BLOCK)
        return grad_gate, grad_up


@triton.jit
def _forward(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gate = tl.load(gate_ptr + place, inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(
    gate_ptr,
    up_ptr,
    grad_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    count,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gate = tl.load(gate_ptr + place, inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    # silu'(a) = σ(a) · (1 + a · (1 − σ(a)))
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_up = grad * gate * sigmoid
    tl.store(grad_gate_ptr + place, grad_gate.to(grad_gate_ptr.dtype.element_ty), inside)
    tl.store(grad_up_ptr + place, grad_up.to(grad_up_ptr.dtype.element_ty), inside)
