"""A whole training step beside Hugging Face's Mixtral (grouped_mm, fused AdamW) of the same shape.

Ours is the native engine as ``portmoe train`` runs it, on one rank: forward, backward, gradient norms,
clipping, AdamW, metrics. Without transformers only ours is timed.

Beside the times, both train from the same weights on the same tokens for 20 steps, ours with a capacity
that drops nothing, and the losses are printed: they are the same model. In 16-bit types theirs keeps float32
weights for this, by autocast: weights in bfloat16 lose most updates.

  python benchmarks/train_step.py --threads 1
"""

import argparse
import importlib.util
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from measuring import Bench, open_bench, options, ratio, report
from torch import nn

from portmoe.config import Config
from portmoe.data.batch import Batch
from portmoe.model.precision import local_tensor
from portmoe.ops import OPERATIONS, Segments, choose
from portmoe.parallel.layout import Layout
from portmoe.parallel.mesh import build_meshes
from portmoe.parallel.workload import call_sites
from portmoe.training.engine import NativeEngine
from portmoe.training.schedule import learning_rate

STEPS = 20  # of the comparison of losses
Step = Callable[[torch.Tensor], float]  # one step on tokens [sequences, length]


def config_of(arguments: argparse.Namespace, capacity_factor: float = 1.0) -> Config:
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
            "moe": {
                "top_k": arguments.top_k,
                "capacity_factor": capacity_factor,
                "use_fused_gating": True,  # no noise: theirs has none
            },
            "loss": {"moe_loss_coeff": 0.0 if capacity_factor > 1 else 0.1},
        }
    )


class Ours:
    """The native engine on one rank."""

    def __init__(self, config: Config, bench: Bench) -> None:
        layout, device = Layout.plan(config, 1), bench.device
        sites = call_sites(config, layout, device)
        ops = choose(OPERATIONS, bench.accelerator.ops.implementations(), sites, config)
        meshes = build_meshes(layout, device.type)
        self.engine = NativeEngine(config, layout, ops, meshes, device, dist.new_group(backend="gloo"))
        self._layout = layout
        length = config.data.seq_len
        self._positions_T = torch.arange(length).repeat(config.data.micro_bsz)
        self._segments = Segments(tuple(range(0, self._positions_T.numel() + 1, length)))
        self._numbers = iter(range(1_000_000))

    def step(self, tokens_BL: torch.Tensor) -> float:
        """One step; its loss."""
        labels_BL = tokens_BL.roll(-1, dims=1)
        labels_BL[:, -1] = -100
        tokens_T, labels_T = tokens_BL.flatten(), labels_BL.flatten()
        number, types_T = next(self._numbers), torch.zeros_like(tokens_T)
        batch = Batch(tokens_T, labels_T, self._positions_T, types_T, self._segments, number)
        outcome = self.engine.train_step(number, [batch])
        return outcome.metrics.reduce(False, dist.group.WORLD, self._layout).loss

    @torch.no_grad()
    def take_weights(self, theirs: nn.Module) -> None:
        """Copy the weights of a Mixtral of the same shape."""
        named = dict(theirs.named_parameters())
        for name, parameter in self.engine.optimizer.parameters.items():
            local_tensor(parameter.detach()).copy_(_their_weight(name, named))


