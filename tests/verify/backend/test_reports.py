"""How a validation report is shown and stored."""

import json
import math
from xml.etree import ElementTree

import pytest

from portmoe.errors import ConfigError
from portmoe.result import Result
from portmoe.verify.backend import reports
from portmoe.verify.backend.report import LEFT_OUT, Curve, Report


@pytest.fixture
def report():
    checks = [
        Result(
            "pass",
            "values, float32",
            "plain: output",
            part="operations",
            subject="swiglu.fast",
            needed=1e-7,
            allowed=1e-6,
            seconds=0.5,
        ),
        Result(
            "fail",
            "repeated, float32",
            "two calls <differ>\x00",
            part="operations",
            subject="swiglu.fast",
            needed=math.inf,
            allowed=1e-6,
        ),
        Result("skip", "values, bfloat16", "no bfloat16 here", part="operations", subject="swiglu.fast"),
        Result("pass", "values", part="collectives", subject="gloo, 2 ranks"),
        Result(
            "fail",
            "loss",
            "leaves the band at step 3",
            part="training",
            subject="reference run",
            needed=math.nan,
            allowed=1e-5,
        ),
    ]
    curves = [Curve("loss", [3.0, 2.0, 1.0], [3.0, None, math.nan])]
    return Report("fake", "Fake Device", {"torch": "2"}, checks, curves)


def test_verdict(report):
    assert [check.name for check in report.failed] == ["repeated, float32", "loss"]
    assert not report.passed
    assert not Report("fake", "", {}).passed
    assert Report("fake", "", {}, [Result("pass", "reuse", part="memory", subject="memory")]).passed


def test_the_table_shows_the_worst_of_a_line_and_every_failure(report):
    lines = reports.table(report).splitlines()
    assert "[FAIL] swiglu.fast float32   needed      inf of    1e-06" in lines
    assert "       repeated, float32: two calls <differ>\x00" in lines
    assert any(line.startswith("[SKIP] swiglu.fast bfloat16") for line in lines)
    assert "[PASS] gloo, 2 ranks: values" in lines
    assert lines[-1] == "fake (Fake Device): 2 checks passed, 2 failed, 1 not supported"


def test_groups_that_were_not_made_are_left_out_and_not_unsupported(report):
    report.checks.append(
        Result("skip", LEFT_OUT, "not with --quick", part="collectives", subject="collectives")
    )
    assert reports.summary(report).endswith("1 not supported, 1 group left out")
    page = reports.html(report)
    assert "<dt>not supported, not checked</dt><dd>1</dd>" in page
    assert "<p>left out (not with --quick): collectives</p>" in page
    assert '<span class="count">1 passed, 1 left out</span>' in page


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
    assert page.count('<svg class="plot"') == 1
    assert page.count('class="track"') == 1
    assert "two calls &lt;differ&gt;" in page
    assert not any(forbidden in page for forbidden in ("<script", "http://", "https://", "src="))


def test_a_directory_that_cannot_be_written(report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        reports.write(report, tmp_path / "file" / "out")
