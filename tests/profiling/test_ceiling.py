"""The measured ceilings wait by the backend's own device part, never past it."""

import torch

from portmoe.accelerator import Device
from portmoe.profiling.ceiling import Ceiling


class Waiting(Device):
    """A device in front of the host, which torch's accelerator interface does not know."""

    type = "cpu"

    def __init__(self) -> None:
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1


def test_every_call_begins_and_ends_on_an_idle_device():
    part, calls = Waiting(), []
    seconds = Ceiling(part, torch.device("cpu")).fastest(lambda: calls.append(part.waits), budget=0.0)
    assert seconds > 0
    assert calls == [0, 1, 3, 5]  # one to warm up, then a wait before each and another after it
    assert part.waits == 6


def test_the_ceilings_are_rates():
    ceiling = Ceiling(Waiting(), torch.device("cpu"))
    assert ceiling.matmul_flops(torch.float32, (64,)) > 1e6
    assert ceiling.copy_bytes_per_second(2**20) > 1e6


def test_a_device_says_whether_the_host_computes():
    class Elsewhere(Device):
        type = "elsewhere"

    assert Waiting().on_host
    assert not Elsewhere().on_host
