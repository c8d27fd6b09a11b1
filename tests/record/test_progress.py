"""How far a command is: on terminals of any width, in a pipe, and where a terminal can do less."""

import io

import pytest
from screen import Screen

from portmoe.record.progress import Progress
from portmoe.record.terminal import terminal


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Screen()


def drawn(screen, monkeypatch, columns):
    """A failure said above, then the line of a count of 10 of 40 after 5 s each."""
    monkeypatch.setenv("COLUMNS", str(columns))
    ticks = iter(range(0, 10_000, 5))
    progress = Progress(terminal(screen), 40, unit="checks", clock=lambda: next(ticks))
    for done in range(11):
        progress("attention.sdpa, float32", done)
    with progress:
        progress.say("[FAIL] rms_norm")
        return screen.shown()


@pytest.mark.parametrize("columns", [200, 80, 40])
def test_count_and_time_left_are_there_at_any_width(screen, monkeypatch, columns):
    shown = drawn(screen, monkeypatch, columns)
    assert shown[0] == "[FAIL] rms_norm"
    assert len(shown) == 2
    assert shown[1].startswith("10/40 checks ━━")
    assert "0:02:30 left" in shown[1]  # 30 of them at 5 s each
    assert ("attention.sdpa, float32" in shown[1]) == (columns >= 80)
    assert screen.shown() == ["[FAIL] rms_norm"]  # the line is gone, what was said stays


@pytest.mark.parametrize(
    ("name", "value", "lively", "coloured"),
    [
        ("NO_COLOR", "1", True, False),
        ("TERM", "dumb", False, False),
        ("CI", "true", False, False),
        ("UNRELATED", "1", True, True),
    ],
)
def test_what_the_environment_asks_of_a_terminal(screen, monkeypatch, name, value, lively, coloured):
    monkeypatch.setenv(name, value)
    console = terminal(screen)
    assert console.is_terminal == lively
    with Progress(console, 3) as progress:
        progress.say("red", "red")
    written = screen.getvalue()
    assert ("\x1b[31m" in written) == coloured
    assert ("\x1b" in written) == lively


def test_a_pipe_gets_a_plain_line_now_and_then():
    stream = io.StringIO()
    ticks = iter([0.0, 0.0, 4.0, 4.0, 12.0, 12.0, 12.0])
    with Progress(terminal(stream), 4, unit="checks", clock=lambda: next(ticks)) as progress:
        progress("first", 1)
        progress("second", 2)
    assert stream.getvalue() == "2/4 checks second 0:00:12 left\n"
