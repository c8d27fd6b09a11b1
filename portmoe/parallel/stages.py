"""Which layers each pipeline stage holds, and how much of a step its rank waits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from portmoe.config import Config
from portmoe.costs.flops import head_forward_flops, layer_forward_flops
from portmoe.costs.parameters import (
    ParameterCount,
    count_parameters,
    embedding_parameters,
    head_parameters,
    layer_parameters,
)
from portmoe.parallel.layout import Layout


@dataclass(frozen=True)
class Stage:
    """A part of the decoder: layers that follow each other, and its ends.

    ``number`` counts from 0 over all stages of the model; ``model.num_chunks`` of them are on each rank.
    """

    number: int
    layers: Sequence[int]
    embed: bool  # holds the embedding
    head: bool  # holds the final norm, the head and the loss


def split_stages(config: Config) -> list[Stage]:
    """All stages of the model, in order.

    The cost of a layer, of the embedding (in the first stage) and of the head (in the last) is the mean of
    its share of the model's parameters, which is memory, and of its FLOPs, which is time. Of all splits the
    one is taken whose dearest stage is cheapest, and of those the one most even by squares.
    """
    number = config.parallel.pipeline.size * config.model.num_chunks
    embedding, layers, head = costs(config)
    layers[0] += embedding
    layers[-1] += head
    ends = _most_even(layers, number)
    starts = [0, *ends[:-1]]
    return [
        Stage(n, range(first, end), embed=n == 0, head=n == number - 1)
        for n, (first, end) in enumerate(zip(starts, ends, strict=True))
    ]


def stages_of(config: Config, rank: int) -> list[Stage]:
    """The stages rank ``rank`` of the pipeline holds: every ``parallel.pipeline.size``-th."""
    return split_stages(config)[rank :: config.parallel.pipeline.size]


def rank_parameters(config: Config, rank: int) -> ParameterCount:
    """Numbers of the parameters rank ``rank`` of the pipeline holds; without a pipeline of all there are."""
    model, count = config.architecture, ParameterCount()
    for stage in stages_of(config, rank):
        if stage.embed:
            count += embedding_parameters(model)
        for kind, number in Counter(model.layers[place] for place in stage.layers).items():
            count += layer_parameters(model, kind) * number
        if stage.head:
            count += head_parameters(model)
    return count


def fullest_rank(config: Config) -> int:
    """The rank of the pipeline that holds most parameters."""
    return max(range(config.parallel.pipeline.size), key=lambda rank: rank_parameters(config, rank).total)


def in_flight(layout: Layout, num_chunks: int, rank: int) -> int:
    """How many (micro-batch, stage) pairs rank ``rank`` of the pipeline holds activations of at once.

    Its forward passes before the first backward pass, and the one that begins each pair after.
    """
    rounds = layout.micro_num // layout.pipeline
    behind = layout.pipeline - 1 - rank
    warm_up = behind if num_chunks == 1 else (num_chunks - 1) * (layout.micro_num // rounds) + 2 * behind
    return min(warm_up + 1, num_chunks * layout.micro_num)


def bubble(layout: Layout, num_chunks: int) -> float:
    """The share of a step that each rank waits for others, if all stages take equally long.

    (p − 1) / (v·m + p − 1) for p ranks, v stages on each and m micro-batches, whatever a backward pass takes
    beside a forward pass (Narayanan et al. 2021, arXiv:2104.04473).
    """
    waiting = layout.pipeline - 1
    return waiting / (num_chunks * layout.micro_num + waiting)


def describe(config: Config, layout: Layout) -> str:
    """The schedule, what each rank holds, and the bubble, in one line."""
    chunks, size = config.model.num_chunks, layout.pipeline
    overlap = "" if config.parallel.pipeline.interleaved_overlap else "not "
    interleaved = f"interleaved 1F1B, {chunks} stages per rank, communication {overlap}overlapped"
    name = interleaved if chunks > 1 else "1F1B"
    ranks = [" + ".join(map(_span, split_stages(config)[rank::size])) for rank in range(size)]
    share = f"bubble {bubble(layout, chunks):.1%} of a step"
    return f"{name}; {share}; layers {' | '.join(ranks)}"


def _span(stage: Stage) -> str:
    first, last = stage.layers[0], stage.layers[-1]
    return f"{first}–{last}" if last > first else str(first)


def costs(config: Config) -> tuple[float, list[float], float]:
    """Costs of the embedding, of each layer and of the head; they add up to 1."""
    model, recomputed = config.architecture, config.recomputed_layers
    parameters = {kind: layer_parameters(model, kind).total for kind in model.kinds}
    forward = {kind: layer_forward_flops(config, kind, causal=True) for kind in model.kinds}
    total = count_parameters(config).total
    flops = [(4 if place < recomputed else 3) * forward[kind] for place, kind in enumerate(model.layers)]
    head_flops = 3 * head_forward_flops(config)
    all_flops = sum(flops) + head_flops
    layers = [
        (parameters[kind] / total + work / all_flops) / 2
        for kind, work in zip(model.layers, flops, strict=True)
    ]
    head = (head_parameters(model).total / total + head_flops / all_flops) / 2
    return embedding_parameters(model).total / total / 2, layers, head


def _most_even(layers: list[float], parts: int) -> list[int]:
    """The ends of ``parts`` runs of layers, none empty, by dynamic programming."""
    best: list[tuple[float, float, tuple[int, ...]] | None] = [(0.0, 0.0, ())] + [None] * len(layers)
    for part in range(1, parts + 1):
        following: list[tuple[float, float, tuple[int, ...]] | None] = [None] * (len(layers) + 1)
        for end in range(part, len(layers) - (parts - part) + 1):
            cost = 0.0
            for start in range(end - 1, part - 2, -1):
                cost += layers[start]
                found = following[end]
                if found is not None and cost > found[0]:
                    break  # a longer part costs only more
                before = best[start]
                if before is None:
                    continue
                candidate = (max(before[0], cost), before[1] + cost * cost, (*before[2], end))
                if found is None or candidate < found:
                    following[end] = candidate
        best = following
    return list(best[len(layers)][2])
