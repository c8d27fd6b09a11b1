"""A whole training step beside Hugging Face's Mixtral (grouped_mm, fused AdamW) of the same shape.

Ours is the native engine as ``portmoe train`` runs it, on one rank: forward, backward, gradient norms,
clipping, AdamW, metrics. Without transformers only ours is timed.

  python benchmarks/train_step.py --threads 1
"""

import argparse
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from measuring import Bench, open_bench, options, ratio, report

from portmoe.config import Config
from portmoe.data.batch import Batch
from portmoe.ops import OPERATIONS, Segments, choose
from portmoe.parallel.layout import Layout
from portmoe.parallel.mesh import build_meshes
from portmoe.parallel.workload import workload_of
from portmoe.training.engine import NativeEngine

Step = Callable[[torch.Tensor], None]  # one step on tokens [sequences, length]


def config_of(arguments: argparse.Namespace) -> Config:
    return Config.model_validate(
        {
            "data": {
                "seq_len": arguments.seq_len,
                "micro_bsz": arguments.sequences,
                "micro_num": 1,
                "total_steps": 10_000,
            },
            "model": {
                "dtype": arguments.dtype,
                "hidden_size": arguments.hidden,
                "num_attention_heads": arguments.hidden // 64 or 1,
                "num_layers": arguments.layers,
                "vocab_size": arguments.vocab,
                "num_experts": arguments.experts,
            },
            "moe": {"top_k": arguments.top_k},
        }
    )


def our_step(config: Config, bench: Bench) -> Step:
    layout = Layout.plan(config, 1)
    store, device = dist.HashStore(), bench.device
    bench.accelerator.collectives.init(device, 0, 1, timedelta(minutes=2), store)
    workload = workload_of(config, layout, device)
    ops = choose(OPERATIONS, bench.accelerator.ops.implementations(), workload, config)
    meshes = build_meshes(layout, device.type)
    engine = NativeEngine(config, layout, ops, meshes, device, dist.new_group(backend="gloo"))
    length = config.data.seq_len
    positions_T = torch.arange(length).repeat(config.data.micro_bsz)
    segments = Segments(tuple(range(0, positions_T.numel() + 1, length)))
    numbers = iter(range(1_000_000))

    def step(tokens_BL: torch.Tensor) -> None:
        labels_BL = tokens_BL.roll(-1, dims=1)
        labels_BL[:, -1] = -100
        tokens_T, labels_T = tokens_BL.flatten(), labels_BL.flatten()
        number = next(numbers)
        batch = Batch(tokens_T, labels_T, positions_T, torch.zeros_like(tokens_T), segments, number)
        outcome = engine.train_step(number, [batch])
        outcome.metrics.reduce(False, dist.group.WORLD, layout)

    return step


def their_step(config: Config, bench: Bench, dtype: torch.dtype) -> Step | None:
    """None where transformers is not installed."""
    try:
        from transformers import MixtralConfig, MixtralForCausalLM
    except ImportError:
        return None
    model_config, adam = config.model, config.adam
    theirs = MixtralConfig(
        vocab_size=model_config.vocab_size,
        hidden_size=model_config.hidden_size,
        intermediate_size=model_config.ffn_width,
        num_hidden_layers=model_config.num_layers,
        num_attention_heads=model_config.num_attention_heads,
        num_key_value_heads=model_config.num_attention_heads,
        num_local_experts=model_config.num_experts,
        num_experts_per_tok=config.moe.top_k,
        use_cache=False,
        experts_implementation="grouped_mm",
    )
    with bench.device:
        model = MixtralForCausalLM(theirs).to(dtype).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=adam.lr, betas=(adam.adam_beta1, adam.adam_beta2), fused=True
    )

    def step(tokens_BL: torch.Tensor) -> None:
        model(input_ids=tokens_BL, labels=tokens_BL).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    for name, default in (("layers", 4), ("hidden", 512), ("vocab", 4096), ("experts", 4), ("top-k", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2, help="of a micro-batch")
    arguments = parser.parse_args()
    bench = open_bench(arguments)
    config = config_of(arguments)
    steps = {"portmoe": our_step(config, bench)}
    if theirs := their_step(config, bench, getattr(torch, arguments.dtype)):
        steps["transformers Mixtral, grouped_mm"] = theirs
    tokens_BL = torch.empty(arguments.sequences, arguments.seq_len, dtype=torch.int64, device=bench.device)
    cases = {name: lambda step=step: step(tokens_BL) for name, step in steps.items()}
    times = bench.interleaved(cases, arguments.rounds, lambda: tokens_BL.random_(arguments.vocab))
    rows = [
        {
            "case": name,
            "dtype": arguments.dtype,
            "ms (fastest)": min(of_case) * 1e3,
            "tokens/s": tokens_BL.numel() / min(of_case),
            "speed over ours (median)": 1 / ratio(of_case, times["portmoe"]),
            "peak MiB": bench.peak_bytes(cases[name]) / 2**20,
        }
        for name, of_case in times.items()
    ]
    report(bench, "One training step", rows, arguments)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
