"""Attention with log Σ exp by products over blocks of queries, where torch has no kernel that gives it.

Memory grows with the block and the tokens, not with the tokens' square; scores and sums are float32.
"""

from collections.abc import Iterator

import torch

from portmoe.backends.torch.attention import FlashKernel, log_sum_implementation

BLOCK = 512  # queries


def _forward(
    q_BNLD: torch.Tensor, k_BNLD: torch.Tensor, v_BNLD: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    q, k, v = _wide(q_BNLD, k_BNLD, v_BNLD)
    outs, log_sums = [], []
    for block, scores_BNQK in _scores(q, k, scale):
        log_sum_BNQ = scores_BNQK.logsumexp(-1)
        weights_BNQK = scores_BNQK.sub_(log_sum_BNQ.unsqueeze(-1)).exp_()
        outs.append(weights_BNQK @ v[:, :, : block.stop])
        log_sums.append(log_sum_BNQ)
    return torch.cat(outs, 2).to(q_BNLD.dtype), torch.cat(log_sums, 2), ()


def _backward(
    grad_BNLD: torch.Tensor,
    q_BNLD: torch.Tensor,
    k_BNLD: torch.Tensor,
    v_BNLD: torch.Tensor,
    out_BNLD: torch.Tensor,
    log_sum_BNL: torch.Tensor,
    rest: tuple,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    grad, q, k, v, out = _wide(grad_BNLD, q_BNLD, k_BNLD, v_BNLD, out_BNLD)
    of_out_BNL = (grad * out).sum(-1)
    grads = grad_q, grad_k, grad_v = tuple(map(torch.zeros_like, (q, k, v)))
    for block, scores_BNQK in _scores(q, k, scale):
        seen = slice(0, block.stop)
        weights_BNQK = scores_BNQK.sub_(log_sum_BNL[:, :, block].unsqueeze(-1)).exp_()
        grad_v[:, :, seen] += weights_BNQK.mT @ grad[:, :, block]
        of_weights_BNQK = grad[:, :, block] @ v[:, :, seen].mT
        of_scores_BNQK = weights_BNQK.mul_(of_weights_BNQK.sub_(of_out_BNL[:, :, block].unsqueeze(-1)))
        grad_q[:, :, block] = of_scores_BNQK @ k[:, :, seen] * scale
        grad_k[:, :, seen] += of_scores_BNQK.mT @ q[:, :, block] * scale
    return tuple(t.to(q_BNLD.dtype) for t in grads)


def _wide(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    return (t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)


def _scores(q_BNLD: torch.Tensor, k_BNLD: torch.Tensor, scale: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """Block by block of queries: which, and their scores with all keys that some of them see."""
    length = q_BNLD.shape[2]
    for start in range(0, length, BLOCK):
        block = slice(start, min(start + BLOCK, length))
        scores_BNQK = (q_BNLD[:, :, block] @ k_BNLD[:, :, : block.stop].mT).mul_(scale)
        size = block.stop - start
        behind_QQ = torch.ones(size, size, dtype=torch.bool, device=q_BNLD.device).triu(1)
        scores_BNQK[..., start:].masked_fill_(behind_QQ, -torch.inf)
        yield block, scores_BNQK


ATTENTION_BLOCKS = log_sum_implementation("blocks", FlashKernel(_forward, _backward))