def _their_weight(name: str, theirs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What our parameter ``name`` is in Mixtral."""
    ends = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    if name in ends:
        return theirs[ends[name]]
    _, layer, rest = name.split(".", 2)
    block = {
        key.removeprefix(f"model.layers.{layer}."): value
        for key, value in theirs.items()
        if key.startswith(f"model.layers.{layer}.")
    }
    if rest == "attention.qkv.bias":  # zeros like all of them
        return block["self_attn.q_proj.bias"].repeat(3)
    if rest == "attention.qkv.weight":
        parts = [block[f"self_attn.{part}_proj.weight"] for part in "qkv"]
        head_dim = parts[0].shape[0] // (parts[0].shape[1] // 64 or 1)
        return torch.stack([part.unflatten(0, (-1, head_dim)) for part in parts], 1).flatten(0, 2)
    if rest in ("moe.experts.w1", "moe.experts.w3"):
        return block["mlp.experts.gate_up_proj"].chunk(2, dim=1)[rest.endswith("w3")]
    return block[
        {
            "attention_norm.weight": "input_layernorm.weight",
            "attention.out.weight": "self_attn.o_proj.weight",
            "attention.out.bias": "self_attn.o_proj.bias",
            "feed_forward_norm.weight": "post_attention_layernorm.weight",
            "moe.router.weight": "mlp.gate.weight",
            "moe.experts.w2": "mlp.experts.down_proj",
        }[rest]
    ]


class Theirs:
    """Mixtral in the trained type, with torch's fused AdamW.

    Args:
        biases: add those our projections have and theirs have not, as zeros.
        autocast: the type of products, where it is not that of the weights.
    """

    def __init__(
        self,
        config: Config,
        bench: Bench,
        dtype: torch.dtype,
        biases: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        from transformers import MixtralConfig, MixtralForCausalLM

        model_config = config.model
        theirs = MixtralConfig(
            vocab_size=model_config.vocab_size,
            hidden_size=model_config.hidden_size,
            intermediate_size=model_config.ffn_width,
            num_hidden_layers=model_config.num_layers,
            num_attention_heads=model_config.num_attention_heads,
            num_key_value_heads=model_config.num_attention_heads,
            num_local_experts=model_config.num_experts,
            num_experts_per_tok=config.moe.top_k,
            rms_norm_eps=model_config.layer_norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": model_config.rope_base},
            use_cache=False,
            experts_implementation="grouped_mm",
        )
        with bench.device:
            self.model = MixtralForCausalLM(theirs).to(dtype).train()
        if biases:
            for block in self.model.model.layers:
                for part in "qkvo":
                    linear = getattr(block.self_attn, f"{part}_proj")
                    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
        self._config = config
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            betas=(config.adam.adam_beta1, config.adam.adam_beta2),
            weight_decay=config.adam.weight_decay,
            fused=True,
        )
        self._numbers = iter(range(1_000_000))
        self._autocast = torch.autocast(bench.device.type, autocast, enabled=autocast is not None)

    def step(self, tokens_BL: torch.Tensor) -> float:
        """One step at our learning rate; its loss."""
        with self._autocast:
            loss = self.model(input_ids=tokens_BL, labels=tokens_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self._config.hybrid_zero_optimizer.clip_grad_norm
        )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._config, next(self._numbers))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item()


def compare_losses(arguments: argparse.Namespace, bench: Bench) -> list[dict]:
    """The losses of both from the same weights, on four micro-batches again and again."""
    config = config_of(arguments, capacity_factor=arguments.experts / arguments.top_k)
    generator = torch.Generator().manual_seed(0)
    shape = (4, arguments.sequences, arguments.seq_len)
    batches = torch.randint(arguments.vocab, shape, generator=generator).to(bench.device)
    torch.manual_seed(0)
    narrow = None if arguments.dtype == "float32" else getattr(torch, arguments.dtype)
    ours = Ours(config, bench)
    theirs = Theirs(config, bench, torch.float32, biases=True, autocast=narrow)
    ours.take_weights(theirs.model)
    rows = []
    for step in range(STEPS):
        pair = [side.step(batches[step % 4].clone()) for side in (ours, theirs)]
        rows.append({"step": step, "portmoe": pair[0], "Mixtral": pair[1], "difference": pair[0] - pair[1]})
    return rows


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
    store = dist.HashStore()
    bench.accelerator.collectives.init(bench.device, 0, 1, timedelta(minutes=2), store)
    steps: dict[str, Step] = {"portmoe": Ours(config, bench).step}
    if has_transformers := importlib.util.find_spec("transformers") is not None:
        theirs = Theirs(config, bench, getattr(torch, arguments.dtype))
        steps["transformers Mixtral, grouped_mm"] = theirs.step
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
    if has_transformers:
        arguments.json = arguments.json and arguments.json.with_suffix(".losses.json")
        rows = compare_losses(arguments, bench)
        report(bench, "Losses from the same weights on the same tokens", [*rows[:2], *rows[-3:]], arguments)
        largest = max(abs(row["difference"]) for row in rows)
        print(f"largest difference in {STEPS} steps: {largest:.2g}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
