"""Functions of liger-kernel whose semantics are the contracts' own, as implementations.

Its SwiGLU overwrites its inputs in the backward pass and its rotary embedding in the forward pass, so
neither is offered. The signatures are those of release 0.8.5.
"""

import torch

from portmoe.accelerator.probing import describe, installed_version, release
from portmoe.backends.torch.ops import CROSS_ENTROPY_CHUNKED
from portmoe.ops.cross_entropy import IGNORED
from portmoe.ops.operation import Implementation
from portmoe.ops.rms_norm import rms_norm as plain_rms_norm
from portmoe.ops.workload import Workload

PACKAGE = "liger-kernel"
OLDEST = (0, 8, 5)
WIDEST_ROW = 65536  # a row is one block of its normalisation


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Cast as for Gemma: all in float32, rounded once. Llama's casting rounds before the weight."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if not x_TH.numel():
        return plain_rms_norm(x_TH, weight_H, eps)
    offset, casting_mode, in_place = 0.0, "gemma", False  # in place it would write into the caller's gradient
    return LigerRMSNormFunction.apply(x_TH, weight_H, eps, offset, casting_mode, in_place)


def cross_entropy(
    x_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unreduced, with the weight's gradient summed in float32 and the predicted classes returned."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    if not x_TH.numel():
        return CROSS_ENTROPY_CHUNKED.function(x_TH, weight_VH, labels_T, label_smoothing)
    loss_T, _, _, predicted_T = LigerFusedLinearCrossEntropyFunction.apply(
        x_TH,
        weight_VH,
        labels_T,
        None,  # bias
        None,  # ce_weight
        IGNORED,
        0.0,  # lse_square_scale
        label_smoothing,
        "none",  # reduction
        None,  # softcap
        False,  # return_z_loss
        torch.float32,  # accum_dtype
        False,  # use_token_scaling
        False,  # return_token_accuracy
        True,  # return_predicted_tokens
    )
    return loss_T.to(torch.float32), (predicted_T == labels_T) & (labels_T != IGNORED)


def _supports(workload: Workload) -> str | None:
    if workload.dtype == torch.float64:
        return "its kernels compute in float32"
    version = installed_version(PACKAGE)
    if version is None:
        return f"{PACKAGE} is not installed"
    if release(version) < OLDEST:
        return f"{PACKAGE} {version} is older than {'.'.join(map(str, OLDEST))}"
    try:
        import liger_kernel.ops.fused_linear_cross_entropy
        import liger_kernel.ops.rms_norm  # noqa: F401
    except Exception as error:
        return f"{PACKAGE} {version} does not load: {describe(error)}"
    return None


def _norm_supports(workload: Workload) -> str | None:
    if workload.hidden > WIDEST_ROW:
        return f"a row has {workload.hidden} numbers, over {WIDEST_ROW}"
    return _supports(workload)


RMS_NORM = Implementation("rms_norm", "liger", rms_norm, _norm_supports)
CROSS_ENTROPY = Implementation("cross_entropy", "liger", cross_entropy, _supports)
