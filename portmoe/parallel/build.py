"""One rank's part of the model, with every parallelism of the layout in it."""

from collections.abc import Iterable

import torch
from torch import nn

from portmoe.accelerator.interface import BufferPool
from portmoe.config import Config
from portmoe.model.decoder import Decoder
from portmoe.model.precision import compute_dtype
from portmoe.ops.table import OpTable
from portmoe.parallel import cuts, expert, expert_shards, sequence, tensor, vocabulary, weight, zero
from portmoe.parallel.mesh import Meshes
from portmoe.parallel.stages import Stage, stages_of
from portmoe.parallel.tensor import Region


def build(
    config: Config,
    ops: OpTable,
    meshes: Meshes,
    stages: Iterable[Stage] | None = None,
    pool: BufferPool | None = None,
) -> nn.ModuleList:
    """Decoders for ``stages`` (None: this rank's), each sharded; their parameters are on the meta device.

    ``to_empty`` and ``model.init.initialise`` then give memory and values to what the rank keeps, no more.
    What ``parallel.weight`` pools comes from ``pool`` (None: one of the model's own).
    """
    if stages is None:
        stages = stages_of(config, meshes.pipeline.get_local_rank())
    pool = pool or BufferPool()
    with torch.device("meta"):
        model = nn.ModuleList(Decoder(config, ops, s.layers, s.embed, s.head) for s in stages)
    region = Region.of_mode(meshes.tensor, config.parallel.mode)
    for decoder in model:
        if meshes.tensor.size() > 1 and region is None:
            sequence.split(decoder, meshes)
        elif meshes.tensor.size() > 1:
            tensor.share(decoder, region)
            vocabulary.share(decoder, region)
        cuts.cut_parameters(decoder, meshes, weights_are_shared=region is not None)
        expert.spread(decoder, meshes)
        if config.expert_shard is not None:
            expert_shards.shard(decoder, meshes, config.expert_shard)
        zero.shard(decoder, meshes, compute_dtype(config.model))
        if config.parallel.weight.size > 1:
            weight.gather_by(decoder, config.parallel.weight, pool)
    return model
