"""Implementations in torch's own operators that more than one backend can offer.

A backend's ``ops.py`` lists those that serve its device, in its order of preference. What each
computes is the contract of its operation, in that operation's file.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.adamw import adamw as torch_adamw

from portmoe.ops.attention import Segments, check_covers
from portmoe.ops.chunked_cross_entropy import chunked_cross_entropy
from portmoe.ops.cross_entropy import CUT_VOCABULARY
from portmoe.ops.gather_dispatch import gather_combine, gather_dispatch
from portmoe.ops.operation import Implementation
from portmoe.ops.workload import Workload


def _rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    dtype = torch.promote_types(x_TH.dtype, weight_H.dtype)
    return F.rms_norm(x_TH.to(dtype), weight_H.shape, weight_H.to(dtype), eps).to(x_TH.dtype)


def _swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    return F.silu(gate_TF) * up_TF


def _sdpa(
    q_TND: torch.Tensor, k_TND: torch.Tensor, v_TND: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    """One call per length that occurs, without a mask: memory stays linear where the kernel's is."""
    check_covers(segments, q_TND)
    if segments.equal_length is not None:
        batch = [t.unflatten(0, (-1, segments.equal_length)) for t in (q_TND, k_TND, v_TND)]
        return _sdpa_batch(*batch, scale).flatten(0, 1)
    parts = [t.split(segments.lengths) for t in (q_TND, k_TND, v_TND)]
    same_length = defaultdict(list)
    for number, length in enumerate(segments.lengths):
        same_length[length].append(number)
    out: list[torch.Tensor] = [q_TND[:0]] * len(segments.lengths)
    for numbers in same_length.values():
        batch = [torch.stack([part[number] for number in numbers]) for part in parts]
        for number, o_LND in zip(numbers, _sdpa_batch(*batch, scale).unbind(0), strict=True):
            out[number] = o_LND
    return torch.cat(out) if out else q_TND


def _sdpa_batch(
    q_BLND: torch.Tensor, k_BLND: torch.Tensor, v_BLND: torch.Tensor, scale: float
) -> torch.Tensor:
    q_BNLD, k_BNLD, v_BNLD = (t.transpose(1, 2) for t in (q_BLND, k_BLND, v_BLND))
    o_BNLD = F.scaled_dot_product_attention(q_BNLD, k_BNLD, v_BNLD, is_causal=True, scale=scale)
    return o_BNLD.transpose(1, 2)


