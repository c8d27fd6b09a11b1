"""How a validation report is shown and stored."""

import json
import math
from xml.etree import ElementTree

import pytest

from portmoe.errors import ConfigError
from portmoe.verify.backend import reports
from portmoe.verify.backend.check import Check, Curve, Report


@pytest.fixture
def report():
    checks = [
        Check("operations", "swiglu.fast", "values, float32", "pass", "plain: output", 1e-7, 1e-6, 0.5),
        Check(
            "operations", "swiglu.fast", "repeated, float32", "fail", "two calls <differ>\x00", math.inf, 1e-6
        ),
        Check("operations", "swiglu.fast", "values, bfloat16", "skip", "no bfloat16 here"),
        Check("collectives", "gloo, 2 ranks", "values", "pass"),
        Check("training", "reference run", "loss", "fail", "leaves the band at step 3", math.nan, 1e-5),
    ]
    curves = [Curve("loss", [3.0, 2.0, 1.0], [3.0, None, math.nan])]
    return Report("fake", "Fake Device", {"torch": "2"}, checks, curves)


def test_verdict(report):
    assert [check.name for check in report.failed] == ["repeated, float32", "loss"]
    assert not report.passed
    assert not Report("fake", "", {}).passed
    assert Report("fake", "", {}, [Check("memory", "memory", "reuse", "pass")]).passed


def test_the_table_shows_the_worst_of_a_line_and_every_failure(report):
    lines = reports.table(report).splitlines()
    assert "[FAIL] swiglu.fast float32   needed      inf of    1e-06" in lines
    assert "       repeated, float32: two calls <differ>\x00" in lines
    assert any(line.startswith("[SKIP] swiglu.fast bfloat16") for line in lines)
    assert "[PASS] gloo, 2 ranks: values" in lines
    assert lines[-1] == "fake (Fake Device): 2 checks passed, 2 failed, 1 not supported"


def test_files(report, tmp_path):
    paths = reports.write(report, tmp_path / "out")
    assert [path.name for path in paths] == ["report.json", "report.xml", "report.html"]
    stored = json.loads(paths[0].read_text(), parse_constant=lambda name: pytest.fail(name))
    assert stored["passed"] is False
    assert stored["checks"][0]["needed"] == 1e-7
    assert stored["checks"][1]["needed"] == "inf"
    suites = ElementTree.parse(paths[1]).getroot()
    counted = {s.get("name"): (s.get("tests"), s.get("failures"), s.get("skipped")) for s in suites}
    assert counted["operations"] == ("3", "1", "1")
    assert counted["training"] == ("1", "1", "0")
    page = paths[2].read_text()
    assert page.count("<svg") == 2
    assert "two calls &lt;differ&gt;" in page
    assert not any(forbidden in page for forbidden in ("<script", "http://", "https://", "src="))


def test_a_directory_that_cannot_be_written(report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        reports.write(report, tmp_path / "file" / "out")
