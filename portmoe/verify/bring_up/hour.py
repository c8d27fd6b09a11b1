"""The stages of the first hour, and what each of them found."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from portmoe.verify.machine.child import Outcome, run_python

CHILD = ("-m", "portmoe.verify.bring_up.alone")
COMMAND = ("-m", "portmoe")
CONFIG = "tiny_moe4"
TRUSTED = "cpu"  # the backend whose run the other one is held to
STEPS = 10
# Small enough for a first step on anything, with the parts that most functions serve.
MODELS = {
    "static": ("model.moe_use_residual=true",),
    "dropless": ("model.moe_type=MegaBlock-D", "data.fixed_random_dataset_seqlen=false"),
}
LONGER = 10  # a command against one implementation

Status = Literal["pass", "fail", "died", "not taken", "skip"]


@dataclass(frozen=True)
class Finding:
    """What one stage, or one implementation alone, came to.

    Attributes:
        status: "died": the process crashed, or had to be ended; "not taken": the backend says why itself.
        file: in the folder, where all it said is.
    """

    stage: str
    subject: str
    status: Status
    text: str
    seconds: float
    file: str = ""


@dataclass
class Hour:
    """One bring-up: where it writes, what it may take, and what it found so far."""

    backend: str
    folder: Path
    timeout: float
    only: Sequence[str]
    say: Callable[[str], None]
    findings: list[Finding] = field(default_factory=list)
    unusable: bool = False

    @property
    def failed(self) -> bool:
        return any(finding.status in ("fail", "died") for finding in self.findings)

    @property
    def dead(self) -> list[str]:
        """The implementations that took their process down, never returned, or were wrong."""
        bad = ("fail", "died")
        return [f.subject for f in self.findings if f.stage == "functions" and f.status in bad]

    def found(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.say(f"[{finding.status}] {finding.stage}: {finding.subject} {finding.text}".rstrip())

    def command(
        self, stage: str, subject: str, arguments: Sequence[str], meanings: Mapping[int, str], file: str
    ) -> int | None:
        """Run ``portmoe``, keep what it said in ``file``, and find by its exit code; None: it died."""
        began = time.monotonic()
        limit = self.timeout * LONGER
        with (self.folder / file).open("w", encoding="utf-8") as output:
            child = subprocess.Popen(
                [sys.executable, *COMMAND, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                code: int | None = child.wait(limit)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                code = None
        seconds = time.monotonic() - began
        if code is None or code < 0:
            text = f"did not end within {limit:g} s" if code is None else f"ended by signal {-code}"
            self.found(Finding(stage, subject, "died", text, seconds, file))
            return None
        status: Status = "fail" if code else "pass"
        text = meanings.get(code, f"ended with exit code {code}") if code else ""
        self.found(Finding(stage, subject, status, text, seconds, file))
        return code


def environment(hour: Hour) -> None:
    """The machine; a backend that cannot train there ends the hour's other stages."""
    arguments = ["check-env", "--backend", hour.backend, "--json"]
    code = hour.command(
        "environment", hour.backend, arguments, {3: "cannot be used here"}, "environment.json"
    )
    hour.unusable = code != 0


def functions(hour: Hour) -> None:
    """Each implementation in a process of its own."""
    if hour.unusable:
        return
    (listed,) = run_python([[*CHILD, "list", hour.backend]], {}, hour.timeout)
    if listed.ending is not None:
        text = f"{listed.ending}: {listed.last_line}"
        hour.found(Finding("functions", "all", "died", text, 0.0))
        hour.unusable = True
        return
    for record in listed.records:
        name = record["implementation"]
        if hour.only and name not in hour.only:
            continue
        if record["why_not"]:
            hour.found(Finding("functions", name, "not taken", record["why_not"], 0.0))
            continue
        began = time.monotonic()
        (outcome,) = run_python([[*CHILD, "try", hour.backend, name]], {}, hour.timeout)
        file = f"functions/{name}.txt"
        (hour.folder / file).parent.mkdir(exist_ok=True)
        (hour.folder / file).write_text(_told(outcome), encoding="utf-8")
        status, text = judged(outcome)
        hour.found(Finding("functions", name, status, text, time.monotonic() - began, file))


