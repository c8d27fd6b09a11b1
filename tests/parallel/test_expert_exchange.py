"""The exchange of rows between ranks, with routings that leave ranks and experts without any."""

import pytest
import torch
import torch.distributed as dist

import portmoe
from portmoe.model.experts import Experts
from portmoe.model.reference_table import reference_table
from portmoe.parallel.cuts import cut_parameters
from portmoe.parallel.expert import spread
from portmoe.parallel.layout import Layout
from portmoe.parallel.mesh import build_meshes

EXPERTS, HIDDEN, WIDTH = 8, 6, 16
KEYS = (
    "model.hidden_size=6",
    "model.num_attention_heads=1",
    "model.multiple_of=16",
    "model.num_experts=8",
    "data.global_batch_size=null",
)

# rows of each expert, rank by rank
RAGGED = {
    "everything to the last expert": [[0] * 7 + [9]] * 4,
    "one rank has nothing to send": [[0] * 8, [1, 2, 3, 0, 0, 1, 0, 2], [0, 5, 0, 0, 0, 0, 0, 0], [1] * 8],
    "nothing at all": [[0] * 8] * 4,
}


def network(x, w1, w3, w2):
    gate = x @ w1.T
    return (gate * gate.sigmoid() * (x @ w3.T)) @ w2.T


class Holder(torch.nn.Module):
    """What ranks spread: experts somewhere in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts(EXPERTS, HIDDEN, WIDTH, reference_table())


def differences(counts) -> list[float]:
    """On a rank: largest errors of outputs, input gradients and weight gradients, in float64."""
    dist.init_process_group("gloo")
    try:
        rank, world = dist.get_rank(), dist.get_world_size()
        holder = Holder().double()
        shapes = {name: p.shape for name, p in holder.experts.named_parameters()}
        generator = torch.Generator().manual_seed(3)
        whole = {n: torch.randn(s, generator=generator, dtype=torch.double) for n, s in shapes.items()}
        for name, value in whole.items():
            holder.experts.get_parameter(name).data.copy_(value)
            value.requires_grad_()
        layout = Layout.plan(portmoe.load_config("tiny_moe4", KEYS), world)
        meshes = build_meshes(layout, "cpu")
        cut_parameters(holder, meshes, weights_are_shared=False)
        spread(holder, meshes)
        rows = [torch.randn(sum(c), HIDDEN, generator=generator, dtype=torch.double) for c in counts]
        ways = [torch.randn(sum(c), HIDDEN, generator=generator, dtype=torch.double) for c in counts]
        mine = rows[rank].clone().requires_grad_()
        output = holder.experts(mine, torch.tensor(counts[rank]).cumsum(0))
        (output * ways[rank]).sum().backward()
        total, expected_output, expected_input = 0.0, None, rows[rank].clone().requires_grad_()
        for other in range(world):
            x = expected_input if other == rank else rows[other]
            parts = x.split(counts[other])
            y = torch.cat(
                [network(part, *(whole[n][e] for n in ("w1", "w3", "w2"))) for e, part in enumerate(parts)]
            )
            expected_output = y if other == rank else expected_output
            total = total + (y * ways[other]).sum()
        total.backward()
        errors = [output - expected_output, mine.grad - expected_input.grad]
        share = EXPERTS // world
        for name, value in whole.items():
            gradient = holder.experts.get_parameter(name).grad.to_local()
            assert gradient is not None
            errors.append(gradient - value.grad[rank * share : (rank + 1) * share])
        return [error.abs().max().item() if error.numel() else 0.0 for error in errors]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", RAGGED)
def test_ranks_and_experts_without_rows(world, name):
    for errors in world(4).call(differences, RAGGED[name]):
        assert max(errors) < 1e-12
