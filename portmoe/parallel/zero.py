"""ZeRO by PyTorch's fully sharded data parallel (FSDP2).

Every rank keeps float32 master weights and optimizer state for its shard only. Under ZeRO-1 the compute
copies are gathered once at the start of a step, stay whole over all its micro-batches, and are dropped when
the last backward has reduced the gradients: per parameter group one all-gather and one reduce-scatter a step.
With ``parallel.zero1.fsdp`` or ``parallel.weight.size`` a block's copies are dropped after its forward and
again after its backward pass, and its gradients are reduced in every micro-batch, so that neither is ever
whole for the whole model.

The three cases of ``parallel.zero1.size`` are three shapes of the same mesh; see ``parallel.mesh``.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard

from portmoe.costs.parameters import exact_modules, spread_modules
from portmoe.model.decoder import Decoder
from portmoe.model.precision import local_tensor
from portmoe.parallel.expert_shards import weights_in_shards
from portmoe.parallel.mesh import Meshes


def shard(model: Decoder, meshes: Meshes, dtype: torch.dtype) -> None:
    """Shard ``model`` in place, block by block; compute copies are of ``dtype``, the router's float32.

    Gradients are reduced and accumulated in float32 whatever ``dtype`` is: reducing in bfloat16 changes
    them by 3e-3. A rank that shares its weights with no other keeps them whole, as plain parameters: the
    modules cast them at use (``model.precision``), which spares the engine's copies into its buffers.
    """
    if meshes.data.size() == 1:
        return
    # Said by every rank of what is changed in place, and nothing here changes what the model returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    compute = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(
        param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    drop = model.config.parallel.gathers_by_block
    settings = _settings(meshes.data) | {"reshard_after_forward": drop}
    in_shards = weights_in_shards(model)
    if meshes.expert.size() > 1 and not in_shards:
        of_experts = _settings(meshes.expert_data) | {"reshard_after_forward": drop}
        for experts in spread_modules(model):
            fully_shard(experts, **of_experts, mp_policy=compute)
            # An expert's gradient is the sum over all tokens, those of other ranks included, and the
            # loss a mean over all data-parallel ranks. On one rank torch divides when it copies, and would
            # again after a sum.
            experts.set_gradient_divide_factor(meshes.data.size())
            experts.set_force_sum_reduction_for_comms(meshes.expert_data.size(-1) > 1)
    if dtype != torch.float32:  # otherwise the block's own group keeps them exact
        for module in exact_modules(model):
            fully_shard(module, **settings, mp_policy=exact)
    for block in model.layers.values():
        fully_shard(block, **settings, mp_policy=compute, ignored_params=in_shards)
    whole = settings | {"reshard_after_forward": False}
    fully_shard(model, **whole, mp_policy=compute, ignored_params=in_shards)


def _settings(mesh: DeviceMesh) -> dict[str, Any]:
    return {"mesh": mesh, "shard_placement_fn": partial(_cut, parts=mesh.size(-1))}


def _cut(parameter: nn.Parameter, parts: int) -> Shard:
    """Cut along the first dimension that divides into equal ``parts``, or, unequally, along the first of all.

    Four experts on 32 ranks are thus cut along their width: every rank has state of its own.
    """
    shape = local_tensor(parameter).shape
    return Shard(next((dim for dim, size in enumerate(shape) if size % parts == 0), 0))


def begin_micro_batch(model: Decoder, last: bool) -> None:
    """Accumulate gradients locally, or, in the ``last`` micro-batch of a step, reduce and reshard.

    Where parameters are sharded too, they are reduced within their subset at once, between subsets once.
    """
    if not isinstance(model, FSDPModule):
        return
    if model.config.parallel.gathers_by_block:
        model.set_requires_all_reduce(last)
        return
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)
    model.set_is_last_backward(last)


def cut_further(parameter: DTensor) -> Sequence[Placement]:
    """Placements of a sharded parameter's moments, cut also over the ranks that hold the same shard.

    Along a dimension that is not cut yet and divides evenly; where there is none, as in a vector, not at all.
    """
    placements, shape = list(parameter.placements), parameter.to_local().shape
    for number, placement in enumerate(placements):
        cut = {other.dim for other in placements if not other.is_replicate()}
        parts = parameter.device_mesh.size(number)
        if placement.is_replicate() and parts > 1:
            free = (dim for dim, size in enumerate(shape) if dim not in cut and size % parts == 0)
            placements[number] = next(map(Shard, free), placement)
    return placements


def gather_updates(parameter: DTensor, part: DTensor) -> None:
    """Write the ``part`` of a parameter that each of the holders of its shard updated to all of them."""
    parameter.to_local().copy_(part.redistribute(placements=parameter.placements).to_local())


def drop_compute_copies(model: nn.Module) -> None:
    """Free the gathered weights, which a forward pass without a backward leaves behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
