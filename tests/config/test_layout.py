"""The layout arithmetic, against sizes worked out by hand."""

import pytest

import portmoe
from portmoe.errors import ConfigError
from portmoe.parallel.layout import Layout, most_ranks


def plan(world, *overrides, config="tiny_moe4"):
    return Layout.plan(portmoe.load_config(config, overrides), world)


def refusal(world, *overrides, config="tiny_moe4"):
    with pytest.raises(ConfigError) as caught:
        plan(world, *overrides, config=config)
    return str(caught.value)


def test_7b_reaches_512_sequences_at_32_ranks():
    planned = plan(32, config="7b_moe4")
    assert (planned.data, planned.zero1, planned.expert) == (32, 32, 4)
    assert planned.global_batch_sequences == 512
    assert planned.tokens_per_step == 1_048_576
    assert planned.tokens_per_micro_batch == 4096
    assert most_ranks(portmoe.load_config("7b_moe4")) == 32


@pytest.mark.parametrize(("world", "micro_num"), [(1, 4), (2, 2), (4, 1)])
def test_the_global_batch_stays_when_the_ranks_change(world, micro_num):
    planned = plan(world, "data.global_batch_size=8", "data.micro_bsz=2")
    assert planned.micro_num == micro_num
    assert planned.global_batch_sequences == 8


@pytest.mark.parametrize(("size", "shards"), [(-1, 4), (0, 4), (1, 1), (2, 2), (4, 4)])
def test_the_three_cases_of_zero1(size, shards):
    assert plan(4, f"parallel.zero1.size={size}").zero1 == shards


@pytest.mark.parametrize(
    ("world", "experts", "size", "spread", "shards"),
    [
        (4, 4, "null", 4, 1),
        (8, 4, "null", 4, 2),
        (2, 4, "null", 2, 1),
        (6, 4, "null", 2, 3),
        (3, 4, "null", 1, 3),
        (8, 4, "2", 2, 4),
        (8, 1, "null", 1, 8),
        (8, 16, "null", 8, 1),
    ],
)
def test_experts_are_spread_as_far_as_they_divide(world, experts, size, spread, shards):
    keys = (f"model.num_experts={experts}", f"parallel.expert.size={size}", "moe.top_k=1")
    planned = plan(world, *keys, "data.global_batch_size=null", "data.micro_num=1")
    assert (planned.expert, planned.expert_shards) == (spread, shards)


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        (["model.num_attention_heads=2"], "model.num_attention_heads=2 must be a multiple of"),
        (["model.vocab_size=1023"], "model.vocab_size=1023 must be a multiple of parallel.tensor.size=4"),
        (["model.multiple_of=2", "model.mlp_ratio=1.04"], "the feed-forward width (see model.multiple_of)="),
        (["parallel.tensor.mode=msp", "data.seq_len=250", "data.micro_bsz=1"], "data.seq_len=250 must be"),
        (["parallel.tensor.mode=isp", "model.num_attention_heads=2"], "model.num_attention_heads=2 must be"),
    ],
)
def test_what_tensor_ranks_share_must_divide(keys, part):
    assert part in refusal(4, "parallel.tensor.size=4", *keys)


@pytest.mark.parametrize(("mode", "sequence"), [("mtp", 1), ("msp", 4), ("fsp", 4)])
def test_the_sequence_is_split_between_the_regions_but_in_mtp(mode, sequence):
    assert plan(4, "parallel.tensor.size=4", f"parallel.tensor.mode={mode}").sequence == sequence


def test_experts_over_more_ranks_than_there_are():
    assert "parallel.expert.size=4 must divide the group of 2 ranks" in refusal(2, "parallel.expert.size=4")


def test_a_composed_layout():
    planned = plan(
        64,
        "parallel.tensor.size=4",
        "parallel.pipeline.size=2",
        "parallel.zero1.size=4",
        "parallel.expert.size=4",
        "data.global_batch_size=null",
        "data.micro_num=8",
        config="7b_moe4",
    )
    # 64 ranks / 2 stages / 4 tensor ranks = 8 data-parallel ranks; 8 · 2 · 8 sequences
    assert (planned.data, planned.tensor, planned.pipeline) == (8, 4, 2)
    assert (planned.zero1, planned.expert, planned.global_batch_sequences) == (4, 4, 128)


ISP = ("parallel.tensor.mode=isp", "parallel.tensor.size=2", "data.global_batch_size=null")


@pytest.mark.parametrize(
    ("weight", "zero1", "shards"), [(1, -1, 4), (1, 2, 2), (1, 1, 1), (2, 1, 2), (4, -1, 4), (4, 1, 4)]
)
def test_isp_shards_among_data_and_tensor_ranks(weight, zero1, shards):
    planned = plan(4, *ISP, f"parallel.weight.size={weight}", f"parallel.zero1.size={zero1}")
    assert (planned.data, planned.replicas, planned.weight, planned.zero1) == (2, 4, weight, shards)


