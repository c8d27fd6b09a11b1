"""Training on the simulated NPU: the losses of the CPU, with each fused function and without it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(600)  # many short trainings stand behind each test

STEPS = 3
SMALL = [
    f"data.total_steps={STEPS}",
    f"lr_scheduler.total_steps={STEPS}",
    "data.seq_len=64",
    "data.num_samples=400",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.vocab_size=256",
]
# Two models that between them use every operation: with a capacity and equal segments, and without.
MODELS = {
    "static": ["model.moe_use_residual=true"],
    "ragged": ["model.moe_type=MegaBlock-D", "data.fixed_random_dataset_seqlen=false"],
}
EXACT = 1e-6  # relative


# What torch_npu, its allocator and HCCL read when they start.
STACK = {
    "TORCH_NPU_FALLBACK_CPU_DISABLE": "1",
    "INF_NAN_MODE_ENABLE": "1",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
    "HCCL_CONNECT_TIMEOUT": "600",
    "HCCL_EXEC_TIMEOUT": "600",
    "HCCL_EVENT_TIMEOUT": "660",
    "HCCL_DETERMINISTIC": "true",
}

# Each vendor function: a model that uses it, its operation, and what computes that where it is missing.
FUSED = {
    "npu_rms_norm": ("static", "rms_norm", "torch"),
    "npu_rotary_mul": ("static", "rotary", "reference"),
    "npu_swiglu": ("static", "swiglu", "silu"),
    "npu_fusion_attention": ("ragged", "attention", "npu_fusion_attention_v2"),
    "npu_moe_token_permute": ("ragged", "dispatch", "gather"),
    "npu_moe_token_unpermute": ("ragged", "combine", "gather"),
    "npu_grouped_matmul": ("ragged", "expert_ffn_ragged", "loop"),
    "npu_apply_adam_w": ("static", "adamw", "fused"),
}
JOBS = {
    **{model: (model, ()) for model in MODELS},
    **{f"without {name}": (model, (f"lack:{name}",)) for name, (model, *_) in FUSED.items()},
    "without the static product": ("static", ("lack:npu_grouped_matmul",)),
    "wrong gradient": ("static", ("gradient:npu_rms_norm:1.01",)),
    "nan": ("static", ("wrong:npu_rms_norm:nan",)),
    "measured": ("static", ("fail:npu_rms_norm",)),
    "out of memory": ("static", ("memory:3000000",)),
    "another product": ("ragged", ("product:A3",)),
}
EXTRA = {"measured": ["ops.select=measure"]}


def job(name):
    """One of ``JOBS`` as ``train_worker`` takes it."""
    model, faults = JOBS[name]
    settings = [*SMALL, "ckpt.enable_save_ckpt=false", *MODELS[model], *EXTRA.get(name, [])]
    return {"name": name, "config": settings, "faults": faults}


def train_all(backend, folder, jobs, environment):
    """Each of these jobs in turn, in one process."""
    command = [sys.executable, str(HERE / "train_worker.py"), backend, str(folder)]
    done = subprocess.run(
        command, input=json.dumps(jobs), env=environment, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return train_all("cpu", tmp_path_factory.mktemp("cpu"), list(map(job, MODELS)), None)


@pytest.fixture(scope="module")
def on_npu(tmp_path_factory, simulated):
    return train_all("npu", tmp_path_factory.mktemp("npu"), list(map(job, JOBS)), simulated)


def steps(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return [step["loss"] for step in steps(run)]


def operations(run):
    """Operation → its choice, which is the same at all of its sites here."""
    record = json.loads((run / "ops.json").read_text())
    by_op = {}
    for key, choice in record.items():
        assert by_op.setdefault(key.partition("@")[0], choice)["chosen"] == choice["chosen"]
    return by_op


def norms(step):
    return [value for key, value in step.items() if key.startswith("grad_norm/")]


@pytest.mark.parametrize("model", MODELS)
def test_the_fused_functions_are_used_and_the_losses_are_the_cpus(model, on_cpu, on_npu):
    assert len(losses(on_cpu / model)) == STEPS
    assert losses(on_npu / model) == pytest.approx(losses(on_cpu / model), rel=EXACT)
    for ours, theirs in zip(steps(on_npu / model), steps(on_cpu / model), strict=True):
        assert norms(ours) == pytest.approx(norms(theirs), rel=1e-5)
    chosen = {op: choice["chosen"] for op, choice in operations(on_npu / model).items()}
    assert {chosen[op] for of, op, _ in FUSED.values() if of == model} == {
        name for name, (of, *_) in FUSED.items() if of == model
    }
    environment = json.loads((on_npu / model / "environment.json").read_text())
    assert environment["device"] == "Simulated NPU (host memory and host kernels)"
    assert "simulated" in environment["facts"]["torch_npu"]


@pytest.mark.parametrize("name", FUSED)
def test_without_one_function_the_losses_stay_and_the_record_says_why(name, on_cpu, on_npu):
    model, op, fallback = FUSED[name]
    run = on_npu / f"without {name}"
    assert losses(run) == pytest.approx(losses(on_cpu / model), rel=EXACT)
    choice = operations(run)[op]
    assert choice["chosen"] == fallback
    (missing,) = [c for c in choice["candidates"] if c["name"] == name]
    assert missing["reason"] == f"torch_npu 2.13.0+simulated has no {name}"


def test_another_product_takes_what_its_pages_name_and_the_losses_stay(on_cpu, on_npu):
    run = on_npu / "another product"
    assert losses(run) == pytest.approx(losses(on_cpu / "ragged"), rel=EXACT)
    chosen = {op: choice["chosen"] for op, choice in operations(run).items()}
    assert chosen["attention"] == "npu_fusion_attention_v2"
    assert chosen["expert_ffn_ragged"] == "loop"
    assert "910_9392" in operations(run)["attention"]["candidates"][0]["reason"]


def test_the_static_product_falls_back_too(on_cpu, on_npu):
    run = on_npu / "without the static product"
    assert operations(run)["expert_ffn"]["chosen"] == "loop"
    assert losses(run) == pytest.approx(losses(on_cpu / "static"), rel=EXACT)


def test_a_wrong_gradient_shows_in_the_gradient_norms_before_the_loss(on_cpu, on_npu):
    ours, theirs = steps(on_npu / "wrong gradient"), steps(on_cpu / "static")
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=EXACT)
    assert norms(ours[0]) != pytest.approx(norms(theirs[0]), rel=1e-3)


def test_nan_in_one_function_is_counted_and_skipped(on_npu):
    assert [step["inf_nan_skip_batches"] for step in steps(on_npu / "nan")] == [1, 2, 3]


def test_a_function_that_fails_when_timed_is_not_chosen(on_cpu, on_npu):
    record = operations(on_npu / "measured")["rms_norm"]
    assert record["chosen"] != "npu_rms_norm"
    assert "failed when timed" in record["candidates"][0]["reason"]
    assert losses(on_npu / "measured") == pytest.approx(losses(on_cpu / "static"), rel=EXACT)


def test_out_of_memory_is_explained(on_npu):
    code, _, message = (on_npu / "out of memory.failed").read_text().partition(" ")
    assert code == "4"
    assert "ran out of memory: NPU out of memory (simulated)" in message
    assert "data.micro_bsz" in message


def portmoe(arguments, environment):
    command = [sys.executable, "-m", "portmoe", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_with_ranks(run, ranks, environment, *overrides):
    settings = [*SMALL, *MODELS["static"], "ckpt.checkpoint_every=2", f"run.directory={run}"]
    settings += ["cudnn_deterministic=true", *overrides]
    sets = [part for setting in settings for part in ("--set", setting)]
    return portmoe(["train", "--backend", "npu", "--nproc", str(ranks), *sets], environment)


@pytest.mark.slow
def test_two_ranks_share_the_state_save_it_and_one_goes_on(tmp_path, simulated, on_cpu):
    run = tmp_path / "run"
    shown = train_with_ranks(run, 2, simulated, "data.total_steps=2")
    assert "Simulated NPU" in shown
    recorded = json.loads((run / "environment.json").read_text())["variables"]
    assert recorded.items() >= STACK.items()
    told = (run / "train.log").read_text()
    for name, value in STACK.items():
        assert f"{name}={value}" in told
    assert "optimizer state over 2" in told
    train_with_ranks(run, 1, simulated)
    assert losses(run) == pytest.approx(losses(on_cpu / "static"), rel=EXACT)
    assert sorted(p.name for p in (run / "checkpoints").iterdir())[-1] == "step-00000003"


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"zero1.size": 1},
        {"zero1.size": 2},
        {"zero1.fsdp": True},
        {"pipeline.size": 2},
        {"pipeline.size": 2, "expert.size": 2},
        {"expert.size": 4},
    ],
    ids=str,
)
def test_four_ranks(layout, tmp_path, simulated, on_cpu):
    settings = [f"parallel.{key}={value}".lower() for key, value in layout.items()]
    train_with_ranks(tmp_path / "run", 4, simulated, *settings)
    assert losses(tmp_path / "run") == pytest.approx(losses(on_cpu / "static"), rel=EXACT)


@pytest.mark.slow
def test_tiny_moe4_itself(tmp_path, simulated):
    def run(backend, environment):
        path = tmp_path / backend
        sets = ["--set", f"run.directory={path}", "--set", "data.total_steps=10"]
        portmoe(["train", "--backend", backend, *sets], environment)
        return losses(path)

    assert run("npu", simulated) == pytest.approx(run("cpu", None), rel=EXACT)


@pytest.mark.slow
def test_tiny_moe4_on_four_ranks_in_a_pipeline_and_on_from_its_checkpoint(tmp_path, simulated):
    def run(path, backend, ranks, environment, *settings):
        settings = [*settings, f"run.directory={path}", "lr_scheduler.total_steps=10"]
        sets = [part for setting in settings for part in ("--set", setting)]
        return portmoe(["train", "--backend", backend, "--nproc", str(ranks), *sets], environment)

    split, whole = tmp_path / "split", tmp_path / "whole"
    run(split, "npu", 4, simulated, "parallel.pipeline.size=2", "data.total_steps=3")
    assert "optimizer state over 2" in (split / "train.log").read_text()
    run(split, "npu", 1, simulated, "data.total_steps=5")
    run(whole, "cpu", 1, None, "data.total_steps=5", "ckpt.enable_save_ckpt=false")
    assert len(losses(whole)) == 5
    assert losses(split) == pytest.approx(losses(whole), rel=EXACT)


def test_check_env_tries_it_and_says_that_it_is_simulated(simulated):
    report = portmoe(["check-env", "--backend", "npu"], simulated)
    assert "simulated" in report.lower()
    assert re.search(r"\[OK\].*hccl", report)
