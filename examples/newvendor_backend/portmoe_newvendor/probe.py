"""The vendor's software, found without torch and without the vendor's module."""

from portmoe.accelerator import Probe
from portmoe.accelerator.probing import installed_version, release

PACKAGE = "portmoe-newvendor"  # yours: the vendor's torch plug-in
OLDEST_TORCH = (2, 11)

# Read while torch, and with it the plug-in, is imported.
ENVIRONMENT = {"NEWVENDOR_CPU_FALLBACK": "0"}  # an operation without a kernel is an error, not a slow run


def software() -> Probe:
    """Versions of what lies between torch and the chip, and what does not go together."""
    probe = Probe(present=True)  # yours: whether the device is on the PCI bus
    plugin, torch = installed_version(PACKAGE), installed_version("torch") or "none"
    probe.facts["plug-in"] = plugin or "none"
    if plugin is None:
        probe.fail(f"{PACKAGE} is not installed", f"pip install {PACKAGE}")
    if release(torch) < OLDEST_TORCH:
        probe.warn(f"torch {torch} is older than the plug-in is made for", "pip install 'torch>=2.11'")
    return probe
