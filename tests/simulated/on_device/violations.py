# ruff: noqa: E501  a table: one case a line
"""Calls of the vendor's functions: one that is allowed, and for each documented constraint one that breaks it.

Per function: its arguments, then (parameter, the constraint's words, what to change in the arguments). A
fourth entry, where there is one, is a change that comes as near as is allowed. The limits are the
documentation's, written here a second time: the rows of the simulated device are what is tested.
"""

import torch

NPU = torch.device("npu", 0)
HALF, BRAIN, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
INT, LONG, BYTE = torch.int32, torch.int64, torch.int8
LEFT_OUT = object()  # the argument is not given
CAUSAL = torch.ones(2048, 2048, dtype=torch.bool, device=NPU).triu(1)


def z(*shape, dtype=FLOAT):
    """Zeros that take no memory, whatever their shape."""
    return torch.zeros((), dtype=dtype, device=NPU).expand(shape)


def full(*shape, dtype=FLOAT):
    return torch.zeros(shape, dtype=dtype, device=NPU)


def ints(*numbers, dtype=LONG):
    return torch.tensor(numbers, dtype=dtype, device=NPU)


def bits(rows, dtype=BYTE):
    return torch.tensor(rows, dtype=dtype, device=NPU)


def tnd(tokens=8, heads=2, width=16, **more):
    """The arguments of the packed layout."""
    return dict.fromkeys(("query", "key", "value"), full(tokens, heads, width)) | {
        "head_num": heads,
        "input_layout": "TND",
        "actual_seq_qlen": [3, tokens],
        "actual_seq_kvlen": [3, tokens],
        **more,
    }


def bsnd(tokens=4, heads=2, width=16, **more):
    shape = (1, tokens, heads, width)
    return dict.fromkeys(("query", "key", "value"), full(*shape)) | {"head_num": heads, **more}


FLOATS = "must be float16 or bfloat16 or float32"
HALVES = "must be float16 or bfloat16"
NOT_HERE = "is not simulated"

_q = full(1, 4, 2, 16)
_attention = {
    "query": _q,
    "key": _q,
    "value": _q,
    "head_num": 2,
    "input_layout": "BSND",
    "scale": 0.25,
    "atten_mask": CAUSAL,
    "sparse_mode": 2,
}
_both = [
    ("query", FLOATS, dict.fromkeys(("query", "key", "value"), full(1, 4, 2, 16, dtype=DOUBLE))),
    ("key", "dtype of query", {"key": _q.half()}),
    ("value", "dtype of query", {"value": _q.half()}),
    ("input_layout", "may only be", {"input_layout": "NDS"}),
    ("query", "dimensions of input_layout", {"head_num": 4}),
    ("head_num", "1 to 256", bsnd(heads=257), bsnd(heads=256)),
    ("key", "divide head_num", {"key": full(1, 4, 3, 16), "value": full(1, 4, 3, 16), "query": full(1, 4, 4, 16), "head_num": 4},
     {"key": full(1, 4, 2, 16), "value": full(1, 4, 2, 16), "query": full(1, 4, 4, 16), "head_num": 4}),
    ("query", "key's head width", bsnd(width=776), bsnd(width=768)),
    ("query", "key's head width", {"query": full(1, 4, 2, 8)}),
    ("query", "a sequence and key's batch", {"query": full(2, 4, 2, 16)}),
    ("query", "a sequence and key's batch", {"query": z(1, 2**20 + 1, 2, 16)}),
    ("query", "tokens in TND", tnd(actual_seq_qlen=[2**20 + 1]) | {"query": z(2**20 + 1, 2, 16)}),
    ("actual_seq_qlen", "cumulative lengths", tnd(actual_seq_qlen=[5, 3]), tnd(actual_seq_qlen=[8, 0], actual_seq_kvlen=[8, 0])),
    ("actual_seq_qlen", "cumulative lengths", tnd(actual_seq_qlen=[3, 7])),
    ("actual_seq_qlen", "cumulative lengths", tnd(actual_seq_qlen=None)),
    ("actual_seq_kvlen", "one for each", tnd(actual_seq_kvlen=[8])),
    ("pse, padding_mask, prefix, dropout_mask", NOT_HERE, {"pse": full(1, 2, 4, 4)}),
    ("keep_prob", "above 0", {"keep_prob": 0.0}),
    ("keep_prob", "below 1", {"keep_prob": 0.9}),
    ("inner_precise", "may only be", {"inner_precise": 3}, {"inner_precise": 2}),
    ("atten_mask", "bool or uint8", {"atten_mask": CAUSAL.float()}, {"atten_mask": CAUSAL.to(torch.uint8)}),
    ("sparse_mode", "0 to 8", {"sparse_mode": 7}),
    ("sparse_mode", "0 to 8", tnd(sparse_mode=5)),
    ("sparse_mode", "from 5 on", tnd(sparse_mode=7)),
    ("atten_mask", "2048 × 2048", {"atten_mask": CAUSAL[:8, :8]}),
    ("atten_mask", "2048 × 2048", {"sparse_mode": 0}, {"sparse_mode": 0, "atten_mask": CAUSAL[:4, :4]}),
    ("atten_mask", "triangle", {"atten_mask": CAUSAL.t()}),
    ("atten_mask", "whole row", tnd(sparse_mode=0, atten_mask=CAUSAL[:5, :5] | True)),
    ("softmax_layout", "empty, or TND", {"softmax_layout": "TND"}, tnd(softmax_layout="TND")),
    ("sink", "must be float32", {"sink": full(2, dtype=HALF)}, {"sink": full(2)}),
    ("sink", "one number a head", {"sink": full(3)}),
]  # fmt: skip

