"""What a family's ``hf`` says of its format on the hub: how its weights lie there, and its config.json.

One table of tensors serves both ways, in and out. Without torch, as all of the config is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from portmoe.families.architecture import Architecture, Attention, Dense, Layer


@dataclass(frozen=True)
class Run:
    """Rows that follow each other, in a tensor of the hub and in a parameter of ours.

    Attributes:
        tensor: its name on the hub.
        shape: the hub tensor's. With one dimension fewer than the parameter's, it is one index of the
            parameter's first dimension.
        there: its first row in the hub's tensor.
        here: its first row in the parameter.
        length: number of rows.
    """

    tensor: str
    shape: tuple[int, ...]
    there: int
    here: int
    length: int


@dataclass(frozen=True)
class Rows:
    """A parameter whose first dimension holds rows of several tensors, in ``groups`` equal turns.

    In each turn every tensor gives as many rows as it says; one turn is a plain concatenation.
    """

    groups: int
    rows: Mapping[str, int]  # hub tensor → its rows in each turn

    def runs(self, shape: Sequence[int]) -> Iterator[Run]:
        """Yield what a parameter of ``shape`` is made of."""
        turn = sum(self.rows.values())
        if turn * self.groups != shape[0]:
            raise ValueError(f"{self.groups} times {turn} rows are not the {shape[0]} of {list(shape)}")
        before = 0
        for tensor, rows in self.rows.items():
            whole = (self.groups * rows, *shape[1:])
            for group in range(self.groups):
                yield Run(tensor, whole, group * rows, group * turn + before, rows)
            before += rows


@dataclass(frozen=True)
class Same:
    """A parameter that is one tensor."""

    tensor: str

    def runs(self, shape: Sequence[int]) -> Iterator[Run]:
        """Yield the one run of all rows."""
        yield Run(self.tensor, tuple(shape), 0, 0, shape[0])


@dataclass(frozen=True)
class Stack:
    """A parameter whose first dimension counts tensors."""

    tensors: tuple[str, ...]

    def runs(self, shape: Sequence[int]) -> Iterator[Run]:
        """Yield each tensor."""
        if len(self.tensors) != shape[0]:
            raise ValueError(f"{len(self.tensors)} tensors are not the {shape[0]} of {list(shape)}")
        for number, tensor in enumerate(self.tensors):
            yield Run(tensor, tuple(shape[1:]), 0, number, 1)


Made = Same | Rows | Stack
Allowed = Callable[[Any, Mapping[str, Any]], bool]  # (a value, all of config.json) → whether it can be


@dataclass(frozen=True)
class Hub:
    """A family's format on the hub.

    Attributes:
        architecture: the class config.json names.
        layer: (a layer, what its tensors' names begin with) → parameter of a block → what it is made of.
        absent: key of the ``model`` section → what a config.json without it means. All others must be there.
        renamed: key of config.json → the ``model`` key it is another name of.
        fixed: key of config.json that the section does not have, or knows less of → whether a value can be.
        free: keys of the ``model`` section that are no part of what the weights are: a config may set them
            otherwise than the folder.
    """

    architecture: str
    layer: Callable[[Layer, str], Mapping[str, Made]]
    absent: Mapping[str, Any]
    renamed: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Allowed] = field(default_factory=dict)
    free: frozenset[str] = frozenset()

    def made(self, architecture: Architecture) -> dict[str, Made]:
        """Parameter of the whole model → what it is made of."""
        found: dict[str, Made] = {"embedding.weight": Same("model.embed_tokens.weight")}
        for place, layer in enumerate(architecture.layers):
            at = f"model.layers.{place}"
            inner = {
                "attention_norm.weight": Same(f"{at}.input_layernorm.weight"),
                "feed_forward_norm.weight": Same(f"{at}.post_attention_layernorm.weight"),
                **self.layer(layer, at),
            }
            found |= {f"layers.{place}.{name}": made for name, made in inner.items()}
        return found | {"norm.weight": Same("model.norm.weight"), "head.weight": Same("lm_head.weight")}


def grouped_attention(sizes: Attention, at: str) -> dict[str, Made]:
    """The parameters of an attention whose first projection holds one key head after the other."""
    widths = {"q": sizes.group * sizes.head_dim, "k": sizes.head_dim, "v": sizes.value_dim}
    found: dict[str, Made] = {"attention.out.weight": Same(f"{at}.self_attn.o_proj.weight")}
    for leaf in ("weight", "bias") if sizes.bias else ("weight",):
        rows = {f"{at}.self_attn.{role}_proj.{leaf}": width for role, width in widths.items()}
        found[f"attention.qkv.{leaf}"] = Rows(sizes.kv_heads, rows)
    if sizes.out_bias:
        found["attention.out.bias"] = Same(f"{at}.self_attn.o_proj.bias")
    if sizes.norm_epsilon is not None:
        for role in ("q", "k"):
            found[f"attention.{role}_norm.weight"] = Same(f"{at}.self_attn.{role}_norm.weight")
    return found


SWIGLU = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def feed_forward(ours: str, theirs: str) -> dict[str, Made]:
    """The parameters of a dense network."""
    return {f"{ours}.{w}.weight": Same(f"{theirs}.{name}.weight") for w, name in SWIGLU.items()}


def experts(count: int, theirs: str, names: Mapping[str, str] = SWIGLU) -> dict[str, Made]:
    """The parameters of a layer's router and of its experts."""
    found: dict[str, Made] = {"moe.router.weight": Same(f"{theirs}.gate.weight")}
    for w, name in names.items():
        found[f"moe.experts.{w}"] = Stack(tuple(f"{theirs}.experts.{e}.{name}.weight" for e in range(count)))
    return found


def network(layer: Layer, at: str, shared: str = "") -> dict[str, Made]:
    """The parameters of a layer's network by the names most families have.

    Args:
        shared: what the network beside the experts is called.
    """
    sizes = layer.network
    if isinstance(sizes, Dense):
        return feed_forward("feed_forward", f"{at}.mlp")
    found = experts(sizes.count, f"{at}.mlp")
    if sizes.shared is not None:
        found |= feed_forward("moe.shared", f"{at}.mlp.{shared}")
    if sizes.shared_gate:
        found["moe.shared_gate.weight"] = Same(f"{at}.mlp.{shared}_gate.weight")
    return found


# What config.json need not say, in every published family.
ABSENT: Mapping[str, Any] = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rope_scaling": None,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "use_sliding_window": False,
}
FREE = frozenset({"initializer_range", "max_position_embeddings", "router_aux_loss_coef"})
