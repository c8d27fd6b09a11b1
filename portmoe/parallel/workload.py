"""What a config gives the operations to do: the shapes and types they are chosen by."""

import torch

from portmoe.config import Config
from portmoe.model.capacity import expert_capacity
from portmoe.model.precision import compute_dtype
from portmoe.ops import Workload
from portmoe.parallel.layout import Layout


def workload_of(config: Config, layout: Layout, device: torch.device) -> Workload:
    """One rank's work per micro-batch."""
    model, moe = config.model, config.moe
    width = 1 if config.parallel.tensor.mode == "isp" else layout.tensor  # what weights are cut by
    return Workload(
        device=device,
        dtype=compute_dtype(model),
        tokens=layout.tokens_per_micro_batch,
        seq_len=config.data.seq_len,
        hidden=model.hidden_size,
        heads=model.num_attention_heads // layout.tensor,
        head_dim=model.head_dim,
        ffn_width=model.ffn_width // width,
        vocab=model.vocab_size // width,
        experts=model.num_experts // layout.expert,
        top_k=moe.top_k,
        # an expert sees the rows of all ranks that spread the experts among them
        capacity=expert_capacity(config, layout.tokens_per_micro_batch) * layout.expert,
        # dummy samples of fixed length fill seq_len exactly; those of a data set do not
        equal_segments=config.data.train_folder is None and config.data.fixed_random_dataset_seqlen,
        qk_interleaved=model.qk_interleaved,
        dropless=model.moe_type == "MegaBlock-D",
        random_drops=moe.use_rts and moe.drop_tokens and moe.top_k == 1,
    )
