"""The memory formulas against bytes measured on a small model, and hand-computed state."""

import dataclasses

import pytest
import torch

import portmoe
from portmoe.accelerator import get_accelerator
from portmoe.config import Config
from portmoe.costs.memory import activation_bytes, recomputed_bytes, state_bytes
from portmoe.costs.parameters import count_parameters
from portmoe.data.batch import Batch
from portmoe.model import Decoder, Router
from portmoe.model.precision import compute_dtype
from portmoe.model.share import Share
from portmoe.ops import OPERATIONS, OpTable, Segments, choose
from portmoe.parallel.layout import Layout
from portmoe.parallel.workload import call_sites, share_of

TOKENS = 64


def make_config(**model) -> Config:
    sizes = {
        "dtype": "float32",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_layers": 3,
        "vocab_size": 256,
    }
    return Config.model_validate(
        {"data": {"seq_len": TOKENS // 4, "micro_bsz": 4}, "model": sizes | {"multiple_of": 16} | model}
    )


def cpu_table(config: Config) -> OpTable:
    """What the CPU chooses for this model."""
    sites = call_sites(config, Layout.plan(config, 1), torch.device("cpu"))
    return choose(OPERATIONS, get_accelerator("cpu").ops.implementations(), sites, config)


def share(config: Config, **ranks) -> Share:
    """A micro-batch of ``TOKENS``."""
    whole = share_of(config, Layout.plan(config, 1), torch.device("cpu"))
    return dataclasses.replace(whole, tokens=TOKENS, **{"between": TOKENS} | ranks)


def saved_bytes(config: Config) -> int:
    """Bytes of all storages autograd keeps after a forward pass, parameters not counted."""
    model = Decoder(config, cpu_table(config))
    routers = [module for module in model.modules() if isinstance(module, Router)]
    model.to(compute_dtype(config.model))  # so that no copies of the weights are made and counted
    for router in routers:
        router.float()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    labels_T = torch.zeros(TOKENS, dtype=torch.int64)
    segments = Segments(tuple(range(0, TOKENS + 1, TOKENS // 4)))
    batch = Batch(labels_T, labels_T, torch.arange(TOKENS) % 16, labels_T, segments, 0)
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch.tokens_T, batch)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"dtype": "bfloat16"},
        {"num_experts": 1},
        {"moe_use_residual": True},
        {"moe_type": "MegaBlock-D"},
        {"first_k_dense_replace": 2},
        {"hidden_size": 128, "num_layers": 1},
        {"vocab_size": 4096},
    ],
)
def test_estimate_is_close_to_what_the_cpu_keeps(model):
    config = make_config(**model)
    assert 0.9 < saved_bytes(config) / activation_bytes(config, share(config)) < 1.5


def test_activations_by_hand():
    config = make_config(num_experts=1, num_layers=2, dtype="bfloat16")  # H = 64, F = 96, N = 4
    block = TOKENS * (8 * 64 * 2 + 4 * 4 + 3 * 96 * 2)
    head = TOKENS * (2 * 64 * 2 + 4 + 256 * 2)
    assert activation_bytes(config, share(config)) == 2 * block + head
    assert activation_bytes(config, share(config), head=False) == 2 * block


def test_recomputation_keeps_inputs_and_one_layer():
    plain = make_config(num_layers=4)
    layer = activation_bytes(plain, share(plain), head=False) // 4
    for recompute, count in ((0.5, 2), (True, 4)):
        config = make_config(num_layers=4, checkpoint=recompute)
        recomputed = activation_bytes(config, share(config), head=False)
        assert recomputed == (4 - count) * layer + count * TOKENS * 64 * 4
        assert recomputed_bytes(config, share(config)) == layer
    assert recomputed_bytes(plain, share(plain)) == 0
    assert recomputed_bytes(make_config(checkpoint=0.5), share(plain), layers=[2]) == 0


def test_state_of_the_7b_model_on_32_ranks():
    parameters, exact, experts = 11_852_320_768, 524_288, 32 * 4 * 3 * 4096 * 5632
    whole = count_parameters(Config())
    state = state_bytes(Config(), whole, shards=32)
    assert state.weights == 2 * parameters + 2 * exact
    assert state.gradients == 4 * parameters
    assert state.masters == parameters // 8
    assert state.optimizer == parameters // 4
    assert state.total == state.weights + state.gradients + state.masters + state.optimizer
    spread = state_bytes(Config(), whole, shards=32, expert_ranks=4, expert_shards=8)
    assert state.weights - spread.weights == 2 * experts * 3 // 4
    assert (spread.masters, spread.optimizer) == (state.masters, state.optimizer)
    replicated = state_bytes(Config(), whole, shards=1, expert_ranks=4, expert_shards=1)
    assert replicated.masters == 4 * (parameters - experts) + experts


@pytest.mark.parametrize(("dtype", "copies"), [("bfloat16", 2 * (11_852_320_768 - 524_288)), ("float32", 0)])
def test_a_rank_that_shares_nothing_copies_only_what_it_casts(dtype, copies):
    for fsdp in (False, True):  # alone there is nothing to shard
        config = Config.model_validate({"model": {"dtype": dtype}, "parallel": {"zero1": {"fsdp": fsdp}}})
        state = state_bytes(config, count_parameters(config), shards=1, shared=False)
        assert state.weights == copies
        assert state.masters == state.gradients == 4 * 11_852_320_768


def test_sharded_parameters_leave_two_blocks_whole():
    config = Config.model_validate({"parallel": {"zero1": {"fsdp": True}}})
    state = state_bytes(config, count_parameters(config), shards=32)
    # of the 7B model: one block is 4·4096² + 4·4096 + 2·4096 + 4·4096 + 4·3·4096·5632 parameters
    assert state.weights == 2 * (2 * 103168 * 4096 + 2 * 343_973_888)
    assert state.gradients == state.masters == 11_852_320_768 // 8


@pytest.mark.parametrize(("overlap", "blocks"), [(True, 2), (False, 1)])
def test_weights_gathered_ahead_are_one_block_more(overlap, blocks):
    weight = {"size": 32, "overlap": overlap}
    config = Config.model_validate({"parallel": {"tensor": {"mode": "isp"}, "weight": weight}})
    state = state_bytes(config, count_parameters(config), shards=32)
    assert state.weights == 2 * (2 * 103168 * 4096 + blocks * 343_973_888)
    assert state.gradients == state.masters == 11_852_320_768 // 8


def test_tensor_ranks_cut_all_but_routers_and_norms():
    whole = count_parameters(Config())
    state = state_bytes(Config(), whole, shards=4, tensor_ranks=8)
    # by hand: (11,852,320,768 − 524,288 − 266,240) / 8 + 524,288 + 266,240 parameters
    assert state.gradients == 4 * (1_481_441_280 + 790_528)
    assert state.optimizer == 2 * (1_481_441_280 + 790_528)


def test_activations_of_a_cut_dense_layer():
    config = make_config(num_experts=1, num_layers=1)
    tokens, hidden, width = 64, 64, config.model.ffn_width
    # inside the regions 2 inputs, and a quarter of q, k, v, output, log-sum-exp, gate, up and product;
    # between them a quarter of the tokens of 2 inputs
    expected = tokens * (4 * (2 * hidden + hidden + 3 * width // 4 + hidden // 2) + 4)
    cut = share(config, ranks=4, between=tokens // 4)
    assert activation_bytes(config, cut, head=False) == expected
    # and a quarter of those in the regions too, where they are gathered again
    expected -= tokens * 4 * (2 * hidden - hidden // 2)
    cut = share(config, ranks=4, between=tokens // 4, regather=True)
    assert activation_bytes(config, cut, head=False) == expected


def test_activations_of_split_tokens():
    """Heads over 2 ranks and a ring of 2: a quarter of all."""
    sizes = ["model.num_attention_heads=2", "model.num_experts=1", "model.num_layers=1", "data.seq_len=64"]
    sizes += ["data.global_batch_size=null"]
    alone, split = (
        portmoe.load_config("tiny_moe4", [*sizes, f"parallel.sequence.size={size}"]) for size in (1, 4)
    )
    layout, device = Layout.plan(split, 4), torch.device("cpu")
    assert (layout.ring, layout.sequence) == (2, 4)
    whole, part = share_of(alone, Layout.plan(alone, 1), device), share_of(split, layout, device)
    assert activation_bytes(split, part, head=False) * 4 == activation_bytes(alone, whole, head=False)
    (work,) = (call for site, call in call_sites(split, layout, device)["attention"].items())
    assert (work.tokens, work.heads, work.log_sum) == (whole.tokens // 2, 1, True)


def test_experts_gathered_some_at_a_time_count_as_those():
    """Of 16 experts in two layers the largest block has 16, and 2 of them are whole at a time."""
    keys = ["model.num_experts=16", "parallel.zero1.fsdp=true", "parallel.expert.size=1"]
    whole = portmoe.load_config("tiny_moe4", keys)
    some = portmoe.load_config(
        "tiny_moe4", [*keys, "moe.moe_implementation=shard", "moe.expert_in_one_shard=2"]
    )
    width, hidden = whole.model.ffn_width, whole.model.hidden_size
    expert = 3 * width * hidden * 4
    states = [state_bytes(config, count_parameters(config), shards=4) for config in (whole, some)]
    assert states[0].weights - states[1].weights == (2 * 16 - 2) * expert
