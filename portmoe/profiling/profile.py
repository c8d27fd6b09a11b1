"""``portmoe train --profile``: a trace of a few steps, and where their time and memory go."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import profile, supported_activities

from portmoe.accelerator import Device
from portmoe.costs.step_cost import Cost
from portmoe.errors import TrainingError
from portmoe.model.share import Share
from portmoe.profiling.attribution import OTHER, Usage, attribute
from portmoe.profiling.ceiling import Ceiling
from portmoe.profiling.spans import WAITING

FOLDER = "profile"
SKIPPED = 2  # steps that fill caches and build kernels
PROFILED = 3
ORDER = ("embedding", "norms", "attention", "router", "dispatch", "experts", "combine", "dense network")
LAST = ("loss", "optimizer", "communication", WAITING, OTHER)


@dataclass
class StepProfile:
    """Profiles ``PROFILED`` steps after ``SKIPPED`` others, or as many as a shorter run has left.

    ``after_step`` is to be called after each step; it writes the trace and gives the table once it has seen
    enough.

    Args:
        path: of the trace file; its folder is made.
        steps: that will be run.
        share: the rank's, whose device and dtype the parts are held against the ceilings of.
        least: part → what it cannot do without, per step.
        device: the backend's device part.
        linear: what computes the model's products.
    """

    path: Path
    steps: int
    share: Share
    least: Mapping[str, Cost]
    device: Device
    linear: Callable[..., torch.Tensor]
    _seen: int = 0
    _began: float = 0.0
    _profile: profile | None = field(default=None, repr=False)

    def before_step(self) -> None:
        """Begin the profile where this is the first step to be profiled."""
        if self._seen == min(SKIPPED, self.steps - 1):
            known = supported_activities()
            self._profile = profile(activities=sorted(known, key=str), profile_memory=True)
            self._profile.__enter__()
            self._began = time.perf_counter()

    def after_step(self) -> str | None:
        """The table, after the last profiled step; None before and afterwards."""
        self._seen += 1
        profiled = self._seen - min(SKIPPED, self.steps - 1)
        if self._profile is None or profiled < min(PROFILED, self.steps - min(SKIPPED, self.steps - 1)):
            return None
        seconds = time.perf_counter() - self._began
        finished, self._profile = self._profile, None
        finished.__exit__(None, None, None)
        self._write(finished)
        usages = attribute(finished.events(), on_host=self.device.on_host)
        ceiling = Ceiling(self.device, self.share.device, self.linear)
        peaks = ceiling.matmul_flops(self.share.dtype), ceiling.copy_bytes_per_second()
        return table(usages, seconds, profiled, self.least, peaks) + f"\ntrace: {self.path}"

    def _write(self, finished: profile) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(self.path))
        except OSError as error:
            raise TrainingError(f"cannot write the trace {self.path}: {error.strerror}") from error


def table(
    usages: Mapping[str, Usage],
    seconds: float,
    steps: int,
    least: Mapping[str, Cost],
    peaks: tuple[float, float],
) -> str:
    """Return a table: per part and step milliseconds, their share, the least they could be, and memory.

    Args:
        seconds: of all profiled steps together, by the host's clock.
        peaks: measured FLOP/s of products and bytes/s of copies.
    """
    usages = dict(usages)
    idle = seconds - sum(usage.seconds for usage in usages.values())
    usages.setdefault(WAITING, Usage()).forward += max(0.0, idle)
    shown = [part for part in (*ORDER, *LAST) if part in usages]
    shown += sorted(usages.keys() - set(shown))
    head = (
        "part",
        "ms",
        "share",
        "forward",
        "backward",
        "least ms",
        "of ceiling",
        "allocated MiB",
        "kept MiB",
    )
    lines = [head]
    for part in shown:
        usage = usages[part]
        lines.append((part, *_figures(usage, seconds, steps, least.get(part), peaks)))
    total = Usage(
        sum(u.forward for u in usages.values()),
        sum(u.backward for u in usages.values()),
        sum(u.allocated for u in usages.values()),
        sum(u.kept for u in usages.values()),
    )
    everything = Cost(sum(c.flops for c in least.values()), sum(c.bytes for c in least.values()))
    lines.append(("step", *_figures(total, seconds, steps, everything, peaks)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    title = (
        f"profile of {steps} step(s), figures per step; ceilings measured here: "
        f"{peaks[0] / 1e9:,.0f} GFLOP/s of products, {peaks[1] / 1e9:.1f} GB/s of copies"
    )
    rows = (
        "  ".join((first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))))
        for first, *cells in lines
    )
    return "\n".join((title, *rows))


def _figures(
    usage: Usage, seconds: float, steps: int, least: Cost | None, peaks: tuple[float, float]
) -> tuple[str, ...]:
    floor = None if least is None else least.seconds(*peaks)
    return (
        f"{usage.seconds / steps * 1e3:.2f}",
        f"{usage.seconds / seconds:.1%}",
        f"{usage.forward / steps * 1e3:.2f}",
        f"{usage.backward / steps * 1e3:.2f}",
        "–" if floor is None else f"{floor * 1e3:.2f}",
        "–" if floor is None or not usage.seconds else f"{floor * steps / usage.seconds:.0%}",
        f"{usage.allocated / steps / 2**20:.1f}",
        f"{usage.kept / steps / 2**20:.1f}",
    )
