"""The dry run: the benchmark's figures, and no allocation of the model."""

import re
import subprocess
import sys
import time

import pytest
import torch

import portmoe
from portmoe.cli import main as command
from portmoe.costs.memory import activation_bytes
from portmoe.parallel.layout import Layout
from portmoe.parallel.workload import share_of
from portmoe.planning.dry_run import _activations

MEASURED = """
import resource, sys
from portmoe.cli.main import run
code = run(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print("USED", used.ru_maxrss, used.ru_utime + used.ru_stime)
sys.exit(code)
"""


def shown(capsys, *arguments):
    assert command.run(["train", "--dry-run", *arguments]) == 0
    return capsys.readouterr().out


def test_7b_within_its_time_and_memory():
    arguments = ["train", "--dry-run", "--config", "7b_moe4", "--world-size", "32"]
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    kib, seconds = result.stdout.rpartition("USED")[2].split()
    assert int(kib) < 2 * 1024 * 1024
    assert float(seconds) < 30  # of a core: other tests may have it in between
    assert "Warning" not in result.stderr


def test_epochs_are_told_in_steps_where_the_data_is_here(capsys, tmp_path):
    """400 dummy samples of a row each, 8 a step: 50 steps an epoch. Data that is not here is not needed."""
    epochs = ["--set", "data.total_steps=null", "--set", "data.num_epochs=2"]
    arguments = ["--config", "tiny_mixtral", "--set", "data.num_samples=400", *epochs]
    text = shown(capsys, *arguments)
    assert (
        "400 samples, 102,400 tokens in 400 rows of 256, 100.0% full; 50 steps an epoch, 100 in all" in text
    )
    text = shown(capsys, *arguments, "--set", f"data.train_folder={tmp_path / 'elsewhere'}")
    assert "data             cannot be looked at: data.train_folder=" in text
    refused = ["train", "--dry-run", *arguments, "--set", "data.total_steps=7"]
    assert command.run(refused) == 2
    assert "data.num_epochs=2 makes 100 steps of this data, and data.total_steps=7" in capsys.readouterr().err
    few = shown(capsys, *arguments, "--set", "data.num_epochs=1")
    assert "50 steps an epoch, 50 in all" in few
    assert "acceptance: cannot be reached in 50 steps" in few


def test_the_figures_of_7b(capsys):
    text = shown(capsys, "--config", "7b_moe4", "--world-size", "32")
    for figure in (
        "11,852,320,768 in all, 7,423,135,744 active",
        "512 sequences = 2 data.micro_bsz · 8 micro_num · 32 data-parallel ranks; 1,048,576 tokens",
        "data.max_global_batch_size 512 allows at most 32 ranks",
        "benchmark: 31.53 GFLOP",
        "model: 45.2",
        "model, causal: 43.6",
        # by hand: of 11,852,320,768 parameters 8,858,370,048 are the experts', a quarter of them here:
        # 2 bytes · (5,208,543,232 − 32·4·4096 router weights) + 4 bytes · those = 9.70 GiB
        "weights 9.70 GiB (bfloat16) + 1.38 GiB (1/32 of the float32 masters)",
        "gradients 19.40 GiB",  # 4 bytes · 5,208,543,232
        "optimizer 2.76 GiB",  # 8 bytes · 11,852,320,768 / 32
    ):
        assert figure in text


def test_the_optimizer_state_follows_zero1(capsys):
    eight = ("--world-size", "8", "--set", "parallel.expert.size=1")
    whole = shown(capsys, "--config", "7b_moe4", *eight, "--set", "parallel.zero1.size=1")
    subsets = shown(capsys, "--config", "7b_moe4", *eight, "--set", "parallel.zero1.size=4")
    assert "optimizer 88.31 GiB (all Adam moments" in whole  # 8 bytes · 11,852,320,768
    assert "optimizer 22.08 GiB (1/4 of the Adam moments" in subsets


def test_experts_spread_over_two_ranks_have_a_share_of_their_own(capsys):
    """4 ranks in subsets of 2; each of the two groups of experts lies on 2 ranks, over which it is cut."""
    keys = ("parallel.expert.size=2", "parallel.zero1.size=2")
    text = shown(capsys, "--world-size", "4", *(part for key in keys for part in ("--set", key)))
    assert "(1/2 of the dense and 1/4 of the experts' float32 masters)" in text


def test_the_parts_of_the_memory_add_up(capsys):
    text = shown(capsys, "--config", "7b_moe4", "--world-size", "32")
    sizes = [float(size) for size in re.findall(r"([\d.]+) GiB", text.partition("communication")[0])]
    assert len(sizes) == 6
    assert sum(sizes[:5]) == pytest.approx(sizes[5], abs=0.03)


