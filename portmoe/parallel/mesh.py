"""The device meshes of a layout: which ranks shard, replicate and reduce together."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from portmoe.parallel.layout import Layout

PIPELINE, DATA, TENSOR = "pipeline", "data", "tensor"
RING, HEADS = "ring", "heads"
REPLICAS, REPLICATE, SHARD = "replicas", "replicate", "shard"
EXPERT_REPLICATE, EXPERT_SHARD, EXPERT = "expert_replicate", "expert_shard", "expert"


@dataclass(frozen=True)
class Meshes:
    """The groups the ranks of one run form. All are cut from one mesh, so that they compose.

    Attributes:
        root: every rank, as (PIPELINE, DATA, TENSOR): the tensor ranks are neighbours, the stages far apart.
        data: the ranks that see different tokens and compute with the same weights: the data-parallel ranks
            of one stage and tensor rank, in isp mode those of one stage. One dimension (SHARD) where the
            optimizer state is sharded over all of them; two (REPLICATE, SHARD) where it is sharded over
            subsets and replicated between them.
        heads: the tensor ranks that split the heads of one attention, or all its weights.
        ring: those that keys and values go around; None where ``heads`` are all the tensor ranks.
        expert: those among them, neighbours, that together hold all experts of a layer.
        expert_data: those among them that hold the same experts, in one or two dimensions as ``data``.
    """

    root: DeviceMesh
    data: DeviceMesh
    heads: DeviceMesh
    ring: DeviceMesh | None
    expert: DeviceMesh
    expert_data: DeviceMesh

    @property
    def pipeline(self) -> DeviceMesh:
        """The ranks that hold the stages of one copy of the model, in the order of the stages."""
        return self.root[PIPELINE]

    @property
    def tensor(self) -> DeviceMesh:
        """The ranks that share each layer, or the tokens of each micro-batch."""
        return self.root[TENSOR]

    @property
    def data_rank(self) -> int:
        """This rank among those that see different samples."""
        return self.root.get_local_rank(DATA)


def build_meshes(layout: Layout, device_type: str) -> Meshes:
    """Create the process groups of ``layout`` on the default process group's ranks. Collective."""
    shape = (layout.pipeline, layout.data, layout.tensor)
    root = init_device_mesh(device_type, shape, mesh_dim_names=(PIPELINE, DATA, TENSOR))
    replicas = root[DATA] if layout.replicas == layout.data else root[DATA, TENSOR]._flatten(REPLICAS)
    data = _cut(replicas, (layout.replicas // layout.zero1, layout.zero1), (REPLICATE, SHARD))
    holders = layout.replicas // layout.expert
    experts = _cut(
        replicas,
        (holders // layout.expert_shards, layout.expert_shards, layout.expert),
        (EXPERT_REPLICATE, EXPERT_SHARD, EXPERT),
    )
    heads, ring = root[TENSOR], None
    if layout.ring > 1:
        sequence = heads._unflatten(0, (layout.ring, layout.tensor // layout.ring), (RING, HEADS))
        heads, ring = sequence[HEADS], sequence[RING]
    return Meshes(root, data, heads, ring, experts[EXPERT], experts[experts.mesh_dim_names[:-1]])


def _cut(mesh: DeviceMesh, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """The 1-D ``mesh`` in several dimensions, without the first of them where it has size 1."""
    first = 1 if sizes[0] == 1 else 0
    return mesh._unflatten(0, sizes[first:], names[first:])
