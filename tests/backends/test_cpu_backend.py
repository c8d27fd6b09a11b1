import os
import platform
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from zygote import python

import portmoe
from portmoe.backends.cpu import memory, probe

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def cpu():
    return portmoe.get_accelerator("cpu")


COUNTED = """
import torch
from portmoe import get_accelerator

memory = get_accelerator("cpu").memory
before = memory.allocated()
memory.reset_peak()
held = torch.ones(64 * 2**20, dtype=torch.uint8)
print(memory.allocated() - before)
del held
print(memory.allocated() - before)
print(memory.peak() - before)
memory.reset_peak()
print(memory.peak() - before)
"""


def test_memory_counts_what_this_process_holds():
    """In a process of its own: one that has trained keeps freed memory, see ``Memory.keep_freed``."""
    done = python(COUNTED, os.environ)
    assert done.returncode == 0, done.stdout
    held, freed, peak, reset = map(int, done.stdout.split())
    assert held == pytest.approx(64 * MEBIBYTE, rel=0.1)
    assert freed < 16 * MEBIBYTE
    assert peak == pytest.approx(64 * MEBIBYTE, rel=0.1)
    assert reset < 16 * MEBIBYTE


def test_memory_without_proc_is_the_peak_of_the_process(cpu, monkeypatch):
    monkeypatch.setattr(memory, "STATUS", Path("/nowhere"))
    monkeypatch.setattr(memory, "CLEAR_REFS", Path("/nowhere/clear"))
    cpu.memory.reset_peak()
    assert cpu.memory.allocated() == cpu.memory.peak() > 50 * MEBIBYTE


def test_total_memory_is_the_machines(cpu):
    kibibytes = next(
        int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    assert cpu.memory.total() == kibibytes * 1024


def test_the_probe_reports_the_cores_this_process_may_use(cpu):
    assert cpu.device.probe().facts["cores"] == str(len(os.sched_getaffinity(0)))
    assert cpu.device.probe().usable


def test_the_processors_name_without_proc_is_still_something(monkeypatch):
    monkeypatch.setattr(probe, "CPUINFO", Path("/nowhere"))
    assert probe.processor()


def test_every_rank_gets_the_same_device_and_no_peak_is_claimed(cpu, monkeypatch):
    monkeypatch.delenv("PORTMOE_PEAK_TFLOPS", raising=False)
    assert cpu.open(0) == cpu.open(7) == torch.device("cpu")
    assert cpu.device.peak_flops(torch.float32) is None


def test_seed_and_generator_state_repeat_draws(cpu):
    cpu.device.seed(5)
    state = cpu.device.generator_state()
    first = torch.rand(4)
    cpu.device.set_generator_state(state)
    assert torch.equal(torch.rand(4), first)
    cpu.device.seed(5)
    assert torch.equal(torch.rand(4), first)
    cpu.device.seed(6)
    assert not torch.equal(torch.rand(4), first)


def test_deterministic_mode_can_be_switched(cpu):
    cpu.device.set_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled()
    cpu.device.set_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_process_group_is_gloo(cpu):
    cpu.collectives.init(torch.device("cpu"), 0, 1, timedelta(seconds=10), dist.HashStore())
    try:
        assert dist.get_backend() == "gloo"
        value = torch.ones(3)
        dist.all_reduce(value)
        assert value.tolist() == [1, 1, 1]
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library has no such settings")
def test_freed_memory_is_used_again():
    """Counted by the pages the system had to map; a process of its own, since the setting stays."""
    script = """
import resource, torch
from portmoe import get_accelerator

def pages(mebibytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(mebibytes * 2**20, dtype=torch.uint8)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * 4096 / 2**20

pages(100)
returned = pages(90)
get_accelerator("cpu").memory.keep_freed()
pages(100)
print(returned, pages(90))
"""
    command = [sys.executable, "-c", script]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200, env=environment)
    returned, kept = map(float, done.stdout.split())
    assert returned > 80
    assert kept < 10
