"""Every layout gives the numbers of one process: losses, gradient norms, counts."""

import pytest
from layout_keys import (
    AHEAD,
    CHUNKS2,
    DENSE_TOO,
    EP2,
    FSDP,
    FSP,
    ISP,
    LAYERS4,
    MANY,
    MIXED,
    MSP,
    NO_EP,
    OVERLAP,
    POOL,
    PP2,
    PP4,
    RAGGED,
    REPLICAS,
    SUBSETS,
    TP2,
    TP4,
    WEIGHT2,
    WEIGHT4,
    assert_same,
)

STEPS = "data.total_steps=15"

# ranks, overrides of the layout, overrides of the model
LAYOUTS = {
    "mtp2": (2, [TP2], []),
    "mtp4": (4, [TP4], DENSE_TOO),
    "mtp2 dp2": (4, [TP2, NO_EP], []),
    "mtp2 ep2 fsdp": (4, [TP2, FSDP], DENSE_TOO),
    "mtp2 ep2 ragged": (4, [TP2], [RAGGED]),
    "mtp2 pp2": (4, [TP2, PP2], LAYERS4),
    "mtp2 recomputed": (2, [TP2, "model.checkpoint=true"], []),
    "msp2": (2, [TP2, MSP], []),
    "msp4": (4, [TP4, MSP], DENSE_TOO),
    "msp2 dp2 zero1 off": (4, [TP2, MSP, NO_EP, REPLICAS], []),
    "msp2 ep2": (4, [TP2, MSP], DENSE_TOO),
    "msp2 pp2 interleaved": (4, [TP2, MSP, PP2, CHUNKS2], LAYERS4),
    "msp2 recomputed": (2, [TP2, MSP, "model.checkpoint=true"], ["moe.noisy_gate_policy=Jitter"]),
    "fsp2": (2, [TP2, FSP], DENSE_TOO),
    "fsp4": (4, [TP4, FSP], ["moe.noisy_gate_policy=Jitter"]),
    "fsp2 dp2 zero1 off": (4, [TP2, FSP, NO_EP, REPLICAS], []),
    "fsp2 ep2 fsdp": (4, [TP2, FSP, FSDP], DENSE_TOO),
    "fsp2 ep2 ragged": (4, [TP2, FSP], [RAGGED]),
    "fsp2 pp2 interleaved": (4, [TP2, FSP, PP2, CHUNKS2], LAYERS4),
    "fsp2 recomputed": (2, [TP2, FSP, "model.checkpoint=0.5"], []),
    "isp2": (2, [TP2, ISP], DENSE_TOO),
    "isp4": (4, [TP4, ISP], ["moe.noisy_gate_policy=Jitter"]),
    "isp4 capacity as needed": (4, [TP4, ISP], ["moe.top_k=1", "moe.drop_tokens=false"]),
    "isp2 dp2 zero1 off": (4, [TP2, ISP, NO_EP, REPLICAS], ["model.moe_type=MegaBlock"]),
    "isp2 dp2 subsets of 2": (4, [TP2, ISP, NO_EP, SUBSETS], []),
    "isp2 ep2": (4, [TP2, ISP], DENSE_TOO),
    "isp2 ep4 fsdp": (4, [TP2, ISP, "parallel.expert.size=4", FSDP], [MANY]),
    "isp2 recomputed": (2, [TP2, ISP, "model.checkpoint=true"], []),
    "isp2 pp2": (4, [TP2, ISP, PP2], MIXED),
    "isp2 weights over 2": (2, [TP2, ISP, WEIGHT2], []),
    "isp2 weights over 4 ahead pooled, ep2": (4, [TP2, ISP, WEIGHT4, AHEAD, POOL], [RAGGED]),
    "isp2 weights over 2 ahead, recomputed": (2, [TP2, ISP, WEIGHT2, AHEAD, "model.checkpoint=0.5"], []),
    "isp2 weights over 2 ahead pooled pp2": (4, [TP2, ISP, WEIGHT2, AHEAD, POOL, PP2], MIXED),
    "isp4 weights over 2": (4, [TP4, ISP, WEIGHT2, REPLICAS], DENSE_TOO),
    "isp2 dp2 weights over 2, moments over 4": (4, [TP2, ISP, WEIGHT2, AHEAD, NO_EP], DENSE_TOO),
    "isp2 ep2 weights over 2": (4, [TP2, ISP, WEIGHT2], DENSE_TOO),
    "isp2 weights over 4 of dp2": (4, [TP2, ISP, WEIGHT4, NO_EP, FSDP], []),
    "isp2 weights over 2 ahead pp2 interleaved": (4, [TP2, ISP, WEIGHT2, AHEAD, PP2, CHUNKS2], LAYERS4),
    "isp2 dp2 pp2 ep2, weights over 4": (8, [TP2, ISP, WEIGHT4, AHEAD, POOL, PP2], [*LAYERS4, MANY]),
    "fsp2 dp2 pp2 ep2 interleaved zero1 off": (8, [TP2, FSP, PP2, CHUNKS2, REPLICAS], [*LAYERS4, MANY]),
    "isp1 weights over 2": (2, [ISP, WEIGHT2, NO_EP], []),
    "dp2": (2, [NO_EP], []),
    "dp4": (4, [NO_EP], []),
    "dp4 zero1 off": (4, [NO_EP, REPLICAS], []),
    "dp4 subsets of 2": (4, [NO_EP, SUBSETS], []),
    "dp2 fsdp": (2, [NO_EP, FSDP], []),
    "dp4 fsdp in subsets of 2": (4, [NO_EP, FSDP, SUBSETS], []),
    "ep2": (2, [], []),
    "ep4": (4, [], []),
    "ep2 of dp4": (4, [EP2], []),
    "ep2 of dp4 zero1 off": (4, [EP2, REPLICAS], []),
    "ep2 of dp4 subsets of 2": (4, [EP2, SUBSETS], []),
    "ep2 of dp4 fsdp": (4, [EP2, FSDP], []),
    "ep4 ragged": (4, [], [RAGGED]),
    "ep2 of dp4 ragged, 16 experts": (4, [EP2], [RAGGED, MANY]),
    "ep4 16 experts": (4, [], [MANY]),
    "ep4 MegaBlock": (4, [], ["model.moe_type=MegaBlock"]),
    "ep4 capacity as needed": (4, [], ["moe.top_k=1", "moe.drop_tokens=false", "moe.use_rts=false"]),
    "ep2 recomputed": (2, [], ["model.checkpoint=true", "model.moe_use_residual=true"]),
    "pp2": (2, [PP2], LAYERS4),
    "pp2 interleaved": (2, [PP2, CHUNKS2], LAYERS4),
    "pp2 interleaved overlapped": (2, [PP2, CHUNKS2, OVERLAP], LAYERS4),
    "pp2 recomputed": (2, [PP2, "model.checkpoint=0.75"], LAYERS4),
    "pp2 dense and noisy layers": (2, [PP2], MIXED),
    "pp4": (4, [PP4], LAYERS4),
    "pp2 dp2": (4, [PP2, NO_EP], LAYERS4),
    "pp2 dp2 zero1 off": (4, [PP2, NO_EP, REPLICAS], LAYERS4),
    "pp2 dp2 interleaved": (4, [PP2, NO_EP, CHUNKS2, OVERLAP], LAYERS4),
    "pp2 dp2 fsdp": (4, [PP2, FSDP], LAYERS4),
    "pp2 dp2 interleaved fsdp": (4, [PP2, CHUNKS2, FSDP], LAYERS4),
    "pp2 ep2": (4, [PP2], LAYERS4),
    "pp2 ep2 interleaved ragged": (4, [PP2, CHUNKS2], [*LAYERS4, RAGGED]),
    "dp8 subsets of 4": (8, [NO_EP, "parallel.zero1.size=4"], []),
    "ep4 of dp8 fsdp in subsets of 2": (8, [FSDP, SUBSETS], [RAGGED]),
    "ep8": (8, [], [MANY]),
    "mtp2 pp2 dp2": (8, [TP2, PP2, NO_EP], LAYERS4),
    "mtp2 pp2 ep2 subsets of 1": (8, [TP2, PP2, REPLICAS], MIXED),
    "mtp4 ep2 fsdp": (8, [TP4, FSDP], DENSE_TOO),
    "msp2 pp4 interleaved": (8, [TP2, MSP, PP4, CHUNKS2], ["model.num_layers=8"]),
    "msp2 pp2 ep2 interleaved overlapped": (8, [TP2, MSP, PP2, CHUNKS2, OVERLAP], LAYERS4),
    "msp4 pp2": (8, [TP4, MSP, PP2], LAYERS4),
    "pp2 ep4 interleaved fsdp": (8, [PP2, CHUNKS2, FSDP], LAYERS4),
    "pp2 dp4 subsets of 2": (8, [PP2, NO_EP, SUBSETS], LAYERS4),
    "pp4 ep2": (8, [PP4], LAYERS4),
    "isp2 pp2 ep2 of dp4 subsets of 2": (8, [TP2, ISP, PP2, EP2, SUBSETS], LAYERS4),
}

