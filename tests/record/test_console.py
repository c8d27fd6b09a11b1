"""What is seen while a run goes on: rows above a bar on terminals of any width, the same rows elsewhere."""

import io
import math

import pytest
from screen import Screen

from portmoe.record.console import Console


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("CI", raising=False)
    return Screen()


def record(step, **changes):
    figures = {
        "step": step,
        "loss": 6.9379 - step,
        "lr": 6.67e-4,
        "grad_norm": {"default": 3.0, "experts": 4.0},
        "tgs/tgs_SMA": 6000.0,
        "peak_memory": 379 << 20,
        "inf_nan_skip_batches": 0,
    }
    return figures | changes


def rows(written):
    return [line.split() for line in written.splitlines()]


def watched(screen, monkeypatch, columns, steps=3, **options):
    """Steps of 6 s each."""
    monkeypatch.setenv("COLUMNS", str(columns))
    now = [0.0]
    console = Console(screen, 40, ranks=2, clock=lambda: now[0], **options)
    console.note("run      runs/tiny_moe4, new")
    console.begin()
    for step in range(steps):
        now[0] += 6.0
        console.step(record(step), f"step={step} the benchmark's line")
    console.note("SIGINT: finishing this step and saving")
    return console


def test_a_terminal_of_80_columns_shows_all_figures_above_one_bar(screen, monkeypatch):
    console = watched(screen, monkeypatch, 80)
    *above, bar = screen.shown()
    assert above[0] == "run      runs/tiny_moe4, new"
    assert above[1].split() == [
        "step",
        "loss",
        "grad",
        "norm",
        "lr",
        "tok/s",
        "memory",
        "time",
        "time",
        "left",
    ]
    figures = ["0", "6.9379", "5.00", "6.67e-04", "12,000", "379", "MiB", "0:00:06", "0:03:54"]
    assert above[2].split() == figures
    assert [line.split()[0] for line in above[3:5]] == ["1", "2"]
    assert above[5:] == ["SIGINT: finishing this step and saving"]
    assert bar.startswith("3/40 steps ━━")
    assert bar.endswith("0:03:42 left loss 4.9379")
    assert all(len(line) < 80 for line in screen.shown())
    console.close()
    assert screen.shown() == above


def test_a_narrow_terminal_keeps_loss_and_time_left(screen, monkeypatch):
    watched(screen, monkeypatch, 40).close()
    assert screen.shown()[1].split() == ["step", "loss", "tok/s", "time", "left"]
    assert screen.shown()[2].split() == ["0", "6.9379", "12,000", "0:03:54"]
    assert all(len(line) < 40 for line in screen.shown())


def test_steps_that_follow_fast_share_a_row(screen, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ticks = [0.0]
    console = Console(screen, 100, clock=lambda: ticks[0])
    for step in range(100):
        ticks[0] += 1.0
        console.step(record(step), "")
    console.close()
    shown = [line.split()[0] for line in screen.shown() if line.split()[0].isdigit()]
    assert shown == [str(step) for step in (*range(0, 100, 5), 99)]


def test_words_stay_whole_where_a_line_is_wrapped(screen, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    Console(screen, 40).note("WARNING: this file system cannot lock files at all")
    assert screen.shown() == ["WARNING: this file system cannot lock", "files at all"]


def test_the_benchmarks_lines_are_shown_where_they_are_asked_for(screen, monkeypatch):
    watched(screen, monkeypatch, 200, style="full").close()
    lines = [line for line in screen.shown() if line.startswith("step=")]
    assert lines == [f"step={step} the benchmark's line" for step in range(3)]
    assert not any("grad norm" in line for line in screen.shown())


def test_elsewhere_a_row_comes_every_so_many_steps_as_plain_text():
    stream = io.StringIO()
    console = Console(stream, 25, plain_every=10, clock=lambda: 0.0)
    console.begin()
    for step in range(25):
        console.step(record(step), "")
    console.close()
    header, *shown = rows(stream.getvalue())
    assert header[:2] == ["step", "loss"]
    assert [row[0] for row in shown] == ["0", "9", "19", "24"]
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_events_are_lines_of_their_own():
    stream = io.StringIO()
    console = Console(stream, 100, plain_every=50, clock=lambda: 0.0)
    console.step(record(0), "")
    console.step(record(1, loss=math.nan, inf_nan_skip_batches=1), "")
    console.step(record(2, inf_nan_skip_batches=1, valid_loss=0.5, valid_acc=0.75), "")
    events = [line for line in stream.getvalue().splitlines() if line[0].isalpha()]
    assert events == [
        "step 1 skipped: its gradients are not finite (1 so far)",
        "validation after step 2: loss 0.5000, accuracy 75.0%",
    ]
    assert [row[0] for row in rows(stream.getvalue()) if row[0].isdigit()] == ["0", "2"]
