"""What a model is made of, in sizes: the one description that everything else is derived from.

A family writes it from the keys of a config. Modules, numbers of parameters, FLOPs, memory, cuts over ranks
and the shapes operations are chosen by follow from it. How a model is trained (dtype, recomputation,
pipeline chunks) is no part of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of the full width of queries and keys (Su et al. 2021, arXiv:2104.09864)."""

    base: float
    interleaved: bool = False  # pairs of neighbours, instead of halves


@dataclass(frozen=True)
class Attention:
    """Causal attention with grouped heads: ``heads`` / ``kv_heads`` queries share a key and a value."""

    heads: int
    kv_heads: int
    head_dim: int  # of a query and a key; the scores are divided by its square root
    value_dim: int
    bias: bool  # of the projections to queries, keys and values
    out_bias: bool
    rotary: Rotary

    @property
    def group(self) -> int:
        """Queries that share a key."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Dense:
    """A SwiGLU network, w2(silu(w1 x) · w3 x)."""

    width: int


@dataclass(frozen=True)
class Gate:
    """How tokens choose experts, in the terms of ``ops.topk_gating`` and ``ops.megablock_gating``."""

    kind: Literal["topk", "megablock"]
    top_k: int
    capacity_factor: float = 1.0
    eval_capacity_factor: float = 1.0
    min_capacity: int = 0
    dropless: bool = False  # every choice is computed, in groups of unequal size
    drop_tokens: bool = True
    use_rts: bool = False
    noise: Literal["Jitter", "RSample"] | None = None
    use_fused_gating: bool = True

    @property
    def random_drops(self) -> bool:
        """Whether it is drawn which tokens an expert keeps."""
        return self.use_rts and self.drop_tokens and self.top_k == 1


@dataclass(frozen=True)
class Experts:
    """``count`` SwiGLU networks, of which a token passes ``gate.top_k``, and what every token passes."""

    count: int
    width: int
    gate: Gate
    shared: Dense | None = None  # its output is added to the experts'
    residual: Dense | None = None  # its output and the experts' are mixed by learned coefficients


@dataclass(frozen=True)
class Layer:
    """x + attention(norm(x)), then x + network(norm(x))."""

    attention: Attention
    network: Dense | Experts


@dataclass(frozen=True)
class Initial:
    """Standard deviations of the normally drawn initial weights."""

    projection: float
    router: float
    vocabulary: float  # embedding and head
    by_depth: bool = False  # what writes to the residual stream is divided by sqrt(2 · (layer + 1))


@dataclass(frozen=True)
class Architecture:
    """A decoder: embedding, layers, final norm, head.

    Attributes:
        nominal_ratio: feed-forward width over hidden width, as the benchmark's counting of FLOPs takes it.
        keys: quantity ("heads", "kv_heads", "width", "experts", "top_k", "layers", "vocabulary") → the config
            key that sets it, for messages.
    """

    vocabulary: int
    hidden: int
    layers: tuple[Layer, ...]
    norm_epsilon: float
    initial: Initial
    nominal_ratio: float
    exact_norms: bool = False  # norms compute with float32 gains and inputs in every dtype
    embedding_gradient: float = 1.0  # scales the embedding's gradient
    keys: Mapping[str, str] = field(default_factory=dict, compare=False, hash=False)

    @cached_property
    def expert_layers(self) -> tuple[Experts, ...]:
        """The networks of the layers that have experts."""
        return tuple(layer.network for layer in self.layers if isinstance(layer.network, Experts))

    @property
    def experts(self) -> int:
        """The most experts a layer has; 1 where every layer is dense."""
        return max((network.count for network in self.expert_layers), default=1)

    @property
    def heads(self) -> dict[str, int]:
        """The numbers of heads that ranks which share a layer must divide, by quantity of ``keys``."""
        common = {"heads": 0, "kv_heads": 0}
        for layer in dict.fromkeys(self.layers):
            common["heads"] = math.gcd(common["heads"], layer.attention.heads)
            common["kv_heads"] = math.gcd(common["kv_heads"], layer.attention.kv_heads)
        return common

    @property
    def widths(self) -> set[int]:
        """The widths of all feed-forward networks."""
        found = set()
        for layer in self.kinds:
            network = layer.network
            found.add(network.width)
            if isinstance(network, Experts):
                found |= {inner.width for inner in (network.shared, network.residual) if inner is not None}
        return found

    @cached_property
    def kinds(self) -> dict[Layer, list[int]]:
        """Each different layer and the places it has in the model."""
        places: dict[Layer, list[int]] = {}
        for place, layer in enumerate(self.layers):
            places.setdefault(layer, []).append(place)
        return places

    def kind_name(self, layer: Layer) -> str:
        """What call sites in layers of this kind are named after: "" for the first kind, else a place."""
        first = self.kinds[layer][0]
        return f"layer {first}" if first else ""
