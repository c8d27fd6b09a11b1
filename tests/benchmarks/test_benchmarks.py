"""Every benchmark runs at a tiny size and writes figures that are possible."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

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
