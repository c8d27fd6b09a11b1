"""intel-extension-for-pytorch, which an old stack may have: used where it fits, never required.

Importing it puts its kernels in the place of torch's. It ends the process where it does not go with torch,
so it is imported only where both have the same minor version.
"""

from importlib import import_module

from portmoe.accelerator import Probe
from portmoe.accelerator.probing import describe, installed_version, release

PACKAGE = "intel-extension-for-pytorch"
MODULE = "intel_extension_for_pytorch"
REMOVE = f"pip uninstall {PACKAGE}: torch needs it no longer, and its development has ended"


def fits() -> bool:
    """Whether it is installed and goes with the installed torch."""
    extension, torch = installed_version(PACKAGE), installed_version("torch")
    return bool(extension and torch) and release(extension)[:2] == release(torch)[:2]


def look(probe: Probe) -> None:
    """Report its version, and warn where it does not go with torch and is not used."""
    extension = installed_version(PACKAGE)
    if extension:
        probe.facts[PACKAGE] = extension
        if not fits():
            torch = installed_version("torch")
            probe.warn(f"{PACKAGE} {extension} does not go with torch {torch} and is not used", REMOVE)


def load(probe: Probe | None = None) -> None:
    """Import it where it fits; what that raises becomes a warning, and torch's own kernels serve."""
    if fits():
        try:
            import_module(MODULE)
        except Exception as error:
            if probe is not None:
                probe.warn(f"{PACKAGE} does not load and is not used: {describe(error)}", REMOVE)