def test_a_world_of_1024_ranks_with_a_pipeline(capsys):
    began = time.perf_counter()
    keys = ("data.max_global_batch_size=4096", "parallel.pipeline.size=4", "parallel.zero1.size=32")
    settings = [part for key in keys for part in ("--set", key)]
    text = shown(capsys, "--config", "7b_moe4", "--world-size", "1024", *settings)
    assert time.perf_counter() - began < 120
    # by hand: the first of 4 stages has 8 layers and the embedding: 959,774,720 parameters, and 2,214,592,512
    # of experts, spread over 4 of the 256 data-parallel ranks, and each over 32 of 64 again
    for figure in (
        "1F1B; bubble 27.3% of a step; layers 0–7 | 8–15 | 16–24 | 25–31",  # 3 / (8 + 3)
        "weights 2.82 GiB (bfloat16) + 180.41 MiB (1/32 of the dense and 1/128 of the experts' float32",
        "of rank 0 in a training step",
        "all-gather over shard, 32 ranks: 17 calls, 1.79 GiB",  # 8 blocks, 8 routers, the embedding
        "reduce-scatter over shard, 32 ranks: 17 calls, 3.58 GiB",
        "all-reduce over replicate, 8 ranks: 17 calls, 114.41 MiB",
        "all-gather over expert_shard, 32 ranks: 8 calls, 1.03 GiB",
        "reduce-scatter over expert_shard, 32 ranks: 8 calls, 2.06 GiB",
        "all-reduce over expert_replicate, 2 ranks: 8 calls, 66.00 MiB",
        "all-to-all over expert, 4 ranks: 256 calls, 16.00 GiB",  # 4 · 8 · 8 · (4 · 2048 · 4096 · 2 bytes)
        "send over pipeline, 4 ranks: 16 calls, 256.00 MiB",  # 8 · (4096 · 4096 · 2 bytes and one float)
    ):
        assert figure in text


def test_a_rank_of_its_own_holds_the_activations_of_the_whole_model_once(capsys):
    """The estimate of the whole model is held against what a process keeps in ``costs/test_memory.py``."""
    config = portmoe.load_config("7b_moe4")
    share = share_of(config, Layout.plan(config, 1), torch.device("meta"))
    whole = activation_bytes(config, share)
    shown_as = re.search(r"activations ([\d.]+) GiB", shown(capsys, "--config", "7b_moe4"))[1]
    assert float(shown_as) == pytest.approx(whole / 2**30, abs=0.005)


def test_recomputing_saves_activations(capsys):
    def activations(*overrides):
        text = shown(capsys, "--config", "7b_moe4", *overrides)
        return float(re.search(r"activations ([\d.]+) GiB", text)[1])

    assert activations("--set", "model.checkpoint=true") < activations("--set", "model.checkpoint=0.5")
    assert activations("--set", "model.checkpoint=0.5") < activations()


def test_a_recomputed_layer_is_there_once_however_many_micro_batches_are_under_way(capsys):
    """Of 4 stages the first holds the inputs of its 8 layers for 4 micro-batches, 32 MiB each."""

    def activations(*overrides):
        keys = ("model.checkpoint=true", "data.global_batch_size=512", *overrides)
        settings = [part for key in keys for part in ("--set", key)]
        text = shown(capsys, "--config", "7b_moe4", "--world-size", "4", *settings)
        return float(re.search(r"activations ([\d.]+) GiB", text)[1])

    # alone: the inputs of 32 layers, the head, and the layer at work
    config = portmoe.load_config("7b_moe4")
    share = share_of(config, Layout.plan(config, 1), torch.device("meta"))
    head = activation_bytes(config, share, layers=()) / 2**30
    layer = activations() - 1 - head
    assert activations("parallel.pipeline.size=4") == pytest.approx(1 + layer, abs=0.02)


def test_inputs_in_host_memory(capsys):
    keys = ("--set", "model.checkpoint=0.5", "--set", "model.checkpoint_offload=true")
    text = shown(capsys, "--config", "7b_moe4", *keys)
    assert "saves nothing on cpu, whose memory is the host's" in text
    assert "in host memory" not in text
    assert "no layer is recomputed" in shown(capsys, "--config", "7b_moe4", *keys[2:])
    # by hand, for a device of its own: 16 inputs of 2 · 2048 tokens · 4096 · 2 bytes
    config = portmoe.load_config("7b_moe4", keys[1::2])
    layout = Layout.plan(config, 1)
    (kept, _), (left, moved) = (_activations(config, layout, moves) for moves in (False, True))
    assert moved == kept - left == 16 * 2 * 2048 * 4096 * 2


def test_the_chosen_operations_and_why_not_the_preferred_one(capsys):
    preferred = re.search(r"attention\.(compiled|sdpa)", shown(capsys))[1]
    text = shown(capsys, "--set", f"ops.disable=[attention.{preferred}]")
    assert re.search(rf"attention\.\w+; not {preferred}: switched off by ops.disable", text)


def test_measuring_is_left_to_training(capsys):
    assert "training may choose others" in shown(capsys, "--set", "ops.select=measure")


def test_a_missing_kind_of_operation_can_be_an_error(capsys):
    refused = ["train", "--dry-run", "--set", "ops.fallback=error", "--set", "moe.use_tutel=true"]
    assert command.run(refused) == 3
    assert "moe.use_" in capsys.readouterr().err
