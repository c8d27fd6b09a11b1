"""The documents' exit codes are the code's."""

import re
import signal
from pathlib import Path

from portmoe.errors import BackendError, ConfigError, TrainingError
from portmoe.launch.interrupt import SIGNALS, exit_code

ROOT = Path(__file__).resolve().parents[2]
SIGNALLED = {exit_code(number): number.name for number in SIGNALS}


def test_the_table():
    section = (ROOT / "docs" / "running.md").read_text(encoding="utf-8").partition("## Exit codes")[2]
    rows = dict(re.findall(r"^\| (\d+) \| (.+) \|$", section.partition("\n## ")[0], re.MULTILINE))
    codes = {0, *SIGNALLED} | {error.exit_code for error in (ConfigError, BackendError, TrainingError)}
    assert {int(code) for code in rows} == codes
    assert SIGNALLED == {129: "SIGHUP", 130: "SIGINT", 143: "SIGTERM"}
    for code, name in SIGNALLED.items():
        assert name in rows[str(code)]


def test_readme_has_the_same():
    (line,) = re.findall(
        r"^Exit codes: .+\n.+$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [int(code) for code in re.findall(r"\b\d+\b", line)] == [0, 2, 3, 4, *sorted(SIGNALLED)]
    named = re.search(r"after (SIG\w+), (SIG\w+),\s(SIG\w+)", line).groups()
    assert [exit_code(signal.Signals[name]) for name in named] == sorted(SIGNALLED)
