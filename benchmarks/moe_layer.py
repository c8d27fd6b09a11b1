"""Forward and backward of one MoE layer beside the bare matrix products of the same work.

The bare products are those of T·k rows, balanced over the experts and already sorted, into buffers
that exist: three forward and six backward per expert, nothing else. Every round has new inputs and so
a new routing. Compared are our layer with each implementation of the experts, and what is installed of
Hugging Face transformers (Mixtral, eager and grouped_mm) and DeepSpeed (capacity 1.0).

  python benchmarks/moe_layer.py --shape 2048/1024/4/2 --dtype float32 --threads 1
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from measuring import DTYPES, Bench, open_bench, options, ratio, report
from torch import nn

from portmoe.config import Config
from portmoe.config.sections.data import DataConfig
from portmoe.config.sections.experts import MoeConfig
from portmoe.families.internlm_moe.section import ModelConfig
from portmoe.model import MoELayer
from portmoe.ops import OPERATIONS, Implementation, OpTable, Segments, choose
from portmoe.ops.table import REFERENCE
from portmoe.parallel.layout import Layout
from portmoe.parallel.workload import call_sites

Call = Callable[[torch.Tensor, torch.Tensor], Any]  # forward and backward for (x_TH, grad_TH)


def shape(text: str) -> tuple[int, int, int, int]:
    """T/H/E/k."""
    tokens, hidden, experts, choices = map(int, text.split("/"))
    return tokens, hidden, experts, choices


def config_of(sizes: tuple[int, int, int, int], moe_type: str, dtype: torch.dtype) -> Config:
    """One layer on one micro-batch of these sizes."""
    tokens, hidden, experts, choices = sizes
    return Config(
        data=DataConfig(seq_len=tokens, micro_bsz=1),
        model=ModelConfig(
            hidden_size=hidden,
            num_attention_heads=hidden // 64 or 1,
            num_layers=1,
            num_experts=experts,
            moe_type=moe_type,
            dtype=str(dtype),
        ),
        moe=MoeConfig(top_k=choices, use_fused_gating=True),
    )


def bare_products(
    config: Config, tokens: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """Nothing but the products, one expert after the other."""
    experts, hidden, width = config.model.num_experts, config.model.hidden_size, config.model.ffn_width
    rows = tokens * config.moe.top_k // experts

    def stack(*sizes: int) -> torch.Tensor:
        return torch.randn(experts, *sizes, device=device, dtype=torch.float32).mul_(0.05).to(dtype)

    x, y, grad_x, grad_y = (stack(rows, hidden) for _ in range(4))
    gate, up, h, grad_h = (stack(rows, width) for _ in range(4))
    (w1, g1), (w3, g3), (w2, g2) = (
        (stack(*sizes), stack(*sizes)) for sizes in ((width, hidden), (width, hidden), (hidden, width))
    )

    def run() -> None:
        for e in range(experts):
            torch.mm(x[e], w1[e].t(), out=gate[e])
            torch.mm(x[e], w3[e].t(), out=up[e])
            torch.mm(h[e], w2[e].t(), out=y[e])
        for e in range(experts):
            torch.mm(grad_y[e], w2[e], out=grad_h[e])
            torch.mm(grad_y[e].t(), h[e], out=g2[e])
            torch.mm(gate[e].t(), x[e], out=g1[e])
            torch.mm(up[e].t(), x[e], out=g3[e])
            torch.mm(gate[e], w1[e], out=grad_x[e])
            torch.addmm(grad_x[e], up[e], w3[e], out=grad_x[e])

    return run


def our_layers(sizes: tuple[int, int, int, int], bench: Bench, dtype: torch.dtype) -> dict[str, Call]:
    """Our layer as the backend would choose it, and with each other implementation of the experts."""
    calls = {}
    for form, moe_type, op in (
        ("static", "GShard", "expert_ffn"),
        ("ragged", "MegaBlock-D", "expert_ffn_ragged"),
    ):
        config = config_of(sizes, moe_type, dtype)
        sites = call_sites(config, Layout.plan(config, 1), bench.device)
        offered = list(bench.accelerator.ops.implementations())
        table = choose(OPERATIONS, offered, sites, config)
        chosen = next(c.chosen for c in table.choices if c.op == op)
        candidates = [i for i in offered if i.op == op and i.supports(sites[op][""]) is None]
        for one in [*candidates, Implementation(op, REFERENCE, OPERATIONS[op].reference)]:
            mark = " (chosen)" if one.name == chosen else ""
            ops = table.wrapped(
                lambda name, site, function, one=one: one.function if name == one.op else function
            )
            calls[f"ours, {form}: {one.name}{mark}"] = _ours(config, ops, bench, dtype)
    return calls


def _ours(config: Config, ops: OpTable, bench: Bench, dtype: torch.dtype) -> Call:
    with bench.device:
        layer = MoELayer(config, ops=ops)
    for parameter in layer.experts.parameters():
        parameter.data = parameter.data.to(dtype)

    def call(x_TH: torch.Tensor, grad_TH: torch.Tensor) -> None:
        y_TH, routing, _ = layer.compute(x_TH, 0, Segments((0, len(x_TH))))
        torch.autograd.backward((y_TH, routing.aux_loss), (grad_TH, torch.ones_like(routing.aux_loss)))
        _forget(layer, x_TH)

    return call


def _forget(module: nn.Module, x_TH: torch.Tensor) -> None:
    x_TH.grad = None
    for parameter in module.parameters():
        parameter.grad = None


def transformers_layers(
    sizes: tuple[int, int, int, int], bench: Bench, dtype: torch.dtype
) -> dict[str, Call]:
    """Hugging Face's Mixtral layer, where transformers is installed."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return {}
    config = config_of(sizes, "GShard", dtype)
    calls = {}
    for kind in ("eager", "grouped_mm"):
        theirs = MixtralConfig(
            hidden_size=config.model.hidden_size,
            intermediate_size=config.model.ffn_width,
            num_local_experts=config.model.num_experts,
            num_experts_per_tok=config.moe.top_k,
            experts_implementation=kind,
        )
        with bench.device:
            layer = MixtralSparseMoeBlock(theirs).to(dtype).train()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)

        def call(x_TH: torch.Tensor, grad_TH: torch.Tensor, layer: nn.Module = layer) -> None:
            layer(x_TH[None]).backward(grad_TH[None])
            _forget(layer, x_TH)

        calls[f"transformers Mixtral: {kind}"] = call
    return calls


