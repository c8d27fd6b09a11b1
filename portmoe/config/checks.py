"""Contradictions between sections of a config that hold for any number of ranks."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from portmoe.families import registry

if TYPE_CHECKING:
    from portmoe.config.tree import Tree
    from portmoe.families.architecture import Architecture


def contradictions(config: "Tree") -> Iterator[str]:
    """One message per contradiction, naming the keys, their values and what to change."""
    yield from registry.families()[config.model_type].contradictions(config)
    yield from _of_the_model(config, config.architecture)
    yield from _of_the_parallel_sizes(config, config.architecture)
    yield from _of_the_shards(config, config.architecture)
    yield from _of_the_engine(config)


def _of_the_model(config: "Tree", model: "Architecture") -> Iterator[str]:
    keys = model.keys
    for experts in dict.fromkeys(model.expert_layers):
        if experts.gate.top_k > experts.count:
            yield (
                f"{keys['top_k']}={experts.gate.top_k} must be at most {keys['experts']}={experts.count}; "
                "change one of the two"
            )
    if registry.families()[config.model_type].hub is None:
        for key in ("export_every", "export_dtype"):
            if value := getattr(config.ckpt, key):
                yield (
                    f"ckpt.{key}={value!r} is for models that have a format on the hub, and model_type="
                    f"{config.model_type!r} has none; set it to null"
                )
    source = config.ckpt.load_ckpt_info
    if config.model.from_pretrained and source and source.path and {"model", "all"} & set(source.content):
        yield (
            f"model.from_pretrained={config.model.from_pretrained!r} and ckpt.load_ckpt_info.path="
            f"{source.path!r} both give the weights; leave one of the two out"
        )
    ckpt, every = config.ckpt, config.data.valid_every
    if ckpt.keep_best and not (ckpt.enable_save_ckpt and every):
        yield (
            "ckpt.keep_best=true is about checkpoints and validations, and ckpt.enable_save_ckpt="
            f"{str(ckpt.enable_save_ckpt).lower()} with data.valid_every={every}; set both, or "
            "ckpt.keep_best to false"
        )
    if config.adam.lr < config.lr_scheduler.eta_min:
        yield (
            f"lr_scheduler.eta_min={config.lr_scheduler.eta_min:g} must be at most "
            f"adam.lr={config.adam.lr:g}; change one of the two"
        )


def _of_the_parallel_sizes(config: "Tree", model: "Architecture") -> Iterator[str]:
    """Sizes that contradict each other for any number of ranks."""
    keys, parallel, chunks = model.keys, config.parallel, config.model.num_chunks
    shared_key, shared = parallel.shared_by
    tensor, pipeline, spread = parallel.tensor.size, parallel.pipeline.size, parallel.expert.size
    heads, kv_heads = model.heads["heads"], model.heads["kv_heads"]
    if heads % tensor:
        yield (
            f"{keys['heads']}={heads} must be a multiple of parallel.tensor.size={tensor}; change one of the "
            "two"
        )
    elif kv_heads % tensor and tensor % kv_heads:
        yield (
            f"{keys['kv_heads']}={kv_heads} must be a multiple of parallel.tensor.size={tensor}, or the size "
            "one of it; change one of the two"
        )
    if parallel.mode != "mtp" and config.data.micro_bsz * config.data.seq_len % shared:
        yield (
            f"data.micro_bsz={config.data.micro_bsz} · data.seq_len={config.data.seq_len} must be a multiple "
            f"of {shared_key}={shared}, which splits the sequence; change one of the three"
        )
    if chunks > 1 and pipeline == 1:
        yield (
            f"model.num_chunks={chunks} needs parallel.pipeline.size of 2 or more, and it is "
            "1; set model.num_chunks to 1"
        )
    if len(model.layers) < pipeline * chunks:
        yield (
            f"{keys['layers']}={len(model.layers)} is fewer than the stages, parallel.pipeline.size="
            f"{pipeline} · model.num_chunks={chunks}; change one of the three"
        )
    for count in sorted({experts.count for experts in model.expert_layers} or {1}):
        if spread is not None and count % spread:
            yield (
                f"{keys['experts']}={count} must be a multiple of "
                f"parallel.expert.size={spread}; change one of the two"
            )


def _of_the_shards(config: "Tree", model: "Architecture") -> Iterator[str]:
    """Experts computed some at a time: those on a rank must be a number of equal runs."""
    size, ranks = config.moe.expert_in_one_shard, config.parallel.expert.size or 1
    if config.moe.moe_implementation != "shard" or size is None:
        return
    for count in sorted({experts.count for experts in model.expert_layers}):
        held = count // ranks
        if count % ranks or held % size == 0:
            continue
        possible = sorted((n for n in range(1, held + 1) if held % n == 0), key=lambda n: abs(n - size))
        yield (
            f"moe.expert_in_one_shard={size} must divide the {held} experts of a layer that a rank holds "
            f"({model.keys['experts']}={count} over {ranks} rank{'s' * (ranks > 1)}, parallel.expert.size); "
            f"nearest possible: {' or '.join(map(str, sorted(possible[:2])))}"
        )


def _of_the_engine(config: "Tree") -> Iterator[str]:
    """What DeepSpeed does not do here, and what only DeepSpeed does."""
    parallel, trainer = config.parallel, config.trainer
    power, scale = trainer.deepspeed.initial_scale_power, config.grad_scaler.fp16.initial_scale
    if power is not None and scale != 2.0**power:
        yield (
            f"trainer.deepspeed.initial_scale_power={power} is a scale of {2.0**power:g}, and "
            f"grad_scaler.fp16.initial_scale={scale:g}; set both alike, or leave the power null"
        )
    if trainer.engine != "deepspeed":
        if trainer.deepspeed.zero_stage != 1:
            yield (
                f"trainer.deepspeed.zero_stage={trainer.deepspeed.zero_stage} acts only with "
                f"trainer.engine='deepspeed', and trainer.engine={trainer.engine!r}; change one of the two"
            )
        return
    layouts = {
        "parallel.tensor.size": (parallel.tensor.size, 1),
        "parallel.sequence.size": (parallel.sequence.size, 1),
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


def of_the_data(config: "Tree") -> Iterator[str]:
    """What keeps this model from training on this data; asked where training is meant, not of any config."""
    model, token = config.architecture, config.data.largest_token()
    if token is not None and token >= model.vocabulary:
        key = model.keys["vocabulary"]
        yield (
            f"{key}={model.vocabulary} is too small: with data.seq_len={config.data.seq_len} the dummy data "
            f"holds tokens up to {token}; set {key} to {token + 1} or more, or data.train_folder"
        )
