"""The first hour: how a process ended becomes a verdict, and nothing private leaves the machine."""

import getpass
import json
import os
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from portmoe.verify.bring_up import hour as module
from portmoe.verify.bring_up.__main__ import bring_up
from portmoe.verify.bring_up.hour import STAGES, Finding, Hour, judged
from portmoe.verify.bring_up.summary import cleaned, html, private_words, write
from portmoe.verify.machine.child import Outcome


def check(status, detail="", name="values, float32"):
    return {"name": name, "status": status, "detail": detail}


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (Outcome(None, [{"begins": "float32"}, check("pass"), check("skip", "no")], ""), ("pass", "")),
        (
            Outcome(None, [check("pass"), check("fail", "output is wrong")], ""),
            ("fail", "values, float32: output is wrong"),
        ),
        (
            Outcome(None, [check("skip", "it has none"), check("skip", "it has none")], ""),
            ("not taken", "it has none"),
        ),
        (
            Outcome("ended by SIGSEGV", [{"begins": "float32"}, check("pass"), {"begins": "bfloat16"}], ""),
            ("died", "ended by SIGSEGV in bfloat16"),
        ),
        (Outcome("did not end within 5 s", [], ""), ("died", "did not end within 5 s before its first call")),
    ],
)
def test_how_a_function_alone_is_judged(outcome, verdict):
    assert judged(outcome) == verdict


def hour(folder, **settings):
    return Hour("cpu", folder, 5.0, (), say=lambda line: None, **settings)


def test_what_died_or_was_wrong_is_left_out_of_what_follows(tmp_path):
    found = [
        Finding("functions", "a.one", "died", "", 0.0),
        Finding("functions", "a.two", "fail", "", 0.0),
        Finding("functions", "a.three", "pass", "", 0.0),
        Finding("functions", "a.four", "not taken", "", 0.0),
        Finding("bisect", "static", "fail", "", 0.0),
    ]
    assert hour(tmp_path, findings=found).dead == ["a.one", "a.two"]


def test_a_stage_that_would_die_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(Hour, "command", lambda *args: pytest.fail("started"))
    mine = hour(tmp_path, findings=[Finding("functions", "a.one", "died", "", 0.0)])
    module.validate(mine)
    assert (mine.findings[-1].status, mine.findings[-1].text) == ("skip", "a.one would end it")
    for stage in list(STAGES)[1:]:
        STAGES[stage](hour(tmp_path, unusable=True))


def test_a_command_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COMMAND", ("-c", "print('so far', flush=True); import time; time.sleep(60)"))
    monkeypatch.setattr(module, "LONGER", 0.4)
    mine = hour(tmp_path)
    assert mine.command("bisect", "static", [], {}, "said.txt") is None
    assert mine.findings[0].status == "died"
    assert (tmp_path / "said.txt").read_text() == "so far\n"


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [(0, "pass", ""), (4, "fail", "a check failed"), (7, "fail", "ended with exit code 7")],
)
def test_a_commands_exit_code_is_its_verdict(tmp_path, monkeypatch, code, status, text):
    monkeypatch.setattr(module, "COMMAND", ("-c", f"raise SystemExit({code})"))
    mine = hour(tmp_path)
    mine.command("validate", "--quick", [], {4: "a check failed"}, "said.txt")
    assert (mine.findings[0].status, mine.findings[0].text) == (status, text)


def test_names_of_the_machine_and_its_user_are_taken_out(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node-17")
    monkeypatch.setattr(socket, "getfqdn", lambda: "node-17.cluster.example")
    monkeypatch.setattr(getpass, "getuser", lambda: "marie")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/marie"))
    (tmp_path / "deep").mkdir()
    told = f"marie@node-17 {os.getcwd()}/x /home/marie/y node-17.cluster.example 10.2.3.4 127.0.0.1 mariette"
    (tmp_path / "deep" / "said.txt").write_text(told)
    (tmp_path / "kept.bin").write_text("node-17")
    mine = hour(tmp_path, findings=[Finding("environment", "cpu", "pass", "", 1.0, "environment.json")])
    write(mine, tmp_path)
    assert (
        tmp_path / "deep" / "said.txt"
    ).read_text() == "USER@HOST HERE/x ~/y HOST ADDRESS 127.0.0.1 mariette"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["findings"][0]["stage"] == "environment"
    assert summary["provenance"]["host"] == "HOST"
    assert '<a href="./environment.json">cpu</a>' in (tmp_path / "SUMMARY.html").read_text()
    assert "pass      environment" in (tmp_path / "SUMMARY.txt").read_text()


def test_the_page_says_first_what_failed_and_how_to_go_on_without_it(tmp_path):
    found = [
        Finding("functions", "a.one", "died", "ended by SIGSEGV", 1.0, "functions/a.one.txt"),
        Finding("functions", "a.two", "not taken", "no page", 0.0),
        Finding("bisect", "static", "fail", "an operation is wrong", 2.0),
    ]
    before, _, after = html(hour(tmp_path, findings=found)).partition("</header>")
    assert "✗ failed</span> functions: a.one and 1 more failed.</h1>" in before
    assert before.count("<tr class=fail>") == 2
    assert "disable: [a.one]" in before
    assert "<tr class=skip><td>a.two</td>" in after
    assert "✓ passed" in html(hour(tmp_path, findings=found[1:2]))


def test_common_words_are_left_alone_and_short_names_are_not(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    monkeypatch.setattr(socket, "gethostname", lambda: "vm")
    assert cleaned("ranks 0 on vm: npu:0", private_words(Path("/"))) == "ranks 0 on HOST: npu:0"
    assert "root" not in private_words(Path("/"))
    assert cleaned("root / torch 2.13.0", private_words(Path("/"))) == "root / torch 2.13.0"


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    done = CliRunner().invoke(bring_up, ["--backend", "cpu", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "is not empty" in done.output
