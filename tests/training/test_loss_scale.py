"""The loss scale against sequences worked out by hand."""

import json

import pytest

from portmoe.config.sections.optimization import GradScalerConfig
from portmoe.training.loss_scale import LossScale

CLEAN, OVERFLOW = True, False


def scaler(dtype="float16", initial=1024.0, growth_interval=3, hysteresis=2, **others):
    fp16 = {"initial_scale": initial, "growth_interval": growth_interval}
    config = GradScalerConfig.model_validate({"fp16": fp16, "hysteresis": hysteresis, **others})
    return LossScale(config, dtype)


def scales(scale, steps):
    seen = []
    for finite in steps:
        scale.update(finite)
        seen.append(scale.scale)
    return seen


def test_starts_at_two_to_the_sixteenth_and_doubles_after_a_thousand_clean_steps():
    scale = LossScale(GradScalerConfig(), "float16")
    assert scale.scale == 65536.0
    seen = scales(scale, [CLEAN] * 2000)
    assert seen[998:1000] == [65536.0, 131072.0]
    assert seen[1998:] == [131072.0, 262144.0]


def test_hysteresis_spares_the_first_overflow_and_no_later_one_until_the_scale_grew():
    scale = scaler(hysteresis=2)
    steps = [OVERFLOW, CLEAN, OVERFLOW, OVERFLOW, CLEAN, CLEAN, CLEAN, OVERFLOW, OVERFLOW]
    #         spared           halved    halved            the third clean: doubled, spared again
    assert scales(scale, steps) == [1024, 1024, 512, 256, 256, 256, 512, 512, 256]
    assert scale.skipped_steps == 5


def test_an_overflow_starts_the_run_of_clean_steps_anew():
    assert scales(scaler(), [CLEAN, CLEAN, OVERFLOW, CLEAN, CLEAN, CLEAN]) == [1024] * 5 + [2048]


def test_hysteresis_of_one_backs_off_at_once():
    assert scales(scaler(hysteresis=1, backoff_factor=0.25), [OVERFLOW, OVERFLOW]) == [256, 64]


def test_the_scale_stays_between_its_bounds():
    assert scales(scaler(initial=2.0, hysteresis=1), [OVERFLOW] * 3) == [1, 1, 1]
    grown = scaler(initial=2.0**23, growth_interval=1)
    assert scales(grown, [CLEAN] * 3) == [2**24, 2**24, 2**24]


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
def test_other_dtypes_are_not_scaled_but_count_their_skipped_steps(dtype):
    scale = scaler(dtype)
    assert scales(scale, [OVERFLOW, OVERFLOW, OVERFLOW, *[CLEAN] * 5]) == [1.0] * 8
    assert scale.skipped_steps == 3


@pytest.mark.parametrize("cut", range(9))
def test_a_resumed_scale_goes_on_as_if_it_had_not_stopped(cut):
    steps = [OVERFLOW, CLEAN, OVERFLOW, OVERFLOW, CLEAN, CLEAN, CLEAN, OVERFLOW, OVERFLOW]
    whole = scales(scaler(), steps)
    first = scaler()
    scales(first, steps[:cut])
    second = scaler()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert scales(second, steps[cut:]) == whole[cut:]
    assert second.skipped_steps == 5


def test_a_scale_is_not_taken_over_between_dtypes():
    full, half = scaler("float32"), scaler("float16")
    full.update(OVERFLOW)
    half.load_state_dict(full.state_dict())
    assert (half.scale, half.skipped_steps) == (1024.0, 1)
    full.load_state_dict(half.state_dict())
    assert full.scale == 1.0
