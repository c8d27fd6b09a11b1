"""Choosing one implementation per operation, once, and recording why.

Every operation has a contract and a reference in plain torch (its file in this folder). A backend
offers further implementations of the same function. ``choose`` takes, per operation, the first
candidate that is asked for, not disabled and supports the workload (``ops.select: order``), or the
fastest such one (``ops.select: measure``), and writes down for every other candidate why it was
not taken. Models call the chosen functions directly: there is no lookup in the hot path.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from portmoe.config import Config
from portmoe.errors import BackendError, ConfigError
from portmoe.ops.operation import Implementation, Operation
from portmoe.ops.timings import Timings
from portmoe.ops.workload import Workload

REFERENCE = "reference"

# The config keys that ask for a kind of implementation, and the operations they speak of.
REQUESTS = (
    ("moe.use_fused_gating", "topk_gating"),
    ("moe.use_tutel", "topk_gating"),
    ("moe.enable_token_rearrange_opt", "dispatch"),
    ("moe.enable_token_rearrange_opt", "combine"),
    ("model.use_flash_attn", "attention"),
)


@dataclass(frozen=True)
class Candidate:
    """One implementation as the choice saw it.

    ``usable``: it could have been taken. ``reason`` says why it was not taken, or why it was.
    """

    name: str
    chosen: bool
    usable: bool
    reason: str
    seconds: float | None = None  # forward and backward of the first sample, when measured


@dataclass(frozen=True)
class Choice:
    """The outcome for one operation. ``unmet``: what the config asked for and did not get, and why."""

    op: str
    chosen: str
    candidates: tuple[Candidate, ...]
    unmet: tuple[str, ...] = ()


class OpTable:
    """The chosen functions as attributes (``ops.rms_norm(x_TH, weight_H, eps)``) and the choice's record."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]], choices: Sequence[Choice]) -> None:
        self.choices = tuple(choices)
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # Reached only when the instance has no such attribute; a copy in the making has none at all.
        known = ", ".join(choice.op for choice in vars(self).get("choices", ()))
        raise AttributeError(f"there is no operation {name!r}; operations: {known}")

    def record(self) -> dict[str, Any]:
        """What ``ops.json`` holds, per operation: the choice, each candidate's reason, unmet requests."""
        return {choice.op: {k: v for k, v in asdict(choice).items() if k != "op"} for choice in self.choices}


def choose(
    operations: Mapping[str, Operation],
    offered: Sequence[Implementation],
    workload: Workload,
    config: Config,
    log: Callable[[str], None] = lambda line: None,
    timings: Timings | None = None,
) -> OpTable:
    """Choose among ``offered`` and the references; see the module's docstring.

    Args:
        log: receives a line for every request that was not met, unless ``ops.fallback`` is "allow",
            and for every implementation that failed while it was timed.
        timings: where ``ops.select: measure`` finds timings and leaves new ones; None: measure all.

    Raises:
        ConfigError: ``ops.disable`` names an implementation that does not exist, or leaves none.
        BackendError: a requested kind of implementation is missing and ``ops.fallback`` is "error".
        ValueError: an offered implementation is of no known operation, or two share a name.
    """
    by_op = _group(operations, offered)
    _check_disabled(config.ops.disable, by_op)
    timings = timings or Timings(workload.device.type)
    functions, choices = {}, []
    for name, operation in operations.items():
        function, choice = _choose_one(operation, by_op[name], workload, config, log, timings)
        functions[name] = function
        choices.append(choice)
    unmet = _check_requests(choices, by_op, config, log)
    return OpTable(functions, [replace(choice, unmet=tuple(unmet[choice.op])) for choice in choices])


def _group(
    operations: Mapping[str, Operation], offered: Sequence[Implementation]
) -> dict[str, list[Implementation]]:
    """The offered implementations by operation."""
    by_op: dict[str, list[Implementation]] = {name: [] for name in operations}
    for implementation in offered:
        if implementation.op not in by_op:
            raise ValueError(
                f"{implementation.name!r} implements {implementation.op!r}, which is no operation"
            )
        names = {REFERENCE, *(i.name for i in by_op[implementation.op])}
        if implementation.name in names:
            raise ValueError(f"{implementation.op} has two implementations called {implementation.name!r}")
        by_op[implementation.op].append(implementation)
    return by_op


