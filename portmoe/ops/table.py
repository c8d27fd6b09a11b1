"""Choosing one implementation per operation, once, and recording why.

Every operation has a contract and a reference in plain torch (its file in this folder). A backend
offers further implementations of the same function. ``choose`` takes, per operation and call site, the
first candidate that is asked for, not disabled and supports the site's workload (``ops.select: order``),
or the fastest such one (``ops.select: measure``), and writes down for every other candidate why it was
not taken. Models call the chosen functions directly: there is no lookup in the hot path.

A ``Group`` of operations is chosen alike: by a fused implementation, or by the functions chosen for its
parts. What computes is what is recorded: the parts have a site where the group's is theirs to compute.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any

from portmoe.config import Config
from portmoe.config.keys import walk
from portmoe.errors import BackendError, ConfigError
from portmoe.ops.operation import Group, Implementation, Operation
from portmoe.ops.timings import Timings
from portmoe.ops.workload import CallSites, Workload

REFERENCE = "reference"
PARTS = "parts"  # of a group: the functions chosen for the operations it is made of
NOT_CALLED = "is not called in this model"


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
    """The outcome for one operation at the call sites that give it the same work.

    Attributes:
        chosen: the implementation's name; None where the model does not call the operation.
        unmet: what the config asked for and did not get, and why.
        sites: the call sites; "" is the operation's default site.
        workload: what the choice was made for.
    """

    op: str
    chosen: str | None
    candidates: tuple[Candidate, ...]
    unmet: tuple[str, ...] = ()
    sites: tuple[str, ...] = ("",)
    workload: Workload | None = None

    @property
    def key(self) -> str:
        """Its name in ``ops.json``: the operation's, or "operation@site" away from the default site."""
        return f"{self.op}@{self.sites[0]}" if self.sites and "" not in self.sites else self.op


class OpTable:
    """The chosen functions as attributes (``ops.rms_norm(x_TH, weight_H, eps)``) and the choice's record.

    The attributes are those of each operation's default site; ``at`` gives those of another.

    Args:
        functions: operation → the function of its default site.
        sites: site → operation → the function there, where one was chosen for that site.
        site: whose functions the attributes are.
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[..., Any]],
        choices: Sequence[Choice],
        sites: Mapping[str, Mapping[str, Callable[..., Any]]] | None = None,
        site: str = "",
    ) -> None:
        self.choices = tuple(choices)
        self._functions, self._sites, self.site = dict(functions), dict(sites or {}), site
        vars(self).update(self._functions | dict(self._sites.get(site, {})))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # Reached only when the instance has no such attribute; a copy in the making has none at all.
        choices = vars(self).get("choices", ())
        mine = [choice for choice in choices if choice.op == name]
        if any(choice.chosen for choice in mine):
            sites = ", ".join(site for choice in mine for site in choice.sites)
            raise AttributeError(f"{name!r} has no default site; its sites: {sites}, to be had by at(site)")
        if mine:
            raise AttributeError(f"{name!r} {NOT_CALLED}, and no implementation was chosen")
        known = ", ".join(dict.fromkeys(choice.op for choice in choices))
        raise AttributeError(f"there is no operation {name!r}; operations: {known}")

    def at(self, site: str) -> "OpTable":
        """The functions chosen for ``site``; of an operation without that site, its default site's."""
        return OpTable(self._functions, self.choices, self._sites, site)

    def wrapped(self, wrap: Callable[[str, str, Callable[..., Any]], Callable[..., Any]]) -> "OpTable":
        """The same table with ``wrap(operation, site, function)`` in the place of every function."""
        return OpTable(
            {op: wrap(op, "", function) for op, function in self._functions.items()},
            self.choices,
            {site: {op: wrap(op, site, f) for op, f in by_op.items()} for site, by_op in self._sites.items()},
            self.site,
        )

    def record(self) -> dict[str, Any]:
        """What ``ops.json`` holds: ``Choice.key`` → the choice, each candidate's reason, unmet requests."""
        return {choice.key: _recorded(choice) for choice in self.choices}


def _recorded(choice: Choice) -> dict[str, Any]:
    record = {key: value for key, value in asdict(choice).items() if key != "op"}
    if choice.workload is not None:
        work = {field.name: getattr(choice.workload, field.name) for field in fields(choice.workload)}
        work |= {"device": str(choice.workload.device), "dtype": str(choice.workload.dtype)}
        record["workload"] = {key: value for key, value in work.items() if value is not None}
    return record


