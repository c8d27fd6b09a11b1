"""The vendor's fused functions: documented signatures, checks and restrictions, over torch's operations.

Where the documentation leaves memory undefined, the result is NaN. What a function documents and portmoe has
no use for (dropout, position biases, quantisation) is refused as not simulated.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_npu.faults import subject_to_faults

DOCUMENTED: dict[str, Callable[..., Any]] = {}

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
COMPRESSED = 2048  # rows and columns of the mask of sparse_mode 2 and 3
MOST_GROUPS = 128
LARGEST_INDEX = 16_777_215


def documented(function: Callable[..., Any]) -> Callable[..., Any]:
    DOCUMENTED[function.__name__] = subject_to_faults(function)
    return function


def without_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    function.without_autograd = True
    return torch.no_grad()(function)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"{message} (simulated npu)")


def check_on_device(name: str, *tensors: torch.Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None:
            check(isinstance(tensor, torch.Tensor), f"{name}: expected a tensor, got {type(tensor).__name__}")
            check(tensor.device.type == "npu", f"{name}: a tensor is on {tensor.device}, not on the npu")


def check_floats(name: str, *tensors: torch.Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> None:
    """On the device, of one dtype, and of an allowed one."""
    check_on_device(name, *tensors)
    dtypes = {tensor.dtype for tensor in tensors}
    check(len(dtypes) == 1, f"{name}: the tensors must have one dtype, not {dtypes}")
    check(dtypes <= set(allowed), f"{name}: {dtypes.pop()} is not supported; supported: {allowed}")


@documented
def npu_rms_norm(
    self: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rstd)"""
    check_floats("npu_rms_norm", self, gamma)
    check(self.shape[-gamma.dim() :] == gamma.shape, "npu_rms_norm: gamma must match the last dimensions")
    wide = self.float()
    axes = tuple(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(self.dtype), rstd.detach()


@documented
def npu_rotary_mul(
    input: torch.Tensor,
    r1: torch.Tensor,
    r2: torch.Tensor,
    rotary_mode: str = "half",
    rotate: torch.Tensor | None = None,
) -> torch.Tensor:
    check_floats("npu_rotary_mul", input, r1, r2)
    check(rotate is None, "npu_rotary_mul: rotate is not simulated")
    check(rotary_mode in ("half", "interleave"), f"npu_rotary_mul: rotary_mode {rotary_mode!r}")
    check(input.dim() == r1.dim() == r2.dim() == 4, "npu_rotary_mul: input, r1 and r2 must have 4 dimensions")
    size = input.shape[-1]
    check(size % 2 == 0 and size <= 896, f"npu_rotary_mul: last dimension {size} is odd or over 896")
    check(r1.shape == r2.shape and r1.shape[-1] == size, "npu_rotary_mul: r1 and r2 must be [..., D]")
    check(
        all(r in (1, x) for r, x in zip(r1.shape, input.shape, strict=True)) and 1 in r1.shape[:3],
        "npu_rotary_mul: r1 does not broadcast to input",
    )
    if rotary_mode == "half":
        first, second = input.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-input[..., 1::2], input[..., 0::2]), dim=-1).flatten(-2)
    return (input.float() * r1.float() + turned.float() * r2.float()).to(input.dtype)


