"""Leaving each rank its part of every parameter, as the modules declare their cuts."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from portmoe.errors import ConfigError
from portmoe.model.decoder import Decoder
from portmoe.model.sharing import ALONE, Cut, declared_cuts
from portmoe.parallel.mesh import Meshes

EXPERT, TENSOR = "expert", "tensor"


def cut_parameters(model: Decoder, meshes: Meshes, weights_are_shared: bool) -> None:
    """Cut the parameters of ``model``, on the meta device, over ranks that spread experts or share layers.

    Args:
        weights_are_shared: the tensor-parallel ranks share each layer; else they have whole weights.

    Raises:
        ConfigError: ranks are to share a module that does not declare how.
    """
    axes = {EXPERT: meshes.expert}
    if weights_are_shared:
        axes[TENSOR] = meshes.tensor
    axes = {kind: mesh for kind, mesh in axes.items() if mesh.size() > 1}
    cuts = declared_cuts(model, axes[TENSOR].size() if TENSOR in axes else 1)
    for name, parameter in list(model.named_parameters()):
        if TENSOR in axes and not _shared(model, name, cuts.get(name)):
            raise _undeclared(model, name, axes[TENSOR].size())
        dims = _dimensions(cuts.get(name, Cut()), axes)
        if not dims:
            continue
        meshes_of_it = [axes[kind] for kind in dims]
        mesh = DeviceMesh._concatenate(meshes_of_it) if len(dims) > 1 else meshes_of_it[0]
        placements = [Shard(dim) for dim in dims.values()]
        owner = model.get_submodule(name.rpartition(".")[0])
        part = distribute_tensor(parameter.detach(), mesh, placements, src_data_rank=None)
        setattr(owner, name.rpartition(".")[2], nn.Parameter(part))


def _dimensions(cut: Cut, axes: dict[str, DeviceMesh]) -> dict[str, int]:
    """Axis → the dimension it cuts, for the axes there are."""
    dims = {EXPERT: cut.expert, TENSOR: cut.tensor}
    return {kind: dims[kind] for kind in axes if dims[kind] is not None}


def _shared(model: nn.Module, name: str, cut: Cut | None) -> bool:
    """Whether ranks can share this parameter: its cut is declared and, where it is one, inside a region."""
    if cut is None:
        return False
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))
    return cut.tensor is None or any(getattr(module, "region", ALONE) is not ALONE for module in around)


def _undeclared(model: nn.Module, name: str, ranks: int) -> ConfigError:
    path, _, leaf = name.rpartition(".")
    module = type(model.get_submodule(path)).__name__
    return ConfigError(
        f"parallel.tensor.size={ranks}: the module {module} ({path}) does not declare how ranks share its "
        f"{leaf!r}; set parallel.tensor.size to 1 or parallel.tensor.mode to 'isp', or add it to `cuts` of "
        "the class or of one around it, and give what is cut a `region` (see model/sharing.py)"
    )
