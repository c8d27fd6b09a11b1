"""What the dry run says a layout communicates, against what real ranks communicate."""

import pytest
from layout_keys import (
    AHEAD,
    CHUNKS2,
    DENSE_TOO,
    FSP,
    ISP,
    LAYERS4,
    MIXED,
    MSP,
    NO_EP,
    OVERLAP,
    POOL,
    PP2,
    PP4,
    REPLICAS,
    SUBSETS,
    TP2,
    WEIGHT2,
)
from worlds import MODEL, train

import portmoe
from portmoe.parallel.layout import Layout
from portmoe.planning.fake_world import measure
from portmoe.planning.traffic import Counted
from portmoe.training import session
from portmoe.training.engine import NativeEngine

FSDP, BF16 = "parallel.zero1.fsdp=true", "model.dtype=bfloat16"

LAYOUTS = {
    "dp2": (2, []),
    "dp4 subsets": (4, ["parallel.zero1.size=2", *LAYERS4]),
    "dp2 fsdp": (2, [FSDP, *MIXED]),
    "dp2 experts one at a time, recomputed": (
        2,
        [FSDP, NO_EP, "moe.moe_implementation=shard", "moe.expert_in_one_shard=1", "model.checkpoint=0.5"],
    ),
    "dp2 bfloat16": (2, [BF16, "data.total_steps=2"]),
    "pp2 recomputed": (2, [PP2, "model.checkpoint=0.5", *LAYERS4]),
    "pp4": (4, [PP4, *LAYERS4]),
    "pp2 dp2": (4, [PP2, *MIXED]),
    "pp2 dp2 interleaved fsdp": (4, [PP2, CHUNKS2, OVERLAP, FSDP, *LAYERS4]),
    "dp2 ragged": (2, ["parallel.expert.size=1", "model.moe_type=MegaBlock-D"]),
    "dp2 nothing dropped": (
        2,
        ["parallel.expert.size=1", "moe.top_k=1", "moe.drop_tokens=false", "model.moe_use_residual=true"],
    ),
    "ep2 of dp4 fsdp": (4, ["parallel.expert.size=2", FSDP]),
    "dp2 pp2, experts not spread": (4, [PP2, "parallel.expert.size=1", *MIXED]),
    "mtp2": (2, [TP2, *MIXED]),
    "mtp2 ep2 fsdp": (4, [TP2, FSDP, *DENSE_TOO]),
    "msp2 pp2 interleaved": (4, [TP2, MSP, PP2, CHUNKS2, "model.num_layers=6"]),
    "fsp2 ep2": (4, [TP2, FSP, *DENSE_TOO]),
    "mtp2 pp2 dp2, subsets": (8, [TP2, PP2, NO_EP, SUBSETS, *MIXED]),
    "msp2 pp2 ep2 interleaved": (8, [TP2, MSP, PP2, CHUNKS2, *DENSE_TOO, *LAYERS4]),
    "ep4 of dp8 fsdp": (8, ["parallel.expert.size=4", FSDP]),
    "isp2 bfloat16": (2, [TP2, ISP, BF16, *DENSE_TOO]),
    "isp2 dp2, weights over 2": (4, [TP2, ISP, WEIGHT2, REPLICAS, NO_EP, *MIXED]),
    "isp2 dp2, moments cut further": (4, [TP2, ISP, WEIGHT2, NO_EP, *MIXED]),
    "isp2 pp2, weights over 2": (4, [TP2, ISP, WEIGHT2, AHEAD, POOL, PP2, *LAYERS4]),
    "heads over 2, ring of 2": (4, ["parallel.sequence.size=4", "model.num_attention_heads=2"]),
    "ring of 2, dp2 bfloat16": (
        4,
        ["parallel.sequence.size=2", "model.num_attention_heads=1", BF16, NO_EP],
    ),
    "pp2 dp2, 3 micro-batches": (4, [PP2, "data.global_batch_size=6"]),
}


def communicated(directory, *overrides) -> list[tuple[str, str, int, int]]:
    """What this rank communicates in its last step: (kind, group, calls, bytes)."""
    built, steps = [], []
    original, build = NativeEngine.train_step, session.build_meshes

    def build_meshes(*args):
        built.append(build(*args))
        return built[0]

    def train_step(engine, *args, **keywords):
        with Counted() as counted:
            outcome = original(engine, *args, **keywords)
        steps.append(list(counted.traffic.rows(built[0])))
        return outcome

    NativeEngine.train_step, session.build_meshes = train_step, build_meshes
    try:
        train(directory, *overrides, "data.total_steps=2")
    finally:
        NativeEngine.train_step, session.build_meshes = original, build
    return steps[-1]


SLOW = {
    *("mtp2 pp2 dp2, subsets", "msp2 pp2 ep2 interleaved", "ep4 of dp8 fsdp"),  # 8 ranks
    # what others have between them
    *("pp4", "dp2 pp2, experts not spread", "pp2 dp2, 3 micro-batches", "mtp2 ep2 fsdp"),
    *("mtp2", "pp2 dp2", "dp4 subsets", "dp2 ragged", "dp2 nothing dropped", "isp2 pp2, weights over 2"),
    *("ring of 2, dp2 bfloat16", "isp2 bfloat16", "isp2 dp2, moments cut further"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in LAYOUTS]
)
def test_the_dry_run_counts_what_real_ranks_communicate(name, world, tmp_path):
    ranks, keys = LAYOUTS[name]
    config = portmoe.load_config("tiny_moe4", (*MODEL, *keys))
    expected = measure(config, Layout.plan(config, ranks))
    counts = world(ranks).call(communicated, tmp_path / "run", *keys)
    assert expected.messages
    assert counts[expected.rank] == expected.messages


def test_zero1_moves_every_parameter_once_a_step():
    """By hand: 11,852,320,768 parameters, 32 · 4 · 4096 of them routers', which stay float32."""
    config = portmoe.load_config("7b_moe4", ["parallel.expert.size=1"])
    (gather, scatter) = measure(config, Layout.plan(config, 32)).messages
    groups = 32 * 2 + 1  # a block, its router, and the rest of the model
    exact = 32 * 4 * 4096
    assert gather == ("all-gather", "shard, 32 ranks", groups, 2 * (11_852_320_768 - exact) + 4 * exact)
    assert scatter == ("reduce-scatter", "shard, 32 ranks", groups, 4 * 11_852_320_768)