@documented
def npu_swiglu(self: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """silu(first half) · second half"""
    check_floats("npu_swiglu", self)
    check(self.shape[dim] % 2 == 0, f"npu_swiglu: dimension {dim} of size {self.shape[dim]} is odd")
    first, second = self.float().chunk(2, dim=dim)
    return (torch.nn.functional.silu(first) * second).to(self.dtype)


@documented
def npu_fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int]:
    """(attention_out, softmax_max, softmax_sum, reserved, seed, offset, length of the dropout mask)"""
    name = "npu_fusion_attention"
    check_floats(name, query, key, value)
    check_on_device(name, atten_mask)
    check(pse is None and padding_mask is None and prefix is None, f"{name}: pse, padding_mask, prefix")
    check(keep_prob == 1.0, f"{name}: dropout is not simulated")
    check(sparse_mode in (0, 1, 2, 3), f"{name}: sparse_mode {sparse_mode} is not simulated")
    check(1 <= head_num <= 256, f"{name}: head_num {head_num} is not in 1 … 256")
    if atten_mask is not None:
        check(atten_mask.dtype in (torch.bool, torch.uint8), f"{name}: atten_mask must be bool or uint8")
        if sparse_mode in (2, 3):
            check(
                atten_mask.shape == (COMPRESSED, COMPRESSED),
                f"{name}: sparse_mode {sparse_mode} takes the compressed mask of {COMPRESSED}×{COMPRESSED}",
            )
    if input_layout == "TND":
        for lengths in (actual_seq_qlen, actual_seq_kvlen):
            host = isinstance(lengths, list | tuple) and all(type(n) is int for n in lengths)
            check(host, f"{name}: TND takes actual_seq_qlen and actual_seq_kvlen as host lists")
            check(list(lengths) == sorted(lengths), f"{name}: the lengths must be cumulative")
        check(query.dim() == 3 and query.shape[1] == head_num, f"{name}: TND with {tuple(query.shape)}")
        check(
            actual_seq_qlen[-1] == len(query) and actual_seq_kvlen[-1] == len(key),
            f"{name}: the last cumulative length must be T",
        )
        check(len(actual_seq_qlen) == len(actual_seq_kvlen) <= 2048, f"{name}: over 2048 sequences")
        pieces = zip(
            *(
                tensor.tensor_split(torch.tensor(ends[:-1], dtype=torch.int64))
                for tensor, ends in (
                    (query, actual_seq_qlen),
                    (key, actual_seq_kvlen),
                    (value, actual_seq_kvlen),
                )
            ),
            strict=True,
        )
        done = [
            _attend(*(t.transpose(0, 1)[None] for t in piece), atten_mask, scale, sparse_mode)
            for piece in pieces
        ]
        out = torch.cat([o_1NSD[0].transpose(0, 1) for o_1NSD, _, _ in done])
        largest, total = (torch.cat([part[i][0].transpose(0, 1) for part in done]) for i in (1, 2))
    else:
        to_bnsd = {
            "BSH": lambda t: t.unflatten(-1, (head_num, -1)).transpose(1, 2),
            "SBH": lambda t: t.unflatten(-1, (head_num, -1)).permute(1, 2, 0, 3),
            "BSND": lambda t: t.transpose(1, 2),
            "BNSD": lambda t: t,
        }
        from_bnsd = {
            "BSH": lambda t: t.transpose(1, 2).flatten(2),
            "SBH": lambda t: t.permute(2, 0, 1, 3).flatten(2),
            "BSND": lambda t: t.transpose(1, 2),
            "BNSD": lambda t: t,
        }
        check(input_layout in to_bnsd, f"{name}: input_layout {input_layout!r}")
        q, k, v = map(to_bnsd[input_layout], (query, key, value))
        check(q.dim() == 4 and q.shape[1] == head_num, f"{name}: {input_layout} with {tuple(query.shape)}")
        out, largest, total = _attend(q, k, v, atten_mask, scale, sparse_mode)
        out = from_bnsd[input_layout](out)
    return out.contiguous(), largest, total, torch.empty(0, device=query.device), 0, 0, 0


