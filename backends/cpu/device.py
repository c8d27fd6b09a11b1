"""The CPU as a device."""

from collections.abc import Mapping

import torch

from portmoe.accelerator import Device, Probe
from portmoe.backends import extension
from portmoe.backends.cpu.probe import processor, software


class CpuDevice(Device):
    """All cores this process may use are one device, shared by every rank on the machine."""

    type = "cpu"
    shared = True

    def software(self) -> Probe:
        return software()

    def find_devices(self, probe: Probe) -> None:
        extension.load(probe)
        probe.facts["instructions"] = torch.backends.cpu.get_cpu_capability()
        probe.facts["threads"] = str(torch.get_num_threads())
        if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
            probe.fail("this torch was built without gloo", "install torch from PyPI: pip install torch")

    def open(self, local_rank: int) -> torch.device:
        """The one CPU device, whatever the rank: ranks share the cores."""
        extension.load()
        return torch.device("cpu")

    def count(self) -> int:
        """One, which any number of ranks can share."""
        return 1

    def name(self) -> str:
        return processor()

    def synchronize(self) -> None:
        """Nothing to wait for: an operation has ended when its call returns."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def generator_state(self) -> dict[str, torch.Tensor]:
        return {"cpu": torch.get_rng_state()}

    def set_generator_state(self, state: Mapping[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
