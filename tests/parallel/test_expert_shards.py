"""Experts gathered, computed and freed some at a time: the numbers of all at once, in every layout."""

import json
import tempfile
from pathlib import Path

import pytest
from layout_keys import (
    DENSE_TOO,
    EP2,
    FSDP,
    ISP,
    LAYERS4,
    MANY,
    MSP,
    NO_EP,
    PP2,
    RAGGED,
    REPLICAS,
    SUBSETS,
    TP2,
    WEIGHT2,
    assert_same,
)
from worlds import MODEL

import portmoe
from portmoe.config.void import void
from portmoe.errors import ConfigError
from portmoe.parallel.layout import Layout

STEPS = "data.total_steps=6"
FULL = "model.checkpoint=true"


def of(size):
    return ["moe.moe_implementation=shard", f"moe.expert_in_one_shard={size}"]


LAYOUTS = {
    "dp2": (2, 4, [NO_EP, FSDP], [MANY]),
    "dp2 one at a time, ragged, recomputed": (2, 1, [NO_EP, FSDP, FULL], [RAGGED]),
    "ep2 of dp4, subsets of 2": (4, 2, [EP2, FSDP, SUBSETS], [RAGGED, MANY]),
    "mtp2 ep2": (4, 1, [TP2, FSDP], DENSE_TOO),
    "msp2 dp2, zero1 off": (4, 2, [TP2, MSP, NO_EP, FSDP, REPLICAS], []),
    "isp2 weights over 2, moments over 4": (4, 2, [TP2, ISP, WEIGHT2, NO_EP], [MANY]),
    "pp2 dp2, recomputed": (4, 2, [PP2, FSDP, NO_EP, FULL], LAYERS4),
    "dp3, which divides no width": (3, 2, [NO_EP, FSDP], ["data.global_batch_size=6", "model.mlp_ratio=2.0"]),
    "alone": (1, 2, [FSDP], [RAGGED]),
}


FAST = {
    "dp2 one at a time, ragged, recomputed",
    "ep2 of dp4, subsets of 2",
    "mtp2 ep2",
    "dp3, which divides no width",
}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_the_numbers_of_one_process(name, run, alone):
    ranks, size, layout, model = LAYOUTS[name]
    assert_same(run(ranks, *layout, *of(size), *model, STEPS), alone(*model, STEPS))


def test_the_losses_are_those_of_all_at_once_bit_by_bit(run):
    whole = run(2, NO_EP, FSDP, MANY, "data.total_steps=3")
    some = run(2, NO_EP, FSDP, MANY, "data.total_steps=3", *of(2))
    assert [record["loss"] for record in some] == [record["loss"] for record in whole]


def test_checkpoints_do_not_know_how_many(run, alone, tmp_path):
    """Two at a time on 2 ranks → whole on 1 → one at a time, experts spread, sharded on 4, each resuming."""
    saving = ["ckpt.enable_save_ckpt=true"]
    for ranks, layout, steps in (
        (2, [NO_EP, FSDP, *of(2)], 3),
        (1, [], 5),
        (4, [EP2, FSDP, *of(1)], 10),
    ):
        keys = (*saving, *layout, f"data.total_steps={steps}", "lr_scheduler.total_steps=10")
        records = run(ranks, *keys, directory=tmp_path / "run")
        assert len(records) == steps
    assert_same(records, alone())


EXPERTS, HIDDEN, WIDTH = 16, 64, 256
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 4


def peak_bytes(size, *keys):
    """The most bytes of tensors in a forward and a backward pass, over what was there; runs on a rank."""
    from portmoe.launch import launch
    from portmoe.launch.ranks import detect
    from portmoe.model.init import initialise
    from portmoe.model.reference_table import reference_table
    from portmoe.parallel.build import build
    from portmoe.parallel.mesh import build_meshes
    from portmoe.planning.fake_world import _batch

    sizes = (f"model.num_experts={EXPERTS}", f"model.hidden_size={HIDDEN}", f"model.multiple_of={WIDTH}")
    shards = of(size) if size else []
    config = portmoe.load_config(
        "tiny_moe4", (*MODEL, *sizes, "model.mlp_ratio=1.0", NO_EP, FSDP, *shards, *keys)
    )
    launch.start(portmoe.get_accelerator("cpu"), detect("torchrun"), 60)
    try:
        layout = Layout.plan(config, 2)
        (decoder,) = build(config, reference_table(), build_meshes(layout, "cpu"))
        decoder.to_empty(device="cpu")
        initialise(decoder, config)
        assert decoder.layers["0"].moe.sizes.width == WIDTH
        return min(_profiled_peak(decoder, _batch(layout)) for _ in range(2))
    finally:
        launch.stop()


def _profiled_peak(decoder, batch):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        decoder(batch.tokens_T, batch).loss_T.sum().backward()
    for parameter in decoder.parameters():
        parameter.grad = None
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profiled.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    return max(totals) - min(totals)


@pytest.mark.parametrize("keys", [pytest.param([], marks=pytest.mark.slow), [FULL]])
def test_peak_memory_follows_how_many(world, keys):
    """Whole weights, their gradients, and these in float32 on their way: 45 experts' bytes less.

    A third of it is asked for: what a collective used is freed in a thread of its own.
    """
    peaks = {size: min(world(2).call(peak_bytes, size, *keys)) for size in (None, EXPERTS, 1)}
    assert peaks[EXPERTS] - peaks[1] > 15 * EXPERT_BYTES
    assert peaks[None] - peaks[1] > 15 * EXPERT_BYTES


@pytest.mark.parametrize(
    ("size", "keys", "said"),
    [
        (3, ["parallel.expert.size=1"], "must divide the 16 experts .* nearest possible: 2 or 4"),
        (16, [EP2], r"the 8 experts .*\(model.num_experts=16 over 2 ranks, parallel.expert.size\).*: 4 or 8"),
    ],
)
def test_a_number_that_does_not_divide_is_refused(size, keys, said):
    with pytest.raises(ConfigError, match=f"moe.expert_in_one_shard={size} .*{said}"):
        portmoe.load_config("tiny_moe4", [MANY, FSDP, *of(size), *keys])


@pytest.mark.parametrize(("size", "ranks"), [(None, 4), (2, 4), (8, 2), (16, 1)])
def test_experts_are_spread_over_no_more_ranks_than_leave_whole_runs(size, ranks):
    shards = of(size) if size else []
    assert Layout.plan(portmoe.load_config("tiny_moe4", [MANY, FSDP, *shards]), 4).expert == ranks


def test_what_is_void_is_said():
    whole = portmoe.load_config("tiny_moe4", [MANY, *of(4)])
    assert "parallel.zero1.fsdp" in void(whole)["moe.expert_in_one_shard"]
    assert not {*void(portmoe.load_config("tiny_moe4", [MANY, FSDP, *of(4)]))} & {
        "moe.moe_implementation",
        "moe.expert_in_one_shard",
    }
