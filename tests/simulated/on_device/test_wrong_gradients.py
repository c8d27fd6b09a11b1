"""One fused function wrong by 1 %, in its gradient only: conformance fails it, bisect names exactly it, and a
replay of a trained checkpoint differs.

The optimizer's function has no gradient: its result is wrong instead.
"""

import io
from contextlib import contextmanager

import pytest
import torch
from torch_npu import faults

from portmoe import load_config
from portmoe.backends.npu.ops import FUSED, LAST
from portmoe.ops import OPERATIONS
from portmoe.record.progress import Progress
from portmoe.record.terminal import terminal
from portmoe.training.run import train
from portmoe.verify.backend.conformance import check_operation
from portmoe.verify.bisect.bisect import bisect
from portmoe.verify.replay import report
from portmoe.verify.replay.recompute import recompute
from portmoe.verify.replay.recorded import config_of_replay, read_recorded
from portmoe.verify.replay.replay import RECORD, replay_of

NPU = torch.device("npu", 0)
SMALL = (
    "data.seq_len=64",
    "data.num_samples=400",
    "model.hidden_size=32",
    "model.multiple_of=32",
    "model.vocab_size=256",
)
# Two models that between them take every fused function: see test_training.py.
STATIC = ("model.moe_use_residual=true",)
RAGGED = ("model.moe_type=MegaBlock-D", "data.fixed_random_dataset_seqlen=false")
ON_RAGGED = {"attention", "dispatch", "combine", "expert_ffn_ragged"}

every_function = pytest.mark.parametrize("implementation", FUSED, ids=lambda i: f"{i.op}.{i.name}")
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)


@contextmanager
def planted(implementation):
    kind = "wrong" if implementation.op == "adamw" else "gradient"
    # The second attention is taken on the product whose page the first one's is not.
    product = "A3" if implementation.name == "npu_fusion_attention_v2" else "A2"
    with faults.product(product), faults.planted(f"{kind}:{implementation.name}:1.01"):
        yield


def failed(implementation, dtype):
    if implementation.op in ("dispatch", "combine"):  # taken where nothing is dropped
        shapes = ["few tokens, many experts"]
    else:
        shapes = ["odd"] if dtype == torch.float32 else ["larger"]
    checks = check_operation(OPERATIONS[implementation.op], [implementation], NPU, 0, [dtype], shapes)
    return {check.subject for check in checks if check.status == "fail"}


@every_function
def test_conformance_fails_it_and_nothing_else(implementation):
    assert not failed(implementation, torch.float32)
    with planted(implementation):
        assert failed(implementation, torch.float32) == {f"{implementation.op}.{implementation.name}"}


def test_conformance_fails_the_cut_vocabularys_gradient():
    backward = "npu_fused_linear_cross_entropy_loss_with_max_sum_backward"

    def outcomes():
        checks = check_operation(
            OPERATIONS["cross_entropy"], LAST, NPU, 0, [torch.bfloat16], ["larger"], with_reference=False
        )
        return {check.name.partition(",")[0]: check.status for check in checks}

    assert set(outcomes().values()) == {"pass"}
    with faults.planted(f"gradient:{backward}:1.01"):
        assert outcomes()["values"] == "fail"


def walk(model, dtype=torch.float32):
    config = load_config("tiny_moe4", [*SMALL, *model, f"model.dtype={str(dtype).removeprefix('torch.')}"])
    return bisect(config, "cpu", "npu", Progress(terminal(io.StringIO())))


@dtypes
@every_function
def test_bisect_names_exactly_it(implementation, dtype):
    with planted(implementation):
        found = walk(RAGGED if implementation.op in ON_RAGGED else STATIC, dtype)
    defects = list(found.defects())
    phase = "update" if implementation.op == "adamw" else "backward"
    assert {(d.judged.operation, d.judged.implementation, d.phase) for d in defects} == {
        (implementation.op, implementation.name, phase)
    }
    assert found.whole.loss < 1e-6  # the loss looks fine


@dtypes
@pytest.mark.parametrize("model", [STATIC, RAGGED], ids=["static", "ragged"])
def test_bisect_reports_no_right_function(model, dtype):
    found = walk(model, dtype)
    assert found.passed
    assert "simulated" in found.device.lower()


def test_a_wrong_product_of_torchs_own_is_named_too():
    with faults.planted("wrong:aten::addmm:1.01"):  # linear maps with a bias, and the loss's sum over slices
        found = walk(STATIC)
    assert {d.judged.operation for d in found.defects()} == {"linear", "cross_entropy"}
    assert next(found.defects()).judged.place == "layers.0.attention.qkv"


SHOWN = ("npu_rotary_mul", "npu_moe_token_unpermute", "npu_apply_adam_w")  # the hardest, one of each kind
TRAINED_FOR = 60  # steps, before which queries and keys carry little gradient


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``trained(model)``: a run on the CPU with the checkpoints of step 0 and of a trained state."""
    runs = {}

    def one(model):
        if model not in runs:
            runs[model] = tmp_path_factory.mktemp("trained") / "run"
            steps = (f"data.total_steps={TRAINED_FOR + 1}", f"ckpt.keep_steps=[0,{TRAINED_FOR}]")
            saved = (*steps, "ckpt.enable_save_ckpt=false", f"run.directory={runs[model]}")
            train(load_config("tiny_moe4", [*SMALL, *model, *saved]), "trained", "cpu", "local")
        return runs[model]

    return one


def replayed(run, out, steps, backend="npu"):
    recorded = read_recorded(run, (), steps)
    config = config_of_replay(recorded, out / RECORD, backend, 1, None, ())
    recompute(config, recorded, backend, "local", lambda line: None)
    return replay_of(recorded, out)


@pytest.mark.parametrize("model", [STATIC, RAGGED], ids=["static", "ragged"])
def test_replay_agrees_with_every_right_function(model, trained, tmp_path):
    found = replayed(trained(model), tmp_path, None)
    assert found.passed, report.text(found)
    assert found.made.backend == "npu"
    assert len(found.recorded.starts) == 2


@pytest.mark.parametrize(
    "implementation",
    [i if i.name in SHOWN else pytest.param(i, marks=pytest.mark.slow) for i in FUSED],
    ids=lambda i: f"{i.op}.{i.name}",
)
def test_replay_of_a_trained_checkpoint_tells_it(implementation, trained, tmp_path):
    with planted(implementation):
        found = replayed(
            trained(RAGGED if implementation.op in ON_RAGGED else STATIC), tmp_path, str(TRAINED_FOR)
        )
    assert not found.passed
    assert found.first.part == ("update" if implementation.op == "adamw" else "backward")
    failed = {result.name: result for result in found.results if result.status == "fail"}
    assert found.first.name in failed
    sharpest = max(result.needed / result.allowed for result in failed.values())
    assert sharpest > 3, report.text(found)  # no near miss
