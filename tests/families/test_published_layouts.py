"""The published families' models train in every layout as in one process."""

import pytest
from layout_keys import CHUNKS2, EP2, FSDP, FSP, ISP, MSP, NO_EP, PP2, REPLICAS, TP2, TP4
from worlds import records

from portmoe.config.read import load_config

SMALL = [
    "data.seq_len=32",
    "data.micro_bsz=1",
    "data.global_batch_size=4",
    "data.num_samples=200",
    "data.total_steps=5",
    "model.vocab_size=448",
    "model.hidden_size=32",
    "model.num_hidden_layers=3",
    "ckpt.enable_save_ckpt=false",
    "loss.z_loss_coeff=0.001",
]
LATENT = ["model.q_lora_rank=12", "model.kv_lora_rank=10", "model.moe_intermediate_size=16"]
FAMILIES = {
    "tiny_mixtral": ["model.intermediate_size=48", "model.router_jitter_noise=0.1"],
    "tiny_deepseek_v2": [*LATENT, "model.intermediate_size=48"],
    "tiny_qwen3_moe": ["model.moe_intermediate_size=16", "model.intermediate_size=48", "model.head_dim=12"],
    "tiny_qwen2_moe": [
        *("model.moe_intermediate_size=16", "model.intermediate_size=48"),
        *("model.shared_expert_intermediate_size=32", "model.mlp_only_layers=[0]"),
        *("moe.capacity_factor=1.0", "moe.min_capacity=2"),
    ],
    "internlm_7b": [
        *("model.num_attention_heads=4", "model.dtype=float32", "model.num_layers=3", "data.valid_every=0"),
        "data.min_length=0",
    ],
}
LAYOUTS = {
    "dp2": (2, [NO_EP]),
    "ep2 fsdp": (2, [FSDP]),
    "mtp2": (2, [TP2]),
    "msp2": (2, [TP2, MSP]),
    "fsp2 recomputed": (2, [TP2, FSP, "model.checkpoint=true"]),
    "isp2": (2, [TP2, ISP]),
    "mtp4": (4, [TP4]),
    "isp4": (4, [TP4, ISP]),
    "pp2": (2, [PP2]),
    "pp2 ep2": (4, [PP2]),
    "pp2 interleaved dp2": (4, [PP2, CHUNKS2, NO_EP, REPLICAS, "model.num_hidden_layers=4"]),
    "mtp2 pp2": (4, [TP2, PP2]),
    "msp2 ep2 fsdp": (4, [TP2, MSP, FSDP]),
    "isp2 ep2": (4, [TP2, ISP]),
    "ep2 of dp4": (4, [EP2]),
}
# Each family once in every kind of layout is behind -m slow.
FAST = {
    ("tiny_mixtral", "isp4"),
    ("tiny_mixtral", "pp2 ep2"),
    ("tiny_deepseek_v2", "msp2 ep2 fsdp"),
    ("tiny_deepseek_v2", "isp2"),
    ("tiny_deepseek_v2", "mtp2 pp2"),
    ("tiny_qwen3_moe", "mtp4"),
    ("tiny_qwen2_moe", "msp2"),
    ("internlm_7b", "dp2"),
}
CASES = [
    pytest.param(family, layout, marks=() if (family, layout) in FAST else pytest.mark.slow)
    for family in FAMILIES
    for layout in LAYOUTS
]
DENSE = "internlm_7b"


def train(directory, family, overrides):
    """One rank's part of a run."""
    from portmoe.training.run import train

    train(load_config(family, [*overrides, f"run.directory={directory}"]), family, "cpu", "torchrun")


@pytest.fixture(scope="module")
def losses(world, tmp_path_factory):
    """``losses(ranks, family, overrides)``: (loss, auxiliary loss, all norms) of every step."""

    def of(ranks, family, overrides):
        directory = tmp_path_factory.mktemp("published") / "run"
        world(ranks).call(train, directory, family, overrides)
        names = ("loss", "moe_loss", "grad_norm/default", "grad_norm/fp32", "grad_norm/experts")
        return [[record[name] for name in names if name in record] for record in records(directory)]

    return of


@pytest.fixture(scope="module")
def alone(losses):
    """``alone(family, overrides)``: the same of one process, each trained once."""
    made = {}

    def of(family, overrides):
        key = (family, *overrides)
        if key not in made:
            made[key] = losses(1, family, overrides)
        return made[key]

    return of


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_the_numbers_of_one_process(family, layout, losses, alone):
    ranks, keys = LAYOUTS[layout]
    model = [key for key in keys if key.startswith("model.num_hidden")]
    rest = [key for key in keys if key not in model]
    overrides = [*SMALL, *FAMILIES[family], *model]
    if family == DENSE:
        overrides = [key.replace("num_hidden_layers", "num_layers") for key in overrides]
        overrides.remove("loss.z_loss_coeff=0.001")
        rest = [key for key in rest if "expert" not in key]
    found, expected = losses(ranks, family, [*overrides, *rest]), alone(family, overrides)
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-6)
        assert ours[2:] == pytest.approx(theirs[2:], rel=1e-5)
    if family != DENSE:
        assert all(step[1] > 0 for step in found)
