"""torch_npu's fused functions as implementations of portmoe's operations: norm, rotary, gate, optimizer.

Each function here is the contract of its operation (portmoe/ops), and says what the vendor's function must be
given for that. Held to the registered schemas and the documented constraints; run on a simulated device only.
"""

from collections.abc import Sequence

import torch


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    import torch_npu

    dtype = torch.promote_types(x_TH.dtype, weight_H.dtype)
    return torch_npu.npu_rms_norm(x_TH.to(dtype), weight_H.to(dtype), eps)[0].to(x_TH.dtype)


def rotary(
    x_TND: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Turn in float32, because the function wants one dtype and angles must not be rounded to 16 bits."""
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

    for param, grad, *moments in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if param.numel():
            torch_npu.npu_apply_adam_w(
                beta1 ** (step - 1),
                beta2 ** (step - 1),
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
