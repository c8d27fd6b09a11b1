"""The two attention functions: their limits, their masks and layouts."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from torch_npu.operations.masked_softmax import Hidden, Lengths, attention
from torch_npu.operations.registry import FLOATS, Row, documented, dtype, like, not_simulated, only

COMPRESSED = 2048  # rows and columns of the mask that the modes from 2 to 4 take
LARGEST = 2**20  # "1M" tokens
NO_LIMIT = 2147483647


def _heads_and_width(tensor: torch.Tensor, layout: str, heads: int) -> tuple[int, int]:
    if layout in ("BSH", "SBH"):
        return heads, tensor.shape[2] // heads
    return tensor.shape[1 if layout in ("BNSD", "TND") else 2], tensor.shape[-1]


def _of_key(a: Any, tensor: torch.Tensor) -> tuple[int, int]:
    """Heads and width of key or value; where a layout joins them, query's width tells."""
    if a.input_layout in ("BSH", "SBH"):
        width = a.query.shape[2] // a.head_num
        return tensor.shape[2] // width, width
    return _heads_and_width(tensor, a.input_layout, a.head_num)


def _batch_and_length(tensor: torch.Tensor, layout: str) -> tuple[int, int]:
    places = {"BSH": (0, 1), "SBH": (1, 0), "BSND": (0, 1), "BNSD": (0, 2)}
    batch, length = places[layout]
    return tensor.shape[batch], tensor.shape[length]


def _cumulative(ends: Lengths, total: int, most: int) -> bool:
    """Never falling and ending at T; trailing zeros leave the last sequences out."""
    used = list(ends)
    while len(used) > 1 and used[-1] == 0:
        used.pop()
    left_out = len(used) < len(ends)
    rises = all(a <= b for a, b in pairwise([0, *used]))
    return 1 <= len(ends) <= most and rises and (used[-1] <= total if left_out else used[-1] == total)


def _varlen(a: Any) -> bool:
    return a.input_layout == "TND"


def _scale_of_mask(a: Any) -> bool:
    if a.atten_mask is None:
        return True
    shape = tuple(a.atten_mask.shape)
    if a.sparse_mode in (2, 3, 4):
        return shape == (COMPRESSED, COMPRESSED)
    if _varlen(a):
        longest = [max(b - c for c, b in pairwise([0, *e])) for e in (a.actual_seq_qlen, a.actual_seq_kvlen)]
        return shape == tuple(longest)
    sq, skv = (_batch_and_length(t, a.input_layout)[1] for t in (a.query, a.key))
    batch = _batch_and_length(a.query, a.input_layout)[0]
    return shape in {
        (batch, a.head_num, sq, skv),
        (batch, 1, sq, skv),
        (1, 1, sq, skv),
        (sq, skv),
    }


def _triangle(a: Any) -> bool:
    if a.atten_mask is None or a.sparse_mode not in (2, 3, 4):
        return True
    triangle = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=a.atten_mask.device).triu(1)
    return torch.equal(a.atten_mask.bool(), triangle)


def _no_row_hidden(a: Any) -> bool:
    if a.atten_mask is None or not _varlen(a) or a.sparse_mode not in (0, 1):
        return True
    return not a.atten_mask.bool().all(-1).any()


def _key_is_value_but(width: bool) -> Callable[[Any], bool]:
    def holds(a: Any) -> bool:
        last = None if not width else -1
        return a.key.shape[:last] == a.value.shape[:last] and a.key.dim() == a.value.dim()

    return holds


