"""Conformance: one implementation of one operation against its contract.

For every dtype four checks, each over all shapes and samples:

* values: outputs and every gradient against float64; integers, booleans, shapes and dtypes exactly;
  arguments untouched unless the contract writes them.
* second call: other values of the same shapes, in memory left full of NaN; the first call's results
  must survive it.
* rows apart: strided arguments, and an expanded gradient.
* repeated: the same call twice with deterministic algorithms on and fresh memory filled with NaN by
  torch: the same bits.

All calls of an implementation are made first and judged together, so that a device is waited for once.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch.utils import deterministic

from portmoe.accelerator.probing import describe
from portmoe.ops.operation import Implementation, Operation, Sample
from portmoe.ops.table import REFERENCE
from portmoe.result import Result
from portmoe.verify.backend.calls import Results, call, copied, identical, named_arguments, on_host, poison
from portmoe.verify.backend.cases import DTYPES, SHAPES, Case, cases, open_questions

# A 16-bit result may be off by some per cent in single numbers, not on the whole: rounding averages out.
# The allowed error of its scale, in eps of the dtype, where there are this many rows and numbers.
SCALE_ERROR = 0.5
SCALE_ROWS = 100
SCALE_NUMBERS = 256

COMPILER = 0.05  # seconds: a first call that took less longer than the next ones has compiled nothing
NAMES = ("values", "second call", "rows apart", "repeated")


def check_operation(
    operation: Operation,
    offered: Sequence[Implementation],
    device: torch.device,
    seed: int,
    dtypes: Sequence[torch.dtype] = DTYPES,
    shapes: Collection[str] = SHAPES,
    with_reference: bool = True,
) -> Iterator[Result]:
    """Check every implementation in ``offered``, and, if asked, the reference itself on ``device``."""
    candidates = [*offered]
    if with_reference:
        candidates.append(Implementation(operation.name, REFERENCE, operation.reference))
    for dtype in dtypes:
        of_dtype = list(cases(operation, dtype, seed, shapes))
        if not of_dtype:
            continue
        for candidate in candidates:
            yield from _check(operation, candidate, of_dtype, device)


@dataclass
class Tally:
    """The worst of one check so far."""

    needed: float = 0.0
    allowed: float = 0.0
    where: str = ""
    wrong: str = ""
    calls: int = 0
    seconds: float = 0.0
    compiling: float = 0.0

    def share(self, needed: float, allowed: float, where: str) -> None:
        if needed > self.needed or not self.where:
            self.needed, self.allowed, self.where = needed, allowed, where

    def fail(self, what: str) -> None:
        self.wrong = self.wrong or what


def _check(
    operation: Operation, candidate: Implementation, of_dtype: Sequence[Case], device: torch.device
) -> Iterator[Result]:
    subject, dtype = f"{operation.name}.{candidate.name}", str(of_dtype[0].dtype).removeprefix("torch.")
    tallies = {name: Tally() for name in NAMES}
    refused: dict[str, str] = {}
    made: list[tuple[Tally, Attempt]] = []
    for case in of_dtype:
        reason = operation.why_not(candidate, replace(case.workload, device=device))
        if reason is not None:
            refused[case.label.partition(":")[0]] = reason
            continue
        trial = _Trial(operation, candidate.function, case, device)
        for name, attempt in zip(
            NAMES, (trial.values, trial.second_call, trial.rows_apart, trial.repeated), strict=True
        ):
            tallies[name].calls += 1
            with _tallied(tallies[name], case):
                made.append((tallies[name], attempt()))
        tallies["values"].compiling += trial.compiling
    _judge(made, device)
    tallies["values"].seconds -= tallies["values"].compiling
    for name, tally in tallies.items():
        yield _verdict(subject, f"{name}, {dtype}", tally, refused)


@contextmanager
def _tallied(tally: Tally, case: Case) -> Iterator[None]:
    """Count the time, and fail the check for what is raised."""
    began = time.perf_counter()
    try:
        yield
    except Exception as error:
        tally.fail(f"{case.label}: raised {describe(error)}")
    tally.seconds += time.perf_counter() - began


def _judge(made: Sequence[tuple[Tally, "Attempt"]], device: torch.device) -> None:
    """Bring all results to the host at once and judge them there."""
    try:
        fetched = on_host([results for _, attempt in made for results in attempt.results], device)
    except Exception as error:  # what went wrong on the device shows where it is waited for
        for tally, attempt in made:
            tally.fail(f"{attempt.case.label}: raised {describe(error)} when the results were read")
        return
    for tally, attempt in made:
        mine, fetched = fetched[: len(attempt.results)], fetched[len(attempt.results) :]
        with _tallied(tally, attempt.case):
            attempt.judge(tally, *mine)


def _verdict(subject: str, name: str, tally: Tally, refused: dict[str, str]) -> Result:
    if not tally.calls:
        return Result(
            "skip", name, "; ".join(sorted(set(refused.values()))), part="operations", subject=subject
        )
    status = "fail" if tally.wrong or tally.needed > 1 else "pass"
    not_tried = "".join(f"; not tried with {shapes!r}: {why}" for shapes, why in refused.items())
    detail = (tally.wrong or tally.where) + not_tried
    needed = tally.needed * tally.allowed
    return Result(
        status,
        name,
        detail,
        part="operations",
        subject=subject,
        needed=needed,
        allowed=tally.allowed,
        seconds=tally.seconds,
        compiling=tally.compiling,
    )


@dataclass(frozen=True)
class Attempt:
    """Calls that were made, and how their results are judged: ``judge(tally, *results)``, on the host."""

    case: Case
    results: Sequence[Results]
    judge: Callable[..., None]


@dataclass
class _Trial:
    """One function tried with one case."""

    operation: Operation
    function: Callable[..., object]
    case: Case
    device: torch.device
    first: Results | None = None
    seconds: list[float] = field(default_factory=list)  # of each call, in order

    def values(self) -> Attempt:
        self.first = self._call(self.case.sample)
        return Attempt(self.case, [self.first], self._judged_values)

    def second_call(self) -> Attempt:
        if self.first is None:  # the first one raised: that is reported
            return Attempt(self.case, [], lambda tally: None)
        before = replace(self.first, outputs={name: t.clone() for name, t in self.first.outputs.items()})
        poison(self.first, self.device)
        again = self._call(self.case.again)
        # Read again at the end, when all that could have overwritten it has run.
        return Attempt(self.case, [before, self.first, again], self._judged_second_call)

    def rows_apart(self) -> Attempt:
        sample = copied(self.case.sample, None, self.device, apart=True)
        found = call(self.operation, self.function, sample, self.case.seed, expanded=True)
        return Attempt(self.case, [found], self._judged_rows_apart)

    def repeated(self) -> Attempt:
        with _deterministic():
            both = [self._call(self.case.sample) for _ in range(2)]
        return Attempt(self.case, both, self._judged_repeated)

    @property
    def compiling(self) -> float:
        """Seconds the first call took longer than the later ones; 0 where they hardly differ."""
        first, *later = self.seconds or [0.0]
        longer = first - min(later, default=first)
        return longer if longer >= COMPILER else 0.0

    def _judged_values(self, tally: Tally, found: Results) -> None:
        self._compare(tally, found, self.case.control, self.case.expected)

    def _judged_second_call(self, tally: Tally, before: Results, first: Results, again: Results) -> None:
        case = self.case
        for name, kept in before.outputs.items():
            if not identical(kept, first.outputs[name]):
                tally.fail(f"{case.label}: {name} of the first call was overwritten by the second")
        self._compare(tally, again, case.again_control, case.again_expected, case.again)

    def _judged_rows_apart(self, tally: Tally, found: Results) -> None:
        # One gradient along a whole row: what follows from it is too alike for rounding to average out.
        self._compare(tally, found, self.case.expanded_control, self.case.expected, scale=False)

    def _judged_repeated(self, tally: Tally, one: Results, two: Results) -> None:
        if not one.same_bits(two):
            tally.fail(f"{self.case.label}: two calls with the same arguments differ")
        self._compare(tally, two, self.case.control, self.case.expected)

    def _call(self, sample: object) -> Results:
        mine = copied(sample, None, self.device)
        began = time.perf_counter()
        results = call(self.operation, self.function, mine, self.case.seed)
        self.seconds.append(time.perf_counter() - began)
        return results

    def _compare(
        self,
        tally: Tally,
        found: Results,
        control: Results,
        expected: Results,
        sample: object = None,
        scale: bool = True,
    ) -> None:
        """Record the largest share of the tolerance, and fail what has no tolerance."""
        case = self.case
        sample = sample or case.sample
        exact = dict(expected.compared())
        values = dict(found.compared())
        if exact.keys() != values.keys():
            tally.fail(f"{case.label}: returned {sorted(values)} instead of {sorted(exact)}")
            return
        for name, wide in control.compared():
            value, like = values[name], exact[name]
            where = f"{case.label}: {name}"
            if value.dtype != like.dtype or value.shape != like.shape:
                tally.fail(f"{where} is {form(value)} instead of {form(like)}")
            elif like.is_floating_point():
                self._compare_numbers(tally, where, value, wide, scale)
            elif not self._agree(value, like, name, sample):
                tally.fail(f"{where} differs from the reference's")
        for name, kept in found.kept.items():
            if not identical(kept.cpu(), expected.kept[name]):
                tally.fail(f"{case.label}: argument {name} was changed")

    def _compare_numbers(
        self, tally: Tally, where: str, value: torch.Tensor, wide: torch.Tensor, scale: bool
    ) -> None:
        tolerance = self.case.tolerance
        tally.share(tolerance.needed(value, wide), tolerance.rtol, where)
        eps = torch.finfo(self.case.dtype).eps
        if scale and self.case.dtype.itemsize == 2 and has_scale(self.operation, self.case.sample, wide):
            tally.share(scale_error(value, wide) / (SCALE_ERROR * eps), SCALE_ERROR * eps, f"{where}, scale")

    def _agree(self, value: torch.Tensor, like: torch.Tensor, name: str, sample: object) -> bool:
        open_T = open_questions(self.operation, sample, name)
        same = value.cpu() == like
        return bool((same if open_T is None else same | open_T).all())


def has_scale(operation: Operation, sample: Sample, wide: torch.Tensor) -> bool:
    """Whether enough rows and numbers went into a result for its roundings to average out."""
    first = next(tensor for _, tensor in named_arguments(operation, sample))
    return first.numel() >= SCALE_ROWS * first.shape[-1] and wide.numel() >= SCALE_NUMBERS


def scale_error(value: torch.Tensor, wide: torch.Tensor) -> float:
    """How far the best factor between value and control is from 1; 0 where the control is zero."""
    value, wide = value.double().cpu().flatten(), wide.double().flatten()
    square = torch.dot(wide, wide).item()
    if square == 0:
        return 0.0
    error = abs(torch.dot(value, wide).item() / square - 1)
    return math.inf if math.isnan(error) else error


def form(tensor: torch.Tensor) -> str:
    """Return dtype and shape in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic algorithms where there are any, and NaN in every fresh tensor."""
    mode, fill = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fill
