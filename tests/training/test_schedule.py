"""Schedules against torch's own and against numbers worked out by hand."""

import pytest
import torch

from portmoe.config import Config
from portmoe.training.schedule import beta2, learning_rate


def config(**sections):
    return Config.model_validate(sections)


def test_cosine_of_the_benchmark_is_that_of_torch():
    run = config(data={"total_steps": 50}, adam={"lr": 1e-4})  # int(50 · 0.01) = 0 warm-up steps
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=1e-5)
    for step in range(51):
        assert learning_rate(run, step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()
    assert learning_rate(run, 0) == 1e-4
    assert learning_rate(run, 25) == pytest.approx(5.5e-5)  # half way: the mean of lr and eta_min
    assert learning_rate(run, 50) == learning_rate(run, 1000) == 1e-5


def test_init_then_warm_up_then_cosine_over_what_is_left():
    run = config(
        data={"total_steps": 7},  # not the schedule's length: that one is set
        adam={"lr": 0.8},
        lr_scheduler={"total_steps": 20, "init_steps": 2, "warmup_ratio": 0.2, "eta_min": 0.1},
    )
    expected = [0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 0.8]  # 4 warm-up steps; the cosine begins at lr
    assert [learning_rate(run, step) for step in range(7)] == pytest.approx(expected)
    assert learning_rate(run, 13) == pytest.approx(0.45)  # 7 of the cosine's 14 steps
    assert learning_rate(run, 20) == pytest.approx(0.1)


@pytest.mark.parametrize("init_steps", [0, 30])
def test_a_schedule_without_room_for_the_cosine_ends_at_eta_min(init_steps):
    run = config(
        adam={"lr": 1.0}, lr_scheduler={"total_steps": 10, "warmup_ratio": 1.0, "init_steps": init_steps}
    )
    assert learning_rate(run, init_steps + 9) == 1.0
    assert learning_rate(run, init_steps + 10) == 1e-5


def test_beta2_is_constant_unless_c_is_positive():
    assert [beta2(config(), step) for step in (0, 1, 1000)] == [0.95, 0.95, 0.95]
    assert beta2(config(beta2_scheduler={"init_beta2": 0.9}), 7) == 0.9
    assert beta2(config(adam={"adam_beta2": 0.8}), 7) == 0.8


@pytest.mark.parametrize(
    "sections", [{"adam": {"adam_beta2_c": 0.5}}, {"beta2_scheduler": {"c": 0.5, "init_beta2": 0.95}}]
)
def test_beta2_grows_from_its_initial_value(sections):
    run = config(**sections)
    # 1 − 1/√step: 0.5 at step 4, which is below the initial value; 0.95 at 400; 0.99 at 10000.
    steps = [0, 1, 4, 400, 10_000]
    assert [beta2(run, step) for step in steps] == pytest.approx([0.95, 0.95, 0.95, 0.95, 0.99])


def test_c_of_the_schedule_wins_over_that_of_adam():
    run = config(adam={"adam_beta2_c": 0.5}, beta2_scheduler={"c": 0.0})
    assert beta2(run, 10_000) == 0.95
