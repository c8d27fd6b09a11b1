"""The NVIDIA driver and how it goes with the installed torch, found without torch."""

import re
from pathlib import Path

from portmoe.accelerator import Probe, Problem
from portmoe.accelerator.probing import installed_version, pci_devices

DRIVER_VERSION = Path("/proc/driver/nvidia/version")
DRIVER_NODE = Path("/dev/nvidiactl")
WSL_NODE = Path("/dev/dxg")  # the driver of Windows, seen from its Linux subsystem
PCI_VENDOR, PCI_CLASSES = 0x10DE, (0x03,)

# CUDA major version → first driver branch for Linux that runs it ("CUDA minor version compatibility").
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}

INSTALL_TORCH = "install a torch built with CUDA, which is what PyPI has: pip install --force-reinstall torch"
INSTALL_DRIVER = "install the NVIDIA driver and see that `nvidia-smi` lists the GPU"


def software() -> Probe:
    """The driver, torch's CUDA version, and whether the driver is new enough for it."""
    probe = Probe()
    cards = pci_devices(PCI_VENDOR, PCI_CLASSES)
    driver = driver_version()
    probe.present = bool(cards or driver)
    probe.facts["NVIDIA devices on the PCI bus"] = str(cards)
    probe.facts["NVIDIA driver"] = driver or "none"
    if not driver and not DRIVER_NODE.exists() and not WSL_NODE.exists():
        probe.fail("no NVIDIA driver: neither /proc/driver/nvidia nor /dev/nvidiactl exists", INSTALL_DRIVER)
    build = (installed_version("torch") or "").partition("+")[2]
    if build == "cpu":
        probe.fail("the installed torch is a build for the CPU only (+cpu)", INSTALL_TORCH)
    if wheel := re.fullmatch(r"cu(\d+)\d", build):
        check_driver(probe, driver, cuda_major=int(wheel[1]))
    return probe


def driver_version() -> str | None:
    """The kernel driver's version; None where there is no driver or it does not say."""
    try:
        text = DRIVER_VERSION.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\s(\d+(?:\.\d+)+)\s", text)  # the first line names the module, then its version
    return found[1] if found else None


def check_driver(probe: Probe, driver: str | None, cuda_major: int) -> None:
    """Fail where the driver is older than this CUDA version takes."""
    oldest = OLDEST_DRIVER.get(cuda_major)
    if driver and oldest and int(driver.split(".")[0]) < oldest:
        probe.fail(
            f"the driver {driver} is older than CUDA {cuda_major} takes (≥ {oldest})",
            f"update the driver to {oldest} or newer, or install a torch built for an older CUDA",
        )


def explain_failed_import(message: str) -> Problem | None:
    """A CUDA library that torch's shared objects need and do not find."""
    library = re.search(r"(lib(?:cud|cu[bfrs]|nccl|nv)\w*\.so[.\d]*): cannot open shared object", message)
    if not library:
        return None
    return Problem(
        f"torch needs {library[1]}, which is not found",
        "install torch again with its CUDA packages: pip install --force-reinstall torch",
    )
