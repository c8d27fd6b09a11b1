"""What a rank is given step by step, and what is refused before the first one."""

import subprocess
import sys
import threading
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from token_folder import folder_of

from portmoe.config import Config
from portmoe.data import check_data, open_data
from portmoe.data.packs import open_packs
from portmoe.errors import ConfigError

VOCAB = 600


def config(vocab_size: int = VOCAB, seed: int = 1024, **data) -> Config:
    data = {"seq_len": 16, "micro_bsz": 2, "num_samples": 40} | data
    return Config.model_validate({"data": data, "model": {"vocab_size": vocab_size}, "run": {"seed": seed}})


def content(batches: list) -> list[tuple]:
    return [
        (b.index, b.tokens_T.tolist(), b.labels_T.tolist(), b.positions_T.tolist(), b.segments.offsets)
        for b in batches
    ]


def steps(run: Config, count: int, rank: int = 0, size: int = 1, micro_num: int = 4) -> list[list[tuple]]:
    with open_data(run, rank=rank, size=size, micro_num=micro_num) as stream:
        return [content(stream.batches(n)) for n in range(count)]


def test_a_batch_worked_out_by_hand(tmp_path):
    """One pack of 6: samples 5 −6 and 7 8 9 10 0, the second in pieces of 3, its end left out."""
    folder = folder_of(tmp_path / "code", [[5, -6], [7, 8, 9, 10, 0]])
    run = config(seq_len=3, train_folder=folder, min_length=0)
    with open_data(run, rank=0, size=1, micro_num=1) as stream:
        (batch,) = stream.batches(0)
        assert stream.num_packs == stream.steps_per_epoch == 1
        assert not stream.equal_segments
    tensors = (batch.tokens_T, batch.labels_T, batch.positions_T, batch.types_T)
    assert [tensor.dtype for tensor in tensors] == [torch.int64] * 4
    assert [tensor.tolist() for tensor in tensors] == [
        [5, 6, 7, 8, 9, 10],
        [-100, -100, 8, 9, 10, -100],
        [0, 1, 0, 1, 2, 0],
        [0] * 6,  # the folder named "code" is the data set itself, not a part of it
    ]
    assert batch.segments.offsets == (0, 2, 5, 6)
    assert (batch.index, batch.num_segments, batch.longest_segment) == (0, 3, 3)


def test_to_moves_every_tensor_and_keeps_the_rest():
    with open_data(config(), rank=0, size=1, micro_num=1) as stream:
        (batch,) = stream.batches(3)
    moved = batch.to("meta", non_blocking=True)
    tensors = (moved.tokens_T, moved.labels_T, moved.positions_T, moved.types_T)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved.segments, moved.index) == (batch.segments, 3)


