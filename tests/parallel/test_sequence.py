"""Training with the tokens of a micro-batch split over ranks (``parallel.sequence.size``) is that of one."""

import pytest
from layout_keys import FSDP, NO_EP, PP2, REPLICAS
from worlds import records

from portmoe.config.read import load_config

# Packs of 128 tokens in samples of 1 … 32; a padded or even pack would hide what a ring can get wrong.
PACKED = [
    *("data.seq_len=32", "data.micro_bsz=4", "data.fixed_random_dataset_seqlen=false"),
    *("data.global_batch_size=8", "data.num_samples=800", "data.total_steps=3"),
    *("model.vocab_size=448", "model.hidden_size=32", "model.num_hidden_layers=2"),
    *("model.intermediate_size=48", "ckpt.enable_save_ckpt=false", "loss.z_loss_coeff=0.001"),
]
MIXTRAL = ("tiny_mixtral", "model.num_attention_heads=4", "model.router_jitter_noise=0.1")
LATENT = (
    "tiny_deepseek_v2",
    "model.q_lora_rank=12",
    "model.kv_lora_rank=10",
    "model.moe_intermediate_size=16",
)
ONE_KEY, TWO_KEYS = "model.num_key_value_heads=1", "model.num_key_value_heads=2"
HEADS1, HEADS2, HEADS3 = (f"model.num_attention_heads={heads}" for heads in (1, 2, 4))
SIZE2, SIZE4 = "parallel.sequence.size=2", "parallel.sequence.size=4"
WEIGHT2 = "parallel.weight.size=2"

# ranks, the model, the layout, the ring there is
LAYOUTS = {
    "mixtral, ring of 4": (4, [*MIXTRAL, ONE_KEY], [SIZE4], 4),
    "latent, heads over 2, ring of 2": (4, [*LATENT, HEADS2], [SIZE4], 2),
    "mixtral, ring of 2, fsdp, experts over 4": (
        4,
        [*MIXTRAL, ONE_KEY],
        [SIZE2, FSDP, "parallel.expert.size=4"],
        2,
    ),
    "mixtral, heads over 2, ring of 2": (4, [*MIXTRAL, TWO_KEYS], [SIZE4, "model.checkpoint=true"], 2),
    "mixtral, heads over 4": (4, [*MIXTRAL, "model.num_key_value_heads=4"], [SIZE4], 1),
    "mixtral, ring of 2": (2, [*MIXTRAL, ONE_KEY], [SIZE2, REPLICAS, "model.checkpoint=0.5"], 2),
    "mixtral, ring of 2, pipeline": (4, [*MIXTRAL, ONE_KEY], [SIZE2, PP2], 2),
    "mixtral, ring of 2, weights over 2": (
        4,
        [*MIXTRAL, ONE_KEY],
        [SIZE2, WEIGHT2, "parallel.weight.overlap=true"],
        2,
    ),
    "latent, ring of 4": (4, [*LATENT, HEADS1], [SIZE4, "model.checkpoint=true"], 4),
    "latent, ring of 2, data over 2": (4, [*LATENT, HEADS1], [SIZE2, NO_EP], 2),
    "latent, ring of 2, tokens weighed": (4, [*LATENT, HEADS1], [SIZE2, FSDP, "loss.reduction=token"], 2),
    "mixtral, heads over 2, ring of 4, data over 2": (
        8,
        [*MIXTRAL, TWO_KEYS],
        ["parallel.sequence.size=8"],
        4,
    ),
}
FAST = list(LAYOUTS)[1:3]


def train(directory, overrides) -> int:
    """One rank's part of a run; the ring it had."""
    from portmoe.parallel.layout import Layout
    from portmoe.training.run import train

    family, *keys = overrides
    config = load_config(family, [*PACKED, *keys, f"run.directory={directory}"])
    train(config, family, "cpu", "torchrun")
    import os

    return Layout.plan(config, int(os.environ["WORLD_SIZE"])).ring


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_the_numbers_of_one_process(name, world, tmp_path):
    ranks, model, layout, ring = LAYOUTS[name]
    assert set(world(ranks).call(train, tmp_path / "split", [*model, *layout])) == {ring}
    reduction = [key for key in layout if key.startswith("loss.")]
    world(1).call(train, tmp_path / "alone", [*model, *reduction])
    found, expected = records(tmp_path / "split"), records(tmp_path / "alone")
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("loss", "moe_loss", "loss_from_metric"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
        norms = [key for key in theirs if key.startswith("grad_norm/")]
        assert [ours[key] for key in norms] == pytest.approx([theirs[key] for key in norms], rel=1e-5)
        loads = [key for key in theirs if key.startswith("expert_load/")]
        for key in ("tokens/en", "acc", "num_consumed_tokens", "data_crc32", *loads):
            assert ours.get(key) == theirs.get(key), key
        assert theirs["moe_loss"] > 0
        assert len(norms) == 3


@pytest.mark.slow
def test_bfloat16_stays_within_its_rounding(world, tmp_path):
    """Turns are rounded one by one and their sums are not: no more than a product's rounding, 2^-9."""
    keys = [*LATENT, HEADS2, "model.dtype=bfloat16", "ops.select=measure"]
    world(4).call(train, tmp_path / "split", [*keys, SIZE4])
    world(1).call(train, tmp_path / "alone", keys)
    found, expected = records(tmp_path / "split"), records(tmp_path / "alone")
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2**-9)
        norms = [ours["grad_norm/default"], theirs["grad_norm/default"]]
        assert norms[0] == pytest.approx(norms[1], rel=2**-6)
