"""Every benchmark runs at a tiny size and writes figures that are possible."""

import importlib
import json
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
import torch.distributed as dist

from portmoe.backends.cpu.compiler import kernels

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a benchmark as from the command line, on the CPU: (its rows, what it printed)."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def call(name, *arguments):
        file = tmp_path / f"{name}.json"
        command = [f"{name}.py", "--backend", "cpu", "--json", str(file), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        importlib.import_module(name).main()
        document = json.loads(file.read_text())
        assert document["environment"]["torch"] == torch.__version__
        return document["rows"], capsys.readouterr().out

    return call


def test_peak(run):
    rows, printed = run("peak", "--size", 64)
    assert 0.01 < rows[0]["GFLOP/s"] < 1e5
    assert 0.05 < rows[1]["GB/s"] < 1e4
    assert "copy" in printed


def test_moe_layer(run):
    rows, printed = run("moe_layer", "--shape", "64/64/4/2", "--rounds", 15, "--only-ours")
    assert rows[0]["case"] == "bare products"
    assert rows[0]["ratio (median)"] == 1.0
    chosen = [row["case"] for row in rows if "(chosen)" in row["case"]]
    ours = "buffered" if isinstance(kernels(), str) else "compiled"
    assert chosen == [f"ours, static: {ours} (chosen)", f"ours, ragged: {ours} (chosen)"]
    # Tiny layers are all overhead; only the impossible is refused.
    assert all(row["ratio (median)"] > 0.9 for row in rows[1:])
    assert "64/64/4/2" in printed


def test_operations(run):
    rows, _ = run("operations", "--operation", "expert_ffn", "--set", "data.seq_len=16")
    assert {"expert_ffn.buffered", "expert_ffn_ragged.grouped_mm"} <= {row["operation"] for row in rows}
    assert all(0 < row["share of the ceiling"] < 1.5 for row in rows)


def test_train_step(run):
    sizes = ("--layers", 1, "--hidden", 64, "--vocab", 256, "--seq-len", 16, "--rounds", 1)
    rows, _ = run("train_step", *sizes)
    assert rows[0]["case"] == "portmoe"
    assert rows[0]["tokens/s"] > 0


@pytest.fixture
def finetune(monkeypatch, tmp_path):
    """(its contestants, what makes a task of 40 tokens), in a process group of one rank."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(FOLDER))
    finetune, contestants = map(importlib.import_module, ("finetune", "contestants"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def task(shape, varlen):
        overrides, folder = finetune.SHAPES["tiny"][shape], tmp_path / shape
        if not folder.exists():
            contestants.write_folder(shape, overrides, folder)
        pack = finetune.samples(40, 1024, 8)
        return contestants.Task(shape, overrides, folder, pack, varlen, "float32", "cpu", 1, False, 0)

    yield contestants, task
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", ["tiny_deepseek_v2", "tiny_mixtral"])
def test_both_fine_tune_the_same_model(finetune, shape):
    contestants, task = finetune
    cpu, losses = torch.device("cpu"), {}
    for varlen, one_by_one in ((True, False), (True, True), (False, False)):
        asked, ours = task(shape, varlen), contestants.Way("ours", ours=True)
        theirs = contestants.Way("theirs", ours=False, one_by_one=one_by_one)
        sides = contestants.Ours(asked, ours, cpu), contestants.Theirs(asked, theirs, cpu)
        mine, other = ([side.step() for _ in range(3)] for side in sides)
        # AdamW's first steps are of the rate's size whatever the gradient's: 1e-5 a step.
        assert mine == pytest.approx(other, rel=2e-6)
        assert mine[2] < mine[0]
        losses[varlen] = mine[0]
    assert abs(losses[True] - losses[False]) > 1e-4, "attention crossed samples in both, or in neither"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_finetune(run, ranks):
    settings = ("--only-ours", "--tokens", 64, "--varlen", "yes", "--rounds", 1, "--models", "tiny_mixtral")
    rows, _ = run("finetune", *settings, "--sequence-parallel", ranks)
    row = rows[0]
    asked = "tiny_mixtral", 64, "yes", ranks
    assert tuple(row[key] for key in ("shape", "tokens", "varlen", "sequence parallel")) == asked
    assert 1 < row["ours tokens/s a rank"] < 1e6
    assert row["ours peak MiB a rank"] < 500


def test_finetune_says_what_it_cannot(finetune, monkeypatch):
    """A step that finds no memory is answered with words, and so is every later one."""
    contestants, task = finetune

    class Large:
        def __init__(self, *_):
            self._steps = iter([1.0, 2.0])

        def step(self):
            for loss in self._steps:
                return loss
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to …")

    monkeypatch.setattr(contestants, "Theirs", Large)
    monkeypatch.setattr(contestants.resource, "setrlimit", lambda *_: None)
    here, there = contestants.multiprocessing.Pipe()
    way = contestants.Way("theirs", ours=False)
    serving = Thread(target=contestants._serve, args=(there, task("tiny_mixtral", True), way, 0, None))
    serving.start()
    answers = []
    for _ in range(3):
        here.send(None)
        assert here.poll(20), "no answer"
        answers.append(here.recv())
    here.close()
    serving.join(20)
    assert not serving.is_alive()
    assert [answer.failure for answer in answers] == [None, None, contestants.OUT_OF_MEMORY]
    figures = importlib.import_module("finetune")._figures("theirs", answers, None)
    assert figures == {"theirs tokens/s a rank": contestants.OUT_OF_MEMORY}
    assert contestants._said(ValueError("x\ny")) == "ValueError: x"


def test_collectives(run):
    rows, _ = run("collectives", "--nproc", 2, "--kib", 4)
    assert [row["collective"] for row in rows] == ["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]
    assert all(row["ms"] > 0 for row in rows)


def test_the_bare_products_are_the_layers_products(monkeypatch):
    """18·R·H·F floating-point operations, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.syspath_prepend(str(FOLDER))
    moe_layer = importlib.import_module("moe_layer")
    config = moe_layer.config_of((32, 64, 4, 2), "GShard", torch.float32)
    products = moe_layer.bare_products(config, 32, torch.device("cpu"), torch.float32)
    with FlopCounterMode(display=False) as counter:
        products()
    assert counter.get_total_flops() == 18 * 64 * 64 * config.model.ffn_width
