"""The keys that ask for an implementation, in real runs: the same numbers, and what lacks is recorded."""

import json

import pytest
from run_portmoe import losses, run

STEPS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    asked = {
        "plain": {},
        "other": {"moe__use_tutel": True, "moe__enable_token_rearrange_opt": False},
        "noisy": {"moe__use_fused_gating": False},
    }
    for name, keys in asked.items():
        run(folder / name, data__total_steps=STEPS, **keys)
    return folder


def recorded(folder):
    record = json.loads((folder / "ops.json").read_text())
    return {op: {c["name"]: c["reason"] for c in choice["candidates"]} for op, choice in record.items()}, {
        op: choice["chosen"] for op, choice in record.items()
    }


def curve(folder):
    return losses([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])


def test_what_was_asked_for_changes_no_number(runs):
    assert len(curve(runs / "plain")) == STEPS
    assert curve(runs / "other") == pytest.approx(curve(runs / "plain"), rel=1e-6)


def test_what_is_missing_is_said_and_the_next_one_runs(runs):
    unmet = "moe.use_tutel is not met: topk_gating.reference computes the same function instead"
    for name in ("plain", "other"):
        gating = json.loads((runs / name / "ops.json").read_text())["topk_gating"]
        for text in (" ".join(gating["unmet"]), (runs / name / "train.log").read_text()):
            assert (unmet in text) is (name == "other")


def test_rows_are_moved_otherwise_where_that_was_not_asked_for(runs):
    _, chosen = recorded(runs / "plain")
    reasons, others = recorded(runs / "other")
    for op in ("dispatch", "combine"):
        assert chosen[op] in ("compiled", "bag")  # there may be no compiler
        assert others[op] == "reference"
        for name in ("compiled", "bag"):
            assert reasons[op][name] == "not asked for: moe.enable_token_rearrange_opt is false"


def test_the_old_second_choice_is_other_mathematics(runs):
    assert curve(runs / "noisy") != pytest.approx(curve(runs / "plain"), rel=1e-6)
