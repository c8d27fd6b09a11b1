"""Counts against a model built on the meta device, and figures worked out by hand."""

import pytest
import torch

from portmoe.config import Config
from portmoe.config.read import load_config
from portmoe.costs.flops import benchmark_flops_per_token, model_flops_per_token
from portmoe.costs.outline import outline
from portmoe.costs.parameters import count_parameters, exact_modules, parameter_groups
from portmoe.model import Decoder
from portmoe.model.capacity import expert_capacity
from portmoe.model.share import Share

SMALL = {"hidden_size": 24, "num_attention_heads": 2, "num_layers": 5, "vocab_size": 200, "multiple_of": 7}
VARIANTS = {
    "experts everywhere": {},
    "dense layers first": {"first_k_dense_replace": 2},
    "dense": {"num_experts": 1},
    "residual": {"moe_use_residual": True, "first_k_dense_replace": 1},
}


def make_config(model=None, **sections) -> Config:
    return Config.model_validate({"data": {"seq_len": 8}, "model": SMALL | (model or {}), **sections})


def on_meta(config: Config) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


def test_the_7b_model_has_exactly_the_benchmarks_parameters():
    config = Config()
    assert sum(p.numel() for p in on_meta(config).parameters()) == 11_852_320_768
    assert count_parameters(config).total == 11_852_320_768
    assert count_parameters(config).active == 7_423_135_744


@pytest.mark.parametrize("variant", VARIANTS)
def test_closed_formulas_count_what_the_model_has(variant):
    config = make_config(VARIANTS[variant])
    groups = parameter_groups(on_meta(config))
    sizes = {name: sum(p.numel() for p in group.values()) for name, group in groups.items()}
    count = count_parameters(config)
    assert sizes == {"default": count.dense, "fp32": count.router, "experts": count.experts}
    assert count.total == sum(sizes.values())
    assert count.active == count.total - count.experts + count.experts * 2 // config.model.num_experts


def test_groups_hold_every_parameter_once_and_the_right_ones():
    model = on_meta(make_config({"moe_use_residual": True}))
    groups = parameter_groups(model)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert set(groups["fp32"]) == {f"layers.{i}.moe.router.weight" for i in range(5)}
    assert set(groups["experts"]) == {
        f"layers.{i}.moe.experts.{w}" for i in range(5) for w in ("w1", "w2", "w3")
    }
    assert len(exact_modules(model)) == 5


def test_exact_norms_join_the_fp32_group():
    model = on_meta(make_config(use_fp32_norm=True))
    fp32 = parameter_groups(model)["fp32"]
    assert sum("norm" in name for name in fp32) == 11
    assert len(fp32) == len(exact_modules(model)) == 16


def test_stages_name_parameters_as_the_whole_model_does():
    config = make_config()
    with torch.device("meta"):
        stages = [
            Decoder(config, layers=range(2), head=False),
            Decoder(config, layers=range(2, 5), embed=False),
        ]
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in on_meta(config).named_parameters())


def test_the_7b_models_flops():
    config = Config()
    # 3·((8 + 4·2)·4096² + 4·2048·4096)·32 + 6·4096·103168
    assert benchmark_flops_per_token(config) == 31_526_486_016
    # 6·(32·(4·4096² + 4·4096 + 2·3·4096·5632) + 4096·103168) + 12·32·2048·4096
    assert model_flops_per_token(config) == 45_219_840_000
    # half of 12·32·2048·4096 less
    assert model_flops_per_token(config, causal=True) == 45_219_840_000 - 1_610_612_736


@pytest.mark.parametrize(("share", "layers"), [(False, 0), (True, 32), (0.25, 8)])
def test_recomputation_adds_the_forward_pass_of_its_layers(share, layers):
    config = Config.model_validate({"model": {"checkpoint": share}})
    benchmark_layer, real_layer = 16 * 4096**2 + 4 * 2048 * 4096, 2 * 205_537_280 + 4 * 2048 * 4096
    extra = benchmark_flops_per_token(config, recompute=True) - benchmark_flops_per_token(config)
    assert extra == layers * benchmark_layer
    extra = model_flops_per_token(config, recompute=True) - model_flops_per_token(config)
    assert extra == layers * real_layer


