"""How full packs are and how many steps epochs take, against counts by hand."""

import pytest
from test_row_packs import Numbered

from portmoe.config import Config
from portmoe.config.read import load_config
from portmoe.data import summary, with_total_steps
from portmoe.data.packs import packed
from portmoe.errors import ConfigError


def config(**data) -> Config:
    data = {"seq_len": 10, "packing": "whole"} | data
    return Config.model_validate({"model_type": "mixtral", "data": data})


@pytest.mark.parametrize(
    ("packing", "lengths", "expected"),
    [
        # 25 tokens in 3 rows; of 6 | 4 4 | 6 5 or another order, what a cut divides depends on it
        ("whole", [6, 4, 4, 6, 5], {"rows": 3, "padding": 5, "divided": 0, "left_out": 0}),
        ("none", [6, 4, 4, 6, 5], {"rows": 5, "padding": 25, "divided": 0, "left_out": 0}),
        ("cut", [25], {"rows": 3, "padding": 5, "divided": 1, "left_out": 0}),
        ("whole", [25], {"rows": 3, "padding": 5, "divided": 1, "left_out": 0}),
        ("benchmark", [25], {"rows": 2, "padding": 0, "divided": 1, "left_out": 5}),
        ("benchmark", [10, 20], {"rows": 3, "padding": 0, "divided": 1, "left_out": 0}),
    ],
)
def test_the_counts(packing, lengths, expected):
    run = config(packing=packing)
    found = summary(run, packed(run, [Numbered(lengths)]), size=1, micro_num=1)
    assert {key: getattr(found, key) for key in expected} == expected
    assert (found.samples, found.tokens) == (len(lengths), sum(lengths))
    assert found.efficiency == 1 - found.padding / (10 * found.rows)


def test_steps_of_an_epoch_need_not_be_whole():
    """7 rows, 2 ranks of 2 micro-batches of 1 row: 1.75 steps an epoch, three of them 5.25 and so 6."""
    run = config(packing="none", num_epochs=3)
    found = summary(run, packed(run, [Numbered([5] * 7)]), size=2, micro_num=2)
    assert (found.steps_per_epoch, found.total_steps) == (1.75, 6)
    assert "1.75 steps an epoch, 6 in all" in str(found)
    wide = config(packing="none", num_epochs=3, micro_bsz=2)
    assert summary(wide, packed(wide, [Numbered([5] * 7)]), size=1, micro_num=2).total_steps == 6


def test_epochs_give_the_steps():
    """400 dummy samples of exactly seq_len, 16 a step: 25 steps an epoch."""
    data = ["data.num_samples=400", "data.global_batch_size=16", "data.num_epochs=3"]
    for packing in ("cut", "whole", "none", "benchmark"):
        run = load_config("tiny_mixtral", [*data, "data.total_steps=null", f"data.packing={packing}"])
        assert run.data.total_steps is None
        resolved = with_total_steps(run, 1, 8)
        assert resolved.data.total_steps == 75
        assert with_total_steps(resolved, 1, 8) == resolved  # what a run directory holds
    with pytest.raises(ConfigError, match=r"num_epochs=3 makes 75 steps .* data\.total_steps=100; set one"):
        with_total_steps(load_config("tiny_mixtral", data), 1, 8)


def test_a_length_is_needed_and_50_steps_are_the_default():
    assert config().data.total_steps == 50
    assert config(num_epochs=2).data.total_steps is None
    with pytest.raises(ConfigError, match="leave open how long the run is"):
        load_config("tiny_mixtral", ["data.total_steps=null"])
