"""Dispatch and combine as Triton kernels. Imported inside functions only: it needs triton.

Both directions only read rows by index: a row of the buffer receives at most one choice, so the map from
choices to rows is inverted once. Nothing is added atomically; sums run over k in order, in float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl

WIDEST_BLOCK = 1024


def dispatch(x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
    """The contract of ``dispatch``, for dtypes up to float32."""
    return _Dispatch.apply(x_SH, row_KS, rows)


def combine(y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
    """The contract of ``combine``, for dtypes up to float32."""
    return _Combine.apply(y_RH, row_KS, weight_KS)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
        row_KS = row_KS.contiguous()
        ctx.save_for_backward(row_KS)
        return _spread(x_SH, _choice_of_row(row_KS, rows), row_KS.shape[1], None)

    @staticmethod
    def backward(ctx: Any, grad_RH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (row_KS,) = ctx.saved_tensors
        return _gather(grad_RH, row_KS, None), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
        row_KS, weight_KS = row_KS.contiguous(), weight_KS.contiguous()
        ctx.save_for_backward(y_RH, row_KS, weight_KS)
        return _gather(y_RH, row_KS, weight_KS)

    @staticmethod
    def backward(ctx: Any, grad_SH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        y_RH, row_KS, weight_KS = ctx.saved_tensors
        grad_y_RH = grad_weight_KS = None
        if ctx.needs_input_grad[0]:
            choice_R = _choice_of_row(row_KS, y_RH.shape[0])
            grad_y_RH = _spread(grad_SH, choice_R, row_KS.shape[1], weight_KS)
        if ctx.needs_input_grad[2]:
            grad_weight_KS = _products(y_RH, grad_SH, row_KS).to(weight_KS.dtype)
        return grad_y_RH, None, grad_weight_KS


def _choice_of_row(row_KS: torch.Tensor, rows: int) -> torch.Tensor:
    """[R] int64: the choice k·S + s that goes to each row; −1 where none."""
    choice_R = row_KS.new_full((rows + 1,), -1)  # the last entry takes the dropped choices
    choice_A = torch.arange(row_KS.numel(), device=row_KS.device)
    return choice_R.scatter_(0, row_KS.flatten().clamp(max=rows), choice_A)[:rows]


def _spread(
    source_SH: torch.Tensor, choice_R: torch.Tensor, tokens: int, weight_KS: torch.Tensor | None
) -> torch.Tensor:
    """[R,H]: each row's token, times the weight of its choice; zeros where there is none."""
    source_SH = _rows_dense(source_SH)
    rows, hidden = choice_R.shape[0], source_SH.shape[1]
    if not tokens:
        return source_SH.new_zeros(rows, hidden)
    out_RH = source_SH.new_empty(rows, hidden)
    if out_RH.numel():
        weighted = weight_KS is not None
        weight = weight_KS if weighted else source_SH
        grid, block = _grid(rows, hidden)
        _spread_kernel[grid](
            source_SH, choice_R, weight, out_RH, tokens, hidden, source_SH.stride(0), weighted, block
        )
    return out_RH


def _gather(source_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor | None) -> torch.Tensor:
    """[S,H]: Σ_k weight · source[row]; a row past the end adds nothing and is not read."""
    source_RH = _rows_dense(source_RH)
    (choices, tokens), (rows, hidden) = row_KS.shape, source_RH.shape
    out_SH = source_RH.new_empty(tokens, hidden)
    if out_SH.numel():
        weighted = weight_KS is not None
        weight = weight_KS if weighted else source_RH
        grid, block = _grid(tokens, hidden)
        _gather_kernel[grid](
            source_RH,
            row_KS,
            weight,
            out_SH,
            tokens,
            rows,
            hidden,
            source_RH.stride(0),
            choices,
            weighted,
            block,
        )
    return out_SH


def _products(y_RH: torch.Tensor, grad_SH: torch.Tensor, row_KS: torch.Tensor) -> torch.Tensor:
    """[K,S] float32: the scalar product of each choice's row with its token's gradient; 0 past the end."""
    y_RH, grad_SH = _rows_dense(y_RH), _rows_dense(grad_SH)
    choices, tokens = row_KS.shape
    out_KS = torch.empty(choices, tokens, device=row_KS.device, dtype=torch.float32)
    if out_KS.numel():
        (rows, hidden), (_, block) = y_RH.shape, _grid(tokens, y_RH.shape[1])
        _product_kernel[(choices * tokens,)](
            y_RH, grad_SH, row_KS, out_KS, tokens, rows, hidden, y_RH.stride(0), grad_SH.stride(0), block
        )
    return out_KS


def _rows_dense(x: torch.Tensor) -> torch.Tensor:
    """``x`` with neighbours in a row beside each other; rows may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _grid(rows: int, hidden: int) -> tuple[tuple[int, int], int]:
    """A program per row and piece of it; the piece's width."""
    block = min(WIDEST_BLOCK, triton.next_power_of_2(max(hidden, 1)))
    return (rows, triton.cdiv(hidden, block)), block


@triton.jit
def _spread_kernel(
    source_ptr,
    choice_ptr,
    weight_ptr,
    out_ptr,
    tokens,
    hidden,
    source_stride,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    choice = tl.load(choice_ptr + row)
    taken = choice >= 0
    token = choice % tokens
    value = tl.load(source_ptr + token * source_stride + column, (column < hidden) & taken, other=0.0)
    if WEIGHTED:
        value = value.to(tl.float32) * tl.load(weight_ptr + choice, taken, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * hidden + column, value.to(out_ptr.dtype.element_ty), column < hidden)


@triton.jit
def _gather_kernel(
    source_ptr,
    row_ptr,
    weight_ptr,
    out_ptr,
    tokens,
    rows,
    hidden,
    source_stride,
    CHOICES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(row_ptr + choice * tokens + token)
        kept = row < rows
        value = tl.load(source_ptr + row * source_stride + column, (column < hidden) & kept, other=0.0)
        value = value.to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight_ptr + choice * tokens + token, kept, other=0.0).to(tl.float32)
        total += value
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), column < hidden)


@triton.jit
def _product_kernel(
    y_ptr,
    grad_ptr,
    row_ptr,
    out_ptr,
    tokens,
    rows,
    hidden,
    y_stride,
    grad_stride,
    BLOCK: tl.constexpr,
):
    choice = tl.program_id(0).to(tl.int64)
    token = choice % tokens
    row = tl.load(row_ptr + choice)
    kept = row < rows
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, hidden, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (column < hidden) & kept
        y = tl.load(y_ptr + row * y_stride + column, inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + token * grad_stride + column, inside, other=0.0).to(tl.float32)
        total += y * grad
    tl.store(out_ptr + choice, tl.sum(total, axis=0))
