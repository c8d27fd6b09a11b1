"""The child side: one implementation alone, so that what ends this process is known to be its doing.

``python -m portmoe.verify.bring_up.alone list BACKEND`` reports what the backend offers; ``… try BACKEND
OP.NAME`` checks one of them against float64.
"""

import sys
from dataclasses import asdict, replace

from portmoe.accelerator.discovery import get_accelerator
from portmoe.verify.machine.child import report

DTYPES = ("float32", "bfloat16", "float16")


def offered(backend: str) -> None:
    """Each implementation, and why it is not taken where none of the shapes is its own."""
    from portmoe.verify.backend.cases import SHAPES
    from portmoe.verify.backend.validate import QUICK

    accelerator = get_accelerator(backend)
    device = accelerator.open(0)
    work = [replace(SHAPES[shape], device=device) for shape in QUICK]
    for implementation in accelerator.ops.implementations():
        reasons = [implementation.supports(workload) for workload in work]
        why_not = "" if None in reasons else "; ".join(sorted({*map(str, reasons)}))
        report({"implementation": f"{implementation.op}.{implementation.name}", "why_not": why_not})


def try_one(backend: str, wanted: str) -> None:
    """Say what begins before it does: the last thing said is where the process ended."""
    import torch

    from portmoe.ops import OPERATIONS
    from portmoe.verify.backend.conformance import check_operation
    from portmoe.verify.backend.validate import QUICK

    accelerator = get_accelerator(backend)
    device = accelerator.open(0)
    op, _, name = wanted.partition(".")
    (mine,) = [i for i in accelerator.ops.implementations() if (i.op, i.name) == (op, name)]
    for dtype in DTYPES:
        report({"begins": dtype})
        for check in check_operation(
            OPERATIONS[op], [mine], device, 0, [getattr(torch, dtype)], QUICK, with_reference=False
        ):
            record = asdict(check)
            report({key: record[key] for key in ("name", "status", "detail")})
    accelerator.device.synchronize()


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    {"list": offered, "try": try_one}[command](*arguments)
