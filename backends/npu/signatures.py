"""How each of torch_npu's functions is called here, and whether a release takes the call.

A call binds where the release registers the function with the same leading parameters, knows every keyword,
and asks for nothing else. Tests compare ``CALLS`` with the calls in this folder, and bind them to the schemas
of every release that was read.
"""

from dataclasses import dataclass

import torch
from torch._C import FunctionSchema

from portmoe.accelerator.probing import describe


@dataclass(frozen=True)
class Call:
    """The parameters that are given by position, by their names, and those given by keyword."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...] = ()

    def why_not(self, schema: FunctionSchema) -> str | None:
        """What of this call ``schema`` does not take; None where it binds."""
        leading = [a.name for a in schema.arguments if not a.kwarg_only][: len(self.positional)]
        if tuple(leading) != self.positional:
            return f"begins with ({', '.join(leading)}), and is called with ({', '.join(self.positional)})"
        given = {*self.positional, *self.keywords}
        unknown = [name for name in self.keywords if name not in {a.name for a in schema.arguments}]
        if unknown:
            return f"has no parameter {unknown[0]}"
        asked = [a.name for a in schema.arguments if not a.has_default_value() and a.name not in given]
        return f"needs {asked[0]}" if asked else None


_ATTENTION = ("query", "key", "value", "head_num", "input_layout")
_SEGMENTS = ("atten_mask", "scale", "sparse_mode", "actual_seq_qlen", "actual_seq_kvlen")
_ADAMW = ("beta1_power", "beta2_power", "lr", "weight_decay", "beta1", "beta2", "epsilon")

CALLS = {
    "npu_rms_norm": Call(("input", "gamma", "epsilon")),
    "npu_rotary_mul": Call(("input", "r1", "r2", "rotary_mode")),
    "npu_swiglu": Call(("input",), ("dim",)),
    "npu_fusion_attention": Call(_ATTENTION, _SEGMENTS),
    "npu_fusion_attention_v2": Call(_ATTENTION, _SEGMENTS),
    "npu_moe_token_permute": Call(("tokens", "indices")),
    "npu_moe_token_unpermute": Call(("permuted_tokens", "sorted_indices"), ("probs",)),
    "npu_grouped_matmul": Call(
        ("x", "weight"), ("group_list", "split_item", "group_type", "group_list_type")
    ),
    "npu_grouped_matmul_add_": Call(("input", "x", "weight", "group_list")),
    "npu_fused_linear_online_max_sum": Call(
        ("input", "weight", "target", "vocab_start_index", "vocab_end_index"), ("return_logits",)
    ),
    "npu_fused_linear_cross_entropy_loss_with_max_sum_backward": Call(
        ("grad", "input", "weight", "target_mask", "masked_target"), ("logits_max", "sum_exp_logits")
    ),
    "npu_apply_adam_w": Call((*_ADAMW, "grad", "max_grad_norm", "amsgrad", "maximize"), ("out",)),
}


def missing(name: str) -> str | None:
    """Why the installed torch_npu cannot be called as ``CALLS`` says; None where it can."""
    try:
        import torch_npu
    except Exception as error:
        return f"torch_npu does not load: {describe(error)}"
    if not hasattr(torch_npu, name):
        return f"torch_npu {torch_npu.__version__} has no {name}"
    packet = getattr(torch.ops.npu, name)
    reasons = [CALLS[name].why_not(getattr(packet, overload)._schema) for overload in packet.overloads()]
    if None in reasons:
        return None
    return f"torch_npu {torch_npu.__version__}'s {name} {reasons[0]}"
