"""torch_npu's fused functions as implementations of portmoe's operations.

Each function here is the contract of its operation (portmoe/ops), and says what the vendor's function must be
given for that. Written against the documented signatures; run on a simulated device only.
"""

from collections.abc import Sequence
from functools import cache

import torch

from portmoe.ops.attention import Segments, check_covers
from portmoe.ops.gather_dispatch import gather_combine, gather_dispatch

COMPRESSED = 2048  # rows and columns of the mask that sparse_mode 2 takes for any length
MOST_SEQUENCES = 1024  # of one call in the TND layout


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    import torch_npu

    dtype = torch.promote_types(x_TH.dtype, weight_H.dtype)
    return torch_npu.npu_rms_norm(x_TH.to(dtype), weight_H.to(dtype), eps)[0].to(x_TH.dtype)


def rotary(
    x_TND: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """In float32, because the function wants one dtype and angles must not be rounded to 16 bits."""
    import torch_npu

    def for_both_halves(table_TR: torch.Tensor) -> torch.Tensor:
        table_TD = table_TR.repeat_interleave(2, dim=1) if interleaved else torch.cat((table_TR, table_TR), 1)
        return table_TD[None, :, None, :]

    mode = "interleave" if interleaved else "half"
    x_1TND = x_TND.to(cos_TR.dtype)[None]
    rotated = torch_npu.npu_rotary_mul(x_1TND, for_both_halves(cos_TR), for_both_halves(sin_TR), mode)
    return rotated[0].to(x_TND.dtype)


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    import torch_npu

    return torch_npu.npu_swiglu(torch.cat((gate_TF, up_TF), dim=-1), dim=-1)


def attention(
    q_TND: torch.Tensor, k_TND: torch.Tensor, v_TND: torch.Tensor, segments: Segments, scale: float
) -> torch.Tensor:
    """Segments of one length as a batch (BSND), others packed (TND).

    Causal is sparse_mode 2 WITH the compressed mask: without a mask the mode does nothing, attention is full.
    """
    check_covers(segments, q_TND)
    if segments.equal_length is not None:
        batch = [t.unflatten(0, (-1, segments.equal_length)) for t in (q_TND, k_TND, v_TND)]
        return _attend(batch, q_TND.shape[1], scale, "BSND").flatten(0, 1)
    out = []
    for first in range(0, len(segments.lengths), MOST_SEQUENCES):
        offsets = segments.offsets[first : first + MOST_SEQUENCES + 1]
        ends = [end - offsets[0] for end in offsets[1:]]
        pack = [t[offsets[0] : offsets[-1]] for t in (q_TND, k_TND, v_TND)]
        out.append(_attend(pack, q_TND.shape[1], scale, "TND", ends))
    return torch.cat(out) if out else q_TND


def _attend(
    qkv: Sequence[torch.Tensor], heads: int, scale: float, layout: str, ends: list[int] | None = None
) -> torch.Tensor:
    import torch_npu

    q, k, v = (t.contiguous() for t in qkv)
    return torch_npu.npu_fusion_attention(
        q,
        k,
        v,
        heads,
        layout,
        atten_mask=_hidden(q.device),
        scale=scale,
        sparse_mode=2,
        actual_seq_qlen=ends,
        actual_seq_kvlen=ends,
    )[0]


@cache
def _hidden(device: torch.device) -> torch.Tensor:
    """The compressed causal mask; True means masked out."""
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=device).triu(1)


def dispatch(x_SH: torch.Tensor, row_KS: torch.Tensor, rows: int) -> torch.Tensor:
    """Where rows are a permutation of the K·S choices, sorting the choices by row puts each in its row."""
    import torch_npu

    if rows != row_KS.numel():  # no permutation: a buffer of capacity 0
        return gather_dispatch(x_SH, row_KS, rows)

    return torch_npu.npu_moe_token_permute(x_SH, row_KS.t())[0]


def combine(y_RH: torch.Tensor, row_KS: torch.Tensor, weight_KS: torch.Tensor) -> torch.Tensor:
    """In float32: the function wants one dtype for rows and weights, and the sum is to be rounded once."""
    import torch_npu

    if y_RH.shape[0] != row_KS.numel():
        return gather_combine(y_RH, row_KS, weight_KS)
    row_A = row_KS.t().flatten().to(torch.int32)
    weight_SK = weight_KS.t().contiguous()
    return torch_npu.npu_moe_token_unpermute(y_RH.to(weight_SK.dtype), row_A, probs=weight_SK).to(y_RH.dtype)


@torch.no_grad()
def adamw(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One kernel a tensor. It is given β^(step − 1) and multiplies by β itself."""
    import torch_npu

    powers = beta1 ** (step - 1), beta2 ** (step - 1)
    for param, grad, *moments in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if param.numel():
            torch_npu.npu_apply_adam_w(
                *powers,
                lr,
                weight_decay,
                beta1,
                beta2,
                eps,
                grad,
                None,  # the largest second moment so far, for amsgrad
                False,  # amsgrad
                False,  # maximize
                out=(param, *moments),
            )
