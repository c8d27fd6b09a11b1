"""The bytes a step cannot do without, worked out by hand for one small rank."""

import torch

from portmoe.config import Config
from portmoe.costs.step_cost import step_cost
from portmoe.model import Decoder
from portmoe.model.share import Share

# T 24, H 16, heads · width 16, F 24, E 4, k 2, V 40, four bytes a number; rows k·T = 48.
ACTIVATION = 24 * 16 * 4
ROWS = 48 * 16 * 4
BY_HAND = {
    "router": 3 * ACTIVATION,
    "dispatch": 2 * (ACTIVATION + ROWS),
    "experts": 3 * (3 * 4 * 24 * 16 * 4) + 4 * ROWS,  # w1, w2, w3 of four experts: twice, and their gradient
    "combine": 2 * (ACTIVATION + ROWS) + ROWS,
    "attention": 2 * 3 * (4 * 16 * 16 * 4 + 2 * ACTIVATION + 4 * 24 * 16 * 4),  # in both layers
    "dense network": 3 * (3 * 24 * 16 * 4) + 4 * ACTIVATION,
    "norms": 5 * 5 * ACTIVATION,  # two a layer and the last
    "loss": 3 * 40 * 16 * 4 + 2 * ACTIVATION,
}


def test_the_bytes_of_every_part():
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "mlp_ratio": 1.5,
        "multiple_of": 8,
        "vocab_size": 40,
    }
    layers = {"vocab_size": 40, "num_layers": 2, "first_k_dense_replace": 1, "num_experts": 4}
    config = Config.model_validate({"model": sizes | layers, "data": {"train_folder": "none"}})
    share = Share(torch.device("cpu"), torch.float32, tokens=24, seq_len=24, attended=12)
    with torch.device("meta"):
        decoder = Decoder(config)
    costs = step_cost([decoder], share, micro_batches=2, parameters=10)
    assert {part: cost.bytes for part, cost in costs.items()} == {
        part: 2 * size for part, size in BY_HAND.items()
    } | {"optimizer": 8 * 4 * 10}
