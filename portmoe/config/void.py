"""Keys that act, and change nothing beside the others of this config: a rule a combination.

What is void whatever else is set stands with its key, see ``keys.Key``. Switches of a layout are not
among them: they wait for sizes that change with the number of ranks.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from portmoe.config.tree import Tree
    from portmoe.families.architecture import Gate

Rule = tuple[bool, str, tuple[str, ...]]  # whether it holds, why, and the keys that are void then


def void(config: "Tree") -> dict[str, str]:
    """Return the keys that are void in this combination, each with the first reason that holds."""
    found: dict[str, str] = {}
    for holds, why, keys in (*_of_the_experts(config), *_of_the_rest(config)):
        if holds:
            for key in keys:
                found.setdefault(key, why)
    return found


def _of_the_experts(config: "Tree") -> Iterator[Rule]:
    """What of ``moe`` the kind of gating reads, by the contracts of the two gatings in ``ops``."""
    gates = {layer.network.gate for layer in config.architecture.layers if hasattr(layer.network, "gate")}
    yield (
        not gates,
        "no layer has experts",
        (
            *(f"moe.{key}" for key in type(config.moe).model_fields),
            *("loss.moe_loss_coeff", "loss.z_loss_coeff", "parallel.expert.size"),
            *("model.moe_type", "model.moe_use_residual"),
        ),
    )
    yield (
        config.moe.moe_implementation != "shard",
        "moe.moe_implementation is 'origin': all experts of a layer are computed at once",
        ("moe.expert_in_one_shard",),
    )
    yield (
        not config.shards_parameters,
        "the weights are whole on every rank; parallel.zero1.fsdp shards them",
        ("moe.moe_implementation", "moe.expert_in_one_shard"),
    )
    yield (
        config.moe.expert_in_one_shard is None,
        "moe.expert_in_one_shard is null: all experts of a layer are computed at once",
        ("moe.moe_implementation",),
    )
    factors = ("moe.capacity_factor", "moe.eval_capacity_factor")
    own_loss = bool(gates) and config.architecture.balance.over not in ("gate", "first choice")
    yield (
        own_loss,
        "the load is evened by the model's own loss and coefficient, or by none (moe.aux_loss)",
        ("loss.moe_loss_coeff",),
    )
    yield from (rule for gate in gates if gate.kind == "softmax" for rule in _of_a_softmax(gate))
    for gate in gates:
        if gate.kind == "softmax":
            continue
        topk, several = gate.kind == "topk", gate.top_k > 1
        yield (
            topk and several,
            f"it acts with one choice only, and moe.top_k={gate.top_k}: tokens over an expert's capacity are "
            "dropped, the later ones first",
            ("moe.drop_tokens", "moe.use_rts"),
        )
        yield (
            topk and not several and not gate.drop_tokens,
            "with moe.drop_tokens=false the capacity is what the fullest expert needs",
            (*factors, "moe.min_capacity", "moe.use_rts"),
        )
        yield (
            gate.dropless,
            "every choice is computed (model.moe_type='MegaBlock-D')",
            (*factors, "moe.min_capacity", "moe.drop_tokens", "moe.use_rts"),
        )
        yield (
            not topk,
            "this kind of gating has no such choice (model.moe_type)",
            ("moe.min_capacity", "moe.use_rts", "moe.use_fused_gating"),
        )
        yield (
            not topk and not gate.drop_tokens,
            "with moe.drop_tokens=false the capacity is what the fullest expert needs",
            factors,
        )


def _of_a_softmax(gate: "Gate") -> Iterator[Rule]:
    yield (
        True,
        "this model's gate has no such choice",
        (
            *("moe.noisy_gate_policy", "moe.drop_tokens", "moe.use_rts", "moe.use_fused_gating"),
            *("moe.use_tutel", "moe.top_k"),
        ),
    )
    yield (
        gate.dropless,
        "every choice is computed (moe.capacity_factor is null)",
        ("moe.eval_capacity_factor", "moe.min_capacity"),
    )


def _of_the_rest(config: "Tree") -> Iterator[Rule]:
    data, ckpt = config.data, config.ckpt
    yield (
        not config.recomputed_layers,
        f"no layer is recomputed: model.checkpoint={config.model.checkpoint}".lower(),
        ("model.checkpoint_offload",),
    )
    yield (
        config.trainer.engine != "deepspeed",
        f"it acts with trainer.engine='deepspeed', and trainer.engine={config.trainer.engine!r}",
        (
            *("trainer.deepspeed.allgather_bucket_size", "trainer.deepspeed.reduce_bucket_size"),
            *("trainer.deepspeed.overlap_comm", "trainer.deepspeed.contiguous_gradients"),
        ),
    )
    yield (
        config.model.dtype != "float16",
        f"the loss is scaled for float16 only, and model.dtype={config.model.dtype!r}",
        (
            *("grad_scaler.fp16.initial_scale", "grad_scaler.fp16.min_scale"),
            *("grad_scaler.fp16.growth_interval", "grad_scaler.growth_factor"),
            *("grad_scaler.backoff_factor", "grad_scaler.max_scale", "grad_scaler.hysteresis"),
        ),
    )
    yield (
        not data.valid_every,
        "data.valid_every is 0: nothing is validated",
        ("data.valid_micro_num", "data.valid_folder", "moe.eval_capacity_factor"),
    )
    yield (
        data.train_folder is not None and (data.valid_folder is not None or not data.valid_every),
        "the data comes from folders, not from the dummy data",
        ("data.num_samples", "data.fixed_random_dataset_seqlen"),
    )
    yield (
        data.train_folder is None and data.valid_folder is None,
        "the dummy data has no samples that are left out",
        ("data.min_length",),
    )
    yield (
        data.train_folder is None and data.valid_folder is None,
        "the dummy data is not tokenized",
        ("data.format", "data.train_on", "data.on_bad_sample", "data.cache_folder"),
    )
    yield (
        data.train_folder is None and data.valid_folder is None and not config.eval.prompts,
        "the dummy data is not tokenized, and there are no eval.prompts",
        ("data.tokenizer", "data.chat_template"),
    )
    yield (
        data.format != "auto" and data.train_folder is not None,
        f"it is about tokenized .bin files, and data.format={data.format!r}",
        ("data.min_length",),
    )
    yield (data.format == "text", "data.format is 'text': every token is learned", ("data.train_on",))
    yield (
        data.format == "text" and not config.eval.prompts,
        "data.format is 'text': every token is learned",
        ("data.chat_template",),
    )
    yield (
        data.packing == "benchmark",
        "with data.packing='benchmark' attention always stays within a sample",
        ("data.use_varlen_attn",),
    )
    yield (
        not ckpt.saves,
        "ckpt.enable_save_ckpt is false: nothing is saved",
        ("ckpt.checkpoint_every", "ckpt.keep", "ckpt.async_upload", "ckpt.save_optimizer"),
    )
    yield (
        ckpt.saves and not ckpt.enable_save_ckpt,
        "ckpt.enable_save_ckpt is false: the steps of ckpt.keep_steps are saved, and kept",
        ("ckpt.checkpoint_every", "ckpt.keep"),
    )
    yield (not config.eval.prompts, "there are no eval.prompts", ("eval.every", "eval.max_tokens"))
    yield (
        config.beta2_scheduler.init_beta2 is not None,
        "beta2_scheduler.init_beta2 goes before it",
        ("adam.adam_beta2",),
    )
    yield (config.beta2_scheduler.c is not None, "beta2_scheduler.c goes before it", ("adam.adam_beta2_c",))
