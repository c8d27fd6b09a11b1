"""Packs against ones worked out by hand and against a token-by-token construction."""

import numpy as np
import pytest

from portmoe.data.batch import Batch
from portmoe.data.packing import Packing, PackSequence
from portmoe.data.sources.sample import Sample


class Listed:
    """Samples given as lists of the benchmark's tokens, or of tokens and which are learned."""

    def __init__(self, samples: list[list[int]], type_id: int = 0, learned: list[list[bool]] | None = None):
        signed = [np.array(sample) for sample in samples]
        self._samples = [
            Sample(tokens_T, np.array(learned[i])) if learned else Sample.from_signed(tokens_T)
            for i, tokens_T in enumerate(signed)
        ]
        self.type_id = type_id
        self.lengths = np.array([len(sample) for sample in samples])
        self.asked = []

    def sample(self, index: int) -> Sample:
        self.asked.append(int(index))
        return self._samples[index]


def packed(samples: list[list[int]] | Listed, seq_len: int, pack_len: int, type_id: int = 0) -> list[dict]:
    if not isinstance(samples, Listed):
        samples = Listed(samples, type_id)
    packing = Packing(samples, seq_len, pack_len)
    return [
        {
            "tokens": pack.tokens_T.tolist(),
            "labels": Batch.from_pack(pack, 0).labels_T.tolist(),
            "positions": pack.positions_T.tolist(),
            "types": pack.types_T.tolist(),
            "offsets": pack.offsets,
        }
        for pack in (packing.pack(p) for p in range(len(packing)))
    ]


def token_by_token(samples: list[list[int]], seq_len: int, pack_len: int) -> list[dict]:
    """The benchmark's text read one token at a time, with no arrays and no random access."""
    order = np.arange(len(samples))
    np.random.RandomState(1024).shuffle(order)
    stream = [(s, i) for s in order.tolist() for i in range(len(samples[s]))]
    packs = []
    for begin in range(0, len(stream) // pack_len * pack_len, pack_len):
        pack = {"tokens": [], "labels": [], "positions": [], "types": [0] * pack_len, "offsets": []}
        previous, position = None, 0
        for s, i in stream[begin : begin + pack_len]:
            position += 1
            if s != previous or position == seq_len:
                pack["offsets"].append(len(pack["tokens"]))
                position = 0
            previous = s
            pack["tokens"].append(abs(samples[s][i]))
            label = samples[s][i + 1] if i + 1 < len(samples[s]) else 0
            pack["labels"].append(label if label > 0 else -100)
            pack["positions"].append(position)
        pack["offsets"] = (*pack["offsets"], pack_len)
        packs.append(pack)
    return packs


def test_order_is_the_one_drawn_by_numpys_generator():
    """RandomState(1024).shuffle(arange(4)) is 0, 2, 1, 3: written down, so that a change is seen."""
    order = [pack["tokens"][0] for pack in packed([[10], [11], [12], [13]], seq_len=1, pack_len=1)]
    assert order == [10, 12, 11, 13]


def test_a_sample_cut_by_a_pack_edge_and_a_rest_left_out():
    """Laid out: 7 8 9 | 3 4 5 6 | 5 | 1 2 → packs of 5: (7 8 9 3 4) (5 6 5 1 2); see the order above."""
    first, second = packed([[7, 8, 9], [5], [3, 4, 5, 6], [1, 2]], seq_len=5, pack_len=5)
    assert first == {
        "tokens": [7, 8, 9, 3, 4],
        "labels": [8, 9, -100, 4, 5],  # 5 follows in the same sample, in the next pack
        "positions": [0, 1, 2, 0, 1],
        "types": [0] * 5,
        "offsets": (0, 3, 5),
    }
    assert second == {
        "tokens": [5, 6, 5, 1, 2],
        "labels": [6, -100, -100, 2, -100],
        "positions": [0, 1, 0, 0, 1],  # 0 although 5 is the third token of its sample
        "types": [0] * 5,
        "offsets": (0, 2, 3, 5),
    }
    assert len(packed([[7, 8, 9], [5], [3, 4, 5, 6], [1, 2]], seq_len=4, pack_len=4)) == 2  # 2 left over


def test_a_sample_longer_than_seq_len_becomes_several_segments():
    """Pieces of 3 are counted from where the sample enters the pack."""
    first, second = packed([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]], seq_len=3, pack_len=6)
    assert first["offsets"] == (0, 3, 6)
    assert first["labels"] == [2, 3, 4, 5, 6, 7]
    assert first["positions"] == [0, 1, 2, 0, 1, 2]
    assert second["tokens"] == [7, 8, 9, 10, 11, 12]
    assert second["labels"] == [8, 9, 10, 11, 12, 13]
    (pack,) = packed([[1, 2, 3, 4, 5, 6, 7]], seq_len=3, pack_len=7)
    assert pack["offsets"] == (0, 3, 6, 7)
    assert pack["positions"] == [0, 1, 2, 0, 1, 2, 0]
    assert pack["labels"] == [2, 3, 4, 5, 6, 7, -100]


