"""What `portmoe train --profile` leaves and says, on work whose parts are known."""

import gzip
import json

import pytest
import torch
from run_portmoe import arguments, environment
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from zygote import portmoe

from portmoe.config import Config
from portmoe.costs.step_cost import Cost, step_cost
from portmoe.data import Batch
from portmoe.model.decoder import Decoder
from portmoe.model.share import Share
from portmoe.ops import Segments
from portmoe.profiling.attribution import Usage, attribute
from portmoe.profiling.profile import table
from portmoe.profiling.spans import span


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("profiled") / "run"
    line = [*arguments(directory, data__total_steps=4, model__checkpoint=0.5), "--profile"]
    done = portmoe(line, environment())
    assert done.returncode == 0, done.stdout
    return directory, done.stdout


def rows_of(printed):
    """The table's rows: part → the cells after it."""
    lines = printed.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("part "))
    end = next(n for n, line in enumerate(lines) if n > start and line.startswith("trace: "))
    return {line[:15].strip(): line[15:].split() for line in lines[start + 1 : end]}


def test_every_part_of_the_step_is_in_the_table(profiled):
    rows = rows_of(profiled[1])
    parts = ["embedding", "norms", "attention", "router", "dispatch", "experts", "combine"]
    assert list(rows) == [*parts, "loss", "optimizer", "communication", "waiting", "other", "step"]
    milliseconds = {part: float(cells[0]) for part, cells in rows.items()}
    assert sum(milliseconds.values()) - milliseconds["step"] == pytest.approx(milliseconds["step"], abs=0.1)
    # What belongs to a part in the backward pass is found there: all but the optimizer have both.
    for part in (*parts, "loss"):
        assert min(float(rows[part][2]), float(rows[part][3])) > 0, part
    assert float(rows["optimizer"][3]) == 0
    assert milliseconds["other"] < 0.5 * milliseconds["step"]


def test_the_trace_holds_the_profiled_steps(profiled):
    (file,) = (profiled[0] / "profile").iterdir()
    with gzip.open(file, "rt") as trace:
        names = [event.get("name") for event in json.load(trace)["traceEvents"]]
    # 4 steps, the first two skipped, and in each 4 micro-batches; half the 2 layers are computed again.
    assert names.count("portmoe::optimizer") == 2
    assert names.count("portmoe::loss") == 2 * 4
    assert names.count("portmoe::experts") == 2 * 4 * 3


def test_backward_nodes_belong_where_their_forward_does():
    w = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(64, 64, requires_grad=True)
    sizes = {"one": 3, "recomputed": 2}

    def products(t, part):
        with span(part):
            for _ in range(sizes[part]):
                t = t @ w
        return t

    with profile(profile_memory=True) as profiler:
        y = products(x, "one") + 1.0
        z = checkpoint(lambda t: products(t, "recomputed"), y, use_reentrant=False)
        z.sum().backward()
    usages = attribute(profiler.events(), on_host=True)
    matrix = 64 * 64 * 4
    # forward: each product's result; backward: two products each, and what is recomputed
    assert usages["one"].allocated >= (3 + 2 * 3) * matrix
    assert usages["recomputed"].allocated >= (2 + 1 + 2 * 2) * matrix  # the last result is not needed again
    assert usages["one"].kept == 3 * matrix  # two kept for the backward pass and the result
    assert usages["recomputed"].kept == matrix  # nothing but the result
    assert min(usages["one"].backward, usages["recomputed"].backward) > 0


def test_the_table_compares_with_the_ceiling():
    usages = {"experts": Usage(forward=0.1, backward=0.3, allocated=2**21, kept=2**20), "odd": Usage(0.1)}
    printed = table(usages, 1.0, 2, {"experts": Cost(1e9, 5e8)}, (1e10, 1e10))
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[2:]}
    # 0.4 s in two steps; 1e9 FLOPs at 1e10 a second and 5e8 bytes at 1e10 are 150 ms of each 200
    assert rows["experts"] == ["200.00", "40.0%", "50.00", "150.00", "150.00", "75%", "1.0", "0.5"]
    assert rows["waiting"][:2] == ["250.00", "50.0%"]
    assert rows["odd"][4:6] == ["–", "–"]


@pytest.mark.parametrize("dense", [0, 1])
def test_the_least_products_are_those_the_model_computes(dense):
    """Counted by torch on a plain decoder, whose attention computes masked scores too."""
    config = Config.model_validate(
        {
            "data": {"seq_len": 16, "micro_bsz": 2, "micro_num": 1, "fixed_random_dataset_seqlen": True},
            "model": {
                "hidden_size": 64,
                "num_attention_heads": 2,
                "num_layers": 2,
                "vocab_size": 224,
                "multiple_of": 16,
                "first_k_dense_replace": dense,
            },
            "moe": {"top_k": 2, "capacity_factor": 1.0},
        }
    )
    tokens_T = torch.arange(32)
    segments = Segments((0, 16, 32))
    batch = Batch(tokens_T, tokens_T, tokens_T % 16, torch.zeros_like(tokens_T), segments, 0)
    decoder = Decoder(config)
    with FlopCounterMode(display=False) as counter:
        output = decoder(batch.tokens_T, batch)
        (output.loss_T.sum() + output.aux_loss).backward()
    share = Share(torch.device("cpu"), torch.float32, tokens=32, seq_len=16, attended=8)
    costs = step_cost([decoder], share, micro_batches=1, parameters=10)
    masked = 2 * 3 * 4 * 64 * (32 * 32 - 32 * 8)  # pairs of tokens: all, without the two causal halves
    assert sum(cost.flops for cost in costs.values()) + masked == counter.get_total_flops()
    assert costs["optimizer"] == Cost(0, 320)