# Relative bounds on the losses of 15 steps in bfloat16, against one process in bfloat16. A product's result
# is rounded to 8 bits, by up to 2^-9. Where ranks share a product, each rounds its part of a sum, so that
# every activation differs by about that much; the mean over many tokens may differ by no more. Where they do
# not, all products are those of one process: only float32 sums over ranks differ, which rounds a few weights
# the other way. A tenth is asked for then. (Seen: 7e-4 and 4e-5; one process is 1.2e-3 away from float32.)
ROUNDING = 2**-9
BF16 = {
    "dp2": ROUNDING / 10,
    "ep2 of dp4 fsdp": ROUNDING / 10,
    "pp2": ROUNDING / 10,
    "msp2": ROUNDING,
    "mtp2 ep2 fsdp": ROUNDING,
    "isp2": ROUNDING,
    "fsp2 pp2 interleaved": ROUNDING,
}
FAST_BF16 = {"dp2", "msp2"}

# The rest of the matrix is behind -m slow.
FAST = {
    *(
        "mtp2 ep2 fsdp",
        "msp2 pp2 interleaved",
        "fsp2",
        "isp2 weights over 4 ahead pooled, ep2",
    ),
    *("dp2", "dp4 zero1 off", "dp4 subsets of 2", "dp2 fsdp"),
    *("ep2", "ep4", "ep2 of dp4 fsdp", "ep4 ragged"),
    *("pp2", "pp2 interleaved", "pp2 dense and noisy layers", "pp4", "pp2 ep2"),
}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_the_numbers_of_one_process(name, run, alone):
    ranks, layout, model = LAYOUTS[name]
    assert_same(run(ranks, *layout, *model, STEPS), alone(*model, STEPS))


@pytest.mark.parametrize(
    "name", [name if name in FAST_BF16 else pytest.param(name, marks=pytest.mark.slow) for name in BF16]
)
def test_bfloat16_stays_within_its_rounding(name, run, alone):
    ranks, layout, model = LAYOUTS[name]
    keys = (*model, STEPS, "model.dtype=bfloat16")
    ours, theirs = run(ranks, *layout, *keys), alone(*keys)
    assert len(ours) == len(theirs) == 15
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=BF16[name]), one["step"]


def test_checkpoints_move_between_layouts(run, alone, tmp_path):
    """One process → experts over 4 ranks → over 2 of 4, sharded there → every rank its own, each resuming."""
    saving = ["ckpt.enable_save_ckpt=true"]
    for ranks, layout, steps in ((1, [], 2), (4, [], 4), (4, [EP2, FSDP], 6), (2, [NO_EP], 10)):
        keys = (*saving, *layout, f"data.total_steps={steps}", "lr_scheduler.total_steps=10")
        records = run(ranks, *keys, directory=tmp_path / "run")
        assert len(records) == steps
    assert_same(records, alone())
