"""The walk through a training step: what it names, what it must not name, and the command."""

import dataclasses
import io
import json
import shlex
from functools import cache

import pytest
import torch
from torch.utils._pytree import tree_map

from portmoe.accelerator import Operations, get_accelerator
from portmoe.cli.main import run as portmoe
from portmoe.config.read import load_config
from portmoe.model import decoder
from portmoe.ops import OPERATIONS
from portmoe.ops.operation import Implementation
from portmoe.record.progress import Progress
from portmoe.record.terminal import terminal
from portmoe.verify.backend.calls import call, copied
from portmoe.verify.bisect import bisect as walking
from portmoe.verify.bisect import bisect_report
from portmoe.verify.bisect.answers import undecided
from portmoe.verify.bisect.whole_model import distance
from portmoe.verify.runs.recording import Call

SMALL = (
    "data.seq_len=32",
    "data.num_samples=300",
    "model.hidden_size=32",
    "model.multiple_of=32",
    "model.vocab_size=256",
    "model.num_layers=2",
)
# Models that between them use every operation.
MODELS = {
    "static": ("model.moe_use_residual=true",),
    "ragged": ("model.moe_type=MegaBlock-D", "data.fixed_random_dataset_seqlen=false"),
    "latent": (),
    "dense first": ("model.first_k_dense_replace=1", "model.checkpoint=true", "model.qk_interleaved=true"),
}
MODEL_OF = {
    "megablock_gating": "ragged",
    "expert_ffn_ragged": "ragged",
    "swiglu": "dense first",
    "softmax_gating": "latent",
}
LATENT = (
    *("data.seq_len=32", "data.num_samples=300", "data.micro_bsz=4", "data.global_batch_size=16"),
    *("model.hidden_size=32", "model.vocab_size=256", "model.moe_intermediate_size=32"),
    *("data.num_epochs=2", "data.total_steps=null"),
)


class Scaled(torch.autograd.Function):
    """x · forward, its gradient · backward."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_factor = backward
        return x * forward

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.backward_factor, None, None


def wrong(op, forward=1.0, backward=1.0):
    """The reference with results or gradients that are a little too large."""

    def function(*args, **kwargs):
        def scale(leaf, by):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                return Scaled.apply(leaf, *by)
            return leaf

        if op == "adamw":
            OPERATIONS[op].reference(*args, **kwargs)
            args[0][0].mul_(forward)
            return None
        args, kwargs = tree_map(lambda leaf: scale(leaf, (1.0, backward)), (args, kwargs))
        return tree_map(lambda leaf: scale(leaf, (forward, 1.0)), OPERATIONS[op].reference(*args, **kwargs))

    return Implementation(op, "wrong", function)


@pytest.fixture
def suspect(monkeypatch):
    """``suspect(implementations)``: the CPU's backend with these before its own, under a name of its own."""

    def place(*implementations, name="suspect"):
        cpu = get_accelerator("cpu")

        class Planted(Operations):
            def implementations(self):
                return [*implementations, *cpu.ops.implementations()]

        found = {"cpu": cpu, name: dataclasses.replace(cpu, name=name, ops=Planted())}
        monkeypatch.setattr(walking, "get_accelerator", lambda name: found[name])

    return place


def config_of(model, *overrides):
    if model == "latent":
        return load_config("tiny_deepseek_v2", [*LATENT, *overrides])
    return load_config("tiny_moe4", [*SMALL, *MODELS[model], *overrides])


def walk(model="static", *overrides):
    config = config_of(model, *overrides)
    return walking.bisect(config, "cpu", "suspect", Progress(terminal(io.StringIO())))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_backend_is_not_reported(suspect, model, dtype):
    suspect()
    found = walk(model, f"model.dtype={dtype}")
    assert found.passed, bisect_report.text(found)
    names = {judged.operation for judged in found.calls}
    assert {"rms_norm", "rotary", "attention", "linear", "embedding", "cross_entropy", "adamw"} <= names
    assert found.whole.loss <= found.whole.band_forward
    places = [judged.place for judged in found.calls]
    first = "down" if model == "latent" else "qkv"
    assert places[:3] == ["embedding", "layers.0.attention_norm", f"layers.0.attention.{first}"]
    assert places[-3:] == ["norm", "head", "optimizer"]


