"""Samples packed into rows give the loss and the gradients they give one by one."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from portmoe.config.read import load_config
from portmoe.data.batch import Batch
from portmoe.data.row_packs import RowPacks
from portmoe.data.sources.sample import Sample
from portmoe.model import Decoder
from portmoe.model.init import initialise
from portmoe.ops import Segments

SEQ_LEN = 24
SMALL = [
    *("model.vocab_size=300", "model.hidden_size=32", "model.num_hidden_layers=2", "moe.aux_loss=none"),
    *("model.intermediate_size=48", f"data.seq_len={SEQ_LEN}"),
]
FAMILIES = {
    "tiny_mixtral": [],
    "tiny_deepseek_v2": ["model.kv_lora_rank=10", "model.moe_intermediate_size=16"],
}
CASES = {
    "many": [1, SEQ_LEN, 1, 5, 17, 2, 23, SEQ_LEN, 9, 1, 12, 3],
    "one token": [1],
    "one row": [SEQ_LEN],
    "one short": [7],
}


class Drawn:
    """Random samples of which some tokens are learned."""

    type_id = 0

    def __init__(self, lengths: list[int]) -> None:
        rng = np.random.default_rng(sum(lengths))
        self.lengths = np.array(lengths)
        self._samples = [Sample(rng.integers(0, 300, n), rng.random(n) < 0.6) for n in lengths]

    def sample(self, index: int) -> Sample:
        return self._samples[index]


def alone(samples: Drawn, index: int) -> Batch:
    """One sample as a micro-batch of its own, without packing."""
    sample = samples.sample(index)
    tokens_T = torch.from_numpy(sample.tokens_T)
    labels_T = torch.full_like(tokens_T, -100)
    for place in range(len(tokens_T) - 1):
        if sample.learned_T[place + 1]:
            labels_T[place] = tokens_T[place + 1]
    positions_T = torch.arange(len(tokens_T))
    return Batch(tokens_T, labels_T, positions_T, torch.zeros_like(tokens_T), Segments((0, len(tokens_T))), 0)


def pieces(batch: Batch) -> list[Batch]:
    """Each segment of a batch that is no padding, as a batch of its own with positions from 0."""
    return [
        Batch(
            batch.tokens_T[begin:end],
            batch.labels_T[begin:end],
            torch.arange(end - begin),
            batch.types_T[begin:end],
            Segments((0, end - begin)),
            0,
        )
        for begin, end in pairwise(batch.segments.offsets)
        if begin < batch.segments.real
    ]


def summed(model: Decoder, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss summed over all labels of all batches, and its gradients."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(batch.tokens_T, batch).loss_T.sum()
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    config = load_config(request.param, [*SMALL, *FAMILIES[request.param]])
    decoder = Decoder(config)
    initialise(decoder, config)
    return decoder


def same(found: tuple, expected: tuple) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6, abs=1e-6)
    scale = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        apart = (found[1][name] - gradient).norm()
        assert apart <= 1e-6 * max(scale, 1e-6), (name, float(apart), float(scale))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("packing", ["whole", "none"])
def test_packed_as_one_by_one(packing, case, model):
    samples = Drawn(CASES[case])
    expected = summed(model, [alone(samples, index) for index in range(len(CASES[case]))])
    for width in (1, 3):
        packs = RowPacks([samples], packing, SEQ_LEN, width, True, seed=3)
        batches = [Batch.from_pack(packs.pack(packs.in_order(n)), n) for n in range(len(packs))]
        same(summed(model, batches), expected)


def test_what_a_cut_divides_is_trained_as_pieces(model):
    """Nothing else of a sample is seen by a piece of it, and the label across the cut stays."""
    packs = RowPacks([Drawn([*CASES["many"], 60])], "cut", SEQ_LEN, 2, True, seed=3)
    batches = [Batch.from_pack(packs.pack(packs.in_order(n)), n) for n in range(len(packs))]
    assert packs.divided > 1
    same(summed(model, batches), summed(model, [piece for batch in batches for piece in pieces(batch)]))


def test_without_varlen_attention_a_row_is_one_text(model):
    """Attention and positions run through a row; labels are those of the samples."""
    samples = Drawn(CASES["many"])
    within = RowPacks([samples], "whole", SEQ_LEN, 1, True, seed=3)
    across = RowPacks([samples], "whole", SEQ_LEN, 1, False, seed=3)
    rows = []
    for row in range(within.num_rows):
        separate, joined = (Batch.from_pack(packs.pack((row,)), 0) for packs in (within, across))
        assert torch.equal(separate.labels_T, joined.labels_T)
        (whole,) = pieces(joined)
        assert whole.positions_T.tolist() == joined.positions_T[: joined.segments.real].tolist()
        rows.append((joined, whole))
    found = summed(model, [joined for joined, _ in rows])
    same(found, summed(model, [whole for _, whole in rows]))
    expected = summed(model, [alone(samples, index) for index in range(len(CASES["many"]))])
    assert abs(found[0] / expected[0] - 1) > 1e-5
