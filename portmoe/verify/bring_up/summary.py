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
from portmoe.verify.bring_up.hour import Hour

TEXTS = {".txt", ".json", ".jsonl", ".log", ".yaml", ".html", ".xml", ".csv"}
ADDRESS = re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}\b")


def write(hour: Hour, folder: Path) -> None:
    """SUMMARY.txt, summary.json, and the private words taken out of every text in the folder."""
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
    record = {"backend": hour.backend, "version": __version__, "findings": [asdict(f) for f in hour.findings]}
    (folder / "summary.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    words = private_words(folder)
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in TEXTS:
            text = file.read_text(encoding="utf-8", errors="replace")
            file.write_text(cleaned(text, words), encoding="utf-8")


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
