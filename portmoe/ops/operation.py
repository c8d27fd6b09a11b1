"""What an operation and an implementation of it are."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from portmoe.ops.workload import Workload


def always(workload: Workload) -> str | None:
    """Supports every workload."""
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute operation ``op``: the same function as its reference.

    Attributes:
        op: the operation's name, a field of ``OpTable``.
        name: short and unique within the operation, as in ``attention.sdpa``.
        function: takes the arguments of the operation's contract.
        supports: None if it computes this workload, otherwise the reason why not, in words.
        requested_by: the config key that asks for this kind of implementation
            ("moe.use_fused_gating"); it is considered only while that key is true.
        handles: the optional parts of the contract it computes, as the operation's file names them. It is
            never given others.
    """

    op: str
    name: str
    function: Callable[..., Any]
    supports: Callable[[Workload], str | None] = always
    requested_by: str | None = None
    handles: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Arguments of one call. Floating-point tensors that require grad are the differentiable ones.

    A call may consume a generator among the arguments or write into them: whoever compares two
    functions draws the samples once for each, from the same seed.
    """

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tolerance:
    """Allowed |value − reference| ≤ rtol · |reference| + atol · rms(reference).

    The root mean square makes ``atol`` independent of the tensor's scale: a weight gradient summed over
    thousands of tokens and an activation are judged alike. It is that of the numbers that are not zero: empty
    rows of a buffer, or the weights of experts without a token, say nothing about the size of the others.
    """

    rtol: float
    atol: float

    def needed(self, value: torch.Tensor, reference: torch.Tensor) -> float:
        """The largest deviation as a share of what is allowed: at most 1 passes, NaN gives infinity."""
        if value.shape != reference.shape:
            return math.inf
        if reference.numel() == 0:
            return 0.0
        value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
        rms = (reference.square().sum() / reference.count_nonzero().clamp(min=1)).sqrt()
        allowed = self.rtol * reference.abs() + self.atol * rms
        deviation = (value - reference).abs()
        share = torch.where(deviation == 0, 0.0, deviation / allowed).max().item()
        return math.inf if math.isnan(share) else share


def rounding(steps: float, sums: float = 1) -> dict[torch.dtype, Tolerance]:
    """Tolerances, per dtype, for a result that went through about ``steps`` roundings.

    ``sums``: how much more float32 and float64 may lose because they also accumulate sums in their
    own precision, where the 16-bit types accumulate in float32.
    """
    factors = {torch.float64: sums, torch.float32: sums, torch.bfloat16: 1, torch.float16: 1}
    allowed = {dtype: steps * factor * torch.finfo(dtype).eps for dtype, factor in factors.items()}
    return {dtype: Tolerance(rtol=share, atol=share) for dtype, share in allowed.items()}


@dataclass(frozen=True)
class Operation:
    """An operation's contract in code: the reference, sample calls, and how close is close enough.

    ``samples(workload, generator)`` draws arguments of the workload's shapes, device and dtype from
    a CPU generator, the usual case first; it serves the conformance tests and the measured choice.
    The references compute float64 input in float64, which gives a control without rounding.
    ``needs(workload)`` names the optional parts of the contract that a workload makes use of; the reference
    computes all.
    """

    name: str
    reference: Callable[..., Any]
    samples: Callable[[Workload, torch.Generator], Sequence[Sample]]
    tolerances: Mapping[torch.dtype, Tolerance]
    needs: Callable[[Workload], Sequence[str]] = lambda workload: ()

    def why_not(self, implementation: Implementation, workload: Workload) -> str | None:
        """Why ``implementation`` cannot compute this workload; None if it can."""
        lacking = [part for part in self.needs(workload) if part not in implementation.handles]
        if lacking and implementation.function is not self.reference:
            return f"it does not take {' nor '.join(lacking)}"
        return implementation.supports(workload)

    def tolerance(self, sample: Sample) -> Tolerance:
        """What this call is judged by: the tolerance for its least precise floating-point argument."""
        dtypes = {t.dtype for t in tree_leaves((sample.args, sample.kwargs)) if isinstance(t, torch.Tensor)}
        floating = [dtype for dtype in dtypes if dtype.is_floating_point]
        return self.tolerances[max(floating, key=lambda dtype: torch.finfo(dtype).eps)]


@dataclass(frozen=True, kw_only=True)
class Group(Operation):
    """Operations that are called together, and that one fused implementation may serve.

    It is an operation itself: a contract, samples, tolerances, and call sites of its own, at which the model
    calls the group and not its parts. Where no fused implementation is taken, the function there is made of
    those chosen for the parts.

    Attributes:
        parts: the names of the operations it is made of.
        compose: the group's function, of functions by the name of the part.
    """

    parts: tuple[str, ...]
    compose: Callable[[Mapping[str, Callable[..., Any]]], Callable[..., Any]]


def draw(
    shape: Sequence[int],
    workload: Workload,
    generator: torch.Generator,
    *,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A differentiable sample argument: normal values on the workload's device, the same for every device."""
    values = torch.randn(tuple(shape), generator=generator).mul_(scale)
    return values.to(workload.device, dtype or workload.dtype).requires_grad_()