def test_pieces_are_counted_from_the_pack_cut():
    """seq_len 4, packs of 6: the second pack begins at the sample's token 6 and cuts at 10, not at 8."""
    _, second = packed([list(range(1, 13))], seq_len=4, pack_len=6)
    assert second["offsets"] == (0, 4, 6)


def test_zero_and_negative_tokens_are_read_but_never_learned():
    (pack,) = packed([[5, 0, -7, 8, -9, 3]], seq_len=6, pack_len=6, type_id=2)
    assert pack["tokens"] == [5, 0, 7, 8, 9, 3]
    assert pack["labels"] == [-100, -100, 8, -100, 3, -100]
    assert pack["types"] == [2] * 6


def test_of_a_source_with_a_mask_zero_is_a_token_like_any_other():
    """Only the mask decides: 0 is learned where it says so, and 8 is not where it does not."""
    learned = [[True, True, True, False, True, True]]
    (pack,) = packed(Listed([[5, 0, 7, 8, 0, 3]], learned=learned), seq_len=6, pack_len=6)
    assert pack["tokens"] == [5, 0, 7, 8, 0, 3]
    assert pack["labels"] == [0, 7, -100, 0, 3, -100]
    first, second = packed(Listed([[5, 0, 7, 8, 0, 3]], learned=learned), seq_len=3, pack_len=3)
    assert (first["labels"], second["labels"]) == ([0, 7, -100], [0, 3, -100])  # the cut changes none


@pytest.mark.parametrize("seed", range(20))
def test_packs_equal_a_token_by_token_construction(seed):
    rng = np.random.default_rng(seed)
    seq_len = int(rng.integers(1, 12))
    pack_len = seq_len * int(rng.integers(1, 4))
    lengths = rng.integers(1, 30, size=rng.integers(1, 25))
    samples = [rng.integers(-20, 50, size=n).tolist() for n in lengths]
    assert packed(samples, seq_len, pack_len) == token_by_token(samples, seq_len, pack_len)


def test_a_pack_reads_only_the_samples_in_it():
    samples = Listed([[i] * 4 for i in range(1, 1001)])
    packing = Packing(samples, seq_len=4, pack_len=8)
    packing.pack(250)
    assert len(samples.asked) == 2


def test_equal_segments():
    assert Packing(Listed([[1] * 4, [2] * 8]), seq_len=4, pack_len=8).equal_segments
    assert not Packing(Listed([[1] * 4, [2] * 7]), seq_len=4, pack_len=8).equal_segments


def test_packs_out_of_range_are_refused():
    packing = Packing(Listed([[1, 2, 3, 4]]), seq_len=2, pack_len=2)
    for wrong in (-1, 2):
        with pytest.raises(IndexError, match=f"pack {wrong} of 2"):
            packing.pack(wrong)
        with pytest.raises(IndexError):
            PackSequence([packing]).pack(wrong)


def test_several_data_sets_follow_each_other_without_sharing_a_pack():
    """7 tokens, 1 token and 4 tokens in packs of 2: 3 + 0 + 2 packs."""
    sets = [Listed([[1] * 7]), Listed([[2]]), Listed([[3] * 4], type_id=1)]
    packs = PackSequence([Packing(samples, 2, 2) for samples in sets])
    assert len(packs) == 5
    assert packs.num_tokens == 12
    assert not packs.equal_segments
    assert [packs.pack(p).tokens_T.tolist() for p in range(5)] == [[1, 1]] * 3 + [[3, 3]] * 2
    assert [packs.pack(p).types_T.tolist() for p in range(5)] == [[0, 0]] * 3 + [[1, 1]] * 2
