"""The shapes and types a run gives its operations: what an implementation decides by."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Workload:
    """One rank's work per micro-batch, known before the first step."""

    device: torch.device
    dtype: torch.dtype  # of activations and of the weights used in products
    tokens: int  # S: tokens of a micro-batch on this rank
    seq_len: int
    hidden: int  # H
    heads: int  # N
    head_dim: int  # D
    ffn_width: int  # F
    vocab: int  # V
    experts: int  # E, on this rank
    top_k: int  # K
    capacity: int  # C; 0 where the layer is dropless
    equal_segments: bool  # every segment of a pack has seq_len tokens
    qk_interleaved: bool = False
    random_drops: bool = False  # the gating draws which tokens an expert keeps