def _rows(sequences: int, key_is_value: Row) -> tuple[Row, ...]:
    """What both functions ask; ``sequences``: of one call where lengths vary."""
    return (
        dtype("query", *FLOATS),
        like("key", "query"),
        like("value", "query"),
        only("input_layout", "BSH", "SBH", "BSND", "BNSD", "TND"),
        Row(
            "query",
            "must have the dimensions of input_layout and head_num heads",
            lambda a: (
                a.query.dim() == a.key.dim() == len(a.input_layout)
                and _heads_and_width(a.query, a.input_layout, a.head_num)[0] == a.head_num
            ),
        ),
        Row("head_num", "must be 1 to 256", lambda a: 1 <= a.head_num <= 256),
        key_is_value,
        Row(
            "key",
            "must have heads that divide head_num",
            lambda a: a.head_num % _of_key(a, a.key)[0] == 0,
        ),
        Row(
            "query",
            "must have key's head width, at least value's, 1 to 768",
            lambda a: (
                1
                <= _of_key(a, a.value)[1]
                <= _of_key(a, a.key)[1]
                == _heads_and_width(a.query, a.input_layout, a.head_num)[1]
                <= 768
            ),
        ),
        Row(
            "query",
            "must have 1 to 1M tokens a sequence and key's batch, up to 2M",
            lambda a: (
                _varlen(a)
                or (
                    _batch_and_length(a.query, a.input_layout)[0]
                    == _batch_and_length(a.key, a.input_layout)[0]
                    and 1 <= _batch_and_length(a.query, a.input_layout)[0] <= 2**21
                    and all(1 <= _batch_and_length(t, a.input_layout)[1] <= LARGEST for t in (a.query, a.key))
                )
            ),
        ),
        Row(
            "query",
            "must have 1 to 1M tokens in TND",
            lambda a: not _varlen(a) or all(1 <= len(t) <= LARGEST for t in (a.query, a.key)),
        ),
        Row(
            "actual_seq_qlen",
            f"must be query's cumulative lengths in TND, 1 to {sequences}",
            lambda a: not _varlen(a) or _cumulative(a.actual_seq_qlen, len(a.query), sequences),
        ),
        Row(
            "actual_seq_kvlen",
            "must be key's cumulative lengths in TND, one for each of query's",
            lambda a: (
                not _varlen(a)
                or (
                    len(a.actual_seq_qlen) == len(a.actual_seq_kvlen)
                    and _cumulative(a.actual_seq_kvlen, len(a.key), sequences)
                )
            ),
        ),
        not_simulated("pse", "padding_mask", "prefix", "dropout_mask"),
        Row("keep_prob", "must be above 0 and at most 1", lambda a: 0 < a.keep_prob <= 1),
        Row("keep_prob", "is not simulated below 1", lambda a: a.keep_prob == 1, "this stand-in"),
        only("inner_precise", 0, 1, 2),
        dtype("atten_mask", torch.bool, torch.uint8),
        Row(
            "sparse_mode",
            "may be 0 to 8, without 5 in TND and without 7 and 8 elsewhere",
            lambda a: a.sparse_mode in ({*range(9)} - {5} if _varlen(a) else {*range(7)}),
        ),
        Row(
            "sparse_mode",
            "from 5 on is not simulated",
            lambda a: a.sparse_mode < 5,
            "this stand-in",
        ),
        Row(
            "atten_mask",
            "must have its layout's shape, and 2048 × 2048 in the modes 2 to 4",
            _scale_of_mask,
        ),
        Row("atten_mask", "must be the triangle above the diagonal in the modes 2 to 4", _triangle),
        Row("atten_mask", "must hide no whole row in TND", _no_row_hidden),
        Row(
            "softmax_layout",
            "must be empty, or TND where input_layout is",
            lambda a: a.softmax_layout == "" or (a.softmax_layout == "TND" and _varlen(a)),
        ),
        dtype("sink", torch.float32),
        Row("sink", "must have one number a head", lambda a: a.sink is None or a.sink.shape == (a.head_num,)),
    )


