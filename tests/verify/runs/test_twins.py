"""How far compare sees: bands that follow twins, distributions beyond, and what is said without twins."""

import math
import random
from dataclasses import replace

import pytest
from test_comparison import judged, record, run_of  # noqa: F401

from portmoe.cli.main import run as portmoe
from portmoe.errors import ConfigError
from portmoe.verify.runs import comparison_report
from portmoe.verify.runs.comparison import compare, read_run
from portmoe.verify.runs.thresholds import FLOAT32

STEPS, SHIPPED = 80, 4e-3
KEYS = [key for key in record(0) if key not in ("step", "num_consumed_tokens", "dropped_token_rate")]


def right(seed, steps=STEPS, growth=2.5, start=1e-7, **offsets):
    """A run whose numbers part from any other seed's by rounding that grows, until they are strangers.

    ``offsets``: key → what is added from step 40 on.
    """
    draw = random.Random(seed)
    made = []
    for step in range(steps):
        size = min(0.3, start * growth**step)
        one = record(step)
        one["loss"] = one["loss"] if step < 20 else 0.1 + math.exp(-step / 20)
        one |= {key: one[key] * math.exp(draw.uniform(-size, size)) for key in KEYS}
        one["dropped_token_rate"] += draw.uniform(-size, size) / 10
        one |= {f"expert_load/{e}": 0.25 + draw.uniform(-size, size) / 20 for e in range(4)}
        if step >= 40:
            one |= {key: one[key] + more for key, more in offsets.items()}
        made.append(one)
    return made


@pytest.fixture
def twinned(run_of):  # noqa: F811
    """The first run, with two twins beside it."""
    for number in (1, 2):
        run_of(f"a-twin{number}", right(number), (f"run.twin={number}",), lr=SHIPPED)
    return read_run(run_of("a", right(0), lr=SHIPPED))


@pytest.fixture
def other(run_of):  # noqa: F811
    return lambda steps, name="b": read_run(run_of(name, steps, lr=SHIPPED, backend="other"))


def test_right_runs_that_become_strangers_agree(twinned, other):
    for seed in range(10, 14):
        found = compare(twinned, other(right(seed), f"b{seed}"))
        assert found.passed, comparison_report.text(found)
    assert found.twins.growth == pytest.approx(2.5, rel=0.3)
    assert 4 <= found.until <= 8
    assert found.judged_later
    assert "two right runs are strangers" in comparison_report.text(found)


def test_where_twins_agree_the_bands_are_those_without_twins_in_every_step(run_of):  # noqa: F811
    for number in (1, 2):
        calm = right(number, growth=1.0, start=1e-8)
        run_of(f"a-twin{number}", calm, (f"run.twin={number}",), lr=SHIPPED)
    a = read_run(run_of("a", right(0, growth=1.0, start=1e-8), lr=SHIPPED))
    wrong = right(10, growth=1.0, start=1e-8)
    wrong[70]["grad_norm/experts"] *= 1.01
    found = compare(a, read_run(run_of("b", wrong, lr=SHIPPED)))
    assert set(judged(found)["loss"].bands) == {FLOAT32.loss}
    assert found.until == STEPS
    assert found.left_at == 70


def test_right_runs_may_part_before_the_twins_do(twinned, other):
    """Which step first tips a choice of experts is chance: this one parts 4 steps earlier."""
    early = right(10, STEPS + 4)[4:]
    for step, made in enumerate(early):
        made |= {key: record(step)[key] for key in ("step", "num_consumed_tokens")}
        size = min(0.3, 1e-7 * 2.5 ** (step + 4)) if step > 3 else 1e-8
        loss = right(0)[step]["loss"]
        made |= {key: record(step)[key] * (1 + size / 2) for key in KEYS} | {"loss": loss * (1 + size / 2)}
    assert compare(twinned, other(early)).left_at is None


@pytest.mark.parametrize("step", [0, 3])
def test_a_fault_before_rounding_has_grown_is_named_by_its_step(twinned, other, step):
    wrong = right(10)
    wrong[step]["grad_norm/experts"] *= 1.1
    found = compare(twinned, other(wrong))
    assert found.left_at == step
    assert judged(found)["gradient norm, experts"].left_at == step


def test_one_twin_shows_no_distribution(run_of):  # noqa: F811
    run_of("a-twin1", right(1), ("run.twin=1",), lr=SHIPPED)
    a, b = (read_run(run_of(name, right(seed), lr=SHIPPED)) for name, seed in (("a", 0), ("b", 10)))
    found = compare(a, b)
    assert found.passed
    assert not found.judged_later
    assert "a single twin shows no distribution" in comparison_report.text(found)


