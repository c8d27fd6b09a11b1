"""Recomputed layers give the same bits, and noise is a function of seed, micro-batch and layer alone."""

import dataclasses

import pytest
import torch

from portmoe.config import Config
from portmoe.config.sections.run import RunConfig
from portmoe.data.batch import Batch
from portmoe.model import Decoder, MoELayer, recompute
from portmoe.model.noise import layer_generator, micro_batch_seed
from portmoe.ops import Segments

WEIGHTS_SEED = RunConfig(seed=3)
NOISY = {
    "none": {},
    "Jitter": {"noisy_gate_policy": "Jitter"},
    "old second choice": {"use_fused_gating": False},
    "random token selection": {"top_k": 1, "use_rts": True, "capacity_factor": 0.5, "min_capacity": 1},
    "RSample": {"top_k": 1, "noisy_gate_policy": "RSample", "use_fused_gating": False},
}


def make_config(moe, seed=1024, **model) -> Config:
    sizes = {
        "dtype": "float32",
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_layers": 3,
        "vocab_size": 200,
    }
    return Config.model_validate(
        {
            "run": {"seed": seed},
            "model": {**sizes, "multiple_of": 8, **model},
            "moe": moe,
            "data": {"seq_len": 8},
        }
    )


def make_batch(index=0) -> Batch:
    tokens_T = torch.randint(1, 200, (24,), generator=torch.Generator().manual_seed(5))
    return Batch(
        tokens_T=tokens_T,
        labels_T=tokens_T.roll(-1),
        positions_T=torch.arange(24) % 8,
        types_T=torch.zeros_like(tokens_T),
        segments=Segments((0, 8, 16, 24)),
        index=index,
    )


def run(config, batch):
    """Output and gradients, with weights large enough that one percent of noise shows in the loss."""
    model = Decoder(config.model_copy(update={"run": WEIGHTS_SEED}))
    model.config = config
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(30 if parameter.dim() > 1 else 1)
    output = model(batch.tokens_T, batch)
    (output.loss_T.mean() + output.aux_loss).backward()
    return output, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("policy", NOISY)
@pytest.mark.parametrize("share", [1.0, 0.34])
def test_recomputation_gives_the_same_bits(policy, share):
    batch = make_batch()
    plain, plain_gradients = run(make_config(NOISY[policy]), batch)
    again, again_gradients = run(make_config(NOISY[policy], checkpoint=share), batch)
    for one, two in zip(plain, again, strict=True):
        assert torch.equal(one, two)
    for name, gradient in plain_gradients.items():
        assert torch.equal(gradient, again_gradients[name]), name


def test_recomputed_layers_keep_only_their_input():
    def saved_bytes(share):
        model, batch, seen = Decoder(make_config({}, checkpoint=share)), make_batch(), {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(batch.tokens_T, batch)
        return sum(size for size, _ in seen.values())

    none, one, two, all_layers = (saved_bytes(share) for share in (0.0, 0.34, 0.67, 1.0))
    assert none > one > two > all_layers
    layer = (none - all_layers) / 3
    for count, kept in ((1, one), (2, two)):
        assert kept == pytest.approx(none - count * layer, rel=0.02)


def test_offloaded_inputs_give_the_same_bits(monkeypatch):
    """On a device whose memory is the host's nothing moves, so this one is taken for another."""
    moved, to_host = [], recompute._to_host
    batch, shape = make_batch(), (24, 16)

    def watched(x):
        moved.append(x)
        device, kept = to_host(x)
        assert kept.data_ptr() != x.data_ptr()
        return device, kept

    monkeypatch.setattr(recompute, "_to_host", watched)
    plain, plain_gradients = run(make_config({}, checkpoint=0.67, checkpoint_offload=True), batch)
    assert not moved
    monkeypatch.setattr(recompute, "on_host", lambda x: False)
    again, again_gradients = run(make_config({}, checkpoint=0.67, checkpoint_offload=True), batch)
    assert [tuple(x.shape) for x in moved] == [shape] * 2  # the inputs of two of three layers, and no more
    for one, two in zip(
        (*plain, *plain_gradients.values()), (*again, *again_gradients.values()), strict=True
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("policy", [name for name in NOISY if name != "none"])
def test_noise_changes_with_micro_batch_and_run_seed_and_repeats_otherwise(policy):
    torch.manual_seed(0)
    global_state = torch.get_rng_state()
    base = make_config(NOISY[policy])
    same, _ = run(base, make_batch(index=4))
    repeated, _ = run(base, make_batch(index=4))
    assert torch.equal(same.loss_T, repeated.loss_T)
    for config, index in ((base, 5), (make_config(NOISY[policy], seed=7), 4)):
        other, _ = run(config, make_batch(index))
        assert not torch.equal(same.loss_T, other.loss_T)
    assert torch.equal(global_state, torch.get_rng_state())


@pytest.mark.parametrize("policy", ["Jitter", "RSample"])
def test_evaluation_has_no_noise_of_these_policies(policy):
    noisy = make_config(NOISY[policy])
    clean = noisy.model_copy(update={"moe": noisy.moe.model_copy(update={"noisy_gate_policy": None})})
    x_TH = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    with_policy, without = MoELayer(noisy), MoELayer(clean)
    routings = [
        layer.eval().compute(x_TH, 3, Segments((0, len(x_TH))))[1] for layer in (with_policy, without)
    ]
    for name in {field.name for field in dataclasses.fields(routings[0])} - {"score_SE"}:
        one, two = (torch.as_tensor(getattr(routing, name)) for routing in routings)
        assert torch.equal(one, two), name


def test_jitter_is_uniform_within_one_percent_of_the_input():
    config = make_config(NOISY["Jitter"])
    layer = MoELayer(config)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, 16))
    noise = layer.router(torch.ones(4000, 16), torch.Generator().manual_seed(0))
    assert 0.99 <= noise.min() < 0.9901
    assert 1.0099 < noise.max() <= 1.01
    assert noise.mean().item() == pytest.approx(1.0, abs=3 * 0.01 / (3 * 16000) ** 0.5)


def test_the_noise_of_a_seed_is_that_of_every_version():
    """Written down: a run that is resumed, or compared with an old one, draws the same."""
    assert micro_batch_seed(1024, 0) == 1352144171955520859
    assert micro_batch_seed(7, 123456) == 3861686090516467693
    generator = layer_generator(micro_batch_seed(1024, 0), 3)
    assert generator.initial_seed() == 6350231486362269298
    assert torch.rand(2, generator=generator).tolist() == [0.18943560123443604, 0.5509420037269592]


def test_seeds_do_not_collide_where_sums_would():
    seeds = {micro_batch_seed(run, index) for run in range(30) for index in range(30)}
    draws = {
        torch.rand(1, generator=layer_generator(s, layer)).item() for s in (0, 1, 2) for layer in (0, 1, 2)
    }
    assert len(seeds) == 900
    assert len(draws) == 9
