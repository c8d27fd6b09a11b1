"""What a backend knows before torch is imported, or when torch cannot be imported.

Some vendors' plug-ins are loaded by ``import torch`` itself: they read variables at that moment,
and when they are broken, torch cannot be imported at all. A backend that has something to say
about either defines ``preflight() -> Preflight`` beside ``accelerator()``, in a module that imports
neither torch nor the vendor's modules.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from portmoe.accelerator.probing import Probe, Problem, describe

PLUGIN_GROUP = "torch.backends"  # what `import torch` loads by itself
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def explains_nothing(message: str) -> Problem | None:
    """Knows no cause."""
    return None


@dataclass(frozen=True)
class Preflight:
    """A backend's knowledge that needs no torch.

    Attributes:
        software: looks at package metadata and files only; reports the versions of everything between
            torch and the chip, and versions that do not go together as problems.
        environment: variables read while torch is imported; set unless the user set them.
        explain: given the text of a failed ``import torch``, the cause if this backend knows it.
    """

    software: Callable[[], Probe] = Probe
    environment: Mapping[str, str] = field(default_factory=dict)
    explain: Callable[[str], Problem | None] = explains_nothing


def preflight_of(point: EntryPoint) -> Preflight:
    """The preflight of the backend registered by ``point``; an empty one where it defines none."""
    try:
        define = getattr(import_module(point.module), "preflight", Preflight)
        return define()
    except Exception as error:
        broken = Probe()
        broken.fail(
            f"backend {point.name!r} ({point.value}) failed to load: {describe(error)}",
            "repair or uninstall the package that provides it",
        )
        return Preflight(software=lambda: broken)


def set_environment(points: Iterable[EntryPoint]) -> None:
    """Set the variables these backends want while torch is imported, where the user has not."""
    for point in points:
        for key, value in preflight_of(point).environment.items():
            os.environ.setdefault(key, value)


def explain_failed_import(message: str, points: Iterable[EntryPoint]) -> Problem:
    """Who made ``import torch`` fail with ``message``, and what to do about it.

    Args:
        points: the backends that may know the cause.
    """
    last_line = next((line for line in reversed(message.splitlines()) if line.strip()), "no message").strip()
    plugin = re.search(r"Failed to load the backend extension: ([\w-]+)", message)
    known = next(filter(None, (preflight_of(point).explain(message) for point in points)), None)
    if not plugin:
        return known or Problem(
            f"torch cannot be imported: {last_line}",
            "install it again: pip install --force-reinstall 'torch>=2.11'",
        )
    package = plugins().get(plugin[1], plugin[1])
    cause, repair = (known.summary, known.fix) if known else (_root_cause(message), f"repair {package}")
    return Problem(
        f"torch cannot be imported because its plug-in {package} is broken: {cause}",
        f"{repair}; or uninstall {package}; or, to train without it, export {AUTOLOAD}=0",
    )


def _root_cause(message: str) -> str:
    """The first error line: torch's own complaint comes after the one that caused it."""
    lines = [line.strip() for line in message.splitlines() if re.match(r"\s*[\w.]*(Error|Exception)\b", line)]
    causes = [line for line in lines if "Failed to load the backend extension" not in line]
    return (causes or lines or ["no message"])[0]


def plugins() -> dict[str, str]:
    """What ``import torch`` loads by itself: each plug-in's name, and its distribution with the version."""
    return {
        point.name: f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        for point in entry_points(group=PLUGIN_GROUP)
    }