@pytest.mark.parametrize("fixed", [True, False])
def test_one_global_batch_on_one_two_and_four_ranks(fixed):
    """Seven steps, over an epoch's end; each micro-batch is known by its number."""
    run = config(fixed_random_dataset_seqlen=fixed)
    by_layout = []
    for size in (1, 2, 4):
        ranks = [steps(run, 7, rank, size, micro_num=4 // size) for rank in range(size)]
        by_layout.append([sorted(chain(*parts)) for parts in zip(*ranks, strict=True)])
    assert by_layout[0] == by_layout[1] == by_layout[2]
    assert [batch[0] for step in by_layout[0] for batch in step] == list(range(28))


def test_resuming_at_any_step_gives_the_same_batches():
    whole = steps(config(), 17)  # five steps are an epoch
    for first in (1, 4, 5, 6, 12):
        with open_data(config(), rank=0, size=1, micro_num=4) as stream:
            resumed = [
                content(stream.batches(n)) for n in (first, first + 1, first + 4)
            ]  # one passes steps over
        assert resumed == [whole[first], whole[first + 1], whole[first + 4]]


def test_an_epoch_takes_every_pack_once_and_the_next_another_order():
    def packs(begin: int) -> list[list[int]]:
        return [batch[1] for step in epochs[begin : begin + 5] for batch in step]

    epochs = steps(config(), 10)
    assert packs(0) != packs(5)
    assert sorted(packs(0)) == sorted(packs(5))


def test_the_seed_decides_the_order():
    assert steps(config(seed=1), 1) != steps(config(seed=2), 1)


@pytest.mark.parametrize(("size", "micro_num"), [(1, 1), (1, 5), (2, 2), (4, 3)])
def test_validation_takes_every_pack_once_in_order_and_fills_up_without_labels(size, micro_num):
    run = config(valid_micro_num=micro_num, train_folder="not/opened", num_samples=11)
    whole = open_packs(run, 1, 1, "valid")
    taken = {}
    passes = []
    for rank in range(size):
        with open_data(run, rank=rank, size=size, micro_num=7, split="valid") as stream:
            passes.append(list(stream.passes()))
    assert {len(one) for one in passes} == {-(-len(whole) // (size * micro_num))}
    for of_rank in passes:
        for batches in of_rank:
            assert len(batches) == micro_num
            for batch in batches:
                if batch.index < len(whole):
                    taken[batch.index] = batch
                else:
                    assert (batch.labels_T == -100).all()
    assert sorted(taken) == list(range(len(whole)))
    for index, batch in taken.items():
        assert batch.tokens_T.tolist() == whole.pack(index).tokens_T.tolist()


def test_the_dummy_data_grows_with_the_ranks_unless_set():
    for size in (1, 3):
        with open_data(config(num_samples=None), rank=0, size=size, micro_num=1) as stream:
            assert stream.num_packs == 250 * size
            assert stream.equal_segments


@pytest.mark.parametrize("fixed", [True, False])
def test_a_vocabulary_too_small_for_the_dummy_data(fixed):
    """Seen here for validation on the dummy data; for training on it the config itself refuses."""
    rng = np.random.RandomState(1999)
    blocks, repeats = rng.randint(1, 30, size=500).tolist(), rng.randint(10, 200, size=500).tolist()
    if fixed:
        repeats = [
            next(r << j for j in range(20) if n * (r << j) >= 512)
            for n, r in zip(blocks, repeats, strict=True)
        ]
    largest = max(repeats)
    data = {
        "num_samples": 500,
        "seq_len": 512,
        "train_folder": "not/opened",
        "fixed_random_dataset_seqlen": fixed,
    }
    open_data(config(largest + 1, **data), rank=0, size=1, micro_num=1, split="valid").close()
    with pytest.raises(ConfigError) as error:
        open_data(config(largest, **data), rank=0, size=1, micro_num=1, split="valid")
    assert str(error.value) == (
        f"model.vocab_size={largest} is too small: the largest token of the dummy data is {largest}; "
        f"set model.vocab_size to {largest + 1} or more"
    )


def test_a_tokenized_token_outside_the_vocabulary_is_refused_when_read(tmp_path):
    for name, token in (("positive", VOCAB), ("negative", -VOCAB), ("least", -(2**63))):
        folder = folder_of(tmp_path / name, [[1, token], [VOCAB - 1, 1]])
        run = config(seq_len=2, micro_bsz=1, train_folder=folder, min_length=0)
        with open_data(run, rank=0, size=1, micro_num=2) as stream:
            with pytest.raises(ConfigError, match=f"model.vocab_size=600 .* {abs(token)};") as error:
                stream.batches(0)
            assert folder in str(error.value)


def test_too_few_samples_name_the_fewest_that_do():
    """Two ranks · 3 micro-batches · 2 sequences of 16 need 12 samples of 16."""
    with pytest.raises(
        ConfigError, match=r"data\.num_samples=11 is too small; set data\.num_samples to 12 or"
    ):
        open_data(config(num_samples=11), rank=0, size=2, micro_num=3)
    open_data(config(num_samples=12), rank=0, size=2, micro_num=3).close()


def test_the_fewest_samples_of_free_length_do_and_one_less_does_not():
    def run(num_samples: int) -> Config:
        return config(num_samples=num_samples, seq_len=2048, fixed_random_dataset_seqlen=False)

    with pytest.raises(ConfigError) as error:
        check_data(run(3), size=1, micro_num=50)
    fewest = int(str(error.value).split("set data.num_samples to ")[1].split()[0])
    check_data(run(fewest), size=1, micro_num=50)
    with pytest.raises(ConfigError, match=f"set data.num_samples to {fewest} or more"):
        check_data(run(fewest - 1), size=1, micro_num=50)


@pytest.mark.parametrize(
    ("data", "micro_num", "said"),
    [
        ({}, 2**40, "data.num_samples=40 is too small; lower one of these sizes"),
        ({"fixed_random_dataset_seqlen": False}, 2**40, "is too small; lower one of these sizes"),
        ({"train_folder": "no/such/folder"}, 1, "data.train_folder='no/such/folder' does not exist"),
        ({"valid_folder": "no/such/folder", "valid_every": 5}, 1, "data.valid_folder='no/such/folder'"),
        ({"valid_micro_num": 0, "valid_every": 5}, 1, "data.valid_micro_num=0 leaves nothing"),
    ],
)
def test_configs_refused_at_once(data, micro_num, said):
    with pytest.raises(ConfigError, match=said):
        check_data(config(**data), size=1, micro_num=micro_num)


def test_so_many_ranks_that_the_default_number_of_samples_is_absurd():
    with pytest.raises(ConfigError, match=r"data\.num_samples=null means 500 samples for each of 40000 "):
        check_data(config(num_samples=None), size=40000, micro_num=1)


def test_validation_data_is_not_checked_where_it_is_not_used():
    check_data(config(valid_folder="no/such/folder", valid_micro_num=0), size=1, micro_num=1)


def test_a_folder_with_too_little_is_refused(tmp_path):
    folder = folder_of(tmp_path / "en", [[1] * 40, [2] * 60])
    with pytest.raises(ConfigError, match=r"holds 60 tokens in samples of at least data\.min_length=50; add"):
        check_data(config(train_folder=folder), size=1, micro_num=2)


def test_the_next_step_is_read_before_it_is_asked_for(monkeypatch):
    with open_data(config(), rank=0, size=1, micro_num=2) as stream:
        asked = []
        prepare = stream._prepare
        monkeypatch.setattr(stream, "_prepare", lambda step: (asked.append(step), prepare(step))[1])
        stream.batches(0)
        deadline = time.monotonic() + 10
        while asked != [0, 1] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert asked == [0, 1]
        stream.batches(1)
        stream.batches(2)
    assert asked in ([0, 1, 2], [0, 1, 2, 3])


def test_an_error_read_ahead_is_raised_by_its_own_step_and_ends_cleanly(tmp_path):
    folder = folder_of(tmp_path / "en", [[1, 2], [3, 4], [5, 6], [7, 8]])
    run = config(seq_len=2, micro_bsz=1, train_folder=folder, min_length=0)
    bad = next(n for n in range(4) if steps(run, 4, micro_num=1)[n][0][1] == [5, 6])
    file = Path(folder, "a.bin")
    file.write_bytes(file.read_bytes().replace(b"[5, 6]", b"[5; 6]"))
    with open_data(run, rank=0, size=1, micro_num=1) as stream:
        for n in (n for n in range(4) if n != bad):
            stream.batches(n)
        with pytest.raises(ConfigError, match="line 3 of"):
            stream.batches(bad)
        with pytest.raises(ConfigError, match="line 3 of"):
            stream.batches(bad)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("portmoe-train-data")]


def test_checking_data_imports_no_torch():
    code = (
        "import sys; from portmoe.config import Config; from portmoe.data import check_data;"
        "check_data(Config(), 1, 1); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
