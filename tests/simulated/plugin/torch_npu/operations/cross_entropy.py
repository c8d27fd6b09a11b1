"""The loss: a cut vocabulary's in three functions, and the plain one."""

from typing import Any

import torch
import torch.nn.functional as F

from torch_npu.operations.registry import (
    FLOATS,
    HALVES,
    Row,
    dims,
    documented,
    dtype,
    like,
    not_simulated,
    only,
    without_autograd,
)

INDICES = (torch.int32, torch.int64)


def _packed(outside_T: torch.Tensor) -> torch.Tensor:
    """Bits of 8 tokens a byte, the first in the lowest: the order within a byte is not documented."""
    bits = F.pad(outside_T.to(torch.uint8), (0, -len(outside_T) % 8)).view(-1, 8)
    return (bits << torch.arange(8, device=bits.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpacked(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    bits = mask[:, None] >> torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (bits & 1).bool().flatten()[:tokens]


@documented(
    dtype("input", *HALVES),
    dims("input", 2),
    like("weight", "input"),
    dims("weight", 2),
    Row("weight", "must have input's width", lambda a: a.weight.shape[1] == a.input.shape[1]),
    dtype("target", *INDICES),
    dims("target", 1),
    Row("target", "must be one a token", lambda a: len(a.target) == len(a.input)),
    Row("vocab_start_index", "must not be negative", lambda a: a.vocab_start_index >= 0),
    Row("vocab_end_index", "must not be below the start", lambda a: a.vocab_end_index >= a.vocab_start_index),
)
@without_autograd
def npu_fused_linear_online_max_sum(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    return_logits: bool = False,
) -> tuple[torch.Tensor, ...]:
    """(max, sum of exponentials, the target's logit or 0, mask of targets elsewhere, local target, logits)"""
    logits = input @ weight.t()
    wide = logits.float()
    largest = wide.amax(1)
    outside = (target < vocab_start_index) | (target >= vocab_end_index)
    local = (target - vocab_start_index).masked_fill(outside, 0)
    predicted = wide.gather(1, local.long()[:, None])[:, 0].masked_fill(outside, 0.0)
    total = torch.exp(wide - largest[:, None]).sum(1)
    kept = logits if return_logits else logits.new_empty(0)
    return largest, total, predicted, _packed(outside), local, kept


def _alike(*names: str) -> Any:
    return lambda a: len({getattr(a, name).shape for name in names}) == 1


@documented(
    dtype("logits_max", torch.float32),
    dims("logits_max", 1),
    dtype("sum_exp_logits", torch.float32),
    dtype("predicted_logits", torch.float32),
    Row("sum_exp_logits", "must have logits_max's shape", _alike("logits_max", "sum_exp_logits")),
    Row("predicted_logits", "must have logits_max's shape", _alike("logits_max", "predicted_logits")),
    only("label_smoothing", 0.0, None),
    only("input", None),
    only("weight", None),
)
@without_autograd
def npu_fused_cross_entropy_loss_with_max_sum(
    logits_max: torch.Tensor,
    sum_exp_logits: torch.Tensor,
    predicted_logits: torch.Tensor,
    *,
    label_smoothing: float | None = 0.0,
    input: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    vocab_parallel_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, softmax); the softmax is empty without logits."""
    loss = sum_exp_logits.log() + logits_max - predicted_logits
    if vocab_parallel_logits is None:
        return loss, loss.new_empty(0)
    wide = vocab_parallel_logits.float()
    return loss, torch.exp(wide - logits_max[:, None]) / sum_exp_logits[:, None]


@documented(
    dtype("grad", torch.float32),
    dims("grad", 1),
    dtype("input", *HALVES),
    dims("input", 2),
    like("weight", "input"),
    dims("weight", 2),
    Row("weight", "must have at least 128 classes", lambda a: len(a.weight) >= 128),
    dtype("target_mask", torch.uint8),
    dims("target_mask", 1),
    dtype("masked_target", *INDICES),
    dims("masked_target", 1),
    only("label_smoothing", 0.0),
    Row(
        "softmax",
        "or logits_max and sum_exp_logits must be given",
        lambda a: a.softmax is not None or (a.logits_max is not None and a.sum_exp_logits is not None),
    ),
)
@without_autograd
def npu_fused_linear_cross_entropy_loss_with_max_sum_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor,
    target_mask: torch.Tensor,
    masked_target: torch.Tensor,
    label_smoothing: float = 0.0,
    logits_max: torch.Tensor | None = None,
    sum_exp_logits: torch.Tensor | None = None,
    softmax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient of input, gradient of weight)"""
    if softmax is None:
        softmax = torch.exp((input @ weight.t()).float() - logits_max[:, None]) / sum_exp_logits[:, None]
    here = (~_unpacked(target_mask, len(grad))).float()
    grad_logits = softmax.scatter_add(1, masked_target.long()[:, None], -here[:, None]) * grad[:, None]
    grad_logits = grad_logits.to(input.dtype)
    return grad_logits @ weight, grad_logits.t() @ input


DEFAULTS = {"reduction": "mean", "ignore_index": -100, "label_smoothing": 0.0}


@documented(
    dtype("input", *FLOATS),
    dims("input", 2),
    Row(
        "input",
        "must have 1 to 200000 rows and a class",
        lambda a: 1 <= len(a.input) <= 200_000 and a.input.shape[1],
    ),
    dtype("target", torch.int64),
    Row("target", "must be one a row", lambda a: a.target.shape == a.input.shape[:1]),
    Row(
        "target",
        "must lie in 0 … classes − 1",
        lambda a: a.target.min() >= 0 and a.target.max() < a.input.shape[1],
    ),
    not_simulated("weight"),
    only("reduction", "mean", "sum", "none"),
    Row("ignore_index", "must be below the classes", lambda a: a.ignore_index < a.input.shape[1]),
    Row("label_smoothing", "must lie in 0 … 1, without 1", lambda a: 0 <= a.label_smoothing < 1),
    only("lse_square_scale_for_zloss", 0.0),
    only("return_zloss", False),
    Row(
        "input",
        "must not want a gradient with label_smoothing, or with mean and any default changed",
        lambda a: (
            not a.input.requires_grad
            or (
                a.label_smoothing == 0
                and (
                    a.reduction != "mean" or all(getattr(a, key) == value for key, value in DEFAULTS.items())
                )
            )
        ),
    ),
    products=("A2", "A3"),
)
def npu_cross_entropy_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
    return_zloss: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, log_prob, zloss, lse_for_zloss); a negative ignore_index ignores nothing."""
    log_prob = torch.log_softmax(input.float(), 1)
    loss = F.nll_loss(log_prob, target, reduction=reduction, ignore_index=ignore_index)
    empty = input.new_empty(0)
    return loss.view(-1).to(input.dtype), log_prob.detach().to(input.dtype), empty, empty
