"""What a run's model answered to its prompts, step by step: ``answers.jsonl`` and a few lines of the log."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from portmoe.files import json_text

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        tokens: how many there are, the end included.
        ended: whether the model ended it; false: it was cut.
    """

    prompt: str
    answer: str
    tokens: int
    ended: bool


def to_json(step: int, answers: Sequence[Answer]) -> str:
    """A line an answer, each with the number of steps the model has had."""
    return "".join(json_text({"step": step, **asdict(answer)}) + "\n" for answer in answers)


def to_text(step: int, answers: Sequence[Answer]) -> str:
    """The answers as they are shown."""
    lines = [f"answers after {step} steps:"]
    for answer in answers:
        cut = "" if answer.ended else " …"
        lines += [*_behind("  > ", answer.prompt), *_behind("    ", answer.answer + cut)]
    return "\n".join(lines)


def _behind(mark: str, text: str) -> list[str]:
    """The lines of ``text``, the first behind the mark."""
    first, *more = text.splitlines() or [""]
    return [mark + first, *(" " * len(mark) + line for line in more)]
