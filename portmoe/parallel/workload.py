"""What a rank is given to do: its share of a micro-batch, and every operation it calls with which shapes."""

import torch

from portmoe.config import Config
from portmoe.costs.outline import outline
from portmoe.families.architecture import Experts
from portmoe.model.capacity import expert_capacity
from portmoe.model.precision import compute_dtype
from portmoe.model.share import Share
from portmoe.ops import CallSites, Workload
from portmoe.parallel.layout import Layout


def share_of(config: Config, layout: Layout, device: torch.device) -> Share:
    """One rank's share of a micro-batch and of each layer's weights."""
    mode, tokens = config.parallel.mode, layout.tokens_per_micro_batch
    return Share(
        device=device,
        dtype=compute_dtype(config.model),
        tokens=tokens,
        seq_len=config.data.seq_len,
        attended=config.data.seq_len / 2,  # what causality leaves
        # dummy samples of fixed length fill seq_len exactly; those of a data set do not
        equal_segments=config.data.train_folder is None and config.data.fixed_random_dataset_seqlen,
        ranks=layout.tensor // layout.ring,
        token_split=mode == "isp" and layout.tensor > 1,
        ring=layout.ring,
        between=tokens // layout.sequence,
        regather=mode == "fsp" and layout.tensor > 1,
        expert_ranks=layout.expert,
        expert_shard=config.expert_shard,
    )


def call_sites(config: Config, layout: Layout, device: torch.device) -> CallSites:
    """Operation → site → what it is given there in a training step, over all ranks' layers."""
    share, model = share_of(config, layout, device), config.architecture
    sites: dict[str, dict[str, Workload]] = {}
    for call in outline(model).calls(share):
        sites.setdefault(call.operation, {})[call.site] = call.workload
    first = next(iter(model.kinds)).network
    updated = share.workload(share.tokens, hidden=model.hidden, ffn_width=first.width)
    return sites | {"adamw": {"": updated}}


def workload_of(config: Config, layout: Layout, device: torch.device) -> Workload:
    """The sizes of a layer in one, for trying every operation on them, whether the model calls it or not."""
    share, model = share_of(config, layout, device), config.architecture
    layer = next((kind for kind in model.kinds if isinstance(kind.network, Experts)), model.layers[0])
    sizes = {"experts": 1, "top_k": 1, "capacity": share.tokens}
    if isinstance(layer.network, Experts):
        capacity = expert_capacity(layer.network, share.tokens)
        gate = layer.network.gate
        sizes = {"experts": layer.network.count, "top_k": gate.top_k, "capacity": capacity}
        sizes |= {"dropless": gate.dropless, "random_drops": gate.random_drops}
    return share.workload(
        share.tokens,
        hidden=model.hidden,
        heads=layer.attention.heads,
        head_dim=layer.attention.head_dim,
        ffn_width=layer.network.width,
        vocab=model.vocabulary,
        qk_interleaved=layer.attention.rotary.interleaved,
        **sizes,
    )
