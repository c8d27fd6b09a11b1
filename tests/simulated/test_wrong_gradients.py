"""One fused function wrong by 1 % in its gradient only, through the commands as a user types them.

validate fails it, compare flags the run although its loss looks fine, bisect names it. What conformance and
bisect say of every function is asked in ``on_device/test_wrong_gradients.py``.
"""

import json
import subprocess
import sys

import pytest
from test_training import FUSED, MODELS, SMALL, losses, train_all

from portmoe.cli.main import run as command
from portmoe.verify.runs.comparison import compare, read_run

pytestmark = pytest.mark.timeout(600)

STEPS = 6
SHORT = [f"data.total_steps={STEPS}", "lr_scheduler.total_steps=12", "ckpt.enable_save_ckpt=false"]
QUICK = ["npu_rms_norm", "npu_grouped_matmul"]
# Queries and keys carry little gradient before attention has learnt something: from trained weights.
TRAINED = ["npu_rotary_mul"]
STEPS_BEFORE = 60
# The optimizer's function has no gradient.
OTHERS = [name for name in FUSED if name not in (*QUICK, *TRAINED, "npu_apply_adam_w")]


def job(name, settings, *faults):
    return {"name": name, "config": [*SMALL, *settings], "faults": faults}


def short(name, *faults, start=None):
    model = MODELS[FUSED[name][0]]
    begin = [f"ckpt.load_ckpt_info={{path: {start}, content: [model]}}", "adam.lr=1e-4"] if start else []
    return job(name, [*model, *SHORT, *begin], *faults)


def twin(job, number):
    """The job of a run's twin, beside it."""
    return job | {"name": f"{job['name']}-twin{number}", "config": [*job["config"], f"run.twin={number}"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights after some steps on the CPU."""
    folder = tmp_path_factory.mktemp("trained")
    settings = [
        *MODELS["static"],
        f"data.total_steps={STEPS_BEFORE}",
        f"lr_scheduler.total_steps={STEPS_BEFORE}",
    ]
    train_all("cpu", folder, [job("before", settings)], None)
    return folder / "before" / "checkpoints" / f"step-{STEPS_BEFORE:08d}"


@pytest.mark.parametrize(
    "names",
    [QUICK, pytest.param(OTHERS, marks=pytest.mark.slow), pytest.param(TRAINED, marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_compare_flags_the_run_although_its_loss_looks_fine(names, tmp_path, simulated, request, capsys):
    start = request.getfixturevalue("trained") if names == TRAINED else None
    right = [short(name, start=start) for name in names]
    wrong = [short(name, f"gradient:{name}:1.01", start=start) for name in names]
    # Those that show after the first step are seen as far as twins agree.
    twins = [twin(job, n) for job in right for n in (1, 2) if names == OTHERS]
    on_cpu = train_all("cpu", tmp_path / "cpu", [*right, *twins], None)
    on_npu = train_all("npu", tmp_path / "npu", [*wrong, right[0] | {"name": "right"}], simulated)
    assert compare(read_run(on_cpu / names[0]), read_run(on_npu / "right")).passed
    for name in names:
        cpu, npu = on_cpu / name, on_npu / name
        assert losses(npu) == pytest.approx(losses(cpu), rel=1e-3)
        found = compare(read_run(cpu), read_run(npu))
        apart = [j.distance.label for j in found.quantities if j.left_at is not None]
        assert any(label.startswith("gradient norm") for label in apart), name
        with pytest.raises(SystemExit) as ended:
            command(["compare", str(cpu), str(npu), "--out", str(tmp_path / "page.html")])
        assert ended.value.code == 4
        assert f"the runs part at step {found.left_at}: " in capsys.readouterr().out
        assert "<svg" in (tmp_path / "page.html").read_text()


def portmoe(*arguments, environment, fault=None):
    planted = {"SIMULATED_NPU_FAULTS": fault} if fault else {}
    typed = [sys.executable, "-m", "portmoe", *map(str, arguments)]
    return subprocess.run(typed, env=environment | planted, capture_output=True, text=True, timeout=560)


def sets(settings):
    return [part for setting in settings for part in ("--set", setting)]


@pytest.mark.parametrize(
    "name", [QUICK[0], *(pytest.param(n, marks=pytest.mark.slow) for n in FUSED if n != QUICK[0])]
)
def test_bisect_names_it(name, tmp_path, simulated):
    model, op, instead = FUSED[name]
    kind = "wrong" if op == "adamw" else "gradient"
    options = ["--backend", "npu", "--out", tmp_path / "report.json", *sets([*SMALL, *MODELS[model]])]
    done = portmoe("bisect", *options, environment=simulated, fault=f"{kind}:{name}:1.01")
    assert done.returncode == 4, done.stdout + done.stderr
    assert f": {op}.{name}, {'update' if op == 'adamw' else 'backward'}" in done.stdout
    assert f"ops.disable: [{op}.{name}] ({op}.{instead} computes" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert {(d["operation"], d["implementation"]) for d in report["defects"]} == {(op, name)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_with_it_switched_off_everything_agrees(name, simulated):
    model, op, _ = FUSED[name]
    settings = [*SMALL, *MODELS[model], f"ops.disable=[{op}.{name}]"]
    kind = "wrong" if op == "adamw" else "gradient"
    options = ["--backend", "npu", *sets(settings)]
    done = portmoe("bisect", *options, environment=simulated, fault=f"{kind}:{name}:1.01")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *FUSED])
def test_validate_fails_it(name, tmp_path, simulated):
    fault = name and f"{'wrong' if name == 'npu_apply_adam_w' else 'gradient'}:{name}:1.01"
    options = ("--backend", "npu", "--out", tmp_path)
    done = portmoe("validate", *options, environment=simulated, fault=fault)
    assert done.returncode == (4 if name else 0), done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    failed = {check["subject"] for check in report["checks"] if check["status"] == "fail"}
    static = {"expert_ffn.npu_grouped_matmul"} if name == "npu_grouped_matmul" else set()
    wrong = {f"{FUSED[name][1]}.{name}"} | static if name else set()
    assert failed - {"reference run"} == wrong