def _choose_one(
    operation: Operation,
    offered: Sequence[Implementation],
    workload: Workload,
    config: Config,
    log: Callable[[str], None],
    timings: Timings,
) -> tuple[Callable[..., Any], Choice]:
    candidates = (*offered, Implementation(operation.name, REFERENCE, operation.reference))
    reasons = {c.name: _why_not(c, workload, config) for c in candidates}
    fit = [c for c in candidates if reasons[c.name] is None]
    seconds: dict[str, float] = {}
    if config.ops.select == "measure" and len(fit) > 1:
        for candidate in fit:
            try:
                seconds[candidate.name] = timings.seconds(operation, candidate, workload)
            except Exception as error:  # a kernel that fails here must not be chosen, nor stop the run
                reasons[candidate.name] = f"failed when timed: {type(error).__name__}: {error}"
                log(f"{operation.name}.{candidate.name} {reasons[candidate.name]}")
        fit = sorted((c for c in fit if c.name in seconds), key=lambda c: seconds[c.name])
    if not fit:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ConfigError(
            f"no implementation of {operation.name!r} is left ({why}); "
            f"take {operation.name}.{REFERENCE} out of ops.disable"
        )
    winner = fit[0]
    won = "the fastest here" if seconds else "the first in the backend's order that supports the case"
    lost = f"slower here than {winner.name!r}" if seconds else f"after {winner.name!r} in the backend's order"
    record = tuple(
        Candidate(
            name=c.name,
            chosen=c is winner,
            usable=c in fit,
            reason=reasons[c.name] or (won if c is winner else lost),
            seconds=seconds.get(c.name),
        )
        for c in candidates
    )
    return winner.function, Choice(operation.name, winner.name, record)


def _why_not(candidate: Implementation, workload: Workload, config: Config) -> str | None:
    if f"{candidate.op}.{candidate.name}" in config.ops.disable:
        return "switched off by ops.disable"
    if candidate.requested_by and not _setting(config, candidate.requested_by):
        return f"not asked for: {candidate.requested_by} is false"
    return candidate.supports(workload)


def _check_disabled(disabled: Sequence[str], by_op: Mapping[str, Sequence[Implementation]]) -> None:
    known = {f"{op}.{REFERENCE}" for op in by_op}
    known |= {f"{i.op}.{i.name}" for offered in by_op.values() for i in offered}
    for name in disabled:
        if name not in known:
            raise ConfigError(
                f"ops.disable: {name!r} is no implementation here; allowed: {', '.join(sorted(known))}"
            )


def _check_requests(
    choices: Sequence[Choice],
    by_op: Mapping[str, Sequence[Implementation]],
    config: Config,
    log: Callable[[str], None],
) -> dict[str, list[str]]:
    """Report, and return by operation, every config key whose kind of implementation was not taken."""
    chosen = {choice.op: choice for choice in choices}
    unmet: dict[str, list[str]] = {op: [] for op in chosen}
    for key, op in REQUESTS:
        if op not in chosen or not _setting(config, key):
            continue
        choice = chosen[op]
        kind = {i.name for i in by_op[op] if i.requested_by == key}
        if choice.chosen in kind:
            continue
        asked = [c for c in choice.candidates if c.name in kind]
        why = "; ".join(f"{c.name}: {c.reason}" for c in asked) or "this backend offers none"
        message = f"{key} is not met: {op}.{choice.chosen} computes the same function instead ({why})"
        # One that was usable and lost to another by order or by measurement is not missing.
        if config.ops.fallback == "error" and not any(c.usable for c in asked):
            raise BackendError(f"{message}; set {key} to false, or ops.fallback to 'warn' or 'allow'")
        unmet[op].append(message)
        if config.ops.fallback != "allow":
            log(message)
    return unmet


def _setting(config: Config, key: str) -> bool:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