class _Router(torch.autograd.Function):
    """Keeps the tokens in their own dtype, and widens them once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_SH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_SH, weight_EH)
        return F.linear(x_SH.to(weight_EH.dtype), weight_EH)

    @staticmethod
    def backward(ctx: Any, grad_SE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_SH, weight_EH = ctx.saved_tensors
        return (grad_SE @ weight_EH).to(x_SH.dtype), grad_SE.t() @ x_SH.to(weight_EH.dtype)


def _expert_loop(
    x_ECH: torch.Tensor, w1_EFH: torch.Tensor, w3_EFH: torch.Tensor, w2_EHF: torch.Tensor
) -> torch.Tensor:
    # unbind, not w[e]: indexing would fill a whole weight's gradient per expert.
    experts = zip(*(t.unbind(0) for t in (x_ECH, w1_EFH, w3_EFH, w2_EHF)), strict=True)
    return torch.stack([_ffn(*expert) for expert in experts])


def _expert_loop_ragged(
    x_RH: torch.Tensor,
    ends_E: torch.Tensor,
    w1_EFH: torch.Tensor,
    w3_EFH: torch.Tensor,
    w2_EHF: torch.Tensor,
) -> torch.Tensor:
    lengths = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).tolist()
    weights = (t.unbind(0) for t in (w1_EFH, w3_EFH, w2_EHF))
    return torch.cat([_ffn(*expert) for expert in zip(x_RH.split(lengths), *weights, strict=True)])


def _ffn(x_CH: torch.Tensor, w1_FH: torch.Tensor, w3_FH: torch.Tensor, w2_HF: torch.Tensor) -> torch.Tensor:
    return F.linear(_swiglu(F.linear(x_CH, w1_FH), F.linear(x_CH, w3_FH)), w2_HF)


def _expert_grouped_mm(
    x_RH: torch.Tensor,
    ends_E: torch.Tensor,
    w1_EFH: torch.Tensor,
    w3_EFH: torch.Tensor,
    w2_EHF: torch.Tensor,
) -> torch.Tensor:
    ends = ends_E.to(torch.int32)
    gate_RF = F.grouped_mm(x_RH, w1_EFH.transpose(1, 2), offs=ends)
    up_RF = F.grouped_mm(x_RH, w3_EFH.transpose(1, 2), offs=ends)
    y_RH = F.grouped_mm(_swiglu(gate_RF, up_RF), w2_EHF.transpose(1, 2), offs=ends)
    return _DenseGradient.apply(y_RH)


class _DenseGradient(torch.autograd.Function):
    """The identity whose gradient is laid out densely: grouped_mm refuses an expanded one."""

    @staticmethod
    def forward(ctx: Any, y_RH: torch.Tensor) -> torch.Tensor:
        return y_RH.view_as(y_RH)

    @staticmethod
    def backward(ctx: Any, grad_RH: torch.Tensor) -> torch.Tensor:
        return grad_RH.contiguous()


def _grouped_mm_supports(workload: Workload) -> str | None:
    if workload.dtype == torch.float64:
        return "grouped_mm has no float64 kernel"
    for name, width in (("hidden", workload.hidden), ("ffn_width", workload.ffn_width)):
        if width * workload.dtype.itemsize % 16:
            return (
                f"grouped_mm needs rows of a multiple of 16 bytes, and {name} is {width} × {workload.dtype}"
            )
    return None


def _adamw_fused(*args: Any, **settings: float) -> None:
    _adamw(*args, fused=True, **settings)


def _adamw_foreach(*args: Any, **settings: float) -> None:
    _adamw(*args, foreach=True, **settings)


@torch.no_grad()
def _adamw(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    step: int,
    **settings: Any,
) -> None:
    if not params:
        return
    # torch counts the step up in a tensor per parameter; only the fused kernels read it on the device.
    device = params[0].device if settings.get("fused") else torch.device("cpu")
    steps = list(torch.full((len(params),), step - 1.0, device=device).unbind(0))
    lists = (list(params), list(grads), list(exp_avgs), list(exp_avg_sqs))
    torch_adamw(*lists, [], steps, amsgrad=False, maximize=False, **settings)


RMS_NORM = Implementation("rms_norm", "torch", _rms_norm)
SWIGLU = Implementation("swiglu", "silu", _swiglu)
ATTENTION_SDPA = Implementation("attention", "sdpa", _sdpa, requested_by="model.use_flash_attn")
ROUTER_LEAN = Implementation("router", "lean", _Router.apply)
DISPATCH_GATHER = Implementation(
    "dispatch", "gather", gather_dispatch, requested_by="moe.enable_token_rearrange_opt"
)
COMBINE_GATHER = Implementation(
    "combine", "gather", gather_combine, requested_by="moe.enable_token_rearrange_opt"
)
EXPERT_FFN_LOOP = Implementation("expert_ffn", "loop", _expert_loop)
EXPERT_FFN_RAGGED_LOOP = Implementation("expert_ffn_ragged", "loop", _expert_loop_ragged)
EXPERT_FFN_GROUPED_MM = Implementation(
    "expert_ffn_ragged", "grouped_mm", _expert_grouped_mm, _grouped_mm_supports
)
CROSS_ENTROPY_CHUNKED = Implementation(
    "cross_entropy", "chunked", chunked_cross_entropy, handles=(CUT_VOCABULARY,)
)
ADAMW_FUSED = Implementation("adamw", "fused", _adamw_fused)
ADAMW_FOREACH = Implementation("adamw", "foreach", _adamw_foreach)

# All of the above, the usually faster one of each operation first.
ALL = (
    RMS_NORM,
    SWIGLU,
    ATTENTION_SDPA,
    ROUTER_LEAN,
    DISPATCH_GATHER,
    COMBINE_GATHER,
    EXPERT_FFN_LOOP,
    EXPERT_FFN_GROUPED_MM,
    EXPERT_FFN_RAGGED_LOOP,
    CROSS_ENTROPY_CHUNKED,
    ADAMW_FUSED,
    ADAMW_FOREACH,
)
