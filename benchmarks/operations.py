"""Every operation and implementation on a config's shapes: time, bytes, and the share of the ceiling.

Timed is one forward and backward of the operation's first sample, as ``ops.select: measure`` does. The
bytes are those of every argument, result and gradient once: what no implementation can avoid. The
ceiling is the sum of the products' FLOPs and of those bytes, each at its measured peak.

The last line says what it costs a model to call an operation by way of its table of chosen functions.

  python benchmarks/operations.py --config tiny_moe4 --threads 1
"""

import timeit

import torch
from measuring import Bench, open_bench, options, report
from peak import copy_bytes, matmul_flops
from torch.utils._pytree import tree_leaves

from portmoe import load_config
from portmoe.ops import OPERATIONS, Implementation, Operation, Segments, Workload
from portmoe.ops.measure import seconds_per_call
from portmoe.ops.operation import Sample
from portmoe.ops.table import REFERENCE, OpTable
from portmoe.parallel.layout import Layout
from portmoe.parallel.workload import workload_of

CALLS = 1_000_000


def product_flops(operation: str, sample: Sample, workload: Workload) -> int:
    """FLOPs of the matrix products in a forward and backward pass; each product has two in the backward."""
    forward = 0
    if operation in ("expert_ffn", "expert_ffn_ragged"):
        rows = sample.args[0].numel() // workload.hidden
        forward = 6 * rows * workload.hidden * workload.ffn_width
    if operation == "linear":
        forward = 2 * workload.tokens * workload.hidden * workload.ffn_width
    if operation == "router":
        forward = 2 * workload.tokens * workload.hidden * workload.experts
    if operation == "cross_entropy":
        forward = 2 * workload.tokens * workload.hidden * workload.vocab
    if operation == "attention":
        segments: Segments = sample.args[3]
        pairs = sum(n * (n + 1) // 2 for n in segments.lengths)
        forward = 4 * pairs * workload.heads * workload.head_dim
    return 3 * forward


def bytes_moved(operation: Operation, sample: Sample) -> int:
    """Every argument, result and gradient once."""
    arguments = [t for t in tree_leaves((sample.args, sample.kwargs)) if isinstance(t, torch.Tensor)]
    results = [
        t
        for t in tree_leaves(operation.reference(*sample.args, **sample.kwargs))
        if isinstance(t, torch.Tensor)
    ]
    tensors = [*arguments, *results, *(t for t in (*arguments, *results) if t.requires_grad)]
    return sum(t.nbytes for t in tensors)


def measure(bench: Bench, workload: Workload, only: str) -> list[dict]:
    flops, bandwidth = matmul_flops(bench, workload.dtype), copy_bytes(bench)
    offered = bench.accelerator.ops.implementations()
    rows = []
    for name, operation in OPERATIONS.items():
        if only not in name:
            continue
        sample = operation.samples(workload, torch.Generator().manual_seed(0))[0]
        moved = bytes_moved(operation, sample)
        ceiling = product_flops(name, sample, workload) / flops + moved / bandwidth
        implementations = [i for i in offered if i.op == name and i.supports(workload) is None]
        for one in [*implementations, Implementation(name, REFERENCE, operation.reference)]:
            seconds = seconds_per_call(
                operation, one.function, workload, bench.accelerator.device.synchronize
            )
            rows.append(
                {
                    "operation": f"{name}.{one.name}",
                    "ms": seconds * 1e3,
                    "MiB": moved / 2**20,
                    "GB/s": moved / seconds / 1e9,
                    "share of the ceiling": ceiling / seconds,
                }
            )
    return rows


def call_overhead() -> float:
    """Seconds that a call through the table takes more than one of the function itself."""

    def nothing() -> None:
        pass

    ops = OpTable({"swiglu": nothing}, ())
    through_table = min(timeit.repeat(lambda: ops.swiglu(), number=CALLS))
    directly = min(timeit.repeat(lambda: nothing(), number=CALLS))
    return (through_table - directly) / CALLS


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--config", default="tiny_moe4", help="a packaged name or a path")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as for portmoe train"
    )
    parser.add_argument("--operation", default="", help="only operations whose name contains this")
    arguments = parser.parse_args()
    bench = open_bench(arguments)
    config = load_config(arguments.config, arguments.set)
    workload = workload_of(config, Layout.plan(config, 1), bench.device)
    title = f"Operations on the shapes of {arguments.config}, {workload.tokens} tokens, {workload.dtype}"
    report(bench, title, measure(bench, workload, arguments.operation), arguments)
    print(f"calling an operation through the table costs {call_overhead() * 1e9:.0f} ns")


if __name__ == "__main__":
    main()
