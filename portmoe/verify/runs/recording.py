"""Recording every operation of a training step: what it was given, what it gave, what came back to it.

Besides the operations of the table this is the embedding, which torch looks up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from portmoe.model.vocabulary import Embedding
from portmoe.ops import OPERATIONS, OpTable
from portmoe.ops.operation import Operation, Sample, rounding
from portmoe.ops.workload import Workload
from portmoe.verify.backend.calls import named_outputs


def _none(workload: Workload, generator: torch.Generator) -> Sequence[Sample]:
    return []


def _embedding(tokens_T: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    return F.embedding(tokens_T, weight_VH)


# A row of its gradient adds those of all its tokens, in any order.
EMBEDDING = Operation("embedding", _embedding, _none, rounding(4, sums=16))

PLAIN = {operation.name: operation for operation in (EMBEDDING,)}


@dataclass
class Call:
    """One call of an operation inside the model.

    Attributes:
        place: the module that made it, as in "layers.0.attention", or "decoder" itself.
        site: the call site of the operations in that module.
        sample: its arguments, detached; those that were differentiable require gradients.
        outputs: the tensors it returned, detached, by name.
        upstream: the gradients that came back to them; nothing where none did.
    """

    place: str
    operation: Operation
    sample: Sample
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    upstream: dict[str, torch.Tensor] = field(default_factory=dict)
    site: str = ""

    @property
    def name(self) -> str:
        """The place and the operation, as in "layers.0.attention: rotary"."""
        return f"{self.place}: {self.operation.name}"


class Recorder:
    """Puts itself between a model and its operations, and keeps every call in order."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Call] = []
        self._begun: Call | None = None  # a plain operation, while its module computes it
        for place, module in model.named_modules():
            tables = {name: value for name, value in vars(module).items() if isinstance(value, OpTable)}
            for name, ops in tables.items():
                setattr(module, name, ops.wrapped(partial(self._recorded, place or "decoder", ops.site)))
            if type(module) in _PLAIN:
                module.register_forward_pre_hook(partial(self._before, place), with_kwargs=True)
                module.register_forward_hook(self._after)

    def _recorded(
        self, place: str, site: str, op: str, chosen_for: str, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sample = _kept(Sample(place, args, kwargs))
            result = function(*args, **kwargs)
            self._add(Call(place, OPERATIONS[op], sample, site=site), result)
            return result

        return call

    def _before(self, place: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        operation, *arguments = _PLAIN[type(module)](module, *args, **kwargs)
        self._begun = Call(place, operation, _kept(Sample(place, tuple(arguments))))

    def _after(self, module: nn.Module, args: tuple, result: Any) -> None:
        self._add(self._begun, result)

    def _add(self, made: Call, result: Any) -> None:
        for name, tensor in named_outputs(result).items():
            made.outputs[name] = tensor.detach()
            if tensor.requires_grad:
                tensor.register_hook(partial(made.upstream.__setitem__, name))
        self.calls.append(made)


def _embedding_of(module: nn.Embedding, tokens_T: torch.Tensor) -> tuple:
    return EMBEDDING, tokens_T, module.weight


# A module that computes one plain operation: that operation, and its arguments.
_PLAIN: dict[type, Callable[..., tuple]] = {
    Embedding: _embedding_of,
}


def _kept(sample: Sample) -> Sample:
    """The arguments as they are now, without the graph they hang in. A generator is about to be used up."""

    def keep(leaf: Any) -> Any:
        if isinstance(leaf, torch.Generator):
            return leaf.clone_state()
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().requires_grad_(leaf.requires_grad)
        return leaf

    args, kwargs = tree_map(keep, (sample.args, sample.kwargs))
    return Sample(sample.label, args, kwargs)