def choose(
    operations: Mapping[str, Operation],
    offered: Sequence[Implementation],
    work: Workload | CallSites,
    config: Config,
    log: Callable[[str], None] = lambda line: None,
    timings: Timings | None = None,
) -> OpTable:
    """Choose among ``offered`` and the references; see the module's docstring.

    Args:
        work: what each operation is given at each of its call sites. One ``Workload`` stands for a default
            site of every operation. An operation that is missing is not called, and gets no implementation.
        log: receives a line for every request that was not met, unless ``ops.fallback`` is "allow",
            and for every implementation that failed while it was timed.
        timings: where ``ops.select: measure`` finds timings and leaves new ones; None: measure all.

    Raises:
        ConfigError: ``ops.disable`` names an implementation that does not exist, or leaves none.
        BackendError: a requested kind of implementation is missing and ``ops.fallback`` is "error".
        ValueError: an offered implementation is of no known operation, or two share a name; or ``work``
            names an operation that is not known.
    """
    by_op = _group(operations, offered)
    _check_disabled(config.ops.disable, operations, by_op)
    sites_of = {name: {"": work} for name in operations} if isinstance(work, Workload) else work
    if unknown := sites_of.keys() - operations.keys():
        raise ValueError(f"call sites of {', '.join(sorted(unknown))}, which is no operation")

    @cache
    def chosen(name: str, workload: Workload) -> tuple[Callable[..., Any], Choice]:
        operation, function = operations[name], operations[name].reference
        if isinstance(operation, Group):
            function = operation.compose({part: chosen(part, workload)[0] for part in operation.parts})
        last = Implementation(name, _last_name(operation), function, handles=tuple(operation.needs(workload)))
        return _choose_one(operation, (*by_op[name], last), workload, config, log, timed(workload))

    def timed(workload: Workload) -> Timings:
        nonlocal timings
        timings = timings or Timings(workload.device.type)
        return timings

    sites_of = _with_parts(operations, sites_of, chosen)
    functions: dict[str, Callable[..., Any]] = {}
    at_sites: dict[str, dict[str, Callable[..., Any]]] = {}
    choices = []
    for name, operation in operations.items():
        sites_by_work: dict[Workload, list[str]] = {}
        for site, workload in sites_of.get(name, {}).items():
            sites_by_work.setdefault(workload, []).append(site)
        if not sites_by_work:
            choices.append(_not_called(operation, by_op[name]))
        for workload, sites in sites_by_work.items():
            function, choice = chosen(name, workload)
            choices.append(replace(choice, sites=tuple(sites), workload=workload))
            for site in sites:
                (at_sites.setdefault(site, {}) if site else functions)[name] = function
    choices = [_with_requests(choice, by_op[choice.op], config, log) for choice in choices]
    return OpTable(functions, choices, at_sites)


def _last_name(operation: Operation) -> str:
    """The name of the candidate that is always there."""
    return PARTS if isinstance(operation, Group) else REFERENCE


def _with_parts(
    operations: Mapping[str, Operation],
    sites_of: CallSites,
    chosen: Callable[[str, Workload], tuple[Callable[..., Any], Choice]],
) -> CallSites:
    """``sites_of`` with the sites of every group that its parts compute there."""
    sites = {name: dict(of_op) for name, of_op in sites_of.items()}
    for group in (operations[name] for name in sites_of):
        if isinstance(group, Group):
            for site, workload in sites_of[group.name].items():
                if chosen(group.name, workload)[1].chosen == PARTS:
                    for part in group.parts:
                        sites.setdefault(part, {}).setdefault(site, workload)
    return sites


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
        names = {_last_name(operations[implementation.op]), *(i.name for i in by_op[implementation.op])}
        if implementation.name in names:
            raise ValueError(f"{implementation.op} has two implementations called {implementation.name!r}")
        by_op[implementation.op].append(implementation)
    return by_op


def _not_called(operation: Operation, offered: Sequence[Implementation]) -> Choice:
    names = [*(i.name for i in offered), _last_name(operation)]
    candidates = tuple(Candidate(name, False, False, f"the operation {NOT_CALLED}") for name in names)
    return Choice(operation.name, None, candidates, sites=())


def _choose_one(
    operation: Operation,
    candidates: Sequence[Implementation],
    workload: Workload,
    config: Config,
    log: Callable[[str], None],
    timings: Timings,
) -> tuple[Callable[..., Any], Choice]:
    reasons = {c.name: _why_not(operation, c, workload, config) for c in candidates}
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
            f"take {operation.name}.{candidates[-1].name} out of ops.disable"
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


def _why_not(
    operation: Operation, candidate: Implementation, workload: Workload, config: Config
) -> str | None:
    if f"{candidate.op}.{candidate.name}" in config.ops.disable:
        return "switched off by ops.disable"
    if candidate.requested_by and not _setting(config, candidate.requested_by):
        return f"not asked for: {candidate.requested_by} is false"
    return operation.why_not(candidate, workload)


def _check_disabled(
    disabled: Sequence[str],
    operations: Mapping[str, Operation],
    by_op: Mapping[str, Sequence[Implementation]],
) -> None:
    known = {f"{name}.{_last_name(operation)}" for name, operation in operations.items()}
    known |= {f"{i.op}.{i.name}" for offered in by_op.values() for i in offered}
    for name in disabled:
        if name not in known:
            raise ConfigError(
                f"ops.disable: {name!r} is no implementation here; allowed: {', '.join(sorted(known))}"
            )


def _with_requests(
    choice: Choice, offered: Sequence[Implementation], config: Config, log: Callable[[str], None]
) -> Choice:
    """``choice`` with every config key whose kind of implementation was not taken, each told to ``log``."""
    unmet = []
    op = choice.op
    for entry in walk(config):
        key = entry.path
        if op not in entry.key.asks_for or not entry.value or choice.chosen is None:
            continue
        kind = {i.name for i in offered if i.requested_by == key}
        if choice.chosen in kind:
            continue
        asked = [c for c in choice.candidates if c.name in kind]
        why = "; ".join(f"{c.name}: {c.reason}" for c in asked) or "this backend offers none"
        where = "" if "" in choice.sites else f" at {', '.join(choice.sites)}"
        message = f"{key} is not met{where}: {op}.{choice.chosen} computes the same function instead ({why})"
        # One that was usable and lost to another by order or by measurement is not missing.
        if config.ops.fallback == "error" and not any(c.usable for c in asked):
            raise BackendError(f"{message}; set {key} to false, or ops.fallback to 'warn' or 'allow'")
        unmet.append(message)
        if config.ops.fallback != "allow":
            log(message)
    return replace(choice, unmet=tuple(unmet))


def _setting(config: Config, key: str) -> bool:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