def test_every_operation_is_met():
    met = set()
    for model in MODELS:
        met |= {made.operation.name for made in step_of(config_of(model)).calls}
    assert met == OPERATIONS.keys() - {"adamw"} | {"linear", "router", "embedding"}


@cache
def batch_of(text):
    config = load_config("tiny_moe4", json.loads(text))
    with walking.open_data(config, rank=0, size=1, micro_num=4) as stream:
        return stream.batches(0)[0]


def step_of(config):
    batch = batch_of(json.dumps([*SMALL]))
    return walking._step(config, walking.reference_table(), batch, torch.device("cpu"))


def test_what_is_called_again_is_what_the_model_computed():
    step = step_of(load_config("tiny_moe4", [*SMALL]))
    gradients = {name: p.grad for name, p in step.model.named_parameters()}
    compared = set()
    for made in step.calls:
        again = call(
            made.operation,
            made.operation.reference,
            copied(made.sample, None, torch.device("cpu")),
            upstream=made.upstream,
        )
        for name, tensor in made.outputs.items():
            assert torch.equal(tensor, again.outputs[name])
        for argument in ("weight_H", "weight_OI", "weight_EH", "weight_VH", "bias_O"):
            owner = made.place.replace("decoder", "head")  # which it multiplies by in cross_entropy
            parameter = f"{owner}.{argument.partition('_')[0]}"
            if f"gradient of {argument}" in again.grads:
                torch.testing.assert_close(again.grads[f"gradient of {argument}"], gradients[parameter])
                compared.add(parameter)
    assert compared == {name for name in gradients if ".experts." not in name}


@pytest.mark.parametrize(
    ("op", "direction"),
    [(op, d) for op in OPERATIONS for d in ("forward", "backward") if (op, d) != ("adamw", "backward")],
)
def test_exactly_the_wrong_operation_is_named(suspect, op, direction):
    suspect(wrong(op, **{direction: 1.01}))
    found = walk(MODEL_OF.get(op, "static"))
    defects = list(found.defects())
    phase = "update" if op == "adamw" else direction
    assert {(d.judged.operation, d.judged.implementation, d.phase) for d in defects} == {(op, "wrong", phase)}
    assert not found.passed
    document = bisect_report.as_dict(found)
    assert document["first"]["operation"] == op
    assert document["first"]["switch_off"].startswith(f"ops.disable: [{op}.wrong] ({op}.")
    json.dumps(document, allow_nan=False)


def test_the_walk_goes_forward_and_then_back(suspect):
    suspect(wrong("rotary", backward=1.01), wrong("swiglu", backward=1.01), wrong("combine", forward=0.99))
    found = walk()
    order = [(d.judged.place, d.judged.operation) for d in found.defects()]
    assert order[:3] == [
        ("layers.0.moe", "combine"),
        ("layers.1.moe", "combine"),
        ("layers.1.moe.residual", "swiglu"),
    ]
    assert order[-1] == ("layers.0.attention", "rotary")
    text = bisect_report.text(found)
    assert "first wrong: layers.0.moe: combine.wrong, forward" in text
    assert "also wrong: rotary.wrong, backward: 4 calls" in text
    assert "to switch it off: ops.disable: [combine.wrong]" in text


def test_one_percent_shows_in_bfloat16(suspect):
    suspect(wrong("swiglu", backward=1.01))
    found = walk("dense first", "model.dtype=bfloat16")
    assert {d.judged.subject for d in found.defects()} == {"swiglu.wrong"}
    assert next(found.defects()).deviation.tensor.endswith("scale")


def test_what_raises_is_named(suspect):
    def broken(*args):
        raise RuntimeError("no kernel")

    suspect(Implementation("rms_norm", "broken", broken))
    found = walk()
    first = next(found.defects())
    assert (first.judged.subject, first.phase) == ("rms_norm.broken", "forward")
    assert "no kernel" in first.deviation.wrong
    assert "no kernel" in found.whole.raised


def test_nan_is_named_and_can_be_written_down(suspect):
    suspect(wrong("combine", forward=float("nan")))
    found = walk()
    assert bisect_report.as_dict(found)["first"]["error"] == "inf"


