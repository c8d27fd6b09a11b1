"""Keys of the published families: what they refuse, what is void, what survives in the resolved file."""

import math

import pytest
import torch

from portmoe.config.read import dump_config, load_config, no_effect_notes, packaged_names
from portmoe.errors import ConfigError
from portmoe.families.architecture import Rotary, Yarn
from portmoe.model.rotary import frequencies, rotary_tables

REFUSED = {
    "tiny_mixtral": [
        ("model.num_key_value_heads=3", r"model\.num_attention_heads=8 .*model\.num_key_value_heads=3"),
        ("model.num_experts_per_tok=9", r"model\.num_experts_per_tok=9 .*model\.num_local_experts=8"),
        ("model.hidden_act=gelu", r"model\.hidden_act = 'gelu'.*silu"),
        ("model.tie_word_embeddings=true", r"model\.tie_word_embeddings = true"),
        ("model.use_sliding_window=true", r"model\.use_sliding_window = true"),
        ("model.rope_scaling={type: llama3, factor: 8.0}", r"model\.rope_scaling\.type = 'llama3'.*yarn"),
        ("model.attention_dropout=0.1", r"model\.attention_dropout = 0\.1"),
        ("parallel.expert.size=3", r"model\.num_local_experts=8 .*parallel\.expert\.size=3"),
        ("parallel.tensor.size=3", r"model\.num_attention_heads=8 .*parallel\.tensor\.size=3"),
        ("model.num_experts=4", r"model\.num_experts: unknown key"),
    ],
    "tiny_deepseek_v2": [
        ("model.n_group=5", r"model\.n_routed_experts=16 .*model\.n_group=5"),
        ("model.topk_group=5", r"model\.topk_group=5 .*model\.n_group=4"),
        ("model.num_experts_per_tok=9", r"model\.num_experts_per_tok=9 .*8 experts of model\.topk_group=2"),
        ("model.num_key_value_heads=2", r"model\.num_key_value_heads=2 .*model\.num_attention_heads=4"),
        ("model.scoring_func=sigmoid", r"model\.scoring_func = 'sigmoid'"),
        ("model.qk_rope_head_dim=7", r"7, must be even"),
        ("parallel.expert.size=7", r"model\.n_routed_experts=16 .*parallel\.expert\.size=7"),
    ],
    "tiny_qwen3_moe": [
        ("parallel.tensor.size=8", None),  # 2 key heads on 8 ranks: four hold the same
        ("model.head_dim=7", r"7, must be even"),
    ],
    "internlm_7b": [("model.num_experts=4", r"model\.num_experts: unknown key")],
    "7b_moe4": [("moe.capacity_factor=null", r"moe\.capacity_factor=null, dropless.*MegaBlock-D")],
}
CASES = [(name, key, message) for name, cases in REFUSED.items() for key, message in cases]


@pytest.mark.parametrize(("name", "key", "message"), CASES)
def test_what_a_family_refuses(name, key, message):
    if message is None:
        load_config(name, [key])
        return
    with pytest.raises(ConfigError, match=message):
        load_config(name, [key])


@pytest.mark.parametrize("name", packaged_names())
def test_a_packaged_config_sets_nothing_void_and_survives_as_resolved(name, tmp_path):
    config = load_config(name)
    assert no_effect_notes(config) == []
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_dropless_is_the_published_models_default_and_a_capacity_an_option():
    gate = load_config("tiny_mixtral").architecture.expert_layers[0].gate
    assert (gate.dropless, gate.capacity_factor) == (True, None)
    notes = no_effect_notes(load_config("tiny_mixtral", ["moe.top_k=1", "moe.min_capacity=8"]))
    assert [note.partition(" has")[0] for note in notes] == ["moe.top_k = 1", "moe.min_capacity = 8"]
    config = load_config("tiny_mixtral", ["moe.capacity_factor=1.25", "moe.min_capacity=8"])
    gate = config.architecture.expert_layers[0].gate
    assert (gate.dropless, gate.capacity_factor, gate.eval_capacity_factor) == (False, 1.25, 1.25)
    assert no_effect_notes(config) == []


def test_yarn_by_hand():
    """Base 10000, 64 of 16 · 4: pair 0 turns 2.5 times within 16 tokens, none 32 times, pair 1 once in 63."""
    yarn = Yarn(factor=4.0, original=16, fast=2.0, slow=0.1, magnitude=1.5)
    rotary, width = Rotary(10000.0, yarn=yarn), 8

    def pair(turns):
        return width * math.log(16 / (turns * 2 * math.pi)) / (2 * math.log(10000.0))

    low, high = max(math.floor(pair(2.0)), 0), min(math.ceil(pair(0.1)), width - 1)
    assert (low, high) == (0, 2)
    plain = [1.0, 0.1, 0.01, 0.001]
    slowed = [0.0, 0.5, 1.0, 1.0]
    wanted = [f * (1 - s) + f / 4 * s for f, s in zip(plain, slowed, strict=True)]
    assert frequencies(rotary, width) == pytest.approx(wanted, rel=1e-12)
    cos_TR, sin_TR = rotary_tables(torch.arange(5), rotary, width)
    angle = torch.arange(5).double()[:, None] * torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(cos_TR.double(), 1.5 * angle.cos(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin_TR.double(), 1.5 * angle.sin(), rtol=1e-6, atol=1e-6)
