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


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The fused kernel: dense arguments only, float32 inside, one rounding. It has no gradients."""
    wide = gate.detach().float()
    return (wide * torch.sigmoid(wide)).mul_(up.detach().float()).to(gate.dtype)


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fused kernel's other half: the gradients of gate and up."""
    grad, gate, up = grad.float(), gate.detach().float(), up.detach().float()
    sigmoid = torch.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return grad_gate, grad * gate * sigmoid
