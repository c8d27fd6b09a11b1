"""The trials must pass on a healthy device and notice an unhealthy one."""

import os
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from zygote import python

import portmoe
from portmoe.accelerator.preflight import Preflight
from portmoe.ops import OPERATIONS, Implementation
from portmoe.verify.machine import trials

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cpu():
    return portmoe.get_accelerator("cpu")


@pytest.fixture
def group(cpu):
    cpu.collectives.init(CPU, 0, 1, timedelta(seconds=10), dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", trials.ALLOWED)
def test_every_dtype_passes_on_the_cpu(dtype):
    (finding,) = trials.forward_backward(CPU, dtype)
    assert finding.status == "pass", finding


@pytest.mark.parametrize(("dtype", "level"), [(torch.float32, "fail"), (torch.bfloat16, "warn")])
def test_a_product_that_is_ten_percent_off_is_noticed(monkeypatch, dtype, level):
    true_linear = F.linear

    def wrong_linear(x, weight):
        return true_linear(x, weight) * (1.1 if x.dtype == dtype else 1)

    monkeypatch.setattr(F, "linear", wrong_linear)
    (finding,) = trials.forward_backward(CPU, dtype)
    assert finding.status == level
    assert finding.fix


def test_nan_is_noticed(monkeypatch):
    monkeypatch.setattr(F, "silu", lambda x: x * (float("nan") if x.dtype == torch.float32 else 1))
    (finding,) = trials.forward_backward(CPU, torch.float32)
    assert finding.status == "fail"


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("all_reduce", "all_reduce"),
        ("reduce_scatter_tensor", "reduce_scatter"),
        ("all_gather_into_tensor", "all_gather"),
        ("all_to_all_single", "uneven_all_to_all"),
    ],
)
def test_a_collective_with_wrong_values_is_named(cpu, group, monkeypatch, function, name):
    (finding,) = trials.collectives(cpu, CPU)
    assert finding.status == "pass", finding
    true_collective = getattr(dist, function)

    def wrong(tensor, *others):
        true_collective(tensor, *others)
        tensor += 1

    monkeypatch.setattr(dist, function, wrong)
    (finding,) = trials.collectives(cpu, CPU)
    assert finding.status == "fail"
    assert f"{name} gave" in finding.detail


def test_a_collective_that_is_not_offered_is_named(cpu, group):
    class Poor(type(cpu.collectives)):
        capabilities = frozenset({"all_reduce", "all_gather", "reduce_scatter"})

    (finding,) = trials.collectives(replace(cpu, collectives=Poor()), CPU)
    assert finding.status == "fail"
    assert "uneven_all_to_all is not offered" in finding.detail


MEMORY = """
from dataclasses import replace
import torch
import portmoe
from portmoe.verify.machine import trials

accelerator = portmoe.get_accelerator("cpu")

class Blind(type(accelerator.memory)):
    def allocated(self):
        return 0

for memory in (accelerator.memory, Blind()):
    print(next(trials.memory(replace(accelerator, memory=memory), torch.device("cpu"))).status)
"""


def test_statistics_that_do_not_count_are_noticed():
    """In a process of its own: one that has trained has memory to give that it once freed."""
    assert python(MEMORY, os.environ).stdout.split() == ["pass", "warn"]


def test_every_operation_gets_a_line_with_the_reason_why_a_preferred_one_was_not_taken(cpu):
    class Offers(type(cpu.ops)):
        def implementations(self):
            picky = Implementation(
                "megablock_gating", "fused", lambda *_: None, lambda workload: "needs a moon"
            )
            return [picky, *super().implementations()]

    record, findings = trials.operations(replace(cpu, ops=Offers()), CPU)
    lines = {finding.name: finding.detail for finding in findings if finding.status == "pass"}
    assert lines.keys() == record.keys() == OPERATIONS.keys()
    assert lines["megablock_gating"] == "reference (not fused: needs a moon)"
    assert record["megablock_gating"]["chosen"] == "reference"


def test_the_environment_shows_what_is_set(cpu, monkeypatch):
    monkeypatch.delenv("PORTMOE_PEAK_TFLOPS", raising=False)
    monkeypatch.setenv("TOY_MODE", "lax")
    wanted = trials.wanted_environment(cpu, Preflight(environment={"TOY_MODE": "x"}), timedelta(seconds=1))
    assert next(trials.environment(wanted, {})).detail == "TOY_MODE=lax"
    assert next(trials.environment([], {})).detail == "needs no variables"
    monkeypatch.delenv("TOY_ORDER", raising=False)
    text = next(trials.environment(wanted, {"TOY_ORDER": "fixed"})).detail
    assert text == "TOY_MODE=lax; with cudnn_deterministic also TOY_ORDER=fixed"