def deepspeed_layer(sizes: tuple[int, int, int, int], bench: Bench, dtype: torch.dtype) -> dict[str, Call]:
    """DeepSpeed's MoE layer with SwiGLU experts, where it can be imported."""
    os.environ.setdefault("DS_ACCELERATOR", bench.device.type)
    try:
        import deepspeed
        from deepspeed.moe.layer import MoE
    except ImportError:
        return {}
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        deepspeed.init_distributed(dist_init_required=False)
    config = config_of(sizes, "GShard", dtype)
    hidden, width = config.model.hidden_size, config.model.ffn_width

    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3 = (nn.Linear(hidden, width, bias=False) for _ in range(2))
            self.w2 = nn.Linear(width, hidden, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w2(F.silu(self.w1(x)) * self.w3(x))

    with bench.device:
        layer = MoE(
            hidden,
            Expert(),
            config.model.num_experts,
            k=config.moe.top_k,
            capacity_factor=1.0,
            min_capacity=4,
        )
        layer = layer.to(dtype).train()
        layer.deepspeed_moe.gate.wg.float()
    layer.set_deepspeed_parallelism()

    def call(x_TH: torch.Tensor, grad_TH: torch.Tensor) -> None:
        y_TH, aux_loss, _ = layer(x_TH)
        torch.autograd.backward((y_TH, aux_loss), (grad_TH, torch.ones_like(aux_loss)))
        _forget(layer, x_TH)

    return {"DeepSpeed MoE, capacity 1.0": call}


def measure(arguments: argparse.Namespace, bench: Bench, sizes: tuple[int, int, int, int]) -> list[dict]:
    """One row per case of one shape."""
    dtype = DTYPES[arguments.dtype]
    config = config_of(sizes, "GShard", dtype)
    calls = our_layers(sizes, bench, dtype)
    if not arguments.only_ours:
        calls |= transformers_layers(sizes, bench, dtype) | deepspeed_layer(sizes, bench, dtype)
    calls = {name: call for name, call in calls.items() if arguments.case in name}
    inputs: dict[str, torch.Tensor] = {}

    def renew() -> None:
        for name in ("x", "grad"):
            inputs[name] = torch.randn(sizes[:2], device=bench.device).to(dtype)
        inputs["x"].requires_grad_()

    def bound(call: Call) -> Callable[[], Any]:
        return lambda: call(inputs["x"], inputs["grad"])

    cases: dict[str, Callable[[], Any]] = {name: bound(call) for name, call in calls.items()}
    cases = {"bare products": bare_products(config, sizes[0], bench.device, dtype)} | cases
    times = bench.interleaved(cases, arguments.rounds, renew)
    rows = sizes[0] * config.moe.top_k
    flops = 18 * rows * config.model.hidden_size * config.model.ffn_width
    return [
        {
            "case": name,
            "shape T/H/E/k": "/".join(map(str, sizes)),
            "dtype": arguments.dtype,
            "ms (fastest)": min(times[name]) * 1e3,
            "ratio (median)": ratio(times[name], times["bare products"]),
            "ratio of the fastest": min(times[name]) / min(times["bare products"]),
            "TFLOP/s": flops / min(times[name]) / 1e12,
            "peak MiB": None if name == "bare products" else bench.peak_bytes(cases[name]) / 2**20,
        }
        for name in cases
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--shape", type=shape, action="append", metavar="T/H/E/K", help="may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only-ours", action="store_true", help="leave other projects' layers out")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    bench = open_bench(arguments)
    rows = []
    for sizes in arguments.shape or [(2048, 1024, 4, 2)]:
        rows += measure(arguments, bench, sizes)
    report(bench, "One MoE layer, forward and backward", rows, arguments)


if __name__ == "__main__":
    main()
