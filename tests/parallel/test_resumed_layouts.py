"""Checkpoints of layouts that split sequences and weights, resumed in others."""

import pytest
from test_layouts import (
    AHEAD,
    FSDP,
    FSP,
    ISP,
    LAYERS4,
    MSP,
    POOL,
    PP2,
    RAGGED,
    REPLICAS,
    TP2,
    TP4,
    WEIGHT2,
    WEIGHT4,
    assert_same,
)

ALONE = (1, [])
CHAINS = {
    "weights": ([ALONE, (2, [TP2, ISP, WEIGHT2, POOL]), ALONE], []),
    "fsp": ([ALONE, (4, [TP2, FSP]), (2, [TP2, FSP]), (4, [TP2, MSP, FSDP]), ALONE], []),
    "isp": ([ALONE, (4, [TP4, ISP]), (2, [TP2]), (4, [TP2, ISP, REPLICAS]), ALONE], []),
    "weights and experts": (
        [(4, [TP2, ISP, WEIGHT4, AHEAD, POOL]), (4, [FSDP]), (4, [TP4, ISP, WEIGHT2, REPLICAS]), ALONE],
        [RAGGED],
    ),
    "weights and stages": (
        [(4, [TP2, ISP, WEIGHT2, AHEAD, PP2]), (2, [TP2, ISP]), (4, [TP2, FSP, PP2]), (4, [])],
        LAYERS4,
    ),
}
FAST = {"weights"}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CHAINS]
)
def test_the_losses_go_on_in_another_layout(name, run, alone, tmp_path):
    chain, model = CHAINS[name]
    ends = [10 * part // len(chain) for part in range(1, len(chain) + 1)]
    for steps, (ranks, layout) in zip(ends, chain, strict=True):
        keys = (f"data.total_steps={steps}", "lr_scheduler.total_steps=10", "ckpt.enable_save_ckpt=true")
        records = run(ranks, *model, *layout, *keys, directory=tmp_path / "run")
        assert len(records) == steps
    log = (tmp_path / "run" / "train.log").read_text()
    assert all(f"resumed at step {steps}" in log for steps in ends[:-1])
    assert_same(records, alone(*model))
