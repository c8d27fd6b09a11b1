"""Data is known by its content: counts, the lengths of its samples, and what is in them."""

import json
import shutil

import numpy as np
import pytest

from portmoe.config import Config
from portmoe.data import check_data


def tokenized(folder, samples):
    folder.mkdir(parents=True, exist_ok=True)
    rows, offset = [], 0
    with (folder / "part.bin").open("wb") as file:
        for tokens in samples:
            line = json.dumps({"tokens": tokens}).encode() + b"\n"
            file.write(line)
            rows.append((offset, len(tokens)))
            offset += len(line)
    with (folder / "part.bin.meta").open("wb") as file:
        np.save(file, np.array(rows, dtype=np.int64))
    return folder


def of(size=1, **data):
    config = Config.model_validate({"data": {"seq_len": 16, "min_length": 0, **data}})
    return check_data(config, size, 1)["train"]


SAMPLES = [[1 + (i + j) % 50 for j in range(10 + i % 7)] for i in range(60)]


def test_the_same_data_elsewhere_is_the_same(tmp_path):
    first = tokenized(tmp_path / "x" / "ok", SAMPLES)
    shutil.copytree(first, tmp_path / "y" / "ok")
    found = of(train_folder=str(first))
    assert found == of(train_folder=str(tmp_path / "y" / "ok"))
    assert (found["samples"], found["tokens"]) == (60, sum(map(len, SAMPLES)))


@pytest.mark.parametrize(
    "other",
    [[*SAMPLES, [1, 2, 3]], SAMPLES[:-1], SAMPLES[::-1], [[t + 1 for t in sample] for sample in SAMPLES]],
)
def test_other_data_of_the_same_name_is_another(tmp_path, other):
    folder = tmp_path / "data"
    before = of(train_folder=str(tokenized(folder, SAMPLES)))
    assert of(train_folder=str(tokenized(folder, other))) != before


def test_dummy_data_by_the_rank_depends_on_the_ranks_and_a_given_number_does_not():
    assert of(1)["samples"] == 500
    assert of(2) != of(1)
    assert of(2) == of(1, num_samples=1000)
    assert of(4, num_samples=300) == of(1, num_samples=300)
    assert of(num_samples=300) != of(num_samples=301)


def test_the_dummy_validation_data_is_the_same_for_all_ranks():
    config = Config.model_validate({"data": {"seq_len": 16, "valid_every": 1}})
    assert check_data(config, 1, 1)["valid"] == check_data(config, 4, 1)["valid"]
