"""A family is one folder: nothing else is edited, and its models train in every layout as in one process."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from worlds import records

import portmoe.families
from portmoe.config.read import load_config
from portmoe.costs.flops import model_flops_per_token
from portmoe.costs.parameters import count_parameters
from portmoe.data.batch import Batch
from portmoe.errors import ConfigError
from portmoe.families import registry
from portmoe.model import Decoder
from portmoe.ops import Segments

HERE = Path(__file__).parent
CONFIG = """
model_type: scratch
model: {dtype: float32}
data: {seq_len: 32, micro_bsz: 1, global_batch_size: 4, num_samples: 200, total_steps: 5}
adam: {lr: 1e-3}
"""


def load(*overrides):
    """The scratch family's config, in a process that may not have the family yet."""
    if str(HERE) not in portmoe.families.__path__:
        portmoe.families.__path__.append(str(HERE))
        registry.families.cache_clear()
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"scratch-{os.getpid()}.yaml"
    path.write_text(CONFIG)
    try:
        return load_config(path, overrides)
    finally:
        path.unlink()


def train(directory, *overrides):
    """One rank's part of a run."""
    from portmoe.training.run import train

    train(load(f"run.directory={directory}", *overrides), "scratch", "cpu", "torchrun")


@pytest.fixture(autouse=True)
def as_before():
    """Leave no other test a family that is not there."""
    before = list(portmoe.families.__path__)
    yield
    portmoe.families.__path__[:] = before
    registry.families.cache_clear()


@pytest.fixture(scope="module")
def losses(world, tmp_path_factory):
    """``losses(ranks, *overrides)``: (loss, auxiliary loss, all norms) of every step."""

    def of(ranks, *overrides):
        directory = tmp_path_factory.mktemp("scratch") / "run"
        world(ranks).call(train, directory, *overrides)
        names = ("loss", "moe_loss", "grad_norm/default", "grad_norm/fp32", "grad_norm/experts")
        return [[record[name] for name in names] for record in records(directory)]

    return of


@pytest.fixture(scope="module")
def alone(losses):
    return losses(1)


