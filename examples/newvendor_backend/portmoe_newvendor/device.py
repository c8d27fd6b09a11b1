"""The device: finding it, opening it, making it reproducible."""

from collections.abc import Mapping

import torch

from portmoe.accelerator import Device, Probe
from portmoe_newvendor.probe import software


class NewvendorDevice(Device):
    """A simulated device, so everything that torch.accelerator would do is written out."""

    type = "cpu"  # yours: the type your plug-in registers with torch
    shared = True  # several ranks may open it; most devices belong to one rank
    advice = "install the vendor's driver and plug-in"

    def software(self) -> Probe:
        return software()

    def find_devices(self, probe: Probe) -> None:
        from portmoe_newvendor import runtime

        if not runtime.device_count():
            probe.fail("the runtime sees no device", self.advice)
            return
        probe.facts["devices"] = f"{runtime.device_count()} × {runtime.device_name()}"

    def open(self, local_rank: int) -> torch.device:
        return torch.device(self.type)

    def count(self) -> int:
        from portmoe_newvendor import runtime

        return runtime.device_count()

    def name(self) -> str:
        from portmoe_newvendor import runtime

        return runtime.device_name()

    def synchronize(self) -> None:
        from portmoe_newvendor import runtime

        runtime.synchronize()

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def generator_state(self) -> dict[str, torch.Tensor]:
        return {"cpu": torch.get_rng_state()}

    def set_generator_state(self, state: Mapping[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
