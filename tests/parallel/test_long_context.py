"""32,768 tokens in one micro-batch, on four ranks and on one."""

import json

import numpy as np
import pytest
from worlds import records

from portmoe.config.read import load_config

TOKENS, VOCABULARY = 32768, 64
LENGTHS = [20011, 1, 7, 9000, 3749, 30000, 512, 512, 1744]  # of two packs, in whatever order they come
SIZES = [
    *(f"data.seq_len={TOKENS}", "data.micro_bsz=1", "data.micro_num=1", "data.global_batch_size=null"),
    *("data.total_steps=1", "data.min_length=0", f"model.vocab_size={VOCABULARY}", "model.hidden_size=16"),
    *("model.num_hidden_layers=1", "model.intermediate_size=16", "ckpt.enable_save_ckpt=false"),
]
LATENT = ["model.q_lora_rank=8", "model.kv_lora_rank=8", "model.moe_intermediate_size=8"]
LATENT += [
    "model.qk_nope_head_dim=4",
    "model.qk_rope_head_dim=4",
    "model.v_head_dim=4",
    "model.n_shared_experts=1",
]
CASES = {
    "a ring of 4": ["tiny_mixtral", "model.num_attention_heads=2", "model.num_key_value_heads=1"],
    "heads over 2, a ring of 2": [
        *("tiny_deepseek_v2", "model.num_attention_heads=2", "model.first_k_dense_replace=0"),
        *LATENT,
    ],
}


def train(directory, folder, family, *keys):
    """One rank's part of a run."""
    from portmoe.training.run import train

    keys = (*SIZES, *keys, f"data.train_folder={folder}", f"run.directory={directory}")
    train(load_config(family, keys), family, "cpu", "torchrun")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random tokens in samples of these lengths."""
    path, draw = tmp_path_factory.mktemp("long") / "en", np.random.default_rng(3)
    path.mkdir()
    lines = [
        json.dumps({"tokens": draw.integers(1, VOCABULARY, length).tolist()}).encode() + b"\n"
        for length in LENGTHS
    ]
    (path / "part.bin").write_bytes(b"".join(lines))
    with (path / "part.bin.meta").open("wb") as file:
        np.save(file, list(zip(np.cumsum([0, *map(len, lines[:-1])]), LENGTHS, strict=True)))
    return path.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_four_ranks_and_one(name, folder, world, tmp_path):
    world(4).call(train, tmp_path / "split", folder, *CASES[name], "parallel.sequence.size=4")
    world(1).call(train, tmp_path / "alone", folder, *CASES[name])
    (ours,), (theirs,) = records(tmp_path / "split"), records(tmp_path / "alone")
    assert theirs["num_consumed_tokens"] == TOKENS
    assert ours["data_crc32"] == theirs["data_crc32"]
    for key in ("loss", "moe_loss"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
    norms = [key for key in theirs if key.startswith("grad_norm/")]
    assert [ours[key] for key in norms] == pytest.approx([theirs[key] for key in norms], rel=1e-5)
