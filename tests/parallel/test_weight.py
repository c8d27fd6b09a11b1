"""When sharded weights are gathered, and into what, on real ranks."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import MODEL, train

import portmoe
from portmoe.model.decoder import Block, Decoder
from portmoe.training.engine import NativeEngine

GATHER = "_allgather_base_"  # the engine's; between the tokens' ranks functional collectives have other names
ISP2 = ("parallel.tensor.size=2", "parallel.tensor.mode=isp", "parallel.weight.size=2")
OVERLAP, POOL = "parallel.weight.overlap=true", "parallel.weight.memory_pool=true"
LAYERS, MICRO_BATCHES = 3, 8


class Events(TorchDispatchMode):
    """What happens, in order, and what gathers write to: kept, so that nothing else gets its place."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self.buffers: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._opname == GATHER:
            self.order.append("gather")
            self.buffers.append(args[0].untyped_storage())
        return function(*args, **(kwargs or {}))


def observed(directory, *overrides) -> tuple[list[str], list[list[int]]]:
    """The events of the last step, and each step's buffers by their place in memory."""
    steps, compute, train_step = [], Block._compute, NativeEngine.train_step

    def observed_step(engine, *args, **keywords):
        with Events() as events:
            steps.append(events)
            return train_step(engine, *args, **keywords)

    def observed_compute(block, x_TH, *args):
        steps[-1].order.append("forward")
        results = compute(block, x_TH, *args)
        results[0].register_hook(lambda _: steps[-1].order.append("backward"))
        return results

    NativeEngine.train_step, Block._compute = observed_step, observed_compute
    try:
        train(directory, *ISP2, f"model.num_layers={LAYERS}", "data.total_steps=3", *overrides)
    finally:
        NativeEngine.train_step, Block._compute = train_step, compute
    return steps[-1].order, [[buffer.data_ptr() for buffer in events.buffers] for events in steps]


@pytest.mark.parametrize(
    ("overlap", "forward", "backward"),
    [
        # the first gather is of the embedding and the head
        ("false", "gather " + "gather forward " * LAYERS, "backward gather " * LAYERS),
        (
            "true",
            "gather gather " + "gather forward " * (LAYERS - 1) + "forward ",
            "gather " + "backward gather " * (LAYERS - 1) + "backward",
        ),
    ],
)
def test_overlap_gathers_a_block_before_the_one_ahead_of_it_computes(
    overlap, forward, backward, world, tmp_path
):
    for order, _ in world(2).call(observed, tmp_path / "run", f"parallel.weight.overlap={overlap}"):
        assert order == (forward + backward).split() * MICRO_BATCHES


@pytest.mark.parametrize("overlap", ["false", "true"])
def test_the_pool_allocates_no_gather_buffer_after_the_first_step(overlap, world, tmp_path):
    keys = (f"parallel.weight.overlap={overlap}", POOL, "model.dtype=bfloat16")  # routers are gathered apart
    for _, (first, *later) in world(2).call(observed, tmp_path / "run", *keys):
        assert later
        assert all(set(step) <= set(first) for step in later)
        assert len(set(first)) < len(first) / MICRO_BATCHES


def test_without_the_pool_every_gather_allocates(world, tmp_path):
    for _, steps in world(2).call(observed, tmp_path / "run", OVERLAP):
        buffers = [buffer for step in steps for buffer in step]
        assert len(set(buffers)) == len(buffers)


def held(directory, *overrides) -> tuple[int, int]:
    """Numbers of this rank's masters and first moments."""
    sizes, train_step = (0, 0), NativeEngine.train_step

    def numbers(tensors) -> int:
        return sum(tensor.to_local().numel() for tensor in tensors)

    def measured_step(engine, *args, **keywords):
        nonlocal sizes
        outcome = train_step(engine, *args, **keywords)
        sizes = (numbers(engine.optimizer.parameters.values()), numbers(engine.optimizer.exp_avg.values()))
        return outcome

    NativeEngine.train_step = measured_step
    try:
        train(directory, *ISP2, "parallel.expert.size=1", "data.total_steps=1", *overrides)
    finally:
        NativeEngine.train_step = train_step
    return sizes


def parameters() -> list[nn.Parameter]:
    with torch.device("meta"):
        return list(Decoder(portmoe.load_config("tiny_moe4", MODEL)).parameters())


@pytest.mark.parametrize("cut", [True, False])
def test_moments_of_matrices_are_sharded_over_the_holders_of_a_shard(cut, world, tmp_path):
    matrices = sum(p.numel() for p in parameters() if p.ndim > 1)
    vectors = sum(p.numel() for p in parameters() if p.ndim == 1)
    for masters, moments in world(4).call(held, tmp_path / "run", f"parallel.zero1.size={-1 if cut else 1}"):
        assert masters == (matrices + vectors) // 2
        assert moments == (matrices // 4 + vectors // 2 if cut else masters)