def judged(outcome: Outcome) -> tuple[Status, str]:
    """What one implementation's process came to."""
    checks = [record for record in outcome.records if "status" in record]
    begun = [record["begins"] for record in outcome.records if "begins" in record]
    if outcome.ending is not None:
        where = f" in {begun[-1]}" if begun else " before its first call"
        return "died", f"{outcome.ending}{where}"
    failed = [check for check in checks if check["status"] == "fail"]
    if failed:
        return "fail", f"{failed[0]['name']}: {failed[0]['detail']}"
    if any(check["status"] == "pass" for check in checks):
        return "pass", ""
    reasons = sorted({check["detail"] for check in checks})
    return "not taken", "; ".join(reasons)


def _told(outcome: Outcome) -> str:
    lines = [
        f"{record['status']:5} {record['name']}: {record['detail']}" if "status" in record else f"{record}"
        for record in outcome.records
    ]
    return "\n".join([f"ending: {outcome.ending or 'well'}", *lines, "", outcome.output])


def validate(hour: Hour) -> None:
    """All of them together, where none took its process down: that would end this too."""
    if hour.unusable:
        return
    died = [f.subject for f in hour.findings if f.stage == "functions" and f.status == "died"]
    if died:
        hour.found(Finding("validate", "--quick", "skip", f"{', '.join(died)} would end it", 0.0))
        return
    arguments = ["validate", "--quick", "--backend", hour.backend, "--out", str(hour.folder / "validate")]
    hour.command("validate", "--quick", arguments, {4: "a check failed"}, "validate.txt")


def _settings(*settings: str, disabled: Sequence[str] = ()) -> list[str]:
    return [part for s in (*settings, f"ops.disable=[{','.join(disabled)}]") for part in ("--set", s)]


def bisect(hour: Hour) -> None:
    """One step of each model, without what was found dead."""
    if hour.unusable:
        return
    for name, model in MODELS.items():
        report = str(hour.folder / f"bisect-{name}.json")
        settings = _settings(*model, disabled=hour.dead)
        arguments = ["bisect", "--backend", hour.backend, "--out", report, *settings]
        hour.command("bisect", name, arguments, {4: "an operation is wrong"}, f"bisect-{name}.txt")


def train(hour: Hour) -> None:
    """Ten steps on both, and how far they agree."""
    if hour.unusable:
        return
    runs = {}
    for backend in dict.fromkeys((TRUSTED, hour.backend)):
        run = hour.folder / f"run-{backend}"
        settings = [
            f"run.directory={run}",
            f"data.total_steps={STEPS}",
            f"lr_scheduler.total_steps={STEPS}",
            "ckpt.enable_save_ckpt=false",
            *([f"ckpt.keep_steps=[0,{STEPS - 1}]"] if backend == TRUSTED else []),
            "cudnn_deterministic=true",
        ]
        # The CPU has implementations of its own: nothing is left out of its run.
        disabled = hour.dead if backend == hour.backend else ()
        given = _settings(*MODELS["static"], *settings, disabled=disabled)
        arguments = ["train", "--config", CONFIG, "--backend", backend, *given]
        runs[backend] = hour.command(
            "train", backend, arguments, {4: "the run failed"}, f"train-{backend}.txt"
        )
    if len(runs) == 2 and all(code == 0 for code in runs.values()):
        page = str(hour.folder / "compare.html")
        both = [str(hour.folder / f"run-{backend}") for backend in runs]
        arguments = ["compare", *both, "--out", page]
        hour.command("compare", "cpu", arguments, {4: "further apart than rounding explains"}, "compare.txt")


def replay(hour: Hour) -> None:
    """Steps of the CPU's run again on the backend, from its states: at the start and after some training."""
    run = hour.folder / "run-cpu"
    if hour.unusable or not run.is_dir():
        return
    out = str(hour.folder / "replay")
    arguments = ["replay", str(run), "--backend", hour.backend, "--out", out, *_settings(disabled=hour.dead)]
    hour.command("replay", "cpu", arguments, {4: "a step differs"}, "replay.txt")


STAGES: dict[str, Callable[[Hour], None]] = {
    "environment": environment,
    "functions": functions,
    "validate": validate,
    "bisect": bisect,
    "train": train,
    "replay": replay,
}
