"""Ascend NPUs as devices. Untested on hardware."""

from collections.abc import Mapping
from types import ModuleType

import torch

from portmoe.accelerator import Device, Probe, Problem
from portmoe.accelerator.probing import describe
from portmoe.backends.npu.probe import INSTALL_DRIVER, explain_failed_import, software
from portmoe.backends.npu.product import product_named


def npu() -> ModuleType:
    """``torch.npu``, loading the plug-in where torch was told not to (TORCH_DEVICE_BACKEND_AUTOLOAD=0)."""
    import torch_npu  # noqa: F401

    return torch.get_device_module("npu")


class NpuDevice(Device):
    """torch.npu. Its vendor publishes no peak that could be relied on: give PORTMOE_PEAK_TFLOPS."""

    type = "npu"

    advice = INSTALL_DRIVER

    def software(self) -> Probe:
        return software()

    def find_devices(self, probe: Probe) -> None:
        try:
            npu()
        except Exception as error:
            cause = explain_failed_import(str(error)) or Problem(
                f"torch_npu does not load: {describe(error)}",
                "install torch_npu again, in torch's own version",
            )
            probe.fail(cause.summary, cause.fix)
        else:
            super().find_devices(probe)
            if probe.usable:
                probe.facts["product"] = product_named(self.name()) or "unknown, and no function is excluded"

    def open(self, local_rank: int) -> torch.device:
        npu().set_device(local_rank)
        return torch.device("npu", local_rank)

    def count(self) -> int:
        return npu().device_count() if npu().is_available() else 0

    def synchronize(self) -> None:
        npu().synchronize()

    def deterministic_environment(self) -> Mapping[str, str]:
        return {"HCCL_DETERMINISTIC": "true"}
