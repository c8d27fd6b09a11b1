"""The device's measured ceilings: matrix products and copies.

python benchmarks/peak.py --dtype float32 --dtype bfloat16
"""

import torch
from measuring import DTYPES, Bench, open_bench, options, report

# For the CPU, and for an accelerator.
SIZES = {True: (512, 1024, 2048), False: (2048, 4096, 8192)}
COPY_BYTES = {True: 2**27, False: 2**30}


def matmul_flops(bench: Bench, dtype: torch.dtype, sizes: tuple[int, ...] | None = None) -> float:
    """The highest FLOP/s of products of square matrices of these sizes."""
    sizes = sizes or SIZES[bench.device.type == "cpu"]
    return max(2 * n**3 / _matmul_seconds(bench, dtype, n) for n in sizes)


def copy_bytes(bench: Bench, size: int | None = None) -> float:
    """Bytes per second of a copy, read and written bytes counted."""
    size = size or COPY_BYTES[bench.device.type == "cpu"]
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * size / bench.fastest(lambda: target.copy_(source))


def _matmul_seconds(bench: Bench, dtype: torch.dtype, n: int) -> float:
    a, b, out = (torch.ones(n, n, dtype=dtype, device=bench.device) for _ in range(3))
    return bench.fastest(lambda: torch.mm(a, b, out=out))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated")
    parser.add_argument("--size", type=int, action="append", help="of the square matrices; may be repeated")
    arguments = parser.parse_args()
    bench = open_bench(arguments)
    sizes = arguments.size or SIZES[bench.device.type == "cpu"]
    rows = [
        {
            "what": f"product {n}×{n}×{n}",
            "dtype": dtype,
            "GFLOP/s": 2 * n**3 / _matmul_seconds(bench, DTYPES[dtype], n) / 1e9,
        }
        for dtype in arguments.dtype or ["float32"]
        for n in sizes
    ]
    rows.append({"what": "copy", "GB/s": copy_bytes(bench) / 1e9})
    report(bench, "Measured ceilings", rows, arguments)


if __name__ == "__main__":
    main()
