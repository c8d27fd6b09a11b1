"""The chain of hashes, walked: which lines, files and checkpoints are as they were written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from portmoe.config import Config
from portmoe.config.read import parse_config
from portmoe.errors import ConfigError
from portmoe.record.chain import CHAIN, CHECKPOINT, FILES, START, STEP, Entry, hash_of, read_chain
from portmoe.record.run_directory import CONFIG, first_difference
from portmoe.record.writers import METRICS
from portmoe.result import Result
from portmoe.verify.evidence.directory import Directory, Line

PART = "chain"


@dataclass(frozen=True)
class Start:
    """One start of the run.

    Attributes:
        first_step: that it made.
        config: that it ran; None where it cannot be read.
        files: name → hash, as they were.
    """

    first_step: int
    config: Config | None
    files: Mapping[str, str | None]


@dataclass(frozen=True)
class Walk:
    """What the chain says was written, and stands.

    Attributes:
        starts: in order.
        steps: step → hash of its line, in order.
        checkpoints: step → hash of its state file, as it was written last.
    """

    starts: Sequence[Start]
    steps: Mapping[int, str]
    checkpoints: Mapping[int, str]

    def config_of(self, step: int) -> Config | None:
        """The config of the start that made ``step``; None where none is known."""
        mine = [start for start in self.starts if start.first_step <= step]
        return mine[-1].config if mine else None


def walk(directory: Directory, results: list[Result]) -> Walk:
    """Follow the chain; what does not fit goes to ``results``."""
    try:
        entries = list(read_chain(directory.path))
    except OSError:
        return Walk([], {}, {})  # that it is missing is said already
    starts: list[Start] = []
    steps: dict[int, str] = {}
    checkpoints: dict[int, str] = {}
    broken = []
    for number, entry in enumerate(entries, 1):
        if entry is None:
            if number < len(entries) or directory.state == "finished":
                broken.append((number, "it is no entry"))
            continue
        if not entry.fits:
            broken.append((number, "its hash is not that of its content after the entry before"))
        _note(entry, starts, steps, checkpoints)
    for number, detail in broken[:5]:
        results.append(Result("fail", "fits", detail, subject=f"{CHAIN}:{number}", part=PART))
    if not broken:
        results.append(Result("pass", "fits", f"{len(entries)} entries", subject=CHAIN, part=PART))
    return Walk(starts, steps, checkpoints)


def _note(entry: Entry, starts: list[Start], steps: dict[int, str], checkpoints: dict[int, str]) -> None:
    said: Mapping[str, Any] = entry.content
    kind, step = said.get("kind"), said.get("step")
    if kind == START:
        for later in [made for made in steps if made >= step]:
            del steps[later]  # made again from here on
        starts.append(Start(step, _config(said.get("config", "")), said.get("files", {})))
    elif kind == STEP:
        steps[step] = said.get("sha256", "")
    elif kind == CHECKPOINT:
        checkpoints[step] = said.get("sha256", "")


def _config(text: str) -> Config | None:
    try:
        return parse_config(text, CHAIN)
    except ConfigError:
        return None


def check_lines(directory: Directory, walked: Walk) -> Iterator[Result]:
    """Hold the lines of ``metrics.jsonl`` to the chain."""
    if not walked.steps:
        return
    expected = dict(walked.steps)
    unlike: list[tuple[Line, str]] = []
    last = directory.lines[-1] if directory.lines else None
    for line, record in directory.records:
        said = expected.pop(record["step"], None)
        if said is None:
            killed = line is last and directory.state == "running" and record["step"] not in walked.steps
            if not killed:  # between the line and its entry
                unlike.append((line, "the chain has no such line: it was added later"))
        elif said != hash_of(line.raw):
            unlike.append((line, "it is not the line that was written: it was edited later"))
    for line, detail in unlike[:20]:
        yield Result("fail", "is as written", detail, subject=line.place, part=PART)
    for step in list(expected)[:20]:
        detail = f"the line of step {step} was written and is not there"
        yield Result("fail", "is as written", detail, subject=METRICS, part=PART)
    if not unlike and not expected:
        detail = f"{len(walked.steps)} lines"
        yield Result("pass", "is as written", detail, subject=METRICS, part=PART)


def check_files(directory: Directory, walked: Walk) -> Iterator[Result]:
    """Hold config, environment and operations to what the last start wrote."""
    if not walked.starts:
        return
    start = walked.starts[-1]
    for name in FILES:
        path = directory.path / name
        if not path.is_file():
            continue  # said already
        if hash_of(path.read_bytes()) == start.files.get(name):
            yield Result("pass", "is as written", subject=name, part=PART)
        elif name == CONFIG and _of_a_start_without_steps(directory, start):
            detail = "it is of a later start of the same run, which was ended before its first step"
            yield Result("warn", "is as written", detail, subject=name, part=PART)
        else:
            detail = "it is not what the run wrote when it started last"
            if name == CONFIG and directory.config is not None and start.config is not None:
                detail += _which(start.config, directory.config)
            yield Result("fail", "is as written", detail, subject=name, part=PART)


def _of_a_start_without_steps(directory: Directory, start: Start) -> bool:
    """Whether a run that goes on has written its config and nothing more yet."""
    same = directory.config is not None and start.config is not None
    return same and directory.state == "running" and first_difference(start.config, directory.config) is None


def _which(former: Config, now: Config) -> str:
    """The keys that differ."""
    from portmoe.config.keys import walk as keys

    values = {entry.path: entry.value for entry in keys(former) if entry.section is None}
    apart = [
        f"{entry.path} is {entry.value!r} and was {values.get(entry.path)!r}"
        for entry in keys(now)
        if entry.section is None and values.get(entry.path) != entry.value
    ]
    return f": {'; '.join(apart[:5])}" if apart else ", though every key has its value"
