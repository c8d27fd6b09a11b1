"""Checkpoints saved in one layout, resumed in another: the losses are those of one process throughout."""

import shutil

import pytest
from layout_keys import (
    AHEAD,
    CHUNKS2,
    FSDP,
    FSP,
    ISP,
    LAYERS4,
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

ALONE = (1, [])
CHAINS = {
    "weights": ([ALONE, (2, [TP2, ISP, WEIGHT2, POOL]), ALONE], []),
    "fsp": ([ALONE, (4, [TP2, FSP]), (2, [TP2, FSP]), (4, [TP2, MSP, FSDP]), ALONE], []),
    "isp": ([ALONE, (4, [TP4, ISP]), (2, [TP2]), (4, [TP2, ISP, REPLICAS]), ALONE], []),
    "weights and experts": (
        [(4, [TP2, ISP, WEIGHT4, AHEAD, POOL]), (4, [FSDP]), (4, [TP4, ISP, WEIGHT2]), ALONE],
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


# Each is saved once and resumed in every other: 90 pairs. In all of them the model has 4 layers.
KINDS = {
    "alone": ALONE,
    "dp4 zero1 off": (4, [NO_EP, REPLICAS]),
    "dp4 subsets of 2": (4, [NO_EP, SUBSETS]),
    "dp2 fsdp": (2, [NO_EP, FSDP]),
    "ep4": (4, []),
    "mtp2 ep2 fsdp": (4, [TP2, FSDP]),
    "msp2 pp2 interleaved": (4, [TP2, MSP, PP2, CHUNKS2]),
    "pp2 interleaved overlapped": (2, [PP2, CHUNKS2, OVERLAP]),
    "pp4": (4, [PP4]),
    "pp2 ep2 zero1 off": (4, [PP2, REPLICAS]),
}
FAST_PAIRS = {"mtp2 ep2 fsdp": ["pp2 interleaved overlapped"], "dp4 subsets of 2": ["msp2 pp2 interleaved"]}
PAIRS = [pytest.param(saved, resumed, id=f"{saved} to one") for saved, resumed in FAST_PAIRS.items()] + [
    pytest.param(saved, sorted(KINDS.keys() - {saved}), id=f"{saved} to all", marks=pytest.mark.slow)
    for saved in KINDS
]


@pytest.mark.parametrize(("saved", "resumed"), PAIRS)
def test_any_layout_goes_on_from_any_other(saved, resumed, run, alone, tmp_path):
    keys = (*LAYERS4, "lr_scheduler.total_steps=10", "ckpt.enable_save_ckpt=true")
    ranks, layout = KINDS[saved]
    run(ranks, *layout, *keys, "data.total_steps=3", directory=tmp_path / "saved")
    for name in resumed:
        ranks, layout = KINDS[name]
        directory = shutil.copytree(tmp_path / "saved", tmp_path / name)
        records = run(ranks, *layout, *keys, "data.total_steps=6", directory=directory)
        assert "resumed at step 3" in (directory / "train.log").read_text()
        assert_same(records, alone(*LAYERS4)[:6])
