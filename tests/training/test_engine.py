"""The engine against a plain loop: the same decoder unsharded, torch's own AdamW and clipping."""

import pytest
import torch

import portmoe
from portmoe.costs.parameters import parameter_groups
from portmoe.data import open_data
from portmoe.model import Decoder
from portmoe.model.reference_table import reference_table
from portmoe.parallel.layout import Layout
from portmoe.parallel.mesh import build_meshes
from portmoe.training.engine import NativeEngine
from portmoe.training.schedule import learning_rate

SMALL = [
    "data.seq_len=16",
    "data.micro_bsz=2",
    "data.global_batch_size=6",
    "data.num_samples=60",
    "data.total_steps=8",
    "model.vocab_size=512",
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.num_attention_heads=2",
    "model.multiple_of=8",
]


def build(world, *overrides):
    config = portmoe.load_config("tiny_moe4", [*SMALL, *overrides])
    layout = Layout.plan(config, 1)
    meshes = build_meshes(layout, "cpu")
    engine = NativeEngine(config, layout, reference_table(), meshes, torch.device("cpu"), world)
    stream = open_data(config, rank=0, size=1, micro_num=layout.micro_num)
    return config, engine, stream


def plain_loop(config, stream, steps):
    """(loss, norms, moe_loss) per step and the weights after the last, without any of the engine's code."""
    model = Decoder(config)
    adam = config.adam
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=(adam.adam_beta1, adam.adam_beta2),
        eps=adam.adam_eps,
        weight_decay=adam.weight_decay,
        foreach=False,
    )
    records = []
    for step in range(steps):
        batches = stream.batches(step)
        losses, auxes = [], []
        optimizer.zero_grad()
        for batch in batches:
            output = model(batch.tokens_T, batch)
            loss = output.loss_T.sum() / (batch.labels_T >= 0).sum()
            ((loss + config.loss.moe_loss_coeff * output.aux_loss) / len(batches)).backward()
            losses.append(loss.item())
            auxes.append(output.aux_loss.item())
        norms = {
            name: sum(p.grad.double().square().sum().item() for p in group.values()) ** 0.5
            for name, group in parameter_groups(model).items()
        }
        if limit := config.hybrid_zero_optimizer.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        records.append((sum(losses) / len(losses), norms, sum(auxes) / len(auxes)))
    return records, dict(model.named_parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["hybrid_zero_optimizer.clip_grad_norm=0.05"],
        ["hybrid_zero_optimizer.clip_grad_norm=0"],
        ["model.checkpoint=0.5"],
        ["model.moe_type=MegaBlock-D"],
        ["model.num_experts=1", "moe.top_k=1"],
        ["model.dtype=bfloat16"],
    ],
)
def test_steps_are_those_of_a_plain_loop(one_rank, overrides):
    config, engine, stream = build(one_rank, *overrides)
    # In bfloat16 both round alike but for the embedding, whose gradient the engine adds up in bfloat16; and
    # after an update last bits fall on either side of a rounding.
    exact = config.model.dtype == "float32"
    steps, norm_rel = (6, 1e-5) if exact else (1, 1e-4)
    with stream:
        expected, weights = plain_loop(config, stream, steps)
        for step, (loss, norms, aux_loss) in enumerate(expected):
            outcome = engine.train_step(step, stream.batches(step))
            totals = outcome.metrics.reduce(False, one_rank, Layout.plan(config, 1))
            assert totals.loss == pytest.approx(loss, rel=1e-6)
            assert totals.aux_loss == pytest.approx(aux_loss, rel=1e-6)
            assert outcome.gradient_norms == pytest.approx(norms, rel=norm_rel, abs=1e-8)
    if config.model.dtype == "float32":
        for name, parameter in engine.optimizer.parameters.items():
            torch.testing.assert_close(parameter, weights[name], rtol=1e-4, atol=1e-5)


def test_masters_and_state_are_float32(one_rank):
    _, engine, stream = build(one_rank, "model.dtype=bfloat16")
    with stream:
        engine.train_step(0, stream.batches(0))
    assert {tensor.dtype for tensor in engine.tensors().values()} == {torch.float32}


def test_an_overflowed_step_is_skipped_and_counted(one_rank):
    """A scale of 2^24 makes float16 gradients infinite: nothing may change but the count and the scale."""
    _, engine, stream = build(
        one_rank, "model.dtype=float16", "grad_scaler.fp16.initial_scale=16777216", "grad_scaler.hysteresis=2"
    )
    before = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    with stream:
        first = engine.train_step(0, stream.batches(0))
        second = engine.train_step(1, stream.batches(1))
        third = engine.train_step(2, stream.batches(2))
    assert (first.loss_scale, second.loss_scale, third.loss_scale) == (2.0**24, 2.0**24, 2.0**23)
    assert engine.loss_scale.skipped_steps == 3
    assert engine.optimizer.updates == 0
    for name, tensor in engine.tensors().items():
        assert torch.equal(tensor, before[name]), name


def test_float16_trains_at_a_scale_that_fits(one_rank):
    _, scaled, stream = build(one_rank, "model.dtype=float16", "grad_scaler.fp16.initial_scale=1024")
    _, exact, _ = build(one_rank)
    with stream:
        for step in range(3):
            half = scaled.train_step(step, stream.batches(step))
            full = exact.train_step(step, stream.batches(step))
            # norms are unscaled; float16 has 11 bits
            assert half.gradient_norms["default"] == pytest.approx(full.gradient_norms["default"], rel=2e-2)
    assert scaled.optimizer.updates == 3


def test_a_nan_in_one_micro_batch_skips_the_step(one_rank, monkeypatch):
    _, engine, stream = build(one_rank)
    with stream:
        batches = stream.batches(0)
        block = engine.model[0].layers["1"]
        handle = block.register_forward_hook(
            lambda module, inputs, outputs: (outputs[0] * float("nan"), *outputs[1:])
        )
        before = engine.optimizer.parameters["head.weight"].clone()
        engine.train_step(0, batches)
        handle.remove()
        assert engine.loss_scale.skipped_steps == 1
        assert torch.equal(engine.optimizer.parameters["head.weight"], before)
        engine.train_step(0, batches)
        assert engine.optimizer.updates == 1


def test_evaluation_changes_nothing(one_rank):
    config, engine, stream = build(one_rank)
    _, untouched, _ = build(one_rank)
    with stream:
        for step in range(3):
            engine.evaluate(stream.batches(7))
            a = engine.train_step(step, stream.batches(step)).metrics.reduce(
                False, one_rank, Layout.plan(config, 1)
            )
            b = untouched.train_step(step, stream.batches(step)).metrics.reduce(
                False, one_rank, Layout.plan(config, 1)
            )
            assert a == b


def test_evaluation_sees_the_weights_of_the_last_update(one_rank):
    config, engine, stream = build(one_rank, "hybrid_zero_optimizer.clip_grad_norm=1e30")
    with stream:
        _, weights = plain_loop(config, stream, 2)
        for step in range(2):
            engine.train_step(step, stream.batches(step))
        model = Decoder(config).eval()
        model.load_state_dict(weights)
        batch = stream.batches(5)[0]
        with torch.no_grad():
            output = model(batch.tokens_T, batch)
        loss = output.loss_T.sum() / (batch.labels_T >= 0).sum()
        assert engine.evaluate([batch]).reduce(False, one_rank, Layout.plan(config, 1)).loss == pytest.approx(
            loss.item(), rel=1e-5
        )
