"""ops.select: measure in a real run of two ranks: rank 0 measures, and its timings are kept."""

import json

from run_portmoe import run


def test_two_ranks_choose_by_rank_0s_timings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run(tmp_path / "run", 2, ops__select="measure", data__total_steps=1)
    record = json.loads((tmp_path / "run" / "ops.json").read_text())
    timings = json.loads((tmp_path / "cache" / "portmoe" / "timings.json").read_text())
    kept = {case.partition(" on ")[0]: by_name for case, by_name in timings.items()}
    for op, choice in record.items():
        usable = {c["name"]: c["seconds"] for c in choice["candidates"] if c["usable"]}
        if len(usable) > 1:
            assert usable == kept[op]
            assert usable[choice["chosen"]] == min(usable.values())
