"""Config keys that make layouts, and what two layouts of one run must agree in."""

import pytest

LOSS, NORM = 1e-6, 1e-5  # relative, float32

PP2, PP4, CHUNKS2 = "parallel.pipeline.size=2", "parallel.pipeline.size=4", "model.num_chunks=2"
OVERLAP = "parallel.pipeline.interleaved_overlap=true"
LAYERS4 = ["model.num_layers=4"]
MIXED = ["model.num_layers=5", "model.first_k_dense_replace=2", "moe.noisy_gate_policy=Jitter"]
NO_EP, EP2 = "parallel.expert.size=1", "parallel.expert.size=2"
FSDP, SUBSETS, REPLICAS = "parallel.zero1.fsdp=true", "parallel.zero1.size=2", "parallel.zero1.size=1"
RAGGED = "model.moe_type=MegaBlock-D"
MANY = "model.num_experts=16"  # most are without a token in a micro-batch of 32
TP2, TP4, MSP = "parallel.tensor.size=2", "parallel.tensor.size=4", "parallel.tensor.mode=msp"
FSP, ISP = "parallel.tensor.mode=fsp", "parallel.tensor.mode=isp"
WEIGHT2, WEIGHT4 = "parallel.weight.size=2", "parallel.weight.size=4"
AHEAD, POOL = "parallel.weight.overlap=true", "parallel.weight.memory_pool=true"
DENSE_TOO = ["model.first_k_dense_replace=1", "model.moe_use_residual=true", "loss.label_smoothing=0.1"]


def assert_same(records, expected, loss=LOSS, norm=NORM) -> None:
    assert len(records) == len(expected) > 0
    for ours, theirs in zip(records, expected, strict=True):
        for key in ("loss", "moe_loss", "loss_from_metric"):
            assert ours[key] == pytest.approx(theirs[key], rel=loss), (ours["step"], key)
        norms = [key for key in theirs if key.startswith("grad_norm/")]
        assert norms
        for key in norms:
            assert ours[key] == pytest.approx(theirs[key], rel=norm), (ours["step"], key)
        loads = [key for key in theirs if key.startswith("expert_load/")]
        for key in ("tokens/en", "acc", *loads, "dropped_token_rate", "num_consumed_tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=loss), (ours["step"], key)
