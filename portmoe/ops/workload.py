"""The shapes and types of one call of an operation: what an implementation decides by."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Workload:
    """One call site: what one rank gives one operation there, per micro-batch, known before the first step.

    Every operation reads the fields its contract names: at the site of a linear map, ``hidden`` is the width
    that comes in and ``ffn_width`` the one that goes out; at that of a norm, ``hidden`` is the row's width.
    """

    device: torch.device
    dtype: torch.dtype  # of activations and of the weights used in products
    tokens: int  # S: rows the operation is given
    seq_len: int
    hidden: int  # H
    heads: int  # N
    head_dim: int  # D
    ffn_width: int  # F
    vocab: int  # V: classes on this rank
    experts: int  # E: those scored, of a router and a gate; those on this rank, of the experts' networks
    top_k: int  # K
    capacity: int  # C: rows of each expert; 0 where the buffer is ragged
    equal_segments: bool  # every segment of a pack has seq_len tokens
    qk_interleaved: bool = False
    rotary_magnitude: float = 1.0  # that the rotary tables' cosines and sines reach
    random_drops: bool = False  # the gating draws which tokens an expert keeps
    kv_heads: int | None = None  # heads of k and v; None: as many as q has
    value_dim: int | None = None  # Dv, the width of v's heads; None: D
    log_sum: bool = False  # attention's result is to be put together with others
    vocab_parts: int = 1  # ranks the classes are cut over
    rows: int | None = None  # R, of the experts' ragged buffer; None: K·S
    dropless: bool = False  # of a ragged buffer: each choice has a row, and each row a choice


# Operation → site → its workload there; "" is an operation's default site. What is missing is not called.
CallSites = Mapping[str, Mapping[str, Workload]]
