"""Throughput figures against the benchmark's published line and hand-computed sequences."""

import pytest

from portmoe.record.throughput import Throughput


class Clock:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def throughput(world_size=1, clock=None, peak=None):
    return Throughput(world_size, 31.53e9, 45.2e9, peak, clock or Clock())


def test_the_benchmarks_published_line():
    # 32 ranks, 512 sequences of 2048 tokens, 922958 tokens with a label, 3359.06 tokens per rank and second.
    clock = Clock()
    figures = throughput(32, clock, peak=312e12)
    seconds = 1_048_576 / 32 / 3359.06
    clock.now += seconds
    speed = figures.update(1_048_576, 922_958, seconds)
    assert speed.tgs == pytest.approx(3359.06)
    assert speed.real_tgs == pytest.approx(2956.7, abs=0.1)
    assert speed.tflops == pytest.approx(105.9, abs=0.1)
    assert speed.model_tflops == pytest.approx(152, abs=0.5)
    assert speed.mfu == pytest.approx(0.487, abs=0.001)


def test_no_mfu_without_a_known_peak():
    clock = Clock()
    figures = throughput(clock=clock)
    clock.now += 1
    assert figures.update(10, 10, 1.0).mfu is None


def test_windows_and_means():
    # Steps 1…60 take their own number of seconds for 1000 tokens on 2 ranks; 5 s pass before each step.
    clock = Clock()
    figures = throughput(world_size=2, clock=clock)
    speeds = []
    for number in range(1, 61):
        clock.now += 5 + number
        speeds.append(figures.update(1000, 500, float(number)))

    assert [speed.last_tgs_10 for speed in speeds[:9]] == [0.0] * 9
    assert [speed.last_tgs_50 for speed in speeds[:49]] == [0.0] * 49
    assert speeds[9].last_tgs_10 == pytest.approx(5000 / 55)  # 1 + … + 10
    assert speeds[18].last_tgs_10 == speeds[9].last_tgs_10  # until the next window is complete
    assert speeds[19].last_tgs_10 == pytest.approx(5000 / 155)  # 11 + … + 20
    assert speeds[49].last_tgs_50 == speeds[59].last_tgs_50 == pytest.approx(25000 / 1275)  # 1 + … + 50

    assert speeds[2].tgs == pytest.approx(500 / 3)
    assert speeds[2].tgs_avg == pytest.approx((500 + 250 + 500 / 3) / 3)
    assert speeds[2].tgs_all == pytest.approx(1500 / (6 + 15))
    assert speeds[2].tgs_sma == pytest.approx(1500 / 6)
    assert speeds[59].tgs_sma == pytest.approx(25000 / (1830 - 55))  # 11 + … + 60
    assert speeds[59].tgs_all == pytest.approx(30000 / (1830 + 300))
