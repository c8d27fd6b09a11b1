"""The simulated device: the same numbers as the CPU, a device's refusals, and memory that is counted."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

from portmoe.accelerator import get_accelerator
from portmoe.accelerator.interface import Collectives

NPU = torch.device("npu", 0)
ENDS = torch.tensor([4], dtype=torch.int32, device=NPU)


def test_it_says_that_it_is_simulated():
    accelerator = get_accelerator("npu")
    assert "simulated" in accelerator.device.name().lower()
    assert "simulated" in accelerator.device.probe().facts["torch_npu"]
    assert get_accelerator().name == "npu"  # auto prefers it to the CPU


def test_a_network_trains_to_the_same_bits_as_on_the_cpu():
    def train(device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.LayerNorm(32), nn.Linear(32, 4)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        x = torch.randn(8, 16).to(device)
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), torch.arange(8, device=device) % 4)
            loss.backward()
            optimizer.step()
        return [p.detach().cpu() for p in model.parameters()]

    for ours, theirs in zip(train(NPU), train("cpu"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_views_resizes_and_host_indices_reach_the_same_memory():
    x = torch.arange(24.0, device=NPU).view(4, 6)
    x.t()[1, 2:] = -1.0
    x[:, ::2].mul_(2)
    expected = torch.arange(24.0).view(4, 6)
    expected.t()[1, 2:] = -1.0
    expected[:, ::2].mul_(2)
    assert torch.equal(x.cpu(), expected)
    assert torch.equal(x[torch.tensor([2, 0])].cpu(), expected[[2, 0]])
    out = torch.empty(0, device=NPU)
    torch.add(x, 1, out=out)
    assert torch.equal(out.cpu(), expected + 1)
    assert x.resize_(2, 6).shape == (2, 6)
    assert torch.equal(x.to("npu:1").cpu(), expected[:2])


def test_what_was_never_written_is_nan():
    assert torch.empty(5, device=NPU).isnan().all()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: x + torch.ones(4, 4), "same device"),
        (lambda x: torch.where(x > 0, x, torch.ones(4, 4)), "same device"),
        (lambda x: x + x.to("npu:1"), "same device"),
        (lambda x: x.double() + 1, "float64"),
        (lambda x: x.topk(2, sorted=False), "sorted=False"),
        (lambda x: x.bfloat16().sort(), "bfloat16"),
        (lambda x: torch.nn.functional.grouped_mm(x, x[None], offs=ENDS), "no kernel"),
    ],
)
def test_what_a_device_refuses(call, error):
    with pytest.raises((RuntimeError, TypeError, NotImplementedError), match=error):
        call(torch.randn(4, 4, device=NPU))


def test_memory_is_counted_and_ends():
    from torch_npu import faults

    memory = get_accelerator("npu").memory
    torch.npu.set_device(0)
    before = memory.allocated()
    memory.reset_peak()
    block = torch.empty(1000, device=NPU)
    doubled = block + block
    assert memory.allocated() == before + 8000
    del block, doubled
    assert (memory.allocated(), memory.peak()) == (before, before + 8000)
    assert memory.total() == 2**36
    with faults.memory_limit(before + 1000), pytest.raises(torch.OutOfMemoryError, match="simulated"):
        torch.empty(1000, device=NPU)


def test_events_measure_time_and_streams_exist():
    begin, end = (torch.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.randn(200, 200, device=NPU) @ torch.randn(200, 200, device=NPU)
    end.record()
    assert begin.elapsed_time(end) > 0
    stream = torch.npu.Stream()
    with torch.npu.stream(stream):
        assert torch.npu.current_stream() == stream
    assert torch.npu.current_stream() != stream


def test_random_numbers_repeat():
    device = get_accelerator("npu").device
    device.seed(3)
    state = device.generator_state()
    first = torch.randn(4, device=NPU)
    device.set_generator_state(state)
    assert torch.equal(torch.randn(4, device=NPU), first)


@pytest.mark.parametrize("binds_device", [True, False])
def test_a_host_group_beside_the_device_group(binds_device):
    class Bound(Collectives):
        backend = "hccl"

    Bound.binds_device = binds_device
    collectives = Bound()
    collectives.init(NPU, 0, 1, timedelta(seconds=60), dist.HashStore())
    try:
        group = collectives.host_group()
        on_host, on_device = torch.ones(2), torch.ones(2, device=NPU)
        dist.all_reduce(on_host, group=group)
        dist.all_reduce(on_device)
        out = torch.empty(2, device=NPU)
        dist.all_gather_into_tensor(out, on_device)
        dist.reduce_scatter_tensor(out, on_device)
        dist.barrier()
        assert on_host.tolist() == out.tolist() == [1, 1]
        assert dist.group.WORLD.bound_device_id == (NPU if binds_device else None)
    finally:
        dist.destroy_process_group()


def test_attention_by_torch_is_causal_here_too():
    q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
    attend = nn.functional.scaled_dot_product_attention
    ours = attend(q.to(NPU), k.to(NPU), v.to(NPU), is_causal=True).cpu()
    torch.testing.assert_close(ours, attend(q, k, v, is_causal=True))
