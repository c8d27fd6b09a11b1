"""The split of the layers over the stages, against every possible split."""

import itertools

import pytest

import portmoe
from portmoe.costs.flops import model_flops_per_token
from portmoe.costs.parameters import count_parameters
from portmoe.errors import ConfigError
from portmoe.parallel.layout import Layout
from portmoe.parallel.stages import bubble, costs, describe, rank_parameters, split_stages, stages_of


def configured(*overrides, name="tiny_moe4"):
    small = (
        ("model.num_layers=4", "data.global_batch_size=8", "data.micro_bsz=2") if name == "tiny_moe4" else ()
    )
    return portmoe.load_config(name, (*small, *overrides))


def cost(embedding, layers, head, first, end):
    ends = embedding * (first == 0) + head * (end == len(layers))
    return ends + sum(layers[first:end])


CASES = [
    (2, 1, ()),
    (3, 1, ("model.num_layers=7",)),
    (4, 1, ("model.num_layers=9", "model.first_k_dense_replace=3")),
    (2, 2, ("model.num_layers=8", "model.checkpoint=0.5")),
    (2, 3, ("model.num_layers=6", "model.vocab_size=100000")),
]


@pytest.mark.parametrize(("size", "chunks", "overrides"), CASES)
def test_no_split_has_a_cheaper_dearest_stage(size, chunks, overrides):
    config = configured(f"parallel.pipeline.size={size}", f"model.num_chunks={chunks}", *overrides)
    stages, parts = split_stages(config), costs(config)
    layers = config.model.num_layers
    assert [layer for stage in stages for layer in stage.layers] == list(range(layers))
    assert all(stage.layers for stage in stages)
    assert [stage.embed for stage in stages] == [True] + [False] * (len(stages) - 1)
    assert [stage.head for stage in stages] == [False] * (len(stages) - 1) + [True]
    dearest = max(cost(*parts, stage.layers[0], stage.layers[-1] + 1) for stage in stages)
    splits = ([0, *cuts, layers] for cuts in itertools.combinations(range(1, layers), size * chunks - 1))
    best = min(max(cost(*parts, *span) for span in itertools.pairwise(split)) for split in splits)
    assert dearest == pytest.approx(best)


def test_costs_are_half_memory_and_half_time():
    # tiny_moe4 by hand: H 128, F 256, V 1024, E 4, k 2, s 256
    attention, experts, router = 4 * 128 * 128 + 4 * 128, 4 * 3 * 128 * 256, 128 * 4
    layer, ends = attention + experts + router + 2 * 128, 1024 * 128
    flops_layer = 2 * (4 * 128 * 128 + 128 * 4 + 2 * 3 * 128 * 256) + 4 * 128 * 128
    flops_head = 2 * 128 * 1024
    parameters, flops = 4 * layer + 2 * ends + 128, 4 * flops_layer + flops_head
    embedding, layers, head = costs(configured())
    assert embedding == pytest.approx(ends / parameters / 2)
    assert layers == pytest.approx([(layer / parameters + flops_layer / flops) / 2] * 4)
    assert head == pytest.approx(((ends + 128) / parameters + flops_head / flops) / 2)
    assert parameters == count_parameters(configured()).total
    assert 3 * flops == model_flops_per_token(configured(), causal=True)


@pytest.mark.parametrize("overrides", [(), ("model.first_k_dense_replace=2", "model.moe_use_residual=true")])
def test_the_stages_hold_all_parameters(overrides):
    config = configured("parallel.pipeline.size=4", *overrides)
    held = [rank_parameters(config, rank) for rank in range(4)]
    whole = count_parameters(config)
    for name in ("total", "router", "experts", "norms", "active"):
        assert sum(getattr(of_rank, name) for of_rank in held) == getattr(whole, name), name


def test_without_a_pipeline_a_rank_holds_the_whole_model():
    assert rank_parameters(configured(), 0) == count_parameters(configured())


def test_7b_splits_evenly():
    config = configured("parallel.pipeline.size=4", "data.global_batch_size=null", name="7b_moe4")
    assert [len(stage.layers) for stage in split_stages(config)] == [8, 8, 9, 7]


def test_a_rank_holds_every_nth_stage():
    config = configured("parallel.pipeline.size=2", "model.num_chunks=2")
    assert [[stage.number for stage in stages_of(config, rank)] for rank in range(2)] == [[0, 2], [1, 3]]


def test_what_the_run_says_of_its_pipeline():
    config = configured("parallel.pipeline.size=2", "model.num_chunks=2")
    layout = Layout.plan(config, 2)
    assert bubble(layout, 2) == 1 / 9  # 4 micro-batches
    assert describe(config, layout) == (
        "interleaved 1F1B, 2 stages per rank, communication not overlapped; bubble 11.1% of a step; "
        "layers 0 + 2 | 1 + 3"
    )


@pytest.mark.parametrize(
    ("micro_num", "chunks", "says"),
    [
        (3, 1, "data.micro_num=3 is fewer than the ranks of the pipeline, parallel.pipeline.size=4; .* 4$"),
        (9, 2, "data.micro_num=9 cannot be divided into 2 equal rounds.*set data.micro_num to 8 or 10$"),
        (13, 2, "data.micro_num=13 cannot be divided into 3 equal rounds.*to 12 or 15$"),
    ],
)
def test_micro_batches_no_schedule_can_take(micro_num, chunks, says):
    overrides = ("model.num_layers=8", "data.global_batch_size=null", f"data.micro_num={micro_num}")
    config = configured("parallel.pipeline.size=4", f"model.num_chunks={chunks}", *overrides)
    with pytest.raises(ConfigError, match=says):
        Layout.plan(config, 4)


def test_micro_batches_that_follow_from_the_global_batch():
    config = configured("parallel.pipeline.size=4", "data.global_batch_size=6")
    with pytest.raises(ConfigError, match=r"micro_num, from data\.global_batch_size,=3 is fewer"):
        Layout.plan(config, 4)
