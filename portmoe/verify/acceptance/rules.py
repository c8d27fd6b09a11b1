"""Which keys of a run's config may differ from the benchmark's, and which may not."""

from collections.abc import Iterator

from portmoe.config import Config
from portmoe.config.keys import walk
from portmoe.result import Result

# Beside the keys that train the same numbers (``Key.same_run``): what a rule of the benchmark says of a key.
ALLOWED = {
    "data.micro_bsz": "micro_bsz and micro_num may be traded against each other",
    "data.num_samples": "the size of the dummy data: its checksum is checked",
    "lr_scheduler.total_steps": "",  # a schedule of other steps is other mathematics
}
SECTIONS = {
    "parallel": "the layout is free",
    "run": "where a run lives is no mathematics",
    "ckpt": "checkpoints are no mathematics",
    "ops": "which implementation computes is free: all compute the same",
    "monitor": "who watches is no mathematics",
    "trainer": "the engine is free",
    "eval": "what is looked at is no mathematics",
}
MATHEMATICS = ("run.seed", "run.twin", "ckpt.load_ckpt_info")  # in these sections, and yet other numbers


def differences(config: Config, benchmark: Config) -> Iterator[Result]:
    """Yield a result for each key in which the two differ: a pass where it may, and why; else a fail."""
    theirs = {entry.path: entry.value for entry in walk(benchmark) if entry.section is None}
    for entry in walk(config):
        if entry.section is not None or entry.value == theirs.get(entry.path, entry.default):
            continue
        said = f"{entry.value!r}, and {theirs.get(entry.path, entry.default)!r} in the benchmark"
        why = _why_allowed(entry.path, entry.key.same_run)
        if entry.path == "model.dtype":
            yield Result("warn", entry.path, f"{said}: where the organiser allows it", part="config")
        elif why:
            yield Result("pass", entry.path, f"{said}: {why}", part="config")
        else:
            fix = f"set {entry.path} to the benchmark's value"
            yield Result("fail", entry.path, f"{said}: this key may not differ", fix=fix, part="config")


def _why_allowed(path: str, same_run: bool) -> str:
    """Why a key may differ; "" where it may not."""
    if path.startswith(MATHEMATICS):
        return ""
    if path in ALLOWED:
        return ALLOWED[path]
    return SECTIONS.get(path.partition(".")[0], "") or ("it trains the same numbers" if same_run else "")
