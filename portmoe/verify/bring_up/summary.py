"""What a maintainer reads first, and a folder without the names of this machine and its user."""

import getpass
import json
import os
import re
import socket
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from portmoe import __version__
from portmoe.record import page
from portmoe.record.origin import of_report
from portmoe.verify.bring_up.hour import Finding, Hour

TEXTS = {".txt", ".json", ".jsonl", ".log", ".yaml", ".html", ".xml", ".csv"}
COLUMNS = ("what", "came to", "took", "because")
STATES = {"died": "fail", "not taken": "skip"}
ADDRESS = re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b")


def write(hour: Hour, folder: Path) -> None:
    """SUMMARY.txt, SUMMARY.html, summary.json, and the private words taken out of every text there."""
    lines = [f"portmoe {__version__}: bring-up of {hour.backend}", ""]
    for finding in hour.findings:
        where = f"  ({finding.file})" if finding.file else ""
        told = where if finding.status != "pass" else ""
        line = f"{finding.status:9} {finding.stage:11} {finding.subject:45} {finding.seconds:6.1f} s"
        lines.append(f"{line}  {finding.text}{told}".rstrip())
    dead = hour.dead
    if dead:
        lines += ["", "left out of bisect and training (ops.disable):", *(f"  {name}" for name in dead)]
    (folder / "SUMMARY.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "SUMMARY.html").write_text(html(hour), encoding="utf-8")
    record = {
        "backend": hour.backend,
        "version": __version__,
        "provenance": of_report(),
        "findings": [asdict(f) for f in hour.findings],
    }
    (folder / "summary.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    words = private_words(folder)
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in TEXTS:
            text = file.read_text(encoding="utf-8", errors="replace")
            file.write_text(cleaned(text, words), encoding="utf-8")


def html(hour: Hour) -> str:
    """Return the summary as a page: what is wrong, then every stage with links to what it said."""
    wrong = [finding for finding in hour.findings if finding.status in ("fail", "died")]
    names = list(dict.fromkeys(f"{finding.stage}: {finding.subject}" for finding in wrong))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    verdict = f"{names[0]}{more} failed." if names else f"Nothing failed on {hour.backend}."
    tried = sum(finding.status == "pass" for finding in hour.findings)
    left_out = [page.paragraph("Left out of bisect and training:"), page.code(_disabled(hour))]
    facts = [("backend", hour.backend), ("passed", str(tried)), ("failed or died", str(len(wrong)))]
    summary = [
        page.facts(facts),
        *([page.table(COLUMNS, list(map(_row, wrong)))] if wrong else []),
        *(left_out if hour.dead else []),
    ]
    stages = dict.fromkeys(finding.stage for finding in hour.findings)
    sections = [
        page.Section(stage, [page.table(COLUMNS, [_row(f) for f in hour.findings if f.stage == stage])])
        for stage in stages
    ]
    return page.page("portmoe bring-up", "fail" if wrong else "pass", verdict, summary, sections, of_report())


def _row(found: Finding) -> page.Row:
    state = STATES.get(found.status, found.status)
    cells = (found.subject, found.status, f"{found.seconds:.1f} s", found.text)
    return page.Row(state, cells, target=f"./{found.file}" if found.file else "")


def _disabled(hour: Hour) -> str:
    return f"ops:\n  disable: [{', '.join(hour.dead)}]"


def private_words(folder: Path) -> dict[str, str]:
    """What names this machine or its user → what stands for it, longer ones first."""
    found = {
        str(folder.resolve()): "FOLDER",
        os.getcwd(): "HERE",
        str(Path.home()): "~",
        socket.getfqdn(): "HOST",
        socket.gethostname(): "HOST",
    }
    with suppress(KeyError, OSError):  # a user without a name, as in some containers
        found[getpass.getuser()] = "USER"
    # What every machine has says nothing about this one; a short name is one all the same.
    kept = {word: name for word, name in found.items() if len(word) > 1 and word not in ("root", "localhost")}
    return dict(sorted(kept.items(), key=lambda item: -len(item[0])))


def cleaned(text: str, words: dict[str, str]) -> str:
    """``text`` without the private words, and without addresses of the network."""
    for word, name in words.items():
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", name, text)
    return ADDRESS.sub(lambda match: match[0] if match[0].startswith("127.") else "ADDRESS", text)