@pytest.mark.parametrize(
    ("key", "more", "label"),
    [
        ("loss", 0.3, "loss"),
        ("dropped_token_rate", 0.2, "dropped tokens, rate"),
        ("expert_load/2", 0.2, "load, expert 2"),
        ("grad_norm/fp32", 2.0, "gradient norm, fp32"),
    ],
)
def test_what_differs_only_in_the_distribution_is_caught(twinned, other, key, more, label):
    found = compare(twinned, other(right(10, **{key: more})))
    assert [j.distance.label for j in found.quantities if not j.passed] == [label]
    assert found.left_at is None
    verdict = comparison_report.verdict(found)
    assert "not the same run" in verdict
    assert label in verdict
    assert comparison_report.html(found)


def test_a_number_that_is_missing_late_is_no_agreement(twinned, other):
    lost = right(10)
    lost[70]["loss"] = None
    assert compare(twinned, other(lost)).left_at == 70
    assert compare(twinned, other(lost, "c"), twins=[]).left_at == 70


def test_the_acceptance_of_one_alone_is_a_difference_unless_a_twin_fails_it_too(run_of):  # noqa: F811
    def spiked(seed, spike):
        made = right(seed)
        made[60]["loss"] = 0.5 if spike else made[60]["loss"]
        return made

    def runs(name, twin_spikes):
        for number in (1, 2):
            run_of(f"{name}-twin{number}", spiked(number, twin_spikes), (f"run.twin={number}",), lr=SHIPPED)
        of = {"a": spiked(0, False), "b": spiked(10, True)}
        return [
            read_run(run_of(f"{name}{end}", steps, lr=SHIPPED))
            for end, steps in zip(("", "b"), of.values(), strict=True)
        ]

    found = compare(*runs("x", False))
    assert found.accepted == (True, False)
    assert not found.passed
    assert "does not, and every twin does" in comparison_report.verdict(found)
    assert compare(*runs("y", True)).passed


def test_without_twins_only_the_first_steps_are_judged_and_that_is_said(run_of):  # noqa: F811
    late, early = right(10), right(10)
    late[8]["loss"] *= 1.5
    early[2]["loss"] *= 1.5
    a, b, c = (
        replace(read_run(run_of(name, steps, lr=SHIPPED)), command=f"portmoe train --name {name}")
        for name, steps in (("a", right(0)), ("b", late), ("c", early))
    )
    found = compare(a, b)
    assert found.passed
    assert found.until == 4  # 4e-4 + 8e-4 + 1.2e-3 before step 3
    said = comparison_report.text(found)
    assert "the runs agree in the steps that could be judged, 4 of 80" in said
    assert "`portmoe train --name a` with --twin 1" in said
    trained = "next: portmoe train --name a --twin 1, again with --twin 2, then this comparison"
    assert comparison_report.what_next(found) == trained
    same = comparison_report.text(compare(a, replace(a, path=b.path)))
    assert "the runs agree: their figures are the same in all 80 steps" in same
    assert "unseen" not in same
    assert compare(a, c).left_at == 2


def test_too_few_steps_beyond_are_not_judged(run_of):  # noqa: F811
    for number in (1, 2):
        run_of(f"a-twin{number}", right(number, 12), (f"run.twin={number}",), lr=SHIPPED)
    a, b = (read_run(run_of(name, right(seed, 12), lr=SHIPPED)) for name, seed in (("a", 0), ("b", 10)))
    found = compare(a, b)
    assert found.passed
    assert not found.judged_later
    assert "too few steps" in comparison_report.text(found)


def test_what_is_no_twin(twinned, other, run_of):  # noqa: F811
    b = other(right(10))
    with pytest.raises(ConfigError, match=r"run\.twin=0"):
        compare(twinned, b, twins=[b.path])
    wrong = run_of("w", right(1), ("run.twin=1", "moe.top_k=1"), lr=SHIPPED)
    with pytest.raises(ConfigError, match=r"moe\.top_k is 1 there"):
        compare(twinned, b, twins=[wrong])
    run_of("a-twin3", right(3, 20), ("run.twin=3",), lr=SHIPPED)
    found = compare(twinned, b)
    assert len(found.twins.runs) == 3
    assert any("a-twin3 lies beside" in note and "no step 20" in note for note in found.notes)


def test_one_twin_of_neither_run_shows_nothing(run_of, other):  # noqa: F811
    lonely = run_of("t", right(1), ("run.twin=1",), lr=SHIPPED, backend="third")
    a, b = other(right(0), "a"), other(right(10))
    found = compare(a, b, twins=[lonely])
    assert found.twins is None
    assert any("train a second one" in note for note in found.notes)


def test_the_page_and_the_command(twinned, other, tmp_path, capsys):
    b = other(right(10))
    page = tmp_path / "page.html"
    twins = [part for n in (1, 2) for part in ("--twin", str(tmp_path / f"a-twin{n}"))]
    assert portmoe(["compare", str(twinned.path), str(b.path), *twins, "--out", str(page)]) == 0
    out = capsys.readouterr().out
    assert "rounding grows" in out
    assert "as a distribution" in out
    text = page.read_text()
    for name in ("band", "twins", "a twin"):
        assert f">{name}<" in text or f"</svg>{name}" in text
