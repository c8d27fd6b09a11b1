"""AdamW by torch's fused and its list-wise kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw as torch_adamw

from portmoe.ops.operation import Implementation


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


ADAMW_FUSED = Implementation("adamw", "fused", _adamw_fused)
ADAMW_FOREACH = Implementation("adamw", "foreach", _adamw_foreach)
