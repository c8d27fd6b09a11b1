"""One recorded call, made again on another device with the same arguments and the same upstream gradients.

Three computations are compared: the device's implementation, the plain reference in the same dtype, and
the reference in float64 on the CPU. The third says what is right, the second how much the dtype costs on
these very numbers: a device may be as wrong as that, and no more.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from portmoe.accelerator.probing import describe
from portmoe.verify.backend.calls import Results, call, copied, identical
from portmoe.verify.backend.cases import CPU, open_questions
from portmoe.verify.backend.conformance import SCALE_ERROR, form, has_scale, scale_error
from portmoe.verify.runs.recording import Call

Direction = Literal["forward", "backward"]

# Two right implementations add in other orders: the worst of many numbers may be this many times as far off
# in one as in the other.
HEADROOM = 4.0
# Softmax in float32 tells two logits apart if they differ by more than this many of its roundings.
UNDECIDED = 8.0


@dataclass(frozen=True)
class Deviation:
    """How far one tensor of a call is from the control.

    Attributes:
        error: relative, in the units of the operation's tolerance; infinite for NaN.
        explained: what the dtype explains of it.
        wrong: what has no tolerance: another shape, another choice, an exception. Empty: nothing.
    """

    direction: Direction
    tensor: str
    error: float = 0.0
    explained: float = 0.0
    wrong: str = ""

    @property
    def defect(self) -> bool:
        """Whether the dtype does not explain it."""
        return bool(self.wrong) or self.error > self.explained

    @property
    def badness(self) -> float:
        """How bad it is: above 1 for a defect; the larger, the worse."""
        if self.wrong:
            return float("inf")
        return self.error / self.explained if self.explained else float(self.error > 0)


def deviations(
    made: Call, function: Callable[..., Any], device: torch.device, home: torch.device
) -> Iterator[Deviation]:
    """How far each result of ``function`` on ``device`` is off.

    Args:
        home: where the reference computes in the dtype of the call.
    """
    reference, sample = made.operation.reference, made.sample
    try:
        found = _call(made, function, copied(sample, None, device))
    except Exception as error:
        yield _raised(made, function, device, error)
        return
    own = _call(made, reference, copied(sample, None, home))
    control = _call(made, reference, copied(sample, torch.float64, CPU))
    forward = control.outputs.keys() | control.written.keys()
    if undecided(made) and not _agree_exactly(control, found):
        return  # another choice is as right, and everything after it follows from the choice
    values, plain = dict(found.compared()), dict(own.compared())
    if values.keys() != plain.keys():
        yield Deviation("forward", "results", wrong=f"{sorted(values)} instead of {sorted(plain)}")
        return
    for name, wide in control.compared():
        direction: Direction = "forward" if name in forward else "backward"
        value, like = values[name], plain[name]
        if value.dtype != like.dtype or value.shape != like.shape:
            yield Deviation(direction, name, wrong=f"{form(value)} instead of {form(like)}")
        elif like.is_floating_point():
            yield _numbers(made, direction, name, value, like, wide)
        elif not _same(made, name, value, like):
            yield Deviation(direction, name, wrong="differs from the reference's")
    for name, kept in found.kept.items():
        if not identical(kept.cpu(), own.kept[name].cpu()):
            yield Deviation("forward", name, wrong="the argument was changed")


def undecided(made: Call) -> bool:
    """Whether a choice of experts hangs on rounding: two of a token's highest logits nearly alike."""
    if not made.operation.name.endswith("_gating"):
        return False
    logits_SE, k = made.sample.args[0].detach().cpu().double(), made.sample.args[1]
    if logits_SE.numel() == 0:
        return False
    sorted_SE = logits_SE.sort(dim=1, descending=True).values[:, : k + 1]
    gap_SK = sorted_SE[:, :-1] - sorted_SE[:, 1:]
    rounding_SK = torch.finfo(torch.float32).eps * (1 + sorted_SE[:, :1] - sorted_SE[:, 1:])
    return bool(((gap_SK > 0) & (gap_SK < UNDECIDED * rounding_SK)).any())


def _call(made: Call, function: Callable[..., Any], sample: Any) -> Results:
    return call(made.operation, function, sample, upstream=made.upstream)


def _raised(made: Call, function: Callable[..., Any], device: torch.device, error: Exception) -> Deviation:
    """The exception, and whether the forward pass alone raises it too."""
    direction: Direction = "backward"
    try:
        _call(replace(made, upstream={}), function, copied(made.sample, None, device))
    except Exception:
        direction = "forward"
    return Deviation(direction, "call", wrong=f"raised {describe(error)}")


def _agree_exactly(control: Results, found: Results) -> bool:
    """Whether everything that has no tolerance is alike."""
    pairs = zip(control.outputs.values(), found.outputs.values(), strict=False)
    return all(identical(a, b.cpu()) for a, b in pairs if not a.is_floating_point())


def _same(made: Call, name: str, value: torch.Tensor, like: torch.Tensor) -> bool:
    same = value.cpu() == like.cpu()
    open_T = open_questions(made.operation, made.sample, name)
    return bool((same if open_T is None else same | open_T.cpu()).all())


def _numbers(
    made: Call, direction: Direction, name: str, value: torch.Tensor, like: torch.Tensor, wide: torch.Tensor
) -> Deviation:
    """The worst number; in a 16-bit type also the factor by which all are off, where it says more."""
    tolerance = made.operation.tolerance(made.sample)
    unit, own = tolerance.rtol, HEADROOM * tolerance.needed(like, wide)
    worst = Deviation(direction, name, unit * tolerance.needed(value, wide), unit * max(1.0, own))
    eps = torch.finfo(value.dtype).eps
    if value.dtype.itemsize == 2 and has_scale(made.operation, made.sample, wide):
        allowed = max(SCALE_ERROR * eps, HEADROOM * scale_error(like, wide))
        of_all = Deviation(direction, f"{name}, scale", scale_error(value, wide), allowed)
        return max(worst, of_all, key=lambda d: d.badness)
    return worst
