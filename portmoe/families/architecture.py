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
class Yarn:
    """Slower rotation of the pairs that turn slowest (Peng et al. 2023, arXiv:2309.00071).

    Attributes:
        factor: how much longer contexts are than ``original``, which the model was first trained with.
        fast, slow: rotations within ``original`` from which on a pair keeps its frequency, and up to which it
            turns ``factor`` times as slowly; between them both are mixed.
        magnitude: multiplies cosine and sine.
    """

    factor: float
    original: int
    fast: float
    slow: float
    magnitude: float


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of queries and keys (Su et al. 2021, arXiv:2104.09864)."""

    base: float
    interleaved: bool = False  # pairs of neighbours, instead of halves
    yarn: Yarn | None = None

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0 if self.yarn is None else self.yarn.magnitude


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
    norm_epsilon: float | None = None  # of the norm of each head's query and key; None: they are not normed

    @property
    def rotary_dim(self) -> int:
        """How much of a head's width is turned."""
        return self.head_dim

    @property
    def group(self) -> int:
        """Queries that share a key."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class LatentAttention:
    """Causal attention with keys and values expanded from one latent (DeepSeek-AI 2024, arXiv:2405.04434).

    Of a query and a key ``plain_dim`` numbers are each head's own and ``turned_dim`` carry the position; the
    key's are the same in every head.
    """

    heads: int
    query_rank: int | None  # of the queries' latent; None: they have none
    latent_rank: int
    plain_dim: int
    turned_dim: int
    value_dim: int
    rotary: Rotary
    scale: float  # of the scores
    norm_epsilon: float  # of the latents' norms

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: every query has its own."""
        return self.heads

    @property
    def head_dim(self) -> int:
        """The width of a query and a key."""
        return self.plain_dim + self.turned_dim

    @property
    def rotary_dim(self) -> int:
        """How much of a head's width is turned."""
        return self.turned_dim


@dataclass(frozen=True)
class Dense:
    """A SwiGLU network, w2(silu(w1 x) · w3 x)."""

    width: int


@dataclass(frozen=True)
class Gate:
    """How tokens choose experts, in the terms of the operation ``<kind>_gating``."""

    kind: Literal["topk", "megablock", "softmax"]
    top_k: int
    capacity_factor: float | None = 1.0
    eval_capacity_factor: float | None = 1.0
    min_capacity: int = 0
    normalise: bool = False
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    jitter: float = 0.0  # in training what enters the network is multiplied by U(1 − jitter, 1 + jitter)
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
    shared_gate: bool = False  # the shared network's output is multiplied by sigmoid of a linear map
    residual: Dense | None = None  # its output and the experts' are mixed by learned coefficients


@dataclass(frozen=True)
class Balance:
    """How evenly the load lies on the experts, as terms of the loss; see ``model.balance``.

    Attributes:
        over: what is averaged before the product of an expert's share of the choices and its mean score.
        coefficient: of the balance loss, which is summed over the layers.
        z: coefficient of the routers' z-loss; 0: it is not computed.
    """

    over: Literal["gate", "first choice", "layer", "sequence", "model", "none"] = "none"
    coefficient: float = 0.0
    z: float = 0.0


@dataclass(frozen=True)
class Layer:
    """x + attention(norm(x)), then x + network(norm(x))."""

    attention: Attention | LatentAttention
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
    balance: Balance = Balance()
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