_rope = tnd(width=16) | {name: full(8, 2, 16, dtype=BRAIN) for name in ("query", "key", "value")}
_rope |= {"query_rope": full(8, 2, 8, dtype=BRAIN), "key_rope": full(8, 2, 8, dtype=BRAIN)}

_x = full(5, 3)
_w = full(2, 3, 4)
_grouped = {"x": [_x], "weight": [_w], "group_list": ints(2, 5), "split_item": 2, "group_type": 0}
_summed = {
    "input": full(2, 3, 4),
    "x": full(5, 3, dtype=BRAIN),
    "weight": full(5, 4, dtype=BRAIN),
    "group_list": ints(2, 5),
}
_add = [
    ("input", "must be float32", {"input": full(2, 3, 4, dtype=BRAIN)}),
    ("input", "must have 3 dimensions", {"input": full(2, 12)}),
    ("x", HALVES, {"x": full(5, 3), "weight": full(5, 4)}, {"x": full(5, 3, dtype=HALF), "weight": full(5, 4, dtype=HALF)}),
    ("x", "must have 2 dimensions", {"x": full(5, 3, 1, dtype=BRAIN)}),
    ("weight", "dtype of x", {"weight": full(5, 4, dtype=HALF)}),
    ("weight", "must have 2 dimensions", {"weight": full(5, 4, 1, dtype=BRAIN)}),
    ("input", "[groups, M, N]", {"x": full(3, 5, dtype=BRAIN)}),
    ("transpose_x", "may only be", {"transpose_x": False}),
    ("transpose_weight", "may only be", {"transpose_weight": True}),
    ("group_type", "may only be", {"group_type": 0}),
    ("group_list_type", "may only be", {"group_list_type": 2}, {"group_list_type": 1, "group_list": ints(2, 3)}),
    ("group_list", "must be int64", {"group_list": ints(2, 5, dtype=INT)}),
    ("group_list", "must have 1 dimensions", {"group_list": ints(2, 5)[:, None]}),
    ("group_list", "at most 1024", {"input": z(1025, 3, 4), "group_list": full(1025, dtype=LONG)}, {"input": full(1024, 3, 4), "group_list": full(1024, dtype=LONG)}),
    ("group_list", "must not fall", {"group_list": ints(3, 2)}, {"group_list": ints(2, 4)}),
    ("group_list", "must not fall", {"group_list": ints(2, 6)}),
    ("x", "last dimension below 65536", {"x": z(5, 65536, dtype=BRAIN), "input": z(2, 65536, 4)}),
    ("weight", "last dimension below 65536", {"weight": z(5, 65536, dtype=BRAIN), "input": z(2, 3, 65536)}),
]  # fmt: skip

_loss = {"input": full(4, 8, dtype=BRAIN), "weight": full(130, 8, dtype=BRAIN)}
_cut = [
    ("input", HALVES, {"input": full(4, 8), "weight": full(130, 8)}),
    ("input", "must have 2 dimensions", {"input": full(4, 1, 8, dtype=BRAIN)}),
    ("weight", "dtype of input", {"weight": full(130, 8, dtype=HALF)}),
    ("weight", "must have 2 dimensions", {"weight": full(130, 8, 1, dtype=BRAIN)}),
]
_one = full(3)
_map = bits([[1, 0, 1], [0, 1, 1]])

