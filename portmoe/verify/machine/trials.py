"""Small pieces of training, tried on a device and compared with what they must give."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from portmoe.accelerator.interface import PEAK_VARIABLE, Accelerator
from portmoe.accelerator.preflight import Preflight
from portmoe.config import Config
from portmoe.ops import OPERATIONS, choose
from portmoe.ops.table import Choice
from portmoe.parallel.layout import Layout
from portmoe.parallel.workload import workload_of
from portmoe.result import Result, Status

# A model small enough to choose for at once; everything else as by default.
SMALL = Config.model_validate(
    {
        "data": {"seq_len": 32, "micro_bsz": 2},
        "model": {"hidden_size": 64, "num_attention_heads": 4, "multiple_of": 128, "vocab_size": 256},
    }
)

# Allowed relative error of a forward and backward against float64: some roundings of each dtype.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

OTHER_DTYPE = "train in another dtype (model.dtype), or update the driver and the vendor's packages"
REINSTALL = "update the driver and the vendor's packages to versions that go together"
SAME_FUNCTION = "none needed: what is computed is the same; set the key to false to say so"
CHECK_NETWORK = (
    "see that the host's name resolves to an address of this machine and no firewall blocks its own ports"
)


def memory(accelerator: Accelerator, device: torch.device) -> Iterator[Result]:
    """Allocate a buffer and see that the statistics notice."""
    before = accelerator.memory.allocated()
    buffer = torch.ones(2**24, dtype=torch.uint8, device=device)
    after = accelerator.memory.allocated()
    total = accelerator.memory.total() / 2**30
    text = f"{total:.1f} GiB on {device}"
    if after - before < buffer.numel() // 2:
        yield Result("warn", "memory", f"{text}; 16 MiB allocated, {after - before} bytes counted", REINSTALL)
    else:
        yield Result("pass", "memory", text)


def wanted_environment(accelerator: Accelerator, preflight: Preflight, timeout: timedelta) -> list[str]:
    """The variables this backend sets where the user has not, to be asked before the device is opened."""
    parts = (
        preflight.environment,
        accelerator.device.environment(),
        accelerator.memory.environment(),
        accelerator.collectives.environment(timeout),
    )
    return sorted({PEAK_VARIABLE, *(key for part in parts for key in part)})


def environment(names: Iterable[str], deterministic: Mapping[str, str]) -> Iterator[Result]:
    """The values these variables have in the end, and what ``cudnn_deterministic`` sets besides."""
    values = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    text = ", ".join(values) or "needs no variables"
    if more := [f"{name}={os.environ.get(name, value)}" for name, value in deterministic.items()]:
        text += f"; with cudnn_deterministic also {', '.join(more)}"
    yield Result("pass", "environment", text)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of ``dtype`` as a config has it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def forward_backward(device: torch.device, dtype: torch.dtype) -> Iterator[Result]:
    """A two-layer product with its gradients in ``dtype``, against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in ((16, 32), (64, 32), (32, 64))]
    got = _forward_backward([value.to(device) for value in values])
    expected = _forward_backward([value.double() for value in values])
    error = max(((g.cpu().double() - e).norm() / e.norm()).item() for g, e in zip(got, expected, strict=True))
    text = f"forward and backward, relative error {error:.1e} of float64's (allowed {ALLOWED[dtype]:.0e})"
    if error <= ALLOWED[dtype]:  # false for nan too
        yield Result("pass", dtype_name(dtype), text)
    else:
        yield Result(failure_level(dtype), dtype_name(dtype), text, OTHER_DTYPE)


def failure_level(dtype: torch.dtype) -> Status:
    """Without float32 nothing can be trained: every dtype keeps masters in it."""
    return "fail" if dtype == torch.float32 else "warn"


def _forward_backward(values: list[torch.Tensor]) -> list[torch.Tensor]:
    x_TH, up_FH, down_HF = (value.requires_grad_() for value in values)
    y_TH = F.linear(F.silu(F.linear(x_TH, up_FH)), down_HF)
    wide = torch.promote_types(y_TH.dtype, torch.float32)
    return [y_TH.detach(), *torch.autograd.grad(y_TH.to(wide).square().mean(), [x_TH, up_FH, down_HF])]


