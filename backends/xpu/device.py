"""Intel GPUs as devices. Untested on hardware."""

import torch

from portmoe.accelerator import Device, Probe
from portmoe.backends import extension
from portmoe.backends.xpu.probe import INSTALL_DRIVER, INSTALL_TORCH, software


class XpuDevice(Device):
    """torch.xpu; the generic calls of ``torch.accelerator`` cover the rest.

    A device is a whole card or one of its tiles, as ZE_FLAT_DEVICE_HIERARCHY says, so the name alone
    gives no peak: give PORTMOE_PEAK_TFLOPS.
    """

    type = "xpu"

    advice = INSTALL_DRIVER

    def software(self) -> Probe:
        return software()

    def find_devices(self, probe: Probe) -> None:
        if torch.version.xpu is None:
            probe.fail(f"the installed torch {torch.__version__} is not built for Intel GPUs", INSTALL_TORCH)
            return
        probe.facts["SYCL runtime of torch"] = torch.version.xpu
        extension.load(probe)
        super().find_devices(probe)
        if probe.usable and not torch.distributed.is_xccl_available():
            probe.fail(f"the installed torch {torch.__version__} was built without XCCL", INSTALL_TORCH)

    def open(self, local_rank: int) -> torch.device:
        extension.load()
        return super().open(local_rank)
