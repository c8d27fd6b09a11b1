"""The experts' networks for the CPU: one matrix product at a time, each written where its result belongs.

Compared with a composition of differentiable torch functions nothing is stacked, concatenated or
filled with zeros; silu(gate) · up is computed again in the backward pass instead of kept, in pieces
that stay in the cache, and its gradients overwrite what is not needed any more. Kept per row are its
input, gate and up.

The work between the products is an argument, ``Elementwise``: a backend may have a kernel for it.

The same code serves processors without matrix units for a 16-bit type, on which such products are
a hundred times slower than in float32: there they are computed in float32 and rounded once, which is
what the units do.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch

from portmoe.backends.cpu.products import (
    Products,
    direct,
    direct_products,
    float32_products,
    through_float32,
)
from portmoe.ops.operation import Implementation

PIECE_ELEMENTS = 2**17  # of the elementwise work done at a time
# In 16-bit types ragged row counts are rounded up to the height of a matrix unit's tile: every new count
# costs a new kernel.
GRANULE = 16


class Elementwise(Protocol):
    """What an expert computes between its products, on P rows of width F that exist already."""

    def forward(self, gate_PF: torch.Tensor, up_PF: torch.Tensor, hidden_PF: torch.Tensor) -> None:
        """hidden ← silu(gate) · up."""

    def backward(
        self,
        gate_PF: torch.Tensor,
        up_PF: torch.Tensor,
        hidden_PF: torch.Tensor,
        grad_gate_PF: torch.Tensor,
        grad_up_PF: torch.Tensor,
    ) -> torch.Tensor | None:
        """hidden as before, and the gradients of gate and up.

        ``grad_gate_PF`` comes with the gradient of hidden and is overwritten.

        Returns:
            Both gradients transposed, one above the other, [2F,P]: one product with them gives the gradients
            of both weights. None where two with transposed views are as fast.
        """

    def transpose(self, t_PH: torch.Tensor) -> torch.Tensor:
        """[H,P], the same way."""


class Pieces:
    """``Elementwise`` by torch's operators, in pieces that stay in the cache; transposes are views."""

    def forward(self, gate_PF: torch.Tensor, up_PF: torch.Tensor, hidden_PF: torch.Tensor) -> None:
        for gate, up, hidden in _pieces(gate_PF, up_PF, hidden_PF):
            torch.ops.aten.silu.out(gate, out=hidden).mul_(up)

    def backward(
        self,
        gate_PF: torch.Tensor,
        up_PF: torch.Tensor,
        hidden_PF: torch.Tensor,
        grad_gate_PF: torch.Tensor,
        grad_up_PF: torch.Tensor,
    ) -> None:
        for gate, up, hidden, grad, grad_up in _pieces(gate_PF, up_PF, hidden_PF, grad_gate_PF, grad_up_PF):
            silu = torch.ops.aten.silu.out(gate, out=grad_up)
            torch.mul(silu, up, out=hidden)
            silu.mul_(grad)
            torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad)

    def transpose(self, t_PH: torch.Tensor) -> torch.Tensor:
        return t_PH.t()


PIECES = Pieces()


def static(products: Products, elementwise: Elementwise = PIECES) -> Callable[..., torch.Tensor]:
    """``expert_ffn`` by these products and what lies between them."""

    def expert_ffn(
        x_ECH: torch.Tensor, w1_EFH: torch.Tensor, w3_EFH: torch.Tensor, w2_EHF: torch.Tensor
    ) -> torch.Tensor:
        lengths = [x_ECH.shape[1]] * x_ECH.shape[0]
        y_RH = _ExpertNetworks.apply(
            x_ECH.flatten(0, 1), w1_EFH, w3_EFH, w2_EHF, lengths, 1, products, elementwise
        )
        return y_RH.view(x_ECH.shape)

    return expert_ffn


def ragged(
    products: Products, granule: int = GRANULE, elementwise: Elementwise = PIECES
) -> Callable[..., torch.Tensor]:
    """``expert_ffn_ragged`` in the same way; in 16-bit types row counts are rounded up to ``granule``."""

    def expert_ffn_ragged(
        x_RH: torch.Tensor,
        ends_E: torch.Tensor,
        w1_EFH: torch.Tensor,
        w3_EFH: torch.Tensor,
        w2_EHF: torch.Tensor,
    ) -> torch.Tensor:
        lengths = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
        rounding = granule if x_RH.dtype.itemsize == 2 else 1
        return _ExpertNetworks.apply(x_RH, w1_EFH, w3_EFH, w2_EHF, lengths, rounding, products, elementwise)

    return expert_ffn_ragged