def collectives(accelerator: Accelerator, device: torch.device) -> Iterator[Result]:
    """Every collective training uses, with values that tell the ranks apart. Needs the process group."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    wrong = []
    for name, trial in COLLECTIVES.items():
        if name not in accelerator.collectives.capabilities:
            wrong.append(f"{name} is not offered")
            continue
        got, expected = trial(rank, ranks, device)
        if got.cpu().tolist() != expected:
            wrong.append(f"{name} gave {got.cpu().tolist()} instead of {expected} on rank {rank}")
    where = f"{accelerator.collectives.backend}, {ranks} rank{'s' if ranks > 1 else ''} on this machine"
    if wrong:
        yield Result("fail", "collectives", f"{where}: {'; '.join(wrong)}", REINSTALL)
    else:
        yield Result("pass", "collectives", f"{where}: {', '.join(COLLECTIVES)}")


def _all_reduce(rank: int, ranks: int, device: torch.device) -> tuple[torch.Tensor, list[float]]:
    tensor = torch.tensor([rank + 1.0, 10.0], device=device)
    dist.all_reduce(tensor)
    return tensor, [sum(range(1, ranks + 1)), 10.0 * ranks]


def _reduce_scatter(rank: int, ranks: int, device: torch.device) -> tuple[torch.Tensor, list[float]]:
    tensor, out = torch.arange(2.0 * ranks, device=device) + rank, torch.empty(2, device=device)
    dist.reduce_scatter_tensor(out, tensor)
    offsets = sum(range(ranks))
    return out, [ranks * 2.0 * rank + offsets, ranks * (2.0 * rank + 1) + offsets]


def _all_gather(rank: int, ranks: int, device: torch.device) -> tuple[torch.Tensor, list[float]]:
    out = torch.empty(2 * ranks, device=device)
    dist.all_gather_into_tensor(out, torch.tensor([rank, rank + 0.5], device=device))
    return out, [value for r in range(ranks) for value in (r, r + 0.5)]


def _uneven_all_to_all(rank: int, ranks: int, device: torch.device) -> tuple[torch.Tensor, list[float]]:
    """Rank s sends (s + 2·d + 1) mod 4 values to rank d: of two ranks the second sends itself none."""
    send = [(rank + 2 * d + 1) % 4 for d in range(ranks)]
    receive = [(s + 2 * rank + 1) % 4 for s in range(ranks)]
    values = [100.0 * rank + d for d, count in enumerate(send) for _ in range(count)]
    out = torch.empty(sum(receive), device=device)
    dist.all_to_all_single(out, torch.tensor(values, device=device), receive, send)
    return out, [100.0 * s + rank for s, count in enumerate(receive) for _ in range(count)]


Trial = Callable[[int, int, torch.device], tuple[torch.Tensor, list[float]]]
COLLECTIVES: dict[str, Trial] = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "uneven_all_to_all": _uneven_all_to_all,
}


def operations(accelerator: Accelerator, device: torch.device) -> tuple[dict[str, Any], list[Result]]:
    """Choose implementations for a small workload and the config's defaults: the record, and findings."""
    workload = workload_of(SMALL, Layout.plan(SMALL, 1), device)
    unmet: list[str] = []
    table = choose(OPERATIONS, accelerator.ops.implementations(), workload, SMALL, unmet.append)
    findings = [Result("pass", choice.key, _describe(choice)) for choice in table.choices if choice.chosen]
    findings += [Result("warn", "operations", line, SAME_FUNCTION) for line in unmet]
    return table.record(), findings


def _describe(choice: Choice) -> str:
    """The chosen implementation, and why each one the backend prefers to it was not taken."""
    preferred = choice.candidates[: [c.name for c in choice.candidates].index(choice.chosen)]
    why = "; ".join(f"not {c.name}: {c.reason}" for c in preferred)
    if not why:
        alone = len(choice.candidates) == 1
        why = "this backend offers no other" if alone else "the first in the backend's order"
    return f"{choice.chosen} ({why})"
