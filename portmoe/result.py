"""The outcome of one check: of a machine, of a backend, of a run. Works without torch."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Result:
    """What one check came to.

    Attributes:
        status: "warn": worth repairing, and in nobody's way; "skip": not checked, and ``detail`` says why.
        name: the check, as in "memory" or "values, bfloat16".
        detail: what was found, where the largest deviation was, or what went wrong.
        fix: what to do about a "warn" or "fail".
        subject: what was checked, as in "attention.sdpa"; "" where the report itself is of one thing.
        part: the group of checks it belongs to, as in "collectives".
        needed: the tolerance this would have needed, in the units of ``allowed``; None: nothing measured.
        seconds: for which the check ran, without ``compiling``.
        compiling: seconds its first calls took longer than the next ones: kernels were compiled.
    """

    status: Status
    name: str
    detail: str = ""
    fix: str | None = None
    subject: str = ""
    part: str = ""
    needed: float | None = None
    allowed: float | None = None
    seconds: float = 0.0
    compiling: float = 0.0
