"""Contradictions between sections of a config that hold for any number of ranks."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portmoe.config import Config


def contradictions(config: "Config") -> Iterator[str]:
    """One message per contradiction, naming the keys, their values and what to change."""
    yield from _of_the_model(config)
    yield from _of_the_parallel_sizes(config)
    yield from _of_the_engine(config)


def _of_the_model(config: "Config") -> Iterator[str]:
    model, moe = config.model, config.moe
    if model.num_experts > 1 and moe.top_k > model.num_experts:
        yield (
            f"moe.top_k={moe.top_k} must be at most model.num_experts={model.num_experts}; "
            "change one of the two"
        )
    if moe.noisy_gate_policy and model.moe_type != "GShard":
        yield (
            f"moe.noisy_gate_policy={moe.noisy_gate_policy!r} acts with model.moe_type='GShard' only, "
            f"and model.moe_type={model.moe_type!r}; set moe.noisy_gate_policy to null"
        )
    if config.adam.lr < config.lr_scheduler.eta_min:
        yield (
            f"lr_scheduler.eta_min={config.lr_scheduler.eta_min:g} must be at most "
            f"adam.lr={config.adam.lr:g}; change one of the two"
        )
    token = config.data.largest_token()
    if token is not None and token >= model.vocab_size:
        yield (
            f"model.vocab_size={model.vocab_size} is too small: with data.seq_len={config.data.seq_len} "
            f"the dummy data holds tokens up to {token}; set model.vocab_size to {token + 1} or more"
        )


def _of_the_parallel_sizes(config: "Config") -> Iterator[str]:
    """Sizes that contradict each other for any number of ranks."""
    model, parallel = config.model, config.parallel
    tensor, pipeline, experts = parallel.tensor.size, parallel.pipeline.size, parallel.expert.size
    if model.num_attention_heads % tensor:
        yield (
            f"model.num_attention_heads={model.num_attention_heads} must be a multiple of "
            f"parallel.tensor.size={tensor}; change one of the two"
        )
    if parallel.tensor.mode != "mtp" and config.data.micro_bsz * config.data.seq_len % tensor:
        yield (
            f"data.micro_bsz={config.data.micro_bsz} · data.seq_len={config.data.seq_len} must be a multiple "
            f"of parallel.tensor.size={tensor}, which splits the sequence; change one of the three"
        )
    if model.num_chunks > 1 and pipeline == 1:
        yield (
            f"model.num_chunks={model.num_chunks} needs parallel.pipeline.size of 2 or more, and it is "
            "1; set model.num_chunks to 1"
        )
    if model.num_layers < pipeline * model.num_chunks:
        yield (
            f"model.num_layers={model.num_layers} is fewer than the stages, parallel.pipeline.size="
            f"{pipeline} · model.num_chunks={model.num_chunks}; change one of the three"
        )
    if experts is not None and model.num_experts % experts:
        yield (
            f"model.num_experts={model.num_experts} must be a multiple of "
            f"parallel.expert.size={experts}; change one of the two"
        )


def _of_the_engine(config: "Config") -> Iterator[str]:
    """What DeepSpeed does not do here, and what only DeepSpeed does."""
    parallel, trainer = config.parallel, config.trainer
    if trainer.engine != "deepspeed":
        if trainer.deepspeed.zero_stage != 1:
            yield (
                f"trainer.deepspeed.zero_stage={trainer.deepspeed.zero_stage} acts only with "
                f"trainer.engine='deepspeed', and trainer.engine={trainer.engine!r}; change one of the two"
            )
        return
    layouts = {
        "parallel.tensor.size": (parallel.tensor.size, 1),
        "parallel.pipeline.size": (parallel.pipeline.size, 1),
        "parallel.weight.size": (parallel.weight.size, 1),
        "parallel.expert.size": (parallel.expert.size or 1, 1),
        "parallel.zero1.size": (max(parallel.zero1.size, -1) or -1, -1),
    }
    for key, (value, allowed) in layouts.items():
        if value != allowed:
            yield (
                f"{key}={value} is not possible with trainer.engine='deepspeed', which shards over all "
                f"data-parallel ranks and nothing else; set {key} to {allowed}, or trainer.engine to 'native'"
            )
    if parallel.zero1.fsdp:
        yield (
            "parallel.zero1.fsdp=true is not possible with trainer.engine='deepspeed'; set it to false and "
            "trainer.deepspeed.zero_stage to 3, which shards parameters too"
        )
