"""Comparing two runs: figures computed by hand, verdicts, refusals, and the command."""

import json
import math

import pytest

from portmoe.cli.main import run as portmoe
from portmoe.config.read import dump_config, load_config
from portmoe.errors import ConfigError
from portmoe.verify.runs import comparison_report
from portmoe.verify.runs.comparison import compare, read_run
from portmoe.verify.runs.thresholds import BFLOAT16, FLOAT32

STEPS = 12


PLACES = {"embedding": 0.1, "0": 0.5, "1": 0.8, "head": 0.2}


def record(step, **changes):
    loss = 6.0 - 0.25 * step
    norms = {"default": 2.0, "fp32": 0.5, "experts": 1.0}
    layers = {
        f"grad_norm_layers/{group}/{place}": share * norm
        for group, norm in norms.items()
        for place, share in PLACES.items()
    }
    values = {
        "step": step,
        "loss": loss,
        "moe_loss": 0.1,
        **{f"grad_norm/{group}": norm for group, norm in norms.items()},
        **layers,
        "dropped_token_rate": 0.05,
        "num_consumed_tokens": 256 * (step + 1),
    }
    return values | changes


@pytest.fixture
def run_of(tmp_path):
    """Writes a run; at its learning rate rounding does not grow, so that all steps are judged."""

    def write(name, records, overrides=(), backend="cpu", lr=1e-5):
        directory = tmp_path / name
        directory.mkdir()
        config = load_config("tiny_moe4", (f"adam.lr={lr}", "lr_scheduler.eta_min=0", *overrides))
        (directory / "config.yaml").write_text(dump_config(config))
        (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (directory / "environment.json").write_text(json.dumps({"backend": backend, "ranks": 2}))
        return directory

    return write


def judged(found):
    return {j.distance.label: j for j in found.quantities}


def test_equal_runs_agree(run_of):
    found = compare(*(read_run(run_of(name, map(record, range(STEPS)))) for name in "ab"))
    assert found.passed
    assert found.left_at is None
    assert found.loss.largest == found.loss.variance == 0
    assert found.loss.mean_first == pytest.approx(6.0 - 0.25 * 5.5)
    assert "the runs agree" in comparison_report.text(found)
    assert len(found.quantities) == 3 + 3 + 12


def test_a_constant_offset_has_no_variance_and_is_flagged_all_the_same(run_of):
    shifted = [record(s) | {"loss": record(s)["loss"] + 0.5} for s in range(STEPS)]
    a, b = run_of("a", map(record, range(STEPS))), run_of("b", shifted)
    found = compare(read_run(a), read_run(b))
    assert found.loss.variance == pytest.approx(0, abs=1e-20)
    assert found.loss.largest == pytest.approx(0.5 / (6.0 - 0.25 * 11))
    assert (found.passed, found.left_at) == (False, 0)


def test_the_benchmarks_variance(run_of):
    differences = [0.0, 0.1, 0.0, 0.1]
    other = [record(s) | {"loss": record(s)["loss"] + d} for s, d in enumerate(differences)]
    found = compare(read_run(run_of("a", map(record, range(4)))), read_run(run_of("b", other)))
    assert found.loss.variance == pytest.approx(0.0025)


def test_one_layers_gradient_is_seen_where_loss_and_group_norms_look_fine(run_of):
    def changed(step):
        step_record = record(step)
        if step >= 7:
            step_record["grad_norm_layers/fp32/1"] *= 1.01
        return step_record

    a, b = run_of("a", map(record, range(STEPS))), run_of("b", map(changed, range(STEPS)))
    found = compare(read_run(a), read_run(b))
    failed = [label for label, j in judged(found).items() if not j.passed]
    assert failed == ["gradient norm, fp32, layer 1"]
    assert found.left_at == 7
    assert "step 7" in comparison_report.verdict(found)


@pytest.mark.parametrize(("begin", "passed"), [(0, False), (1, True)])
def test_the_first_step_of_both_runs_is_judged_more_strictly(run_of, begin, passed):
    def changed(step):
        made = record(step)
        made["grad_norm_layers/default/0"] *= 1 + 1e-4
        return made

    a = run_of("a", map(record, range(begin + 5)))
    b = run_of("b", map(changed, range(begin, begin + 5)))
    found = compare(read_run(a), read_run(b))
    assert found.passed is passed
    assert found.left_at == (None if passed else 0)


def test_values_near_zero_count_against_their_group(run_of):
    def tiny(value):
        def make(step):
            made = record(step)
            made["grad_norm_layers/default/embedding"] = value
            return made

        return make

    a, b = (run_of(n, map(tiny(v), range(3))) for n, v in (("a", 1e-9), ("b", 2e-9)))
    assert compare(read_run(a), read_run(b)).passed


@pytest.mark.parametrize("value", [None, 7.0])
def test_a_loss_that_is_not_finite_leaves_every_band(run_of, value):
    broken = [record(s) | ({"loss": None} if s == 3 else {}) for s in range(STEPS)]
    a, b = run_of("a", map(record, range(STEPS))), run_of("b", broken)
    found = compare(read_run(a), read_run(b))
    assert judged(found)["loss"].left_at == 3
    assert math.isinf(found.loss.largest)
    assert comparison_report.html(found)


def test_metrics_of_a_former_version_go_with_those_of_this_one(run_of):
    """It had the groups nested, under names that tell over how many ranks the experts are spread."""

    def former(step, ranks):
        made = record(step)
        names = {"default": "0_default", "fp32": "1_fp32", "experts": f"2_moe_ep_size_{ranks}"}
        norms = {old: made.pop(f"grad_norm/{new}") for new, old in names.items()}
        layers = {
            old: [made.pop(f"grad_norm_layers/{new}/{place}") for place in PLACES]
            for new, old in names.items()
        }
        return made | {"grad_norm": norms, "grad_norm_layers": layers}

    a = run_of("a", map(record, range(3)))
    b = run_of("b", [former(step, 2 if step < 2 else 1) for step in range(3)])  # resumed on one rank
    for pair in ((a, b), (b, b)):
        found = compare(*map(read_run, pair))
        assert found.passed
        assert len(found.quantities) == 3 + 3 + 12


def without(names, steps):
    return [record(s, **(dict.fromkeys(names) if s in steps else {})) for s in range(STEPS)]


NORMS = [key for key in record(0) if key.startswith("grad_norm")]


@pytest.mark.parametrize("lost", [range(1, STEPS), range(STEPS), range(STEPS - 1, STEPS)])
def test_without_a_loss_in_both_nothing_is_compared(run_of, lost, capsys):
    runs = [run_of(name, without(["loss", "moe_loss", *NORMS], lost)) for name in "ab"]
    found = compare(*map(read_run, runs))
    assert (found.passed, found.left_at) == (False, lost[0])
    assert f"nothing was compared from step {lost[0]} on" in comparison_report.text(found)
    assert comparison_report.html(found)
    with pytest.raises(SystemExit) as ended:
        portmoe(["compare", *map(str, runs)])
    assert ended.value.code == 4


def test_a_step_skipped_in_both_has_no_norms_and_all_skipped_is_nothing_compared(run_of):
    some = compare(*(read_run(run_of(name, without(NORMS, [2, 3]))) for name in "ab"))
    assert some.passed
    none = compare(*(read_run(run_of(name, without(NORMS, range(STEPS)))) for name in "cd"))
    assert (none.passed, none.left_at) == (False, 0)


@pytest.mark.parametrize("name", ["grad_norm/experts", "dropped_token_rate", "loss"])
def test_a_number_that_one_run_lacks_is_no_agreement(run_of, name):
    gone = [{k: v for k, v in record(s).items() if k != name} for s in range(STEPS)]
    if name != "grad_norm/experts":
        gone = [step | {name: None} for step in gone]
    a, b = run_of("a", map(record, range(STEPS))), run_of("b", gone)
    assert not compare(read_run(a), read_run(b)).passed
    assert not compare(read_run(b), read_run(a)).passed


def test_validations_are_compared(run_of):
    def validated(loss, every):
        return [record(s) | ({"valid_loss": loss} if s % every == 1 else {}) for s in range(STEPS)]

    runs = (("a", 5.0, 2), ("b", 5.0, 4), ("c", 5.001, 2), ("d", None, 2), ("e", None, 2))
    a, b, c, d, e = (read_run(run_of(n, validated(loss, every))) for n, loss, every in runs)
    assert compare(a, a).passed
    alike = compare(a, b)
    assert alike.passed
    assert any("validations: 6 and 3" in note for note in alike.notes)
    assert compare(a, c).left_at == 1
    assert judged(compare(a, c))["validation loss"].passed is False
    assert not compare(d, e).passed


def test_validations_of_other_amounts_of_data_are_not_compared(run_of):
    def validated(loss, **more):
        return [record(s) | {"valid_loss": loss} | more for s in range(STEPS)]

    older, newer = (
        read_run(run_of(n, steps))
        for n, steps in (("a", validated(5.0)), ("b", validated(5.1, valid_tokens=99)))
    )
    found = compare(older, newer)
    assert found.passed
    assert "validation loss" not in judged(found)
    assert any("read only the first packs" in note for note in found.notes)


def test_sixteen_bit_runs_get_wider_bands_and_norms_are_judged_early_only(run_of):
    def noisy(step):
        made = record(step) | {"loss": record(step)["loss"] * 1.01}
        if step == 11:
            made["grad_norm/fp32"] = 5.0
        return made

    bf16 = ("model.dtype=bfloat16",)
    a, b = run_of("a", map(record, range(STEPS)), bf16), run_of("b", map(noisy, range(STEPS)), bf16)
    found = compare(read_run(a), read_run(b))
    assert found.thresholds == BFLOAT16
    assert found.passed
    assert any("first 10 of 12" in note for note in found.notes)
    assert FLOAT32.loss < BFLOAT16.loss


def test_only_common_steps_are_compared(run_of):
    a, b = run_of("a", map(record, range(5))), run_of("b", map(record, range(3, 9)))
    assert compare(read_run(a), read_run(b)).steps == [3, 4]


def test_old_runs_without_norms_by_layer(run_of):
    def old(step):
        return {key: value for key, value in record(step).items() if "grad_norm_layers" not in key}

    a, b = run_of("a", map(record, range(3))), run_of("b", map(old, range(3)))
    found = compare(read_run(a), read_run(b))
    assert found.passed
    assert any("not recorded" in note for note in found.notes)


def test_other_mathematics_is_refused_by_its_key_and_another_layout_is_not(run_of):
    a = run_of("a", map(record, range(3)))
    b = run_of("b", map(record, range(3)), ("moe.top_k=1",))
    c = run_of("c", map(record, range(3)), ("parallel.zero1.size=1", "data.micro_num=2"))
    with pytest.raises(ConfigError, match=r"moe\.top_k=2 .* and 1 in"):
        compare(read_run(a), read_run(b))
    assert compare(read_run(a), read_run(c)).passed


def test_another_global_batch_is_refused(run_of):
    a = run_of("a", map(record, range(3)))
    b = run_of("b", [record(s, num_consumed_tokens=1) for s in range(3)])
    with pytest.raises(ConfigError, match="another global batch"):
        compare(read_run(a), read_run(b))


def test_the_command(run_of, tmp_path, capsys):
    a = run_of("a", map(record, range(STEPS)))
    b = run_of("b", [record(s) | {"loss": 3.0} for s in range(STEPS)], backend="other")
    page = tmp_path / "page.html"
    assert portmoe(["compare", str(a), str(a)]) == 0
    same = capsys.readouterr().out
    assert (
        f"the runs agree: their figures are the same in all {STEPS} steps\nnext: portmoe report {a}" in same
    )
    with pytest.raises(SystemExit) as ended:
        portmoe(["compare", str(a), str(b), "--out", str(page)])
    assert ended.value.code == 4
    assert "the runs part at step 0: loss" in capsys.readouterr().out
    text = page.read_text()
    assert text.count("<svg") >= 10
    assert not any(forbidden in text for forbidden in ("<script", "http://", "https://", "src="))


def test_what_is_no_run(run_of, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    a, without_steps = run_of("a", map(record, range(3))), run_of("b", [])
    assert portmoe(["compare", str(a), str(empty)]) == 2
    assert portmoe(["compare", str(a), str(without_steps)]) == 2
    assert portmoe(["compare", str(a), str(tmp_path / "missing")]) == 2
    assert portmoe(["compare", str(a), str(a), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "Traceback" not in capsys.readouterr().err
