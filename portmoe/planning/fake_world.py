"""One rank of a world of any size, in this process alone and without memory or messages.

The mesh, the sharded model and its forward and backward passes are the real ones, on process groups that
move nothing and on tensors that hold nothing (torch's fake process group and fake tensors). What the rank
would communicate in a step is so counted instead of derived, for any layout. Layers of one kind communicate
alike: of each kind one layer and then two are run, and the difference is taken as often as there are more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)

from portmoe.config import Config
from portmoe.data.batch import Batch
from portmoe.families.architecture import Layer
from portmoe.model import balance
from portmoe.model.decoder import Decoder, StageOutput
from portmoe.model.precision import compute_dtype
from portmoe.model.share import FP32_BYTES
from portmoe.ops import OPERATIONS, OpTable, Routing, Segments
from portmoe.parallel import zero
from portmoe.parallel.build import build
from portmoe.parallel.layout import Layout
from portmoe.parallel.mesh import Meshes, build_meshes
from portmoe.parallel.stages import Stage, fullest_rank, split_stages, stages_of
from portmoe.parallel.tensor import Region, sum_gradients
from portmoe.planning.traffic import Counted, Traffic


@dataclass(frozen=True)
class RankTraffic:
    """What one rank communicates in a training step.

    ``messages`` are (kind, group, calls, bytes); None: they depend on the data.
    """

    rank: int
    messages: list[tuple[str, str, int, int]] | None


def measure(config: Config, layout: Layout) -> RankTraffic:
    """The traffic of the first rank of the pipeline stage that holds most parameters.

    Not in it are the few numbers the ranks exchange on the host, norms and metrics.
    """
    rank = fullest_rank(config) * (layout.world // layout.pipeline)
    with _fake_group(rank, layout.world):
        meshes = build_meshes(layout, "cpu")
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                messages = list(_step(config, layout, meshes).rows(meshes))
        except (DataDependentOutputException, DynamicOutputShapeException):
            messages = None
    return RankTraffic(rank, messages)


@contextmanager
def _fake_group(rank: int, world: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _table(layout: Layout) -> OpTable:
    """The references, and stand-ins for those whose shapes depend on the data and not the traffic.

    A stand-in has the shapes of the real operation and uses every tensor, so that all have gradients. Where
    experts are spread over ranks, how many tokens meet where is traffic, and nothing stands in.
    """
    functions = {name: operation.reference for name, operation in OPERATIONS.items()}
    functions["attention"] = _without_scores
    if layout.expert == 1:
        for gating in ("topk_gating", "megablock_gating"):
            functions[gating] = _dropping(functions[gating])
        functions["expert_ffn_ragged"] = lambda x_RH, ends_E, w1_EFH, w3_EFH, w2_EHF: (
            x_RH * (w1_EFH + w3_EFH + w2_EHF.mT).sum((0, 1))
        )
    return OpTable(functions, choices=())


def _without_scores(
    q_TND: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGW: torch.Tensor,
    segments: Segments,
    scale: float,
    log_sum: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """[T,N,W] of all three, without the T² scores."""
    both_TGW = v_TGW + k_TGD.sum(-1, keepdim=True)
    out_TNW = both_TGW.repeat_interleave(q_TND.shape[1] // k_TGD.shape[1], 1) + q_TND.sum(-1, keepdim=True)
    return (out_TNW, out_TNW.float().sum(-1)) if log_sum else out_TNW


def _dropping(gating: Callable[..., Routing]) -> Callable[..., Routing]:
    """``gating`` with the capacity that its factor gives, which is known beforehand."""

    def with_capacity(*args: Any, **kwargs: Any) -> Routing:
        return gating(*args, **kwargs | {"drop_tokens": True})

    return with_capacity


def _step(config: Config, layout: Layout, meshes: Meshes) -> Traffic:
    """One step's traffic: of each stage's ends, and of its layers, of which those of one kind are alike."""
    traffic, sums = Traffic(), Traffic()
    model, recomputed = config.architecture, config.recomputed_layers
    for stage in stages_of(config, meshes.pipeline.get_local_rank()):
        kinds: dict[tuple[Layer, bool], list[int]] = {}
        for layer in stage.layers:
            kind = (model.layers[layer], layer < recomputed)
            kinds.setdefault(kind, []).append(layer)
        one_of_each = [layers[0] for layers in kinds.values()]
        longer = {layers[1]: len(layers) - 1 for layers in kinds.values() if len(layers) > 1}
        parts = [(one_of_each, 1 - sum(longer.values()))]
        parts += [([*one_of_each, layer], times) for layer, times in longer.items()]
        for layers, times in parts:
            of_passes, of_sum = _stage_step(config, layout, meshes, replace(stage, layers=layers))
            traffic.add_all(of_passes, times)
            sums.add_all(of_sum, times)
    for (kind, group), size in sums.bytes.items():
        traffic.add(kind, group, size)  # one call for the gradients of all stages here
    if layout.pipeline > 1:
        _add_stage_messages(traffic, config, layout, meshes)
    return traffic


def _stage_step(config: Config, layout: Layout, meshes: Meshes, stage: Stage) -> tuple[Traffic, Traffic]:
    """The traffic of a stage's micro-batches, and of ``sum_gradients`` after them.

    The first micro-batch is run, one that stands for all those between, and the last.
    """
    traffic, between = Traffic(), layout.micro_num - 2
    with unset_fake_temporarily():  # cutting a mesh looks at the ranks in it
        (decoder,) = build(config, _table(layout), meshes, [stage])
    decoder.to_empty(device="cpu")
    if layout.micro_num > 1:
        traffic.add_all(_pass(config, layout, decoder, last=False))
    if between > 0:
        traffic.add_all(_pass(config, layout, decoder, last=False), between)
    traffic.add_all(_pass(config, layout, decoder, last=True))
    with Counted() as counted:
        sum_gradients(decoder, Region.of_mode(meshes.tensor, config.parallel.mode))
    if layout.moments > 1:
        traffic.add_all(_updates(decoder))
    return traffic, counted.traffic


def _updates(decoder: Decoder) -> Traffic:
    """What the holders of a shard exchange when each has updated its part."""
    with Counted() as counted:
        for parameter in decoder.parameters():
            part = parameter.detach().redistribute(placements=zero.cut_further(parameter))
            if part.placements != parameter.placements:
                zero.gather_updates(parameter.detach(), part)
    return counted.traffic


def _pass(config: Config, layout: Layout, decoder: Decoder, last: bool) -> Traffic:
    """A forward and a backward pass of one micro-batch."""
    batch = _batch(layout)
    inputs, terms_so_far_W = batch.tokens_T, None
    if decoder.embedding is None:
        tokens = len(batch.tokens_T) // layout.sequence
        shape, dtype = (tokens, config.architecture.hidden), compute_dtype(config.model)
        inputs = torch.zeros(shape, dtype=dtype, requires_grad=True)
        terms_so_far_W = torch.zeros(balance.width(config.architecture), requires_grad=True)
    with Counted() as counted:
        zero.begin_micro_batch(decoder, last)
        output = decoder(inputs, batch, terms_so_far_W)
        if isinstance(output, StageOutput):
            objective = output.x_TH.float().sum() + output.terms_W.sum()
        else:
            objective = output.loss_T.sum() + output.aux_loss + output.z_loss
        objective.backward()
    return counted.traffic


def _batch(layout: Layout) -> Batch:
    tokens = layout.tokens_per_micro_batch
    tensors = (torch.zeros(tokens, dtype=torch.int64) for _ in range(4))
    offsets = tuple(range(0, tokens + 1, layout.seq_len))
    return Batch(*tensors, segments=Segments(offsets), index=0)


def _add_stage_messages(traffic: Traffic, config: Config, layout: Layout, meshes: Meshes) -> None:
    """For each micro-batch hidden states and auxiliary terms to the next stage, their gradients back."""
    group = meshes.pipeline.get_group().group_name
    hidden = config.architecture.hidden * compute_dtype(config.model).itemsize
    sizes = (
        layout.tokens_per_micro_batch // layout.sequence * hidden,
        balance.width(config.architecture) * FP32_BYTES,
    )
    last = len(split_stages(config)) - 1
    for stage in stages_of(config, meshes.pipeline.get_local_rank()):
        neighbours = (stage.number > 0) + (stage.number < last)
        for kind in ("send", "receive"):
            for size in sizes:
                traffic.add(kind, group, size, layout.micro_num * neighbours)