def test_an_error_between_the_operations_is_said_to_be_one(suspect, monkeypatch):
    suspect()
    right, made = decoder.rotary_tables, []

    def wrong_the_second_time(*args):
        cos_TR, sin_TR = right(*args)
        made.append(cos_TR)
        return (cos_TR, sin_TR) if len(made) == 1 else (cos_TR.bfloat16().float(), sin_TR)

    monkeypatch.setattr(decoder, "rotary_tables", wrong_the_second_time)
    found = walk()
    assert not list(found.defects())
    assert not found.passed
    assert found.whole.starts.startswith("layers.0.attention: rotary: its argument cos_TR")
    assert "every operation agrees, and the whole model does not" in bisect_report.text(found)


def test_a_gradient_lost_between_the_operations_is_found_going_back(suspect, monkeypatch):
    suspect()
    right, made = decoder.Block._compute, []

    def without_the_residual(self, x_TH, *others):
        made.append(self)
        if len(made) > 2:  # the second model
            return right(self, x_TH * 0.5 + x_TH.detach() * 0.5, *others)
        return right(self, x_TH, *others)

    monkeypatch.setattr(decoder.Block, "_compute", without_the_residual)
    found = walk()
    assert not list(found.defects())
    assert found.whole.starts.startswith("layers.0.moe.residual.w2: linear: the gradient")


def gating(logits):
    sample = walking.Sample("", (torch.tensor(logits), 2, 1.0, 4))
    return Call("", OPERATIONS["topk_gating"], sample)


def test_a_choice_that_rounding_decides_is_left_open():
    assert undecided(gating([[1.0, 1.0 - 1e-7, 0.0]]))
    assert not undecided(gating([[1.0, 1.0, 0.0]]))  # a tie goes to the lower index everywhere
    assert not undecided(gating([[1.0, 0.5, 0.499]]))
    assert not undecided(gating([[2.0, 1.0, 0.5, 0.5 - 1e-7]]))  # neither is chosen


def test_distance():
    one = torch.tensor([3.0, 4.0])
    assert distance(one, one) == 0
    assert distance(one, torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert distance(one * 0, one) == distance(one, one * float("nan")) == float("inf")


def small(*options):
    return ["bisect", "--backend", "cpu", *options, *(part for s in SMALL for part in ("--set", s))]


def test_the_command(tmp_path, capsys):
    file = tmp_path / "bisect.json"
    assert portmoe(small("--seed", "3", "--out", str(file))) == 0
    told = capsys.readouterr().out
    assert "every operation and the whole model agree" in told
    settings = shlex.join(small()[3:])
    assert told.endswith(f"next: portmoe train --backend cpu --config tiny_moe4.yaml {settings}\n")
    report = json.loads(file.read_text())
    assert report["passed"]
    assert report["seed"] == 3
    assert len(report["calls"]) > 20


def test_the_command_ends_with_4_where_there_is_a_defect(suspect, tmp_path, capsys):
    suspect(wrong("rms_norm", backward=1.01), name="cpu")
    page = tmp_path / "bisect.html"
    with pytest.raises(SystemExit) as ended:
        portmoe(small("--out", str(page)))
    assert ended.value.code == 4
    before, _, rest = page.read_text().partition("<h2>Wrong</h2>")
    wrong_ones, _, every_call = rest.partition("<h2>Every call</h2>")
    assert "First wrong: norm: rms_norm.wrong, backward." in before
    assert wrong_ones.count("<tr class=fail>") == 5  # two in each layer, and the last
    assert wrong_ones.count("</a></td><td>backward</td>") == 5
    assert "<tr class=pass>" not in wrong_ones
    assert '<tr class=pass id="forward-0">' in every_call
    assert "first wrong: norm: rms_norm.wrong, backward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reference", "cqu"), "did you mean 'cpu'"),
        (("--backend", "no-such-backend"), "is not registered"),
        (("--out", "/no/such/folder/file.json"), "cannot be written"),
        (("--set", "ops.disable=['rms_norm.fast']"), "ops.disable"),
    ],
)
def test_a_users_mistake_is_explained(options, message, capsys):
    assert portmoe(small(*options)) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_a_config_without_a_model_is_refused_before_its_memory_is_taken(tmp_path, capsys):
    only_a_switch = tmp_path / "off.yaml"
    only_a_switch.write_text("ops:\n  disable: [rms_norm.compiled]\n")
    assert portmoe(["bisect", "--backend", "cpu", "--config", str(only_a_switch)]) == 3
    shown = capsys.readouterr().err
    assert "GiB for weights, gradients and optimizer state" in shown
    assert "no key of this config says what the model is" in shown
    assert "32 layers, hidden size 4096, 4 experts" in shown
