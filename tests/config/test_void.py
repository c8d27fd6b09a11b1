"""Keys that change nothing beside the others are named, with the reason, and no others are."""

import pytest

from portmoe.config import Config
from portmoe.config.read import no_effect_notes


def noted(**sections):
    notes = no_effect_notes(Config.model_validate(sections))
    return {note.partition(" = ")[0] for note in notes}


@pytest.mark.parametrize(
    ("sections", "void"),
    [
        ({"moe": {"drop_tokens": False}}, {"moe.drop_tokens"}),
        ({"moe": {"use_rts": False}}, {"moe.use_rts"}),
        ({"moe": {"top_k": 1, "drop_tokens": False}}, set()),
        ({"moe": {"top_k": 1, "use_rts": False}}, set()),
        (
            {"moe": {"top_k": 1, "drop_tokens": False, "capacity_factor": 2.0, "min_capacity": 8}},
            {"moe.capacity_factor", "moe.min_capacity"},
        ),
        (
            {"model": {"moe_type": "MegaBlock"}, "moe": {"min_capacity": 0, "use_rts": False}},
            {"moe.min_capacity", "moe.use_rts"},
        ),
        (
            {"model": {"moe_type": "MegaBlock"}, "moe": {"drop_tokens": False, "capacity_factor": 1.5}},
            {"moe.capacity_factor"},
        ),
        ({"model": {"moe_type": "MegaBlock"}, "moe": {"capacity_factor": 1.5}}, set()),
        (
            {"model": {"moe_type": "MegaBlock-D"}, "moe": {"capacity_factor": 1.5, "drop_tokens": False}},
            {"moe.capacity_factor", "moe.drop_tokens"},
        ),
        ({"moe": {"capacity_factor": 1.5, "min_capacity": 0}}, set()),
        (
            {"model": {"num_experts": 1}, "moe": {"top_k": 1}, "loss": {"moe_loss_coeff": 0.5}},
            {"moe.top_k", "loss.moe_loss_coeff"},
        ),
        ({"model": {"num_experts": 1, "moe_use_residual": True}}, {"model.moe_use_residual"}),
        ({"grad_scaler": {"hysteresis": 3}}, {"grad_scaler.hysteresis"}),
        ({"grad_scaler": {"fp16": {"growth_interval": 9}}, "model": {"dtype": "float16"}}, set()),
        ({"data": {"valid_micro_num": 3}}, {"data.valid_micro_num"}),
        ({"data": {"valid_micro_num": 3, "valid_every": 5}}, set()),
        ({"data": {"train_folder": "/x", "num_samples": 9, "min_length": 3}}, {"data.num_samples"}),
        ({"data": {"min_length": 3}}, {"data.min_length"}),
        ({"data": {"train_on": "all", "tokenizer": "/t"}}, {"data.train_on", "data.tokenizer"}),
        ({"data": {"train_folder": "/x", "train_on": "all", "tokenizer": "/t"}}, set()),
        (
            {"data": {"train_folder": "/x", "format": "text", "train_on": "all", "min_length": 3}},
            {"data.train_on", "data.min_length"},
        ),
        ({"ckpt": {"keep": 5}}, {"ckpt.keep"}),
        ({"ckpt": {"keep": 5, "enable_save_ckpt": True}}, set()),
        ({"beta2_scheduler": {"init_beta2": 0.9}, "adam": {"adam_beta2": 0.8}}, {"adam.adam_beta2"}),
    ],
)
def test_what_is_void(sections, void):
    assert noted(**sections) == void


def test_the_reason_names_the_other_key():
    (note,) = no_effect_notes(Config.model_validate({"moe": {"drop_tokens": False}}))
    assert note.startswith(
        "moe.drop_tokens = false has no effect: it acts with one choice only, and moe.top_k=2"
    )
