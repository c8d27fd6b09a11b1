"""Norm, rotary embedding and gated activation."""

import torch

from torch_npu.operations.registry import FLOATS, Row, dims, documented, dtype, like, not_simulated, only


@documented(
    dtype("input", *FLOATS),
    dims("input", 2, 8),
    like("gamma", "input"),
    Row(
        "gamma", "must be input's last dimensions", lambda a: a.input.shape[-a.gamma.dim() :] == a.gamma.shape
    ),
)
def npu_rms_norm(
    input: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rstd)"""
    wide = input.float()
    axes = tuple(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(input.dtype), rstd.detach()


def _layouts(input: torch.Tensor, r: torch.Tensor, interleave: bool) -> list[tuple[int, int]]:
    """(B, N) in each layout of the input in which a table of this shape is documented."""
    b, n, d = input.shape[0], input.shape[1], input.shape[3]
    s = input.shape[2]
    found = []
    for batch, heads, shapes in (
        (b, n, [(1, 1, s, d), (b, 1, s, d), (b, n, s, d)]),  # BNSD
        (b, s, [(1, n, 1, d), (b, n, 1, d), (b, n, s, d)]),  # BSND
        (n, s, [(b, 1, 1, d), (b, n, 1, d), (b, n, s, d)]),  # SBND
    ):
        if tuple(r.shape) in (shapes[:1] if interleave else shapes):
            found.append((batch, heads))
    return found


def _within(a: object) -> bool:
    layouts = _layouts(a.input, a.r1, a.rotary_mode == "interleave")
    if a.rotary_mode == "interleave":
        return any(b * n < 1000 for b, n in layouts)
    return any(b < 1000 and n < 1000 for b, n in layouts)


COMPILED_OFF = "its page, 2.13.0, with jit_compile off"


@documented(
    dtype("input", *FLOATS),
    dtype("r1", *FLOATS),
    dtype("r2", *FLOATS),
    dims("input", 4),
    dims("r1", 4),
    dims("r2", 4),
    only("rotary_mode", "half", "interleave"),
    not_simulated("rotate"),
    Row(
        "input",
        "must have an even last dimension below 896",
        lambda a: a.input.shape[3] % 2 == 0 and a.input.shape[3] < 896,
        COMPILED_OFF,
    ),
    Row("r2", "must have r1's shape", lambda a: a.r1.shape == a.r2.shape, COMPILED_OFF),
    Row(
        "r1",
        "must be 11SD, B1SD or BNSD of the layout, and 11SD alone where interleaved",
        lambda a: _layouts(a.input, a.r1, a.rotary_mode == "interleave"),
        COMPILED_OFF,
    ),
    Row("input", "must have B and N below 1000, and B·N where interleaved", _within, COMPILED_OFF),
    Row(
        "r1",
        "must not want a gradient where B·N is over 1024",
        lambda a: (
            not (a.r1.requires_grad or a.r2.requires_grad)
            or any(b * n <= 1024 for b, n in _layouts(a.input, a.r1, a.rotary_mode == "interleave"))
        ),
        COMPILED_OFF,
    ),
    Row("r1", "must lie in −1 … 1", lambda a: not a.r1.numel() or a.r1.abs().max() <= 1, COMPILED_OFF),
    Row("r2", "must lie in −1 … 1", lambda a: not a.r2.numel() or a.r2.abs().max() <= 1, COMPILED_OFF),
    products=("A2", "A3"),
)
def npu_rotary_mul(
    input: torch.Tensor,
    r1: torch.Tensor,
    r2: torch.Tensor,
    rotary_mode: str = "half",
    rotate: torch.Tensor | None = None,
) -> torch.Tensor:
    if rotary_mode == "half":
        first, second = input.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-input[..., 1::2], input[..., 0::2]), dim=-1).flatten(-2)
    return (input.float() * r1.float() + turned.float() * r2.float()).to(input.dtype)


@documented(
    dtype("input", *FLOATS),
    dims("input", 1, 8),
    Row("input", "must be even along dim", lambda a: a.input.shape[a.dim] % 2 == 0),
    products=("A2",),
)
def npu_swiglu(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """silu(first half) · second half"""
    first, second = input.float().chunk(2, dim=dim)
    return (torch.nn.functional.silu(first) * second).to(input.dtype)
