"""The experts' networks with compiled kernels between the products.

Beside what ``buffered_expert_ffn`` does, the work between two products is one pass over
memory, and in bfloat16 no product has a transposed first factor: the kernels write the transposes. The
gradients of w1 and w3 are then one product: two threads are no faster than one at either of them alone.
"""

import torch

from portmoe.backends.cpu.buffered_expert_ffn import ragged, static
from portmoe.backends.cpu.compiler import addresses, kernel, require, supports
from portmoe.backends.cpu.products import direct, direct_products
from portmoe.ops.operation import Implementation
from portmoe.ops.workload import Workload


class Kernels:
    """``Elementwise`` by the kernels of swiglu.c, on contiguous tensors."""

    def forward(self, gate_PF: torch.Tensor, up_PF: torch.Tensor, hidden_PF: torch.Tensor) -> None:
        pointers = addresses(gate_PF, up_PF, hidden_PF)
        kernel("swiglu", gate_PF.dtype)(gate_PF.numel(), *pointers, torch.get_num_threads())

    def backward(
        self,
        gate_PF: torch.Tensor,
        up_PF: torch.Tensor,
        hidden_PF: torch.Tensor,
        grad_gate_PF: torch.Tensor,
        grad_up_PF: torch.Tensor,
    ) -> torch.Tensor | None:
        tensors = (gate_PF, up_PF, grad_gate_PF, grad_up_PF, hidden_PF)
        threads = torch.get_num_threads()
        if gate_PF.dtype == torch.float32:
            require().swiglu_backward_float32(gate_PF.numel(), *addresses(*tensors), threads)
            return None
        rows, width = gate_PF.shape
        transposed_BP = gate_PF.new_empty(2 * width, rows)
        tensors = (*tensors, *transposed_BP.chunk(2))
        require().swiglu_backward_bfloat16(rows, width, *addresses(*tensors), threads)
        return transposed_BP

    def transpose(self, t_PH: torch.Tensor) -> torch.Tensor:
        if t_PH.dtype == torch.float32:
            return t_PH.t()
        t_PH = t_PH.contiguous()  # a gradient may come expanded
        t_HP = t_PH.new_empty(t_PH.shape[::-1])
        require().transpose_bfloat16(*t_PH.shape, *addresses(t_PH, t_HP), torch.get_num_threads())
        return t_HP


def _supports(workload: Workload) -> str | None:
    return supports(workload) or direct(workload)


ALL = (
    Implementation("expert_ffn", "compiled", static(direct_products, Kernels()), _supports),
    Implementation(
        "expert_ffn_ragged", "compiled", ragged(direct_products, elementwise=Kernels()), _supports
    ),
)
