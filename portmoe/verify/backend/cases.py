"""The calls every implementation is tried with, and what each must give.

Two controls: the reference in float64 on the CPU for numbers, and the reference in the working dtype on
the CPU for what must agree exactly (choices, slots, counts, shapes, dtypes).
"""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch

from portmoe.ops.cross_entropy import IGNORED, Statistics
from portmoe.ops.operation import Operation, Sample, Tolerance
from portmoe.ops.workload import Workload
from portmoe.verify.backend.calls import Results, call, copied

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_BASE = Workload(
    device=CPU,
    dtype=torch.float32,
    tokens=24,
    seq_len=8,
    hidden=16,
    heads=2,
    head_dim=8,
    ffn_width=24,
    vocab=40,
    experts=4,
    top_k=2,
    capacity=12,
    equal_segments=True,
)
# Small, but no two sizes alike, and none a multiple of every block size a kernel might assume.
SHAPES: dict[str, Workload] = {
    "plain": _BASE,
    "odd": replace(
        _BASE,
        tokens=37,
        seq_len=37,
        hidden=40,
        heads=5,
        ffn_width=56,
        vocab=101,
        experts=8,
        top_k=3,
        capacity=14,
        equal_segments=False,
        qk_interleaved=True,
    ),
    "few tokens, many experts": replace(
        _BASE,
        tokens=5,
        seq_len=5,
        hidden=8,
        heads=1,
        ffn_width=8,
        experts=16,
        top_k=1,
        capacity=0,
        dropless=True,
    ),
    "larger": replace(
        _BASE, tokens=192, seq_len=64, hidden=64, heads=4, head_dim=16, ffn_width=80, vocab=517, capacity=96
    ),
}

# Tried where the operation's contract has an optional part that they make use of.
OPTIONAL = {
    "a cut vocabulary": replace(_BASE, vocab=29, vocab_parts=3),
    "grouped heads": replace(_BASE, tokens=37, seq_len=37, heads=6, kv_heads=2),
    "wide values": replace(_BASE, heads=4, kv_heads=2, head_dim=8, value_dim=12),
    "narrow values": replace(_BASE, heads=3, head_dim=12, value_dim=8, qk_interleaved=True),
    "log-sum-exp": replace(_BASE, log_sum=True),
}
SHAPES |= OPTIONAL


@dataclass(frozen=True)
class Case:
    """One call and what it must give.

    Attributes:
        label: shapes and sample, in words.
        sample: the arguments, on the CPU.
        again: another sample of the same shapes, for a second call.
        control, again_control: what they give in float64.
        expected, again_expected: what they give in the working dtype.
        tolerance: for every floating-point result.
    """

    label: str
    workload: Workload
    dtype: torch.dtype
    seed: int
    sample: Sample
    again: Sample
    control: Results
    again_control: Results
    expanded_control: Results
    expected: Results
    again_expected: Results
    tolerance: Tolerance


def cases(
    operation: Operation, dtype: torch.dtype, seed: int, labels: Collection[str] = SHAPES
) -> Iterator[Case]:
    """Every case in which ``dtype`` occurs; none where the operation does not know it.

    ``labels``: the ``SHAPES`` to take.
    """
    for label in labels:
        workload = replace(SHAPES[label], dtype=dtype)
        if label in OPTIONAL and not operation.needs(workload):
            continue
        first, second = (_draw(operation, workload, seed * 2 + number) for number in range(2))
        for sample, again in zip(first, second, strict=True):
            if not _uses(operation, sample, dtype):
                continue
            yield Case(
                label=f"{label}: {sample.label}",
                workload=workload,
                dtype=dtype,
                seed=seed,
                sample=sample,
                again=again,
                control=_wide(operation, sample, seed),
                again_control=_wide(operation, again, seed),
                expanded_control=_wide(operation, sample, seed, expanded=True),
                expected=call(operation, operation.reference, copied(sample, None, CPU), seed),
                again_expected=call(operation, operation.reference, copied(again, None, CPU), seed),
                tolerance=operation.tolerance(sample),
            )


def _draw(operation: Operation, workload: Workload, seed: int) -> list[Sample]:
    return list(operation.samples(workload, torch.Generator().manual_seed(seed)))


def _uses(operation: Operation, sample: Sample, dtype: torch.dtype) -> bool:
    """Whether the call is a case of this dtype, and not the one of float32 over again."""
    return operation.tolerance(sample) == operation.tolerances[dtype]


def _wide(operation: Operation, sample: Sample, seed: int, *, expanded: bool = False) -> Results:
    return call(operation, operation.reference, copied(sample, torch.float64, CPU), seed, expanded=expanded)


def open_questions(operation: Operation, sample: Sample, name: str) -> torch.Tensor | None:
    """Where a result that must agree exactly hangs on rounding: a bool mask; None: nowhere.

    cross_entropy's ``correct_T`` is open where the two highest logits are closer than their rounding.
    """
    if operation.name != "cross_entropy" or name != "output[1]":
        return None
    x_TH, weight_VH, labels_T, _ = sample.args
    logits_TV = x_TH.detach().double() @ weight_VH.detach().double().t()
    if cut := sample.kwargs.get("cut"):
        others = cut.combine(Statistics.of_no_class(labels_T, torch.float64))
        logits_TV = torch.cat((logits_TV, others.largest_T[:, None]), dim=1)
    first_T, second_T = logits_TV.topk(2, dim=1).values.unbind(1)
    error_T = 4 * torch.finfo(x_TH.dtype).eps * logits_TV.abs().amax(dim=1) * math.sqrt(x_TH.shape[1])
    return (first_T - second_T < error_T) & (labels_T != IGNORED)