class _ExpertNetworks(torch.autograd.Function):
    """[R,H] → [R,H]: the experts' rows lie one after the other, ``lengths[e]`` of them for expert e.

    Row counts are rounded up to the granule, C → P; the rows added hold zeros and reach no result.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RH: torch.Tensor,
        w1_EFH: torch.Tensor,
        w3_EFH: torch.Tensor,
        w2_EHF: torch.Tensor,
        lengths: Sequence[int],
        granule: int,
        products: Products,
        elementwise: Elementwise,
    ) -> torch.Tensor:
        rounded = [-(-length // granule) * granule for length in lengths]
        gate_RF, up_RF = (x_RH.new_empty(sum(rounded), w1_EFH.shape[1]) for _ in range(2))
        hidden_RF = x_RH.new_empty(max(rounded), w1_EFH.shape[1])
        y_RH = x_RH.new_empty(x_RH.shape)
        for expert, rows, rounded_rows in _spans(lengths, rounded):
            gate_PF, up_PF = gate_RF[rounded_rows], up_RF[rounded_rows]
            hidden_PF, x_PH = hidden_RF[: len(gate_PF)], _with_zeros(x_RH[rows], len(gate_PF))
            products(gate_PF, (x_PH, w1_EFH[expert].t()))
            products(up_PF, (x_PH, w3_EFH[expert].t()))
            elementwise.forward(gate_PF, up_PF, hidden_PF)
            _rows_of_products(y_RH[rows], products, (hidden_PF, w2_EHF[expert].t()))
        ctx.save_for_backward(x_RH, w1_EFH, w3_EFH, w2_EHF, gate_RF, up_RF)
        ctx.lengths, ctx.rounded, ctx.products, ctx.elementwise = lengths, rounded, products, elementwise
        return y_RH

    @staticmethod
    def backward(ctx: Any, grad_y_RH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_RH, w1_EFH, w3_EFH, w2_EHF, gate_RF, up_RF = ctx.saved_tensors
        lengths, rounded, products, elementwise = ctx.lengths, ctx.rounded, ctx.products, ctx.elementwise
        grad_x_RH = x_RH.new_empty(x_RH.shape)
        grad_w1_EFH, grad_w3_EFH, grad_w2_EHF = (w.new_empty(w.shape) for w in (w1_EFH, w3_EFH, w2_EHF))
        scratch = [gate_RF.new_empty(max(rounded), gate_RF.shape[1]) for _ in range(3)]
        for expert, rows, rounded_rows in _spans(lengths, rounded):
            gate_PF, up_PF = gate_RF[rounded_rows], up_RF[rounded_rows]
            hidden_PF, grad_gate_PF, grad_up_PF = (t[: len(gate_PF)] for t in scratch)
            x_PH, grad_y_PH = (_with_zeros(t[rows], len(gate_PF)) for t in (x_RH, grad_y_RH))
            products(grad_gate_PF, (grad_y_PH, w2_EHF[expert]))  # so far the gradient of the hidden rows
            transposed = elementwise.backward(gate_PF, up_PF, hidden_PF, grad_gate_PF, grad_up_PF)
            products(grad_w2_EHF[expert], (elementwise.transpose(grad_y_PH), hidden_PF))
            if transposed is None:
                products(grad_w1_EFH[expert], (grad_gate_PF.t(), x_PH))
                products(grad_w3_EFH[expert], (grad_up_PF.t(), x_PH))
            else:
                both_BH = x_PH.new_empty(len(transposed), x_PH.shape[1])  # B = 2F, of w1 and w3
                products(both_BH, (transposed, x_PH))
                torch._foreach_copy_([grad_w1_EFH[expert], grad_w3_EFH[expert]], both_BH.chunk(2))
            pairs = (grad_gate_PF, w1_EFH[expert]), (grad_up_PF, w3_EFH[expert])
            _rows_of_products(grad_x_RH[rows], products, *pairs)
        for expert, length in enumerate(lengths):
            if not length:
                for grad in (grad_w1_EFH, grad_w3_EFH, grad_w2_EHF):
                    grad[expert].zero_()
        return grad_x_RH, grad_w1_EFH, grad_w3_EFH, grad_w2_EHF, None, None, None, None


def _spans(lengths: Sequence[int], rounded: Sequence[int]) -> Iterator[tuple[int, slice, slice]]:
    """(expert, its rows, its rows counted rounded) of every expert that has any."""
    ends, rounded_ends = accumulate(lengths), accumulate(rounded)
    for expert, (end, rounded_end) in enumerate(zip(ends, rounded_ends, strict=True)):
        if lengths[expert]:
            yield (
                expert,
                slice(end - lengths[expert], end),
                slice(rounded_end - rounded[expert], rounded_end),
            )


def _with_zeros(x_CH: torch.Tensor, rows: int) -> torch.Tensor:
    """``x_CH``, or a copy followed by zero rows."""
    if len(x_CH) == rows:
        return x_CH
    longer_PH = x_CH.new_empty(rows, x_CH.shape[1])
    longer_PH[: len(x_CH)] = x_CH
    longer_PH[len(x_CH) :] = 0
    return longer_PH


def _rows_of_products(
    out_CH: torch.Tensor, products: Products, *pairs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The first rows of the sum of products, as many as ``out_CH`` has."""
    rows = len(pairs[0][0])
    if rows == len(out_CH):
        products(out_CH, *pairs)
        return
    longer_PH = out_CH.new_empty(rows, out_CH.shape[1])
    products(longer_PH, *pairs)
    out_CH.copy_(longer_PH[: len(out_CH)])


def _pieces(*tensors_PF: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    rows = max(1, PIECE_ELEMENTS // max(1, tensors_PF[0].shape[1]))
    return zip(*(t.split(rows) for t in tensors_PF), strict=True)


ALL = (
    Implementation("expert_ffn", "buffered", static(direct_products), direct),
    Implementation("expert_ffn", "through_float32", static(float32_products), through_float32),
    Implementation("expert_ffn_ragged", "buffered", ragged(direct_products), direct),
    Implementation("expert_ffn_ragged", "through_float32", ragged(float32_products, 1), through_float32),
)
