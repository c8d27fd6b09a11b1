"""Stands in for the vendor's own module: a device with one fused kernel, simulated on this processor.

A real backend has no such file. Where the package imports this one, it imports the vendor's.
"""

import torch

from portmoe.backends.cpu.memory import CpuMemory

__version__ = "1.2.0"

_memory = CpuMemory()

memory_allocated = _memory.allocated
memory_peak = _memory.peak
memory_reset_peak = _memory.reset_peak
memory_total = _memory.total


def device_count() -> int:
    return 1


def device_name() -> str:
    return "NewVendor One (simulated on the CPU)"


def synchronize() -> None:
    """Nothing to wait for."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused kernel: dense arguments only, float32 inside, one rounding. It has no gradients."""
    wide = x.detach().float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight.detach().float()).to(x.dtype), rstd


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused kernel's other half: the gradients of x and weight, in float32."""
    normed, grad = x.detach().float() * rstd, grad.float()
    scaled = grad * weight.detach().float()
    grad_x = rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return grad_x, (grad * normed).reshape(-1, x.shape[-1]).sum(0)