CALLS = {
    "npu_rms_norm": (
        {"input": full(2, 4), "gamma": full(4)},
        [
            ("input", FLOATS, {"input": full(2, 4, dtype=DOUBLE), "gamma": full(4, dtype=DOUBLE)}),
            ("input", "must have 2 to 8 dimensions", {"input": full(4)}, {"input": full(1, 1, 1, 1, 1, 1, 2, 4)}),
            ("input", "must have 2 to 8 dimensions", {"input": full(1, 1, 1, 1, 1, 1, 1, 2, 4)}),
            ("gamma", "dtype of input", {"gamma": full(4, dtype=HALF)}),
            ("gamma", "last dimensions", {"gamma": full(3)}),
        ],
    ),
    "npu_rotary_mul": (
        {"input": full(1, 5, 2, 8), "r1": full(1, 5, 1, 8), "r2": full(1, 5, 1, 8)},
        [
            ("input", FLOATS, {"input": full(1, 5, 2, 8, dtype=DOUBLE)}),
            ("r1", FLOATS, {"r1": full(1, 5, 1, 8, dtype=DOUBLE)}),
            ("r2", FLOATS, {"r2": full(1, 5, 1, 8, dtype=DOUBLE)}),
            ("input", "must have 4 dimensions", {"input": full(5, 2, 8)}),
            ("r1", "must have 4 dimensions", {"r1": full(5, 1, 8)}),
            ("r2", "must have 4 dimensions", {"r2": full(5, 1, 8)}),
            ("rotary_mode", "may only be", {"rotary_mode": "quarter"}, {"rotary_mode": "interleave"}),
            ("rotate", NOT_HERE, {"rotate": full(8, 8)}),
            ("input", "below 896", {"input": full(1, 5, 2, 896), "r1": full(1, 5, 1, 896), "r2": full(1, 5, 1, 896)},
             {"input": full(1, 5, 2, 894), "r1": full(1, 5, 1, 894), "r2": full(1, 5, 1, 894)}),
            ("input", "below 896", {"input": full(1, 5, 2, 7), "r1": full(1, 5, 1, 7), "r2": full(1, 5, 1, 7)}),
            ("r2", "r1's shape", {"r2": full(1, 1, 1, 8)}),
            ("r1", "11SD", {"r1": full(1, 3, 1, 8), "r2": full(1, 3, 1, 8)}, {"r1": full(1, 5, 2, 8), "r2": full(1, 5, 2, 8)}),
            ("r1", "11SD", {"r1": full(1, 5, 2, 8), "r2": full(1, 5, 2, 8), "rotary_mode": "interleave"}),
            ("input", "below 1000", {"input": full(1, 5, 1000, 8)}, {"input": full(1, 5, 999, 8)}),
            ("input", "below 1000", {"input": full(40, 5, 25, 8), "rotary_mode": "interleave"}, {"input": full(40, 5, 25, 8)}),
            ("r1", "gradient", {"input": full(3, 5, 999, 8), "r1": full(1, 5, 1, 8).requires_grad_()}),
            ("r1", "−1 … 1", {"r1": full(1, 5, 1, 8) + 1.1}, {"r1": full(1, 5, 1, 8) - 1}),
            ("r2", "−1 … 1", {"r2": full(1, 5, 1, 8) - 1.1}),
        ],
    ),
    "npu_swiglu": (
        {"input": full(2, 6)},
        [
            ("input", FLOATS, {"input": full(2, 6, dtype=DOUBLE)}),
            ("input", "must have 1 to 8 dimensions", {"input": full(1, 1, 1, 1, 1, 1, 1, 2, 6)}, {"input": full(6)}),
            ("input", "even along dim", {"input": full(2, 5)}, {"input": full(2, 5), "dim": 0}),
        ],
    ),
    "npu_fusion_attention": (
        _attention,
        [
            *_both,
            ("value", "must have key's shape", {"value": full(1, 4, 2, 8)}),
            ("actual_seq_qlen", "1 to 1024", tnd(1025, actual_seq_qlen=[*range(1, 1026)], actual_seq_kvlen=[*range(1, 1026)]),
             tnd(1024, actual_seq_qlen=[*range(1, 1025)], actual_seq_kvlen=[*range(1, 1025)])),
            ("pre_tockens", "agree with the mask", {"sparse_mode": 0, "atten_mask": CAUSAL[:4, :4], "next_tockens": 0}),
        ],
    ),
    "npu_fusion_attention_v2": (
        _attention,
        [
            *_both,
            ("value", "but for the head width", {"value": full(1, 3, 2, 16)}, {"value": full(1, 4, 2, 8)}),
            ("actual_seq_qlen", "1 to 2048", tnd(2049, actual_seq_qlen=[*range(1, 2050)], actual_seq_kvlen=[*range(1, 2050)])),
            ("pse_type", "may only be", {"pse_type": 4}, {"pse_type": 0}),
            ("sparse_mode", "3 must have no more", {"sparse_mode": 3, "key": full(1, 3, 2, 16), "value": full(1, 3, 2, 16)},
             {"sparse_mode": 3, "key": full(1, 5, 2, 16), "value": full(1, 5, 2, 16)}),
            ("sparse_mode", "3 must have no more", tnd(sparse_mode=3, actual_seq_kvlen=[2, 8])),
            ("query_rope", "must come with key_rope", _rope | {"key_rope": None}, _rope),
            ("query_rope", "must come with key_rope", _rope | {"atten_mask": None}),
            ("query_rope", "must come with key_rope", tnd() | {"query_rope": full(8, 2, 8), "key_rope": full(8, 2, 8)}),
            ("query_rope", "key_rope's width", _rope | {"query_rope": full(8, 2, 4, dtype=BRAIN), "key_rope": full(8, 2, 4, dtype=BRAIN)}),
            ("query_rope", "key_rope's width", _rope | {"query_rope": full(8, 2, 24, dtype=BRAIN), "key_rope": full(8, 2, 24, dtype=BRAIN)}),
            ("query_rope", "query's tokens and heads", _rope | {"query_rope": full(8, 1, 8, dtype=BRAIN)}),
            ("query_rope", "pse_type", _rope | {"pse_type": 0}),
            ("pre_tokens", "agree with the mask", {"sparse_mode": 0, "atten_mask": CAUSAL[:4, :4], "next_tokens": 0}),
        ],
    ),
    "npu_moe_token_permute": (
        {"tokens": full(3, 4), "indices": ints(1, 0, 1).view(3, 1)},
        [
            ("tokens", FLOATS, {"tokens": full(3, 4, dtype=DOUBLE)}),
            ("tokens", "must have 2 dimensions", {"tokens": full(3, 4, 1)}),
            ("indices", "int32 or int64", {"indices": full(3, 1, dtype=torch.int16)}, {"indices": full(3, 1, dtype=INT)}),
            ("indices", "1 to 2 dimensions", {"indices": full(3, 1, 1, dtype=LONG)}, {"indices": ints(1, 0, 1)}),
            ("indices", "a row a token", {"indices": ints(1, 0)}),
            ("indices", "at most 512 choices", {"indices": full(3, 513, dtype=LONG)}, {"indices": full(3, 512, dtype=LONG)}),
            ("indices", "fewer than 16777215", {"tokens": z(2**16, 4), "indices": z(2**16, 256, dtype=LONG)}),
            ("indices", "lie in 0", {"indices": ints(-1, 0, 1)}),
            ("indices", "lie in 0", {"indices": ints(16777215, 0, 1)}, {"indices": ints(16777214, 0, 1)}),
            ("padded_mode", "may only be", {"padded_mode": True}),
        ],
    ),
    "npu_moe_token_unpermute": (
        {"permuted_tokens": full(4, 3), "sorted_indices": ints(3, 0, 1, 2, dtype=INT), "probs": full(2, 2)},
        [
            ("permuted_tokens", FLOATS, {"permuted_tokens": full(4, 3, dtype=DOUBLE)}),
            ("permuted_tokens", "must have 2 dimensions", {"permuted_tokens": full(4, 3, 1)}),
            ("sorted_indices", "must be int32", {"sorted_indices": ints(3, 0, 1, 2)}),
            ("sorted_indices", "must have 1 dimensions", {"sorted_indices": ints(3, 0, 1, 2, dtype=INT)[:, None]}),
            ("sorted_indices", "one for each", {"sorted_indices": ints(1, 0, dtype=INT)}),
            ("sorted_indices", "distinct", {"sorted_indices": ints(3, 0, 0, 2, dtype=INT)}),
            ("sorted_indices", "distinct", {"sorted_indices": ints(4, 4, 4, 4, dtype=INT)}),
            ("probs", FLOATS, {"probs": full(2, 2, dtype=DOUBLE)}),
            ("probs", "must have 2 dimensions", {"probs": full(4)}),
            ("probs", "[tokens, choices]", {"probs": full(3, 2)}),
            ("probs", "at most 512", {"permuted_tokens": full(513, 3), "sorted_indices": torch.arange(513, dtype=INT, device=NPU), "probs": full(1, 513)}),
            ("padded_mode", "may only be", {"padded_mode": True}),
            ("restore_shape", "may only be", {"restore_shape": [2, 3]}),
        ],
    ),
    "npu_grouped_matmul": (
        _grouped,
        [
            ("x", "one tensor each", {"x": [_x, _x]}),
            ("x", "must be float16, bfloat16", {"x": [_x.double()], "weight": [_w.double()]}),
            ("weight", "x's dtype", {"weight": [_w.half()]}),
            ("bias, scale, offset, antiquant_scale, antiquant_offset, per_token_scale", NOT_HERE, {"bias": [full(4)]}),
            ("activation_input, activation_quant_scale, activation_quant_offset, tuning_config", NOT_HERE, {"tuning_config": [1]}),
            ("output_dtype, x_dtype, weight_dtype, scale_dtype, per_token_scale_dtype", NOT_HERE, {"output_dtype": 5}),
            ("act_type", "may only be", {"act_type": 5}),
            ("group_type", "may only be", {"group_type": 2}),
            ("group_type", "may only be", {"group_type": None}),
            ("group_type", "-1 is not", {"group_type": -1}),
            ("split_item", "2 or 3", {"split_item": 0}, {"split_item": 3}),
            ("x", "must have 2 dimensions", {"x": [full(5, 3, 1)]}),
            ("weight", "must have 3 dimensions", {"weight": [full(3, 4)]}),
            ("weight", "summed dimension", {"weight": [full(2, 4, 4)]}),
            ("x", "transposed", {"x": [full(3, 5).t()]}, {"weight": [full(2, 4, 3).transpose(1, 2)]}),
            ("x", "last dimension", {"x": [full(5, 65536)], "weight": [z(2, 65536, 1)]}),
            ("weight", "last dimension", {"weight": [full(2, 3, 65536)]}, {"weight": [full(2, 3, 65535)]}),
            ("group_list", "must be given", {"group_list": None}),
            ("group_list", "host list", {"group_list": [2, 5], "group_list_type": 0}),
            ("group_list", "must be int64", {"group_list": ints(2, 5, dtype=INT)}),
            ("group_list", "must have 1 dimensions", {"group_list": ints(2, 5)[:, None]}),
            ("group_list_type", "may only be", {"group_list_type": 2}, {"group_list_type": 1, "group_list": ints(2, 3)}),
            ("group_list", "at most 1024", {"weight": [z(1025, 3, 4)], "group_list": z(1025, dtype=LONG)},
             {"weight": [full(1024, 3, 4)], "group_list": full(1024, dtype=LONG) + 5}),
            ("group_list", "one group a weight", {"group_list": ints(2, 4, 5)}),
            ("group_list", "length 1", {"group_list": ints(5), "weight": [_w[:1]], "group_list_type": 1},
             {"group_list": ints(5), "weight": [_w[:1]]}),
            ("group_list", "must not fall", {"group_list": ints(6, 5)}, {"group_list": ints(5, 5)}),
            ("group_list", "end at x's rows", {"group_list": ints(2, 4)}),
        ],
    ),
    "npu_grouped_matmul_add_": (_summed, _add),
    "npu_grouped_matmul_add": (_summed, _add),
    "npu_apply_adam_w": (
        dict.fromkeys(("beta1_power", "beta2_power", "lr", "weight_decay", "beta1", "beta2", "epsilon"), 0.5)
        | {"grad": _one, "max_grad_norm": None, "amsgrad": False, "maximize": False, "out": [full(3), full(3), full(3)]},
        [
            ("out", "must be given", {"out": LEFT_OUT}),
            ("grad", FLOATS, {"grad": _one.double(), "out": [_one.double()] * 3}),
            ("out", "dtype of grad", {"out": [full(3), full(3), full(3, dtype=HALF)]}),
            ("out", "shape of grad", {"out": [full(3), full(3), full(4)]}),
            ("out", "1 to 8 dimensions", {"grad": full(), "out": [full(), full(), full()]}),
            ("max_grad_norm", "amsgrad", {"amsgrad": True}, {"amsgrad": True, "max_grad_norm": _one}),
        ],
    ),
    "npu_moe_token_permute_with_routing_map": (
        {"tokens": full(2, 4), "routing_map": _map, "num_out_tokens": 4, "probs": full(2, 3)},
        [
            ("tokens", FLOATS, {"tokens": full(2, 4, dtype=DOUBLE)}),
            ("tokens", "must have 2 dimensions", {"tokens": full(2, 4, 1)}),
            ("routing_map", "int8 or bool", {"routing_map": _map.int()}, {"routing_map": _map.bool()}),
            ("routing_map", "must have 2 dimensions", {"routing_map": _map[..., None]}),
            ("routing_map", "a row a token", {"routing_map": _map[:1]}),
            ("routing_map", "0 and 1", {"routing_map": _map * 2}),
            ("routing_map", "fewer than 16777215", {"routing_map": z(2, 16777215, dtype=torch.bool)}),
            ("probs", "routing_map's shape", {"probs": full(2, 2)}, {"probs": None}),
            ("probs", "tokens' dtype", {"probs": full(2, 3, dtype=HALF)}, {"tokens": full(2, 4, dtype=BRAIN)}),
            ("num_out_tokens", "0 … tokens", {"num_out_tokens": 7}),
            ("routing_map", "choices a token", {"num_out_tokens": 2}),
            ("routing_map", "choices a token", {"routing_map": bits([[1, 0, 1], [0, 1, 0]])}, {"routing_map": bits([[1, 0, 1], [0, 1, 0]]), "drop_and_pad": True}),
            ("num_out_tokens", "fewer than 16777215 rows", {"tokens": z(2**16, 1), "routing_map": z(2**16, 256, dtype=BYTE) + 1, "num_out_tokens": 2**24, "probs": None}),
        ],
    ),
    "npu_moe_token_unpermute_with_routing_map": (
        {
            "permuted_tokens": full(4, 3),
            "sorted_indices": ints(0, 2, 1, 3, dtype=INT),
            "restore_shape": [2, 3],
            "probs": full(2, 3),
            "routing_map": _map,
        },
        [
            ("permuted_tokens", FLOATS, {"permuted_tokens": full(4, 3, dtype=DOUBLE)}),
            ("permuted_tokens", "must have 2 dimensions", {"permuted_tokens": full(4, 3, 1)}),
            ("sorted_indices", "must be int32", {"sorted_indices": ints(0, 2, 1, 3)}),
            ("sorted_indices", "must have 1 dimensions", {"sorted_indices": ints(0, 2, 1, 3, dtype=INT)[:, None]}),
            ("sorted_indices", "one a row", {"sorted_indices": ints(0, 1, dtype=INT)}),
            ("restore_shape", "(tokens, hidden)", {"restore_shape": [2, 4]}),
            ("sorted_indices", "−1 … rows", {"sorted_indices": ints(0, 2, 1, 4, dtype=INT)}),
            ("sorted_indices", "−1 … rows", {"sorted_indices": ints(0, 2, 1, -2, dtype=INT)}),
            ("sorted_indices", "−1 … rows", {"sorted_indices": ints(0, -1, 1, 1, dtype=INT), "drop_and_pad": True}),
            ("probs", "with routing_map", {"routing_map": None}),
            ("routing_map", "int8 or bool", {"routing_map": _map.int()}, {"routing_map": _map.bool()}),
            ("routing_map", "as probs", {"routing_map": _map[:, :2]}),
            ("probs", "permuted_tokens' dtype", {"probs": full(2, 3, dtype=HALF)}, {"permuted_tokens": full(4, 3, dtype=BRAIN)}),
            ("sorted_indices", "capacity", {"permuted_tokens": full(9, 3), "sorted_indices": full(9, dtype=INT), "drop_and_pad": True},
             {"permuted_tokens": full(6, 3), "sorted_indices": full(6, dtype=INT), "drop_and_pad": True}),
            ("sorted_indices", "at most 512", {"permuted_tokens": full(513, 3), "sorted_indices": full(513, dtype=INT), "restore_shape": [1, 3], "probs": None, "routing_map": None}),
        ],
    ),
    "npu_moe_gating_top_k_softmax": (
        {"x": full(4, 8), "k": 2},
        [
            ("x", FLOATS, {"x": full(4, 8, dtype=DOUBLE)}),
            ("x", "must have 2 to 3 dimensions", {"x": full(8)}, {"x": full(1, 4, 8)}),
            ("finished", NOT_HERE, {"finished": full(4, dtype=torch.bool)}),
            ("k", "1 … experts", {"k": 9}, {"k": 8}),
            ("k", "at most 1024", {"x": full(1, 1030), "k": 1025}, {"x": full(1, 1030), "k": 1024}),
        ],
    ),
    "npu_moe_gating_top_k": (
        {"x": full(4, 8), "k": 2, "norm_type": 1},
        [
            ("x", FLOATS, {"x": full(4, 8, dtype=DOUBLE)}),
            ("x", "must have 2 dimensions", {"x": full(1, 4, 8)}),
            ("x", "at most 2048", {"x": full(1, 2049)}, {"x": full(1, 2048)}),
            ("input_ids, tid2eid", NOT_HERE, {"input_ids": ints(0, 0, 0, 0)}),
            ("bias", "dtype of x", {"bias": full(8, dtype=HALF)}, {"bias": full(8)}),
            ("bias", "one number an expert", {"bias": full(7)}),
            ("group_count", "groups of more than 2", {"group_count": 4}, {"group_count": 2}),
            ("group_count", "groups of more than 2", {"group_count": 3}),
            ("k_group", "1 … group_count", {"k_group": 2}),
            ("k", "of k_group groups", {"group_count": 2, "k": 5}, {"group_count": 2, "k": 5, "k_group": 2}),
            ("group_select_mode", "may only be", {"group_select_mode": 2}, {"group_select_mode": 1}),
            ("renorm", "may only be", {"renorm": 1}),
            ("norm_type", "may only be", {"norm_type": 2}, {"norm_type": 0}),
        ],
    ),
    "npu_moe_gating_top_k_backward": (
        {"x_norm": full(4, 8), "grad_y": full(4, 2), "expertIdx": full(4, 2, dtype=INT), "norm_type": 1},
        [
            ("x_norm", "must be float32", {"x_norm": full(4, 8, dtype=HALF)}),
            ("x_norm", "must have 2 dimensions", {"x_norm": full(4, 8, 1)}),
            ("x_norm", "2 to 2048", {"x_norm": full(4, 2049)}, {"x_norm": full(4, 2048)}),
            ("grad_y", FLOATS, {"grad_y": full(4, 2, dtype=DOUBLE)}, {"grad_y": full(4, 2, dtype=BRAIN)}),
            ("grad_y", "must have 2 dimensions", {"grad_y": full(4, 2, 1), "expertIdx": full(4, 2, 1, dtype=INT)}),
            ("grad_y", "contiguous", {"grad_y": full(2, 4).t()}),
            ("grad_y", "columns", {"grad_y": full(4, 9), "expertIdx": full(4, 9, dtype=INT)}),
            ("expertIdx", "must be int32", {"expertIdx": full(4, 2, dtype=LONG)}),
            ("expertIdx", "grad_y's shape", {"expertIdx": full(4, 1, dtype=INT)}),
            ("expertIdx", "contiguous", {"expertIdx": full(2, 4, dtype=INT).t()}),
            ("norm_type", "may only be", {"norm_type": 0}),
            ("renorm", "may only be", {"renorm": 1}),
        ],
    ),
    "npu_fused_linear_online_max_sum": (
        _loss | {"target": ints(0, 1, 2, 3), "vocab_start_index": 0, "vocab_end_index": 130},
        [
            *_cut,
            ("weight", "input's width", {"weight": full(130, 9, dtype=BRAIN)}),
            ("target", "int32 or int64", {"target": full(4, dtype=torch.int16)}, {"target": ints(0, 1, 2, 3, dtype=INT)}),
            ("target", "must have 1 dimensions", {"target": ints(0, 1, 2, 3)[:, None]}),
            ("target", "one a token", {"target": ints(0, 1)}),
            ("vocab_start_index", "negative", {"vocab_start_index": -1}),
            ("vocab_end_index", "below the start", {"vocab_start_index": 131}),
        ],
    ),
    "npu_fused_cross_entropy_loss_with_max_sum": (
        {"logits_max": _one, "sum_exp_logits": _one, "predicted_logits": _one},
        [
            ("logits_max", "must be float32", {"logits_max": _one.half()}),
            ("logits_max", "must have 1 dimensions", dict.fromkeys(("logits_max", "sum_exp_logits", "predicted_logits"), full(3, 1))),
            ("sum_exp_logits", "must be float32", {"sum_exp_logits": _one.half()}),
            ("predicted_logits", "must be float32", {"predicted_logits": _one.half()}),
            ("sum_exp_logits", "logits_max's shape", {"sum_exp_logits": full(2)}),
            ("predicted_logits", "logits_max's shape", {"predicted_logits": full(2)}),
            ("label_smoothing", "may only be", {"label_smoothing": 0.1}),
            ("input", "may only be", {"input": _one}),
            ("weight", "may only be", {"weight": _one}),
        ],
    ),
    "npu_fused_linear_cross_entropy_loss_with_max_sum_backward": (
        _loss | {"grad": full(4), "target_mask": full(1, dtype=torch.uint8), "masked_target": ints(0, 1, 2, 3), "softmax": full(4, 130)},
        [
            *_cut,
            ("grad", "must be float32", {"grad": full(4, dtype=HALF)}),
            ("grad", "must have 1 dimensions", {"grad": full(4, 1)}),
            ("weight", "at least 128", {"weight": full(127, 8, dtype=BRAIN)}, {"weight": full(128, 8, dtype=BRAIN), "softmax": full(4, 128)}),
            ("target_mask", "must be uint8", {"target_mask": full(1, dtype=torch.bool)}),
            ("target_mask", "must have 1 dimensions", {"target_mask": full(1, 1, dtype=torch.uint8)}),
            ("masked_target", "int32 or int64", {"masked_target": full(4, dtype=torch.int16)}),
            ("masked_target", "must have 1 dimensions", {"masked_target": ints(0, 1, 2, 3)[:, None]}),
            ("label_smoothing", "may only be", {"label_smoothing": 0.1}),
            ("softmax", "must be given", {"softmax": None}, {"softmax": None, "logits_max": full(4), "sum_exp_logits": full(4) + 130}),
        ],
    ),
    "npu_cross_entropy_loss": (
        {"input": full(4, 8), "target": ints(0, 1, 2, 3)},
        [
            ("input", FLOATS, {"input": full(4, 8, dtype=DOUBLE)}),
            ("input", "must have 2 dimensions", {"input": full(4, 8, 1)}),
            ("input", "1 to 200000", {"input": z(200_001, 8), "target": z(200_001, dtype=LONG)}),
            ("target", "must be int64", {"target": ints(0, 1, 2, 3, dtype=INT)}),
            ("target", "one a row", {"target": ints(0, 1)}),
            ("target", "0 … classes", {"target": ints(0, 1, 2, -100)}),
            ("target", "0 … classes", {"target": ints(0, 1, 2, 8)}, {"target": ints(0, 1, 2, 7)}),
            ("weight", NOT_HERE, {"weight": full(8)}),
            ("reduction", "may only be", {"reduction": "max"}, {"reduction": "none"}),
            ("ignore_index", "below the classes", {"ignore_index": 8}, {"ignore_index": 7}),
            ("label_smoothing", "without 1", {"label_smoothing": 1.0}),
            ("lse_square_scale_for_zloss", "may only be", {"lse_square_scale_for_zloss": 0.1}),
            ("return_zloss", "may only be", {"return_zloss": True}),
            ("input", "gradient", {"input": full(4, 8).requires_grad_(), "ignore_index": 0}, {"input": full(4, 8).requires_grad_()}),
        ],
    ),
}  # fmt: skip

# The functions whose page lists products, and those lists.
PRODUCTS = {
    "npu_rotary_mul": {"A2", "A3"},
    "npu_swiglu": {"A2"},
    "npu_fusion_attention": {"A2"},
    "npu_fusion_attention_v2": {"A2", "A3"},
    "npu_moe_token_permute": {"A2", "A3"},
    "npu_moe_token_unpermute": {"A2", "A3"},
    "npu_moe_token_unpermute_with_routing_map": {"A2", "A3"},
    "npu_grouped_matmul": {"A2"},
    "npu_grouped_matmul_add": {"A2", "A3"},
    "npu_grouped_matmul_add_": {"A2", "A3"},
    "npu_apply_adam_w": {"A2"},
    "npu_moe_gating_top_k_softmax": {"A2"},
    "npu_cross_entropy_loss": {"A2", "A3"},
}