@pytest.mark.parametrize(("zero1", "moments"), [(-1, 4), (1, 1), (4, 4)])
def test_moments_of_weight_shards_are_sharded_again_or_not(zero1, moments):
    planned = plan(8, *ISP, "parallel.weight.size=2", f"parallel.zero1.size={zero1}")
    assert (planned.zero1, planned.moments) == (2, moments)


def test_moments_of_weight_shards_over_some_of_their_holders():
    message = refusal(8, *ISP, "parallel.weight.size=2", "parallel.zero1.size=2")
    assert message.startswith("parallel.zero1.size=2 with parallel.weight.size: the moments of a shard ")
    assert message.endswith("set parallel.zero1.size to 1 or 4")


def test_weights_over_ranks_that_do_not_divide():
    assert "parallel.weight.size=3 must divide the group of 4 ranks" in refusal(
        4, *ISP, "parallel.weight.size=3"
    )


def test_isp_cuts_neither_vocabulary_nor_width():
    assert plan(4, *ISP, "parallel.tensor.size=4", "model.vocab_size=1023").sequence == 4


@pytest.mark.parametrize(
    ("heads", "size", "ring"), [(4, 2, 1), (4, 4, 1), (2, 4, 2), (1, 4, 4), (3, 2, 2), (6, 4, 2)]
)
def test_tokens_are_split_over_heads_as_far_as_these_go(heads, size, ring):
    """And beyond in a ring: so many ranks have each head."""
    sizes = ("model.hidden_size=48", f"model.num_attention_heads={heads}", "data.global_batch_size=null")
    planned = plan(8, f"parallel.sequence.size={size}", *sizes)
    assert (planned.data, planned.tensor, planned.ring, planned.sequence) == (8 // size, size, ring, size)
    assert (planned.replicas, planned.zero1) == (8, 8)
    assert (f"a ring of {ring}" in str(planned)) == (ring > 1)
    assert f"sequence {size}" in str(planned)


def test_ranks_that_do_not_divide():
    assert "parallel.sequence.size=4 · parallel.pipeline.size=1 = 4 does not divide the 6 ranks" in refusal(
        6, "parallel.sequence.size=4"
    )
    message = refusal(7, "parallel.pipeline.size=2", "parallel.tensor.size=2")
    assert "= 4 does not divide the 7 ranks; use 4 or 8 ranks" in message
    assert "use 4 ranks" in refusal(3, "parallel.pipeline.size=2", "parallel.tensor.size=2")


def test_fewer_micro_batches_than_stages():
    sizes = ("parallel.pipeline.size=4", "model.num_layers=4", "data.global_batch_size=null")
    message = refusal(4, *sizes, "data.micro_num=2")
    assert "data.micro_num=2 is fewer than the ranks of the pipeline, parallel.pipeline.size=4" in message


def test_zero1_must_divide_the_data_parallel_ranks():
    assert "parallel.zero1.size=3 must divide the group of 4 ranks" in refusal(4, "parallel.zero1.size=3")
    assert "nearest possible: 2 or 4" in refusal(4, "parallel.zero1.size=8")


@pytest.mark.parametrize(
    ("batch", "world", "micro_bsz", "fix"),
    [
        (10, 4, 2, "it must be a multiple of 8; set data.global_batch_size to 8 or 16"),
        (12, 4, 2, "set data.global_batch_size to 8 or 16, or data.micro_bsz to 1"),
        (24, 2, 8, "set data.global_batch_size to 16 or 32, or data.micro_bsz to 6"),
        (3, 4, 1, "set data.global_batch_size to 4"),
    ],
)
def test_a_global_batch_that_cannot_be_divided(batch, world, micro_bsz, fix):
    message = refusal(world, f"data.global_batch_size={batch}", f"data.micro_bsz={micro_bsz}")
    assert f"data.global_batch_size={batch} cannot be divided over {world} data-parallel ranks" in message
    assert message.endswith(fix)


def test_the_nearest_possible_batch_respects_the_limit():
    message = refusal(4, "data.micro_bsz=2", "data.global_batch_size=10", "data.max_global_batch_size=12")
    assert message.endswith("set data.global_batch_size to 8")


@pytest.mark.parametrize(
    ("world", "batch", "fix"),
    [
        (64, 1024, "set data.micro_num to at most 4"),
        (33, 528, "set data.micro_num to at most 7"),
        (300, 4800, "set data.micro_bsz to at most 1 and data.micro_num to 1"),
        (1024, 16384, "use at most 512 data-parallel ranks"),
    ],
)
def test_a_global_batch_over_the_limit(world, batch, fix):
    message = refusal(world, config="7b_moe4")
    assert f"the global batch of {batch} sequences" in message
    assert "is over data.max_global_batch_size=512" in message
    assert message.endswith(fix)


@pytest.mark.parametrize("world", [0, -1])
def test_no_ranks(world):
    assert "it must be at least 1" in refusal(world)