LAYOUTS = {
    "dp2": (2, ["parallel.expert.size=1"]),
    "ep2": (2, []),
    "mtp2": (2, ["parallel.tensor.size=2"]),
    "msp2": (2, ["parallel.tensor.size=2", "parallel.tensor.mode=msp"]),
    "isp2": (2, ["parallel.tensor.size=2", "parallel.tensor.mode=isp"]),
    "msp4 over 2 key heads": (4, ["parallel.tensor.size=4", "parallel.tensor.mode=msp"]),
    "isp4 over 2 key heads": (4, ["parallel.tensor.size=4", "parallel.tensor.mode=isp"]),
    "pp2": (2, ["parallel.pipeline.size=2"]),
    "fsdp2": (2, ["parallel.zero1.fsdp=true"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_of_one_process(layout, losses, alone):
    ranks, overrides = LAYOUTS[layout]
    found = losses(ranks, *overrides)
    assert len(found) == len(alone) == 5
    for ours, expected in zip(found, alone, strict=True):
        assert ours == pytest.approx(expected, rel=1e-6)


def oracle(model, config, batch):
    """The loss of a batch in float64, written from the formulas, with room for every choice of an expert."""
    p = {name: value.detach().double() for name, value in model.named_parameters()}
    sizes, tokens = config.model, len(batch.tokens_T)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def network(x, w1, w3, w2):
        gate = x @ w1.T
        return (gate / (1 + (-gate).exp()) * (x @ w3.T)) @ w2.T

    def turned(x):  # interleaved pairs
        frequency = 5000.0 ** (-torch.arange(sizes.head // 2, dtype=torch.float64) / (sizes.head // 2))
        angle = batch.positions_T.double()[:, None] * frequency
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    x = p["embedding.weight"][batch.tokens_T]
    for layer in range(sizes.depth):
        q = {name.removeprefix(f"layers.{layer}."): value for name, value in p.items()}
        h = norm(x, q["attention_norm.weight"])
        group = sizes.queries // sizes.keys
        qkv = (h @ q["attention.qkv.weight"].T).view(tokens, sizes.keys, -1)
        outputs = []
        for head in range(sizes.queries):
            own = qkv[:, head // group]
            start = head % group * sizes.head
            query = turned(own[:, None, start : start + sizes.head])[:, 0]
            key = turned(own[:, None, group * sizes.head : (group + 1) * sizes.head])[:, 0]
            scores = query @ key.T / math.sqrt(sizes.head)
            scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
            outputs.append(scores.softmax(-1) @ own[:, (group + 1) * sizes.head :])
        y = torch.cat(outputs, -1) @ q["attention.out.weight"].T
        x = x + y + q["attention.out.bias"]
        h = norm(x, q["feed_forward_norm.weight"])
        if layer == 0:
            x = x + network(h, *(q[f"feed_forward.{w}.weight"] for w in ("w1", "w3", "w2")))
            continue
        share = (h @ q["moe.router.weight"].T).softmax(-1)
        weight, expert = share.topk(sizes.chosen)
        y = network(h, *(q[f"moe.shared.{w}.weight"] for w in ("w1", "w3", "w2")))
        for token in range(tokens):
            for part, e in zip(weight[token] / weight[token].sum(), expert[token], strict=True):
                own = (q[f"moe.experts.{w}"][e] for w in ("w1", "w3", "w2"))
                y[token] += part * network(h[token], *own)
        x = x + y
    logits = norm(x, p["norm.weight"]) @ p["head.weight"].T
    return torch.nn.functional.cross_entropy(logits, batch.labels_T, reduction="none")


def test_the_formulas_in_float64():
    config = load("model.experts=3")
    model = Decoder(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    tokens_T = torch.randint(1, 448, (12,), generator=torch.Generator().manual_seed(0))
    zeros_T = torch.zeros_like(tokens_T)
    batch = Batch(tokens_T, tokens_T.roll(-1), torch.arange(12), zeros_T, Segments((0, 12)), 0)
    with torch.no_grad():
        loss_T = model(tokens_T, batch).loss_T
        assert loss_T.double() == pytest.approx(oracle(model, config, batch), rel=1e-5)


def test_parameters_and_flops_by_hand():
    config = load()
    attention = 32 * 2 * (2 * 12 + 12 + 10) + 4 * 10 * 32
    network, shared = 3 * 32 * 24, 3 * 32 * 16
    moe, dense, router = 4 * network + shared, 3 * 32 * 40, 4 * 32
    norms, bias, vocabulary = 2 * 32, 32, 448 * 32
    total = 3 * (attention + bias + norms) + dense + 2 * (moe + router) + 2 * vocabulary + 32
    count = count_parameters(config)
    assert (count.total, count.experts, count.router) == (total, 8 * network, 2 * router)
    assert count.active == total - 4 * network
    scores = 2 * 32 * 4 * (12 + 10)  # s · N · (D + Dv), twice
    forward = 3 * (2 * attention + scores) + 2 * (dense + 2 * (2 * network + shared + router) + vocabulary)
    assert model_flops_per_token(config) == pytest.approx(3 * forward)


def test_messages_name_the_familys_keys():
    with pytest.raises(ConfigError, match=r"model\.chosen=5 must be at most model\.experts=4"):
        load("model.chosen=5")
    with pytest.raises(ConfigError, match=r"model\.keys=4 must be a multiple of parallel\.tensor\.size=6"):
        load("parallel.tensor.size=6", "model.queries=12", "model.keys=4")
    with pytest.raises(ConfigError, match=r"model\.quereis: unknown key; did you mean model\.queries\?"):
        load("model.quereis=8")
    with pytest.raises(ConfigError, match=r"model\.hidden_size: unknown key"):
        load("model.hidden_size=8")
    with pytest.raises(ConfigError, match=r"model_type = 'scratsh': must be one of .*'scratch'"):
        load("model_type=scratsh")


def test_a_folder_among_the_families_is_all_the_command_and_its_ranks_need(tmp_path, alone):
    root = Path(portmoe.__file__).parent
    package = tmp_path / "portmoe"
    shutil.copytree(root, package, ignore=shutil.ignore_patterns("__pycache__"))
    for room in ("backends", "cli", "configs"):
        if not (package / room).exists():
            shutil.copytree(root.parent / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(HERE / "scratch", package / "families" / "scratch")
    (tmp_path / "scratch.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "portmoe", "train", "--backend", "cpu", "--nproc", "2", "--config"]
    command += ["scratch.yaml", "--set", "run.directory=run", "--set", "parallel.tensor.size=2"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["loss"] for record in records(tmp_path / "run")] == pytest.approx(
        [step[0] for step in alone], rel=1e-6
    )