def _attend(
    q_BNSD: torch.Tensor,
    k_BNSD: torch.Tensor,
    v_BNSD: torch.Tensor,
    atten_mask: torch.Tensor | None,
    scale: float,
    sparse_mode: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check(q_BNSD.shape[-1] <= 512, f"npu_fusion_attention: head dimension {q_BNSD.shape[-1]} is over 512")
    scores = (q_BNSD.float() @ k_BNSD.float().transpose(-1, -2)) * scale
    rows, columns = scores.shape[-2:]
    if atten_mask is not None:  # True: masked OUT. Without a mask sparse_mode does nothing.
        if sparse_mode in (2, 3):
            first = columns - rows if sparse_mode == 3 else 0
            tile = atten_mask.bool()
            if max(rows, columns) > COMPRESSED or first:
                tile = torch.ones(rows, columns, device=scores.device).triu(1 + first).bool()
            hidden = tile[:rows, :columns]
        else:
            hidden = atten_mask.bool()
            check(hidden.shape[-2:] == (rows, columns), "npu_fusion_attention: atten_mask has another shape")
        scores = scores.masked_fill(hidden, -torch.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    exponentials = torch.exp(scores - largest)
    total = exponentials.sum(-1, keepdim=True)
    out = (exponentials / total) @ v_BNSD.float()
    repeated = (1, 1, 1, 8)  # the statistics come eight times
    return out.to(q_BNSD.dtype), largest.repeat(repeated), total.detach().repeat(repeated)


@documented
def npu_moe_token_permute(
    tokens: torch.Tensor, indices: torch.Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(permuted_tokens, sorted_indices): stable by expert; sorted_indices[a] is the row of assignment a."""
    name = "npu_moe_token_permute"
    check_floats(name, tokens)
    check_on_device(name, indices)
    check(not padded_mode, f"{name}: padded_mode must be False")
    check(tokens.dim() == 2 and indices.dim() in (1, 2), f"{name}: tokens [T,H], indices [T] or [T,K]")
    check(indices.dtype in (torch.int32, torch.int64), f"{name}: indices of {indices.dtype}")
    check(len(indices) == len(tokens), f"{name}: {len(indices)} rows of indices, {len(tokens)} tokens")
    top_k = indices.shape[1] if indices.dim() == 2 else 1
    check(top_k <= 512, f"{name}: {top_k} choices a token, over 512")
    flat = indices.flatten()
    check(flat.numel() < LARGEST_INDEX, f"{name}: {flat.numel()} indices, over {LARGEST_INDEX}")
    if flat.numel():
        low, high = flat.min().item(), flat.max().item()
        check(low >= 0 and high < LARGEST_INDEX, f"{name}: indices {low} … {high} out of range")
    order = flat.argsort(stable=True)
    kept = flat.numel() if num_out_tokens is None else num_out_tokens
    permuted = tokens.index_select(0, order[:kept] // top_k)
    return permuted, order.argsort(stable=True).to(torch.int32)


@documented
def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor,
    sorted_indices: torch.Tensor,
    probs: torch.Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> torch.Tensor:
    name = "npu_moe_token_unpermute"
    check_floats(name, permuted_tokens, *(() if probs is None else (probs,)))
    check_on_device(name, sorted_indices)
    check(not padded_mode and restore_shape is None, f"{name}: padded_mode must be False")
    check(sorted_indices.dtype == torch.int32, f"{name}: sorted_indices must be int32")
    check(
        permuted_tokens.dim() == 2 and sorted_indices.shape == permuted_tokens.shape[:1],
        f"{name}: one sorted index for each permuted token",
    )
    rows = permuted_tokens.index_select(0, sorted_indices.long())
    if probs is None:
        return rows
    check(probs.dim() == 2 and probs.numel() == len(rows), f"{name}: probs must be [tokens, top_k]")
    weighted = rows.unflatten(0, probs.shape).float() * probs.float().unsqueeze(-1)
    return weighted.sum(1).to(permuted_tokens.dtype)


@documented
@without_autograd
def npu_grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    *,
    bias: list[torch.Tensor] | None = None,
    scale: list[torch.Tensor] | None = None,
    offset: list[torch.Tensor] | None = None,
    antiquant_scale: list[torch.Tensor] | None = None,
    antiquant_offset: list[torch.Tensor] | None = None,
    per_token_scale: list[torch.Tensor] | None = None,
    group_list: torch.Tensor | None = None,
    activation_input: list[torch.Tensor] | None = None,
    activation_quant_scale: list[torch.Tensor] | None = None,
    activation_quant_offset: list[torch.Tensor] | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    act_type: int = 0,
    output_dtype: torch.dtype | None = None,
    tuning_config: list[int] | None = None,
) -> list[torch.Tensor]:
    """One product a group of rows (group_type 0), or of the summed dimension (group_type 2)."""
    name = "npu_grouped_matmul"
    quantised = (bias, scale, offset, antiquant_scale, antiquant_offset, per_token_scale)
    check(all(part is None for part in quantised) and act_type == 0, f"{name}: only plain products simulated")
    check(isinstance(x, list) and isinstance(weight, list), f"{name}: x and weight are lists of tensors")
    check(len(x) == len(weight) == 1 and split_item in (2, 3), f"{name}: one x, one weight, one result")
    check(group_type in (0, 2), f"{name}: group_type {group_type}")
    (left,), (right,) = x, weight
    check_floats(name, left, right)
    check_on_device(name, group_list)
    check(
        group_list is not None and group_list.dtype == torch.int64 and group_list.dim() == 1,
        f"{name}: group_list must be a vector of int64",
    )
    check(len(group_list) <= MOST_GROUPS, f"{name}: {len(group_list)} groups, over {MOST_GROUPS}")
    check(group_list_type in (0, 1), f"{name}: group_list_type {group_list_type}")
    counts = group_list.tolist()
    if group_list_type == 0:
        counts = [end - start for start, end in zip([0, *counts], counts, strict=False)]
    check(min(counts, default=0) >= 0, f"{name}: group_list must not fall")
    places = [(sum(counts[:number]), sum(counts[: number + 1])) for number in range(len(counts))]
    if group_type == 0:
        check(left.dim() == 2 and right.dim() == 3, f"{name}: x [M,K] and weight [E,K,N]")
        check(right.shape[:2] == (len(counts), left.shape[1]), f"{name}: weight {tuple(right.shape)}")
        check(sum(counts) <= len(left), f"{name}: the groups cover more rows than x has")
        out = left.new_full((len(left), right.shape[2]), torch.nan)
        for (start, end), matrix in zip(places, right.unbind(0), strict=True):
            if end > start:
                out[start:end] = left[start:end] @ matrix
        return [out]
    check(left.dim() == 2 and right.dim() == 2, f"{name}: x [M,K] and weight [K,N]")
    check(left.t().is_contiguous(), f"{name}: with group_type 2, x must be a transposed view")
    check(left.shape[1] == right.shape[0], f"{name}: x and weight do not match")
    check(sum(counts) <= right.shape[0], f"{name}: the groups cover more than K")
    out = left.new_full((len(counts), left.shape[0], right.shape[1]), torch.nan)
    for number, (start, end) in enumerate(places):
        if end > start:
            out[number] = left[:, start:end] @ right[start:end]
    return [out]


@documented
@without_autograd
def npu_apply_adam_w(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: torch.Tensor,
    max_grad_norm: torch.Tensor | None,
    amsgrad: bool | None,
    maximize: bool | None,
    *,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In place on ``out`` = (var, m, v). The powers are those from before this step."""
    var, m, v = out
    check_floats("npu_apply_adam_w", grad, var, m, v)
    check(not amsgrad and not maximize, "npu_apply_adam_w: amsgrad and maximize are not simulated")
    check(grad.shape == var.shape == m.shape == v.shape, "npu_apply_adam_w: the shapes differ")
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (v / (1 - beta2_power * beta2)).sqrt_().add_(epsilon)
    var.mul_(1 - lr * weight_decay).addcdiv_(m, denominator, value=-lr / (1 - beta1_power * beta1))
    return out


@documented
@without_autograd
def npu_moe_gating_top_k_softmax(
    x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights, expert_idx, row_idx), for inference."""
    name = "npu_moe_gating_top_k_softmax"
    check_floats(name, x)
    check(finished is None, f"{name}: finished is not simulated")
    check(x.dim() in (2, 3) and 1 <= k <= x.shape[-1], f"{name}: {tuple(x.shape)} with k={k}")
    weights, experts = torch.softmax(x.float(), -1).topk(k)
    rows = torch.arange(experts.numel(), dtype=torch.int32, device=x.device)
    row_idx = rows.view(k, -1).t().reshape(experts.shape)
    return weights.to(x.dtype), experts.to(torch.int32), row_idx
