"""Decoding over logits that are written down here."""

import math
from collections import Counter

import pytest
import torch

from portmoe.generation.decode import Decoding, answers, generate, packed

SHARES = (0.6, 0.3, 0.1)


def counted(batch):
    """The likeliest token is the length of the text asked about; it stands last in each segment."""
    lengths = batch.segments.real_lengths
    logits_BV = torch.zeros(len(lengths), 32)
    for row, length in enumerate(lengths):
        logits_BV[row, length] = 1.0
    return logits_BV


def test_each_prompt_goes_on_until_its_end():
    assert answers(counted, [[9, 9], [9, 9, 9, 9]], Decoding(4, ends={5})) == [[2, 3, 4, 5], [4, 5]]
    assert answers(counted, [[9]], Decoding(2)) == [[1, 2]]
    steps = list(generate(counted, [[9, 9], [9, 9, 9, 9]], Decoding(9, ends={4, 5})))
    assert steps == [{0: 2, 1: 4}, {0: 3}, {0: 4}]
    with pytest.raises(ValueError, match="without a token"):
        answers(counted, [[1], []], Decoding(1))


def test_what_the_ranks_agree_on_is_taken():
    assert answers(counted, [[9]], Decoding(3), agreed=lambda tokens: [token + 1 for token in tokens]) == [
        [2, 3, 4]
    ]


def test_texts_are_packed_and_padded_behind():
    batch = packed([[5, 6, 7], [8]], multiple=8)
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 0, 0, 0, 0]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert batch.segments.lengths == (3, 1, 4)
    assert batch.segments.real == 4
    assert batch.asked_B.tolist() == [2, 3]
    assert not packed([[5, 6]], multiple=2).segments.padded


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_draws_as_the_softmax_says(temperature):
    logits_V = torch.tensor([math.log(share) for share in SHARES])

    def next_logits(batch):
        return logits_V.expand(len(batch.asked_B), -1)

    drawn = answers(next_logits, [[0]] * 50, Decoding(40, temperature=temperature, seed=3))
    counts = Counter(token for answer in drawn for token in answer)
    weights = [share ** (1 / temperature) for share in SHARES]
    for token, weight in enumerate(weights):
        assert counts[token] / 2000 == pytest.approx(weight / sum(weights), abs=0.04)
    assert drawn == answers(next_logits, [[0]] * 50, Decoding(40, temperature=temperature, seed=3))
    assert drawn != answers(next_logits, [[0]] * 50, Decoding(40, temperature=temperature, seed=4))
