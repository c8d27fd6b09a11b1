"""Which implementations a run really calls, counted beside the table that records them."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any


@contextmanager
def counted() -> Iterator[Counter]:
    """Calls of every implementation ("swiglu.silu") and at every site ("swiglu@dense") of the runs inside."""
    from portmoe.training import operations as choosing

    calls, original = Counter(), choosing.choose

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    def choose(operations: Mapping, offered: Sequence, *rest: Any) -> Any:
        operations = {
            name: replace(operation, reference=counting(f"{name}.reference", operation.reference))
            for name, operation in operations.items()
        }
        offered = [replace(i, function=counting(f"{i.op}.{i.name}", i.function)) for i in offered]
        table = original(operations, offered, *rest)
        return table.wrapped(lambda op, site, function: counting(f"{op}@{site}", function))

    choosing.choose = choose
    try:
        yield calls
    finally:
        choosing.choose = original


def assert_recorded(directory: Path, calls_of_ranks: Sequence[Counter]) -> None:
    """``ops.json`` names what the ranks called, all of it, and nothing that none of them called."""
    called = sum(calls_of_ranks, Counter())
    if not called:  # the run was complete already
        return
    record = json.loads((directory / "ops.json").read_text())
    recorded = set()
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    never = {"adamw"} if steps[-1]["inf_nan_skip_batches"] == len(steps) else set()  # no step was an update
    for key, choice in record.items():
        op = key.partition("@")[0]
        if choice["chosen"] is not None and op not in never:
            recorded |= {f"{op}.{choice['chosen']}", *(f"{op}@{site}" for site in choice["sites"])}
    assert called.keys() == recorded, sorted(called.keys() ^ recorded)
    for op in {key.partition("@")[0] for key in record}:
        by_name = {name: count for name, count in called.items() if name.startswith(f"{op}.")}
        by_site = {name: count for name, count in called.items() if name.startswith(f"{op}@")}
        assert sum(by_name.values()) == sum(by_site.values()), (by_name, by_site)
