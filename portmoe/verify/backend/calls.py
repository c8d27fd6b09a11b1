"""Calling one function on one sample and collecting all it produces, by name."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map

from portmoe.accelerator.interface import is_host
from portmoe.ops.operation import Operation, Sample


@dataclass(frozen=True)
class Results:
    """All that a call produced.

    Attributes:
        outputs: the tensors returned.
        written: the arguments that are not differentiated, as the call left them.
        grads: the gradient of every differentiable argument; zeros where none flowed.
        kept: the differentiable arguments as the call left them.
    """

    outputs: dict[str, torch.Tensor]
    written: dict[str, torch.Tensor]
    grads: dict[str, torch.Tensor]
    kept: dict[str, torch.Tensor]

    def compared(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything that must agree with the control."""
        for group in (self.outputs, self.written, self.grads):
            yield from group.items()

    def same_bits(self, other: "Results") -> bool:
        """Whether both hold the same numbers to the last bit."""
        pairs = zip(self.compared(), other.compared(), strict=True)
        return all(a == b and identical(x, y) for (a, x), (b, y) in pairs)


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same shape, dtype and values; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def copied(sample: Sample, dtype: torch.dtype | None, device: torch.device, *, apart: bool = False) -> Sample:
    """A sample of its own memory: floating-point tensors in ``dtype`` (None: their own), on ``device``.

    Tensors keep their strides. ``apart``: the rows of differentiable tensors lie apart in memory, with NaN in
    between; as slices of a wider tensor do, they start at multiples of 16 bytes.
    """

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, torch.Generator):
            return leaf.clone_state()
        if not isinstance(leaf, torch.Tensor):
            return leaf
        wanted = dtype if dtype and leaf.is_floating_point() else leaf.dtype
        fresh = laid_alike(leaf.detach(), device, wanted)
        if apart and leaf.requires_grad:
            fresh = _spread(fresh)
        return fresh.requires_grad_(leaf.requires_grad)

    args, kwargs = tree_map(copy, (sample.args, sample.kwargs))
    return Sample(sample.label, args, kwargs)


