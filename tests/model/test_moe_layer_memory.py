"""The layer's memory grows linearly with its tokens: allocations counted, not measured."""

import pytest
import torch
from torch.profiler import profile

import portmoe
from portmoe.config import Config
from portmoe.model import MoELayer
from portmoe.ops import OPERATIONS, choose
from portmoe.parallel.layout import Layout
from portmoe.parallel.workload import call_sites


def allocated(moe_type, tokens):
    """Bytes that a forward and backward pass of the layer as the CPU would run it allocates in all."""
    config = Config.model_validate(
        {
            "data": {"seq_len": tokens, "micro_bsz": 1},
            "model": {
                "hidden_size": 32,
                "num_attention_heads": 2,
                "num_layers": 1,
                "vocab_size": 4096,
                "multiple_of": 32,
                "moe_type": moe_type,
            },
        }
    )
    device = torch.device("cpu")
    offered = portmoe.get_accelerator("cpu").ops.implementations()
    ops = choose(OPERATIONS, offered, call_sites(config, Layout.plan(config, 1), device), config)
    layer = MoELayer(config, ops=ops)
    x_TH = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with profile(profile_memory=True) as profiler:
        layer(x_TH).sum().backward()
    return sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())


@pytest.mark.parametrize("moe_type", ["GShard", "MegaBlock-D"])
def test_twice_the_tokens_allocate_twice_as_much(moe_type):
    small, middle, large = (allocated(moe_type, tokens) for tokens in (256, 512, 1024))
    # What does not depend on the tokens, the weights' gradients, cancels in the differences; of a
    # quadratic part the second would be four times the first. Scratch follows the fullest expert.
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.15)
    assert middle - small > 256 * 32 * 4 * 4  # x, its gradient, and at least as much again
