"""Finding the backends: every one registers in the entry-point group ``portmoe.backends``."""

import difflib
import logging
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from portmoe.accelerator.preflight import explain_failed_import, set_environment
from portmoe.accelerator.probing import Probe, Problem, describe
from portmoe.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from portmoe.accelerator.interface import Accelerator

GROUP = "portmoe.backends"
AUTO = "auto"

logger = logging.getLogger(__name__)


def registered_names() -> list[str]:
    """The names of all registered backends, sorted. Imports none of them."""
    return sorted(registered())


def registered() -> dict[str, EntryPoint]:
    """The entry point of every backend by name.

    Raises:
        BackendError: two packages claim one name.
    """
    claims: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        # One distribution may be seen twice (an egg-info beside a dist-info): same value, no clash.
        claims.setdefault(point.name, {})[point.value] = point
    for name, points in claims.items():
        if len(points) > 1:
            claimants = ", ".join(
                f"{value} (from {point.dist.name if point.dist else 'an unknown package'})"
                for value, point in sorted(points.items())
            )
            raise BackendError(
                f"backend name {name!r} is claimed {len(points)} times: {claimants}; uninstall all but one"
            )
    return {name: next(iter(points.values())) for name, points in claims.items()}


def get_accelerator(name: str = AUTO) -> "Accelerator":
    """The backend called ``name``, checked to be usable; "auto": the usable one of highest priority.

    Raises:
        ConfigError: no backend has this name.
        BackendError: two packages claim the name, torch cannot be imported, or the backend cannot be
            used; the message lists what was looked for, what is missing and what to install.
    """
    if name == AUTO:
        return _best_usable()
    accelerator = load(name)
    probe = probe_of(accelerator)
    if not probe.usable:
        raise BackendError(f"backend {name!r} cannot be used on this machine{_outcome(probe)}")
    return accelerator


def load(name: str) -> "Accelerator":
    """The backend called ``name``, without probing the machine."""
    prepare(name)
    return _build(find(name))


def prepare(name: str) -> None:
    """Import torch as the backend called ``name`` needs it: the first thing a command that trains does.

    Raises:
        ConfigError: no backend has this name.
        BackendError: torch cannot be imported; the message names the package that breaks it.
    """
    problem = import_torch(name)
    if problem:
        raise BackendError(f"{problem.summary}\n  fix: {problem.fix}")


def import_torch(name: str) -> Problem | None:
    """Do as ``prepare``, but say why torch cannot be imported instead of raising."""
    points = registered()
    set_environment(points.values() if name == AUTO else [find(name)])
    try:
        import_module("torch")
    except Exception as error:
        causes = [describe(error.__cause__)] if error.__cause__ else []
        return explain_failed_import("\n".join([*causes, describe(error)]), points.values())
    return None


def find(name: str) -> EntryPoint:
    """The entry point of the backend called ``name``.

    Raises:
        ConfigError: no backend has this name.
    """
    points = registered()
    if name in points:
        return points[name]
    allowed = [AUTO, *sorted(points)]
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"backend {name!r} is not registered; {hint}allowed: {', '.join(allowed)}. "
        f"A package that brings a backend registers it in the entry-point group {GROUP!r}"
    )


def preference(priority: int, name: str) -> tuple[int, str]:
    """The key that sorts backends in the order "auto" tries them."""
    return -priority, name


def probe_of(accelerator: "Accelerator") -> Probe:
    """``accelerator.device.probe()``, with an exception in it turned into a problem that shows it."""
    try:
        return accelerator.device.probe()
    except Exception as error:
        probe = Probe(present=True)  # nobody knows, and a defect is worth a warning
        probe.fail(
            f"probing {accelerator.name!r} raised {describe(error)}",
            "probe() must not raise: report this to the maintainers of the backend",
        )
        return probe


def _best_usable() -> "Accelerator":
    prepare(AUTO)
    built, passed_over = [], []
    for point in registered().values():
        try:
            built.append(_build(point))
        except BackendError as error:  # one broken package must not keep the others from training
            logger.warning("%s", error)
            passed_over.append(f"\n{error}")
    for accelerator in sorted(built, key=lambda a: preference(a.priority, a.name)):
        probe = probe_of(accelerator)
        if probe.usable:
            return accelerator
        passed_over.append(f"\n{accelerator.name}:{_outcome(probe)}")
        level = logging.WARNING if probe.present else logging.INFO
        logger.log(level, "passed over backend %r%s", accelerator.name, _outcome(probe))
    raise BackendError(f"no backend can be used on this machine{''.join(passed_over) or ': none registered'}")


def _outcome(probe: Probe) -> str:
    found = "".join(f"\n  found: {key}: {value}" for key, value in probe.facts.items())
    missing = "".join(f"\n  missing: {p.summary}\n  fix: {p.fix}" for p in probe.problems if p.fatal)
    return found + missing


def _build(point: EntryPoint) -> "Accelerator":
    try:
        return point.load()()
    except Exception as error:
        raise BackendError(
            f"backend {point.name!r} ({point.value}) failed to load: {describe(error)}; "
            "repair or uninstall the package that provides it"
        ) from error
