"""The Triton kernels as implementations, for the backends whose devices have a Triton compiler."""

import torch

from portmoe.accelerator.probing import describe
from portmoe.ops.operation import Implementation
from portmoe.ops.routing import Routing
from portmoe.ops.workload import Workload

COMPILER_OF = {"cuda": "nvidia", "xpu": "intel"}  # Triton's name of the compiler for a type of device
MOST_CHOICES = 16  # the kernel's loops over a token's choices are unrolled


def _swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    from portmoe.backends.triton.swiglu import swiglu

    return swiglu(gate_TF, up_TF)


def _topk_gating(*args: object, **options: object) -> Routing:
    from portmoe.backends.triton.topk_gating import topk_gating

    return topk_gating(*args, **options)


def _dispatch(x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
    from portmoe.backends.triton.dispatch import dispatch

    return dispatch(x_SH, row_KS, rows)


def _combine(y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
    from portmoe.backends.triton.dispatch import combine

    return combine(y_RH, row_KS, weight_KS)


def supports(workload: Workload) -> str | None:
    """Why no Triton kernel here can take this workload."""
    if workload.dtype == torch.float64:
        return "the kernels compute in float32"
    try:
        import triton  # noqa: F401
        from triton.backends import backends as compilers
    except Exception as error:  # a broken installation must not stop the run
        return f"triton does not load: {describe(error)}"
    needed = COMPILER_OF.get(workload.device.type)
    if needed and needed not in compilers:
        return f"the installed triton compiles for {', '.join(sorted(compilers))}, not for {needed}"
    return None


def _gating_supports(workload: Workload) -> str | None:
    if workload.random_drops:
        return "which tokens are dropped is drawn at random, on the CPU (moe.use_rts with moe.top_k 1)"
    if workload.top_k > MOST_CHOICES:
        return f"a token has {workload.top_k} choices, over {MOST_CHOICES}"
    return supports(workload)


TRITON = (
    Implementation("swiglu", "triton", _swiglu, supports),
    Implementation("topk_gating", "triton", _topk_gating, _gating_supports, "moe.use_fused_gating"),
    Implementation("dispatch", "triton", _dispatch, supports, "moe.enable_token_rearrange_opt"),
    Implementation("combine", "triton", _combine, supports, "moe.enable_token_rearrange_opt"),
)