@documented(
    *_rows(1024, Row("value", "must have key's shape", _key_is_value_but(width=False))),
    Row(
        "pre_tockens",
        "and next_tockens must agree with the mask: not simulated in mode 0",
        lambda a: a.sparse_mode or (a.pre_tockens, a.next_tockens) == (NO_LIMIT, NO_LIMIT),
        "this stand-in",
    ),
    products=("A2",),
)
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
    prefix: Lengths = None,
    actual_seq_qlen: Lengths = None,
    actual_seq_kvlen: Lengths = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: torch.Tensor | None = None,
    dropout_mask: torch.Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int]:
    """(attention_out, softmax_max, softmax_sum, reserved, seed, offset, length of the dropout mask)"""
    hidden = Hidden(atten_mask, sparse_mode, pre_tockens, next_tockens)
    return attention(
        (query, key, value),
        head_num,
        input_layout,
        (actual_seq_qlen, actual_seq_kvlen),
        scale,
        hidden,
        sink,
        softmax_layout,
    )


def _rope(condition: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda a: (a.query_rope is None and a.key_rope is None) or condition(a)


@documented(
    *_rows(
        2048,
        Row("value", "must have key's shape but for the head width", _key_is_value_but(width=True)),
    ),
    only("pse_type", 0, 1, 2, 3),
    Row(
        "sparse_mode",
        "3 must have no more queries than keys in a sequence",
        lambda a: (
            a.sparse_mode != 3
            or (
                all(
                    q - p <= k - j
                    for (p, q), (j, k) in zip(
                        pairwise([0, *a.actual_seq_qlen]), pairwise([0, *a.actual_seq_kvlen]), strict=True
                    )
                )
                if _varlen(a)
                else _batch_and_length(a.query, a.input_layout)[1]
                <= _batch_and_length(a.key, a.input_layout)[1]
            )
        ),
    ),
    Row(
        "query_rope",
        "must come with key_rope, in TND, with a mask, in bfloat16",
        _rope(
            lambda a: (
                _varlen(a)
                and a.atten_mask is not None
                and {t.dtype for t in (a.query, a.query_rope, a.key_rope)} == {torch.bfloat16}
            )
        ),
    ),
    Row(
        "query_rope",
        "must have key_rope's width, a multiple of 8 and at most every head's",
        _rope(
            lambda a: (
                a.query_rope.shape[2] == a.key_rope.shape[2]
                and a.query_rope.shape[2] % 8 == 0
                and a.query_rope.shape[2] <= min(t.shape[2] for t in (a.query, a.key, a.value))
            )
        ),
    ),
    Row(
        "query_rope",
        "must have query's tokens and heads, as key_rope has key's",
        _rope(
            lambda a: a.query_rope.shape[:2] == a.query.shape[:2] and a.key_rope.shape[:2] == a.key.shape[:2]
        ),
    ),
    Row("query_rope", "must come without pse_type other than 1", _rope(lambda a: a.pse_type == 1)),
    Row(
        "pre_tokens",
        "and next_tokens must agree with the mask: not simulated in mode 0",
        lambda a: a.sparse_mode or (a.pre_tokens, a.next_tokens) == (NO_LIMIT, NO_LIMIT),
        "this stand-in",
    ),
    products=("A2", "A3"),
)
def npu_fusion_attention_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    query_rope: torch.Tensor | None = None,
    key_rope: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = 2147483647,
    next_tokens: int = 2147483647,
    inner_precise: int = 0,
    prefix: Lengths = None,
    actual_seq_qlen: Lengths = None,
    actual_seq_kvlen: Lengths = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    pse_type: int = 1,
    q_start_idx: Lengths = None,
    kv_start_idx: Lengths = None,
    softmax_layout: str = "",
    sink: torch.Tensor | None = None,
    dropout_mask: torch.Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, int]:
    """As npu_fusion_attention; a further product of query_rope and key_rope is added to the scores."""
    if query_rope is not None:
        query, key = torch.cat((query, query_rope), -1), torch.cat((key, key_rope), -1)
    hidden = Hidden(atten_mask, sparse_mode, pre_tokens, next_tokens)
    return attention(
        (query, key, value),
        head_num,
        input_layout,
        (actual_seq_qlen, actual_seq_kvlen),
        scale,
        hidden,
        sink,
        softmax_layout,
    )
