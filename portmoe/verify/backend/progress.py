"""What a long validation says while it goes on: a line as each group of checks ends, and failures at once."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from portmoe.result import Result

Tell = Callable[[str], None]
Show = Callable[[str, int, int], None]  # what runs now, how many groups are done, of how many
MOST_DETAIL = 200  # characters of a failure


class Progress:
    """Tells how far the groups of checks are.

    Args:
        tell: takes a line.
        groups: their names, in order.
        show: is told what runs now, more often than ``tell``.
        clock: seconds since any moment.
    """

    def __init__(
        self,
        tell: Tell,
        groups: Sequence[str],
        show: Show = lambda now, done, total: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell, self._groups, self._show, self._clock = tell, groups, show, clock
        self._done = self._failed = 0
        self._began = self._group_began = clock()
        self._checks: list[Result] = []
        if groups:
            tell(f"{len(groups)} groups of checks; now {groups[0]}")
            show(groups[0], 0, len(groups))

    def found(self, check: Result) -> None:
        """Count a check; a failure is told at once."""
        self._checks.append(check)
        self._show(check.subject, self._done, len(self._groups))
        if check.status == "fail":
            self._failed += 1
            self._tell(f"FAIL {check.subject}: {check.name}: {check.detail[:MOST_DETAIL]}")

    def end_group(self) -> None:
        """Tell what the group came to, and which one is next."""
        checks, now = self._checks, self._clock()
        count = Counter(check.status for check in checks)
        compiling = sum(check.compiling for check in checks)
        compiled = f", {compiling:.1f} s of it compiling" if compiling else ""
        skipped = f", {count['skip']} not supported" if count["skip"] else ""
        name = self._groups[self._done]
        self._done += 1
        now_runs = self._groups[self._done] if self._done < len(self._groups) else ""
        following = f"; now {now_runs}" if now_runs else ""
        self._tell(
            f"[{self._done}/{len(self._groups)}] {name}: {count['pass']} passed, {count['fail']} failed"
            f"{skipped} in {now - self._group_began:.1f} s{compiled}; {self._failed} failed so far, "
            f"after {now - self._began:.0f} s{following}"
        )
        self._show(now_runs, self._done, len(self._groups))
        self._checks, self._group_began = [], now


@contextmanager
def counted_warnings() -> Iterator[Counter[str]]:
    """Catch Python's warnings inside the block, and count them by their text.

    Libraries warn each time of what a check does on purpose: that an algorithm is not deterministic where
    determinism only warns.
    """
    counts: Counter[str] = Counter()

    def count(message: Warning | str, *_: object, **__: object) -> None:
        counts[" ".join(str(message).partition("(Triggered internally")[0].split())] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        yield counts