def test_flops_of_dense_and_residual_layers_by_hand():
    # H = 24, F = 35, V = 200, s = 8; per layer: attention 4·24² products, 2·2·8·24 for scores and values.
    attention, network, head = 2 * 4 * 24**2 + 4 * 8 * 24, 2 * 3 * 24 * 35, 2 * 24 * 200
    moe = 2 * network + 2 * 24 * 4
    expected = {
        "experts everywhere": 5 * (attention + moe),
        "dense layers first": 5 * attention + 2 * network + 3 * moe,
        "dense": 5 * (attention + network),
        "residual": 5 * attention + network + 4 * (moe + network + 2 * 24 * 2),
    }
    for variant, forward in expected.items():
        assert model_flops_per_token(make_config(VARIANTS[variant])) == pytest.approx(3 * (forward + head))


@pytest.mark.parametrize(
    ("model", "moe", "capacity", "rows"),
    [
        ({}, {}, 50, 200),
        ({}, {"capacity_factor": 1.01}, 51, 204),
        ({}, {"capacity_factor": 0.01, "min_capacity": 6}, 6, 24),
        ({"moe_type": "MegaBlock"}, {"capacity_factor": 1.01}, 50, 200),
        ({"moe_type": "MegaBlock-D"}, {}, 0, 200),
        ({}, {"top_k": 1, "drop_tokens": False}, 25, 100),
    ],
)
def test_capacity_of_a_hundred_tokens(model, moe, capacity, rows):
    config = make_config(model, moe=moe)
    assert expert_capacity(config.architecture.expert_layers[0], 100) == capacity
    assert expert_rows(config, 100) == rows


def expert_rows(config, own, **split):
    """Of the buffer of a rank with ``own`` tokens."""
    share = Share(
        torch.device("meta"), torch.float32, seq_len=100, attended=50, between=own, **{"tokens": own} | split
    )
    (block,) = outline(config.architecture).blocks.values()
    return block.moe.rows(share)


def test_ranks_that_split_a_sequence_have_a_row_for_every_choice():
    config = Config.model_validate({"moe": {"capacity_factor": 1.5, "top_k": 2}})
    assert expert_rows(config, 100, tokens=400, ranks=4, token_split=True) == 200


PUBLISHED = {
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_630_071_296,
    "deepseek_v2": 235_741_434_880,
    "deepseek_v2_lite": 15_706_484_224,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen2_57b_a14b": 57_408_658_944,
    "qwen15_moe_a27b": 14_315_784_192,
    "internlm_7b": 7_321_948_160,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_has_its_published_number_of_parameters(name):
    assert count_parameters(load_config(name)).total == PUBLISHED[name]


def test_latent_attention_by_hand():
    config = load_config("tiny_deepseek_v2", ["data.seq_len=64"])
    heads, hidden, rank, latent, plain, turned, value = 4, 128, 48, 32, 32, 16, 32
    weights = hidden * rank + rank * heads * (plain + turned) + hidden * (latent + turned)
    weights += latent * heads * (plain + value) + heads * value * hidden
    norms = rank + latent + 2 * hidden
    experts, shared, router, dense = 16 * 3 * 128 * 64, 3 * 128 * 128, 16 * 128, 3 * 128 * 256
    total = 3 * (weights + norms) + dense + 2 * (experts + shared + router) + 2 * 1024 * hidden + hidden
    count = count_parameters(config)
    assert (count.total, count.active) == (total, total - 2 * 12 * 3 * 128 * 64)
    scores = 2 * 64 * heads * (plain + turned + value)  # s · N · (D + Dv), twice
    used = dense + 2 * (4 * 3 * 128 * 64 + shared + router)
    forward = 3 * (2 * weights + scores) + 2 * (used + 1024 * hidden)
    assert model_flops_per_token(config) == pytest.approx(3 * forward)
