"""The Intel GPU driver and how it goes with the installed torch, found without torch."""

import os
import re
from pathlib import Path

from portmoe.accelerator import Probe, Problem
from portmoe.accelerator.probing import installed_version, pci_devices
from portmoe.backends import extension

PCI_VENDOR, PCI_CLASSES = 0x8086, (0x03,)
PROCESSOR_GRAPHICS = "0000:00:02.0"  # where the graphics inside an Intel processor always sits
RENDER_NODES = Path("/dev/dri")

# Read while torch registers its kernels.
ENVIRONMENT = {
    "PYTORCH_ENABLE_XPU_FALLBACK": "0",  # an operation without a kernel is an error, not a slow run
    "PYTORCH_DEBUG_XPU_FALLBACK": "1",  # the few operations torch always runs on the CPU are named
}

INSTALL_TORCH = (
    "install a torch built for Intel GPUs: pip install torch --index-url https://download.pytorch.org/whl/xpu"
)
INSTALL_DRIVER = (
    "install Intel's compute runtime (packages intel-opencl-icd and libze-intel-gpu1) and see that "
    "`xpu-smi discovery` or `sycl-ls` lists the GPU"
)


def software() -> Probe:
    """The GPU's device nodes, torch's build, and an extension package that does not go with it."""
    probe = Probe()
    cards = pci_devices(PCI_VENDOR, PCI_CLASSES, besides=(PROCESSOR_GRAPHICS,))
    nodes = sorted(RENDER_NODES.glob("renderD*"))
    probe.present = bool(cards)
    probe.facts["Intel GPUs on the PCI bus"] = str(cards)
    probe.facts["render nodes"] = ", ".join(node.name for node in nodes) or "none"
    if not nodes:
        probe.fail("no GPU driver: there is no /dev/dri/renderD*", INSTALL_DRIVER)
    elif not any(os.access(node, os.R_OK | os.W_OK) for node in nodes):
        probe.fail(
            "this user may not open /dev/dri/renderD*", "sudo usermod -aG render $USER, then log in again"
        )
    torch = installed_version("torch") or ""
    if re.fullmatch(r"cpu|cu\d+|rocm.*", torch.partition("+")[2]):
        probe.fail(f"the installed torch {torch} is not built for Intel GPUs", INSTALL_TORCH)
    extension.look(probe)
    return probe


def explain_failed_import(message: str) -> Problem | None:
    """A library of Intel's runtime that torch's shared objects need and do not find."""
    library = re.search(r"(lib(?:ze_|sycl|mkl_sycl|ccl|ur_|intel-ext)[\w-]*\.so[.\d]*): cannot open", message)
    if not library:
        return None
    return Problem(f"torch needs {library[1]}, which is not found", f"{INSTALL_DRIVER}; {INSTALL_TORCH}")
