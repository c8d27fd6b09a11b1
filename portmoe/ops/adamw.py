"""AdamW (Loshchilov and Hutter, 2019): Adam with decoupled weight decay."""

import math
from collections.abc import Sequence

import torch

from portmoe.ops.operation import Operation, Sample, rounding
from portmoe.ops.workload import Workload


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
    """One step on every parameter: params, exp_avgs and exp_avg_sqs change in place.

    m ← β1·m + (1 − β1)·g;  v ← β2·v + (1 − β2)·g²;
    p ← (1 − lr·weight_decay)·p − lr · m/(1 − β1^step) / (sqrt(v/(1 − β2^step)) + eps).

    Args:
        params, grads, exp_avgs, exp_avg_sqs: as many of each, float32, of one shape per place. Empty
            lists and empty tensors are allowed. Zero averages before the first step.
        step: this step's number, from 1.
    """
    scale = math.sqrt(1 - beta2**step)
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / scale).add_(eps)
        param.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def samples(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    shapes = [(workload.ffn_width, workload.hidden), (workload.hidden,), (3, 5)]

    def tensors(scale: float) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator).mul_(scale).to(workload.device) for shape in shapes]

    def state(started: bool) -> tuple[list[torch.Tensor], ...]:
        return (
            tensors(1.0),
            tensors(0.1),
            [t * started for t in tensors(0.1)],
            [t.square() * started for t in tensors(0.1)],
        )

    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.01}
    return [
        Sample("later step", (*state(True), 7), settings),
        Sample("first step", (*state(False), 1), settings),
    ]


# Elementwise float32; the order of the scalings differs between implementations.
ADAMW = Operation("adamw", adamw, samples, rounding(8))
