"""RMSNorm by torch's own function."""

import torch
import torch.nn.functional as F

from portmoe.ops.operation import Implementation


def _rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    dtype = torch.promote_types(x_TH.dtype, weight_H.dtype)
    return F.rms_norm(x_TH.to(dtype), weight_H.shape, weight_H.to(dtype), eps).to(x_TH.dtype)


RMS_NORM = Implementation("rms_norm", "torch", _rms_norm)
