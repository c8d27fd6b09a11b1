"""The optimizer's update."""

from typing import Any

import torch

from torch_npu.operations.registry import FLOATS, Row, documented, dtype, without_autograd


def _all(condition: Any) -> Any:
    return lambda a: all(condition(tensor, a.grad) for tensor in a.out)


@documented(
    Row("out", "must be given: (var, m, v)", lambda a: a.out is not None and len(a.out) == 3),
    dtype("grad", *FLOATS),
    Row("out", "must have the dtype of grad", _all(lambda tensor, grad: tensor.dtype == grad.dtype)),
    Row("out", "must have the shape of grad", _all(lambda tensor, grad: tensor.shape == grad.shape)),
    Row("out", "must have 1 to 8 dimensions", _all(lambda tensor, grad: 1 <= tensor.dim() <= 8)),
    Row(
        "max_grad_norm",
        "must be given with amsgrad, in the dtype and shape of var",
        lambda a: (
            not a.amsgrad or (a.max_grad_norm.dtype == a.grad.dtype and a.max_grad_norm.shape == a.grad.shape)
        ),
    ),
    products=("A2",),
)
@without_autograd
def npu_apply_adam_w(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: torch.Tensor,
    max_grad_norm: torch.Tensor | None,
    amsgrad: bool | None,
    maximize: bool | None,
    *,
    out: list[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In place on ``out`` = (var, m, v). The powers are those from before this step."""
    var, m, v = out
    if maximize:
        grad = -grad
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if amsgrad:
        v.copy_(torch.maximum(max_grad_norm, v))
    denominator = (v / (1 - beta2_power * beta2)).sqrt_().add_(epsilon)
    var.mul_(1 - lr * weight_decay).addcdiv_(m, denominator, value=-lr / (1 - beta1_power * beta1))
    return var, m, v
