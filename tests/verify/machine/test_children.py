import signal

import pytest

from portmoe.verify.machine.child import run_python

REPORT = "from portmoe.verify.machine.child import report; report({'n': 1}); report({'n': 2}); "


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("pass", None),
        ("raise SystemExit(7)", "ended with exit code 7"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "ended by SIGSEGV"),
        ("import time; time.sleep(60)", "did not end within 3 s"),
    ],
)
def test_what_a_child_reported_survives_how_it_ended(code, ending):
    (outcome,) = run_python([["-c", REPORT + code]], {}, timeout=3)
    assert outcome.ending == ending
    assert outcome.records == [{"n": 1}, {"n": 2}]


def test_a_line_cut_off_by_a_kill_is_left_out():
    code = REPORT + "import os; open(os.environ['PORTMOE_REPORT'], 'a').write('{\"n\": 3')"
    (outcome,) = run_python([["-c", code]], {}, timeout=30)
    assert outcome.records == [{"n": 1}, {"n": 2}]


def test_children_run_side_by_side_and_their_last_words_are_kept():
    codes = [
        "import sys; print('noise', file=sys.stderr); raise ValueError('one')",
        "raise ValueError('two')",
    ]
    outcomes = run_python([["-c", code] for code in codes], {"TOY": "x"}, timeout=30)
    assert [outcome.last_line for outcome in outcomes] == ["ValueError: one", "ValueError: two"]
