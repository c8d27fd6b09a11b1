"""GShard's gating as Triton kernels. Imported inside functions only: it needs triton.

The probabilities are torch's own softmax, so that the choices, ties included, are the reference's bit for
bit. What follows is three kernels over blocks of tokens: the choices with each block's counts and sums, then
slots and weights, and the gradient. Nothing is added atomically; the blocks' sums are added in their order.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from portmoe.ops.gating import probabilities
from portmoe.ops.routing import Routing, check_choices
from portmoe.ops.topk_gating import NoisyGatePolicy, topk_capacity
from portmoe.ops.topk_gating import topk_gating as plain_topk_gating

BLOCK = 4096  # numbers of a block of tokens: as many tokens as fit, their experts padded to a power of two
MOST_TOKENS = 128  # of a block
EPSILON = torch.finfo(torch.float32).eps


def topk_gating(
    logits_SE: torch.Tensor,
    k: int,
    capacity_factor: float,
    min_capacity: int,
    *,
    drop_tokens: bool = True,
    use_rts: bool = False,
    noisy_gate_policy: NoisyGatePolicy = None,
    use_fused_gating: bool = True,
    generator: torch.Generator | None = None,
) -> Routing:
    """The contract of ``topk_gating``; where random numbers decide, which the CPU draws, by its reference."""
    check_choices(logits_SE, k)
    tokens, experts = logits_SE.shape
    rts = k == 1 and use_rts and drop_tokens
    if rts or noisy_gate_policy == "RSample" or (k == 2 and not use_fused_gating) or not tokens:
        return plain_topk_gating(
            logits_SE,
            k,
            capacity_factor,
            min_capacity,
            drop_tokens=drop_tokens,
            use_rts=use_rts,
            noisy_gate_policy=noisy_gate_policy,
            use_fused_gating=use_fused_gating,
            generator=generator,
        )
    capacity = topk_capacity(tokens, experts, k, capacity_factor, min_capacity)
    limit = capacity if k > 1 or drop_tokens else tokens  # no expert has more choices than tokens
    weight_KS, aux_loss, expert_KS, slot_KS, count_E = _Gate.apply(probabilities(logits_SE), k, limit)
    if k == 1 and not drop_tokens:
        capacity = int(count_E.max())
    return Routing(expert_KS, slot_KS, weight_KS, capacity, aux_loss, count_E)


class _Gate(torch.autograd.Function):
    """gate_SE, k, capacity → weight_KS, aux_loss, expert_KS, slot_KS, count_E."""

    @staticmethod
    def forward(ctx: Any, gate_SE: torch.Tensor, k: int, capacity: int) -> tuple[torch.Tensor, ...]:
        (tokens, experts), device = gate_SE.shape, gate_SE.device
        gate_SE = gate_SE.contiguous()
        block, padded = _block(experts)
        blocks = triton.cdiv(tokens, block)
        expert_KS = torch.empty(k, tokens, device=device, dtype=torch.int64)
        count_KBE = torch.empty(k, blocks, experts, device=device, dtype=torch.int64)
        sum_BE = torch.empty(blocks, experts, device=device, dtype=torch.float32)
        _choose_kernel[(blocks,)](
            gate_SE, expert_KS, count_KBE, sum_BE, tokens, experts, blocks, k, block, padded
        )
        # Choice-major: all blocks of the first choices, then those of the second.
        before_AE = count_KBE.flatten(0, 1).cumsum(0)
        count_E = before_AE[-1].clone()
        before_AE -= count_KBE.flatten(0, 1)
        first_E = count_KBE[0].sum(0)
        aux_loss = experts * (sum_BE.sum(0) * first_E).sum() / tokens**2

        slot_KS = torch.empty_like(expert_KS)
        weight_KS = torch.empty(k, tokens, device=device, dtype=torch.float32)
        choices = triton.next_power_of_2(k)
        _place_kernel[(blocks,)](
            gate_SE,
            expert_KS,
            before_AE,
            slot_KS,
            weight_KS,
            tokens,
            experts,
            blocks,
            capacity,
            k,
            choices,
            block,
            padded,
            EPSILON,
        )
        ctx.save_for_backward(gate_SE, expert_KS, slot_KS, first_E)
        ctx.capacity = capacity
        ctx.mark_non_differentiable(expert_KS, slot_KS, count_E)
        return weight_KS, aux_loss, expert_KS, slot_KS, count_E

    @staticmethod
    def backward(
        ctx: Any, grad_KS: torch.Tensor, grad_aux: torch.Tensor, *unused: object
    ) -> tuple[torch.Tensor | None, ...]:
        gate_SE, expert_KS, slot_KS, first_E = ctx.saved_tensors
        (choices, tokens), experts = expert_KS.shape, gate_SE.shape[1]
        share_E = first_E * (grad_aux * (experts / tokens**2))
        grad_SE = torch.empty_like(gate_SE)
        block, padded = _block(experts)
        _gradient_kernel[(triton.cdiv(tokens, block),)](
            gate_SE,
            expert_KS,
            slot_KS,
            grad_KS.contiguous(),
            share_E,
            grad_SE,
            tokens,
            experts,
            ctx.capacity,
            choices,
            block,
            padded,
            EPSILON,
        )
        return grad_SE, None, None


def _block(experts: int) -> tuple[int, int]:
    """Tokens of a block, and the experts padded to a power of two."""
    padded = triton.next_power_of_2(experts)
    return min(MOST_TOKENS, max(1, BLOCK // padded)), padded


@triton.jit
def _choose_kernel(
    gate_ptr,
    expert_ptr,
    count_ptr,
    sum_ptr,
    tokens,
    experts,
    blocks,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, PADDED)
    here, real = token < tokens, expert < experts
    inside = here[:, None] & real[None, :]
    gate = tl.load(gate_ptr + token[:, None] * experts + expert[None, :], inside, other=0.0)
    tl.store(sum_ptr + block * experts + expert, tl.sum(gate, axis=0), real)
    left = tl.where(inside, gate, -2.0)  # below every probability, chosen or not
    for choice in tl.static_range(CHOICES):
        best = tl.argmax(left, axis=1, tie_break_left=True)
        tl.store(expert_ptr + choice * tokens + token, best.to(tl.int64), here)
        chosen = expert[None, :] == best[:, None]
        count = tl.sum((chosen & here[:, None]).to(tl.int32), axis=0)
        tl.store(count_ptr + (choice * blocks + block) * experts + expert, count.to(tl.int64), real)
        left = tl.where(chosen, -1.0, left)


@triton.jit
def _place_kernel(
    gate_ptr,
    expert_ptr,
    before_ptr,
    slot_ptr,
    weight_ptr,
    tokens,
    experts,
    blocks,
    capacity,
    CHOICES: tl.constexpr,
    PADDED_CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    EPSILON: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, PADDED)
    column = tl.arange(0, PADDED_CHOICES)
    here, real = token < tokens, expert < experts
    kept_gate = tl.zeros((BLOCK, PADDED_CHOICES), dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        best = tl.load(expert_ptr + choice * tokens + token, here, other=-1)
        chosen = (expert[None, :] == best[:, None]).to(tl.int32)
        before = tl.load(before_ptr + (choice * blocks + block) * experts + expert, real, other=0)
        within = tl.sum(chosen * (tl.cumsum(chosen, axis=0) - 1), axis=1)
        slot = tl.sum(chosen * before[None, :], axis=1) + within
        tl.store(slot_ptr + choice * tokens + token, slot, here)
        gate = tl.load(gate_ptr + token * experts + best, here & (slot < capacity), other=0.0)
        kept_gate = tl.where(column[None, :] == choice, gate[:, None], kept_gate)
    if CHOICES > 1:
        total = tl.maximum(tl.sum(kept_gate, axis=1), EPSILON)
        kept_gate = tl.div_rn(kept_gate, tl.broadcast_to(total[:, None], (BLOCK, PADDED_CHOICES)))
    place = column[None, :] * tokens + token[:, None]
    tl.store(weight_ptr + place, kept_gate, here[:, None] & (column < CHOICES)[None, :])


@triton.jit
def _gradient_kernel(
    gate_ptr,
    expert_ptr,
    slot_ptr,
    grad_ptr,
    share_ptr,
    out_ptr,
    tokens,
    experts,
    capacity,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    EPSILON: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, PADDED)
    here, real = token < tokens, expert < experts
    # w = g/D, D = max(Σ g, ε) over the kept choices: dL/dg = (dw − Σ dw·w)/D, without the sum where D = ε.
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    product = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        best = tl.load(expert_ptr + choice * tokens + token, here, other=0)
        slot = tl.load(slot_ptr + choice * tokens + token, here, other=0)
        kept = here & (slot < capacity)
        gate = tl.load(gate_ptr + token * experts + best, kept, other=0.0)
        grad = tl.load(grad_ptr + choice * tokens + token, kept, other=0.0)
        total += gate
        product += gate * grad
    share = tl.load(share_ptr + expert, real, other=0.0)
    out = tl.zeros((BLOCK, PADDED), dtype=tl.float32) + share[None, :]
    for choice in tl.static_range(CHOICES):
        best = tl.load(expert_ptr + choice * tokens + token, here, other=0)
        slot = tl.load(slot_ptr + choice * tokens + token, here, other=0)
        kept = here & (slot < capacity)
        grad = tl.load(grad_ptr + choice * tokens + token, kept, other=0.0)
        if CHOICES > 1:
            divisor = tl.maximum(total, EPSILON)
            grad = (grad - tl.where(total >= EPSILON, product / divisor, 0.0)) / divisor
            grad = tl.where(kept, grad, 0.0)
        out += tl.where(expert[None, :] == best[:, None], grad[:, None], 0.0)
    inside = here[:, None] & real[None, :]
    tl.store(out_ptr + token[:, None] * experts + expert[None, :], out, inside)