def laid_alike(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A copy with the same strides: gaps are gaps, and an expanded dimension has one place in memory."""
    once = tensor
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            once = once.narrow(dimension, 0, 1)
    extent = 1 + sum((n - 1) * s for n, s in zip(once.shape, once.stride(), strict=True) if n)
    memory = torch.zeros(extent, dtype=dtype, device=device)
    fresh = memory.as_strided(once.shape, once.stride()) if once.numel() else memory.new_empty(once.shape)
    return fresh.copy_(once.to(device)).expand(tensor.shape)


def _spread(dense: torch.Tensor) -> torch.Tensor:
    if dense.dim() == 0:
        return dense
    wide = dense.new_full((*dense.shape[:-1], dense.shape[-1] + 16), torch.nan)
    inner = wide[..., 8 : 8 + dense.shape[-1]]
    inner.copy_(dense)
    return inner.detach()


def call(
    operation: Operation,
    function: Callable[..., Any],
    sample: Sample,
    seed: int = 0,
    *,
    expanded: bool = False,
    upstream: Mapping[str, torch.Tensor] | None = None,
) -> Results:
    """Run forward and backward.

    The gradient handed to each output depends on ``seed`` and the output alone; ``expanded``: it is the
    same along the last dimension, with one place in memory for all of it. ``upstream``: these gradients
    by the output's name instead, and none for other outputs.
    """
    outputs = named_outputs(function(*sample.args, **sample.kwargs))
    arguments = dict(named_arguments(operation, sample))
    leaves = {name: t for name, t in arguments.items() if t.requires_grad}
    sources = {name: t for name, t in outputs.items() if t.requires_grad}
    grads = {f"gradient of {name}": torch.zeros_like(t) for name, t in leaves.items()}
    if upstream is not None:
        sources = {name: t for name, t in sources.items() if name in upstream}
    if sources and leaves:
        if upstream is None:
            given = [_downstream(t, number, seed, expanded) for number, t in enumerate(outputs.values())]
            wanted = [d for d, t in zip(given, outputs.values(), strict=True) if t.requires_grad]
        else:
            wanted = [laid_alike(upstream[name], t.device, t.dtype) for name, t in sources.items()]
        found = torch.autograd.grad(
            list(sources.values()), list(leaves.values()), wanted, allow_unused=True, materialize_grads=True
        )
        grads = dict(zip(grads, found, strict=True))
    return Results(
        outputs={name: t.detach() for name, t in outputs.items()},
        written={f"{name} afterwards": t for name, t in arguments.items() if name not in leaves},
        grads=grads,
        kept={name: t.detach() for name, t in leaves.items()},
    )


def _downstream(output: torch.Tensor, number: int, seed: int, expanded: bool) -> torch.Tensor:
    """Values that every floating-point type holds exactly: multiples of 1/8 in −2 … 2.

    A few are all different: equal ones for both weights of a token would cancel and leave rounding alone.
    """
    generator = torch.Generator().manual_seed(1000 * seed + number)
    shape = torch.Size((*output.shape[:-1], 1)) if expanded and output.dim() else output.shape
    if shape.numel() <= 33:
        values = torch.randperm(33, generator=generator)[: shape.numel()].view(shape).sub(16).div(8)
    else:
        values = torch.randint(-16, 17, shape, generator=generator).div(8)
    return values.to(output.device, output.dtype).expand(output.shape)


def named_outputs(produced: Any) -> dict[str, torch.Tensor]:
    """What a call returned, by name; numbers beside tensors, as ``Routing.capacity`` is one, as tensors."""
    produced = tree_map(lambda leaf: torch.tensor(leaf) if isinstance(leaf, int) else leaf, produced)
    return {f"output{keystr(path)}": tensor for path, tensor in _tensors(produced)}


def _tensors(tree: Any) -> list[tuple[Any, torch.Tensor]]:
    return [(path, leaf) for path, leaf in tree_flatten_with_path(tree)[0] if isinstance(leaf, torch.Tensor)]


def named_arguments(operation: Operation, sample: Sample) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor among the arguments, named as the contract names it."""
    bound = inspect.signature(operation.reference).bind(*sample.args, **sample.kwargs).arguments
    for name, value in bound.items():
        for path, tensor in _tensors(value):
            yield f"{name}{keystr(path)}", tensor


def on_host(results: Sequence[Results], device: torch.device) -> list[Results]:
    """The same results in the host's memory, brought from ``device`` by one copy, which is waited for."""
    if is_host(device.type):
        return list(results)
    tensors = {id(t): t for t in tree_leaves([vars(r) for r in results]) if not is_host(t.device.type)}
    pieces = [_bytes(tensor) for tensor in tensors.values()]
    together = torch.cat(pieces).cpu() if pieces else torch.empty(0, dtype=torch.uint8)
    brought = dict(zip(tensors, together.split([piece.numel() for piece in pieces]), strict=True))

    def here(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in brought:
            return tensor
        size = tensor.numel() * tensor.element_size()
        return brought[id(tensor)][:size].view(tensor.dtype).view(tensor.shape)

    return [Results(**tree_map(here, vars(r))) for r in results]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor's numbers as bytes, filled up so that the next one begins where any dtype may."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % 16))


def poison(results: Results, device: torch.device) -> None:
    """Leave memory of the sizes just used full of NaN, for the next call to find."""
    sizes = {t.numel() * t.element_size() for t in tree_leaves(vars(results)) if isinstance(t, torch.Tensor)}
    sizes |= {2**power for power in range(6, 19)}
    # NaN in every floating-point type when all bits are set, and −1 as an integer.
    blocks = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes for _ in range(3)]
    blocks.clear()
