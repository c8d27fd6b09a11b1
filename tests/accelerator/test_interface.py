import os
from datetime import timedelta

import pytest
import torch

from portmoe.accelerator import Collectives, Device, Probe
from portmoe.accelerator.interface import BufferPool, set_unset
from portmoe.accelerator.probing import release
from portmoe.errors import ConfigError


def test_the_pool_allocates_once_per_size_dtype_and_number_in_use():
    pool, cpu = BufferPool(), torch.device("cpu")
    for _ in range(5):
        first, second = (pool.take(8, torch.float32, cpu) for _ in range(2))
        third = pool.take(8, torch.bfloat16, cpu)
        assert first.data_ptr() != second.data_ptr()
        assert (third.numel(), third.dtype) == (8, torch.bfloat16)
        for buffer in (first, second, third):
            pool.give(buffer)
    assert pool.allocations == 3


def test_the_users_environment_goes_before_the_backends(monkeypatch):
    monkeypatch.setenv("TOY_SET", "user")
    monkeypatch.setenv("TOY_UNSET", "x")
    monkeypatch.delenv("TOY_UNSET")
    set_unset({"TOY_SET": "backend", "TOY_UNSET": "backend"})
    assert (os.environ["TOY_SET"], os.environ["TOY_UNSET"]) == ("user", "backend")


class Sheet(Device):
    type = "toy"

    def data_sheet_flops(self, dtype):
        return 5e12 if dtype == torch.bfloat16 else None


def test_a_given_peak_goes_before_the_data_sheet(monkeypatch):
    monkeypatch.delenv("PORTMOE_PEAK_TFLOPS", raising=False)
    assert Sheet().peak_flops(torch.bfloat16) == 5e12
    assert Sheet().peak_flops(torch.float32) is None
    monkeypatch.setenv("PORTMOE_PEAK_TFLOPS", "353.5")
    assert Sheet().peak_flops(torch.bfloat16) == pytest.approx(353.5e12)


@pytest.mark.parametrize("given", ["", "fast", "-1", "0", "nan", "inf"])
def test_a_peak_that_is_no_positive_number_is_refused(monkeypatch, given):
    monkeypatch.setenv("PORTMOE_PEAK_TFLOPS", given)
    with pytest.raises(ConfigError, match=r"PORTMOE_PEAK_TFLOPS.*positive number"):
        Sheet().peak_flops(torch.bfloat16)


class Looking(Device):
    """A device whose software is broken and outdated; torch's view of it is given."""

    type = "toy"

    def __init__(self, sees, count=1):
        self.sees, self.counted = sees, count

    def software(self):
        probe = Probe({"driver": "3.1"})
        probe.fail("no driver", "install it")
        probe.warn("old driver", "update it")
        return probe

    def count(self):
        return self.counted

    def name(self):
        return "Toy 9000"


@pytest.fixture
def torch_sees(monkeypatch):
    def see(device_type):
        seen = torch.device(device_type) if device_type else None
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: seen)

    return see


def test_where_torch_sees_the_device_only_the_warnings_about_its_software_stay(torch_sees):
    torch_sees("cuda")
    device = Looking(sees=True, count=2)
    device.type = "cuda"
    probe = device.probe()
    assert probe.usable
    assert probe.present
    assert [p.summary for p in probe.problems] == ["old driver"]
    assert probe.facts == {"driver": "3.1", "devices": "2 × Toy 9000"}


@pytest.mark.parametrize("seen", [None, "cuda"])
def test_where_torch_sees_none_the_software_says_why(torch_sees, seen):
    torch_sees(seen)
    probe = Looking(sees=False).probe()
    assert not probe.usable
    assert [p.summary for p in probe.problems if p.fatal] == ["no driver"]


def test_without_a_known_reason_torchs_own_view_is_the_problem(torch_sees):
    class Plain(Looking):
        def software(self):
            return Probe()

    torch_sees("cuda")
    assert "its accelerator is 'cuda'" in Plain(sees=False).probe().problems[0].summary
    device = Plain(sees=True, count=0)
    device.type = "cuda"
    assert device.probe().problems[0].summary == "torch sees no cuda device"


def test_exceptions_while_probing_become_problems_and_keep_the_facts(torch_sees):
    class Raising(Looking):
        def software(self):
            raise OSError("unreadable")

        def find_devices(self, probe):
            probe.facts["half"] = "way"
            raise RuntimeError("driver said no")

    probe = Raising(sees=False).probe()
    text = " ".join(problem.summary for problem in probe.problems)
    assert "OSError: unreadable" in text
    assert "RuntimeError: driver said no" in text
    assert probe.facts == {"half": "way"}
    assert not probe.usable


class ToyCollectives(Collectives):
    backend = "toyccl"

    def environment(self, timeout):
        return {"TOYCCL_TIMEOUT": str(int(timeout.total_seconds()))}


def test_init_binds_the_device_and_gives_the_cpu_gloo(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setenv("TOYCCL_TIMEOUT", "x")
    monkeypatch.delenv("TOYCCL_TIMEOUT")
    device, timeout, store = torch.device("cuda", 3), timedelta(seconds=7), torch.distributed.HashStore()
    ToyCollectives().init(device, 3, 8, timeout, store)
    (positional, named) = calls.pop()
    assert positional == ("cpu:gloo,cuda:toyccl",)
    assert named == {"store": store, "rank": 3, "world_size": 8, "timeout": timeout, "device_id": device}
    assert os.environ["TOYCCL_TIMEOUT"] == "7"


@pytest.mark.parametrize(
    ("text", "numbers"), [("2.12.0.post3", (2, 12, 0)), ("2.13.0+cpu", (2, 13, 0)), ("9.1.0.B12", (9, 1, 0))]
)
def test_release_reads_the_leading_numbers(text, numbers):
    assert release(text) == numbers
