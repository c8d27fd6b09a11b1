"""A model in outline: one block of each kind and the ends, on the meta device.

What a model costs is a sum over its layers of what the modules themselves say, and layers of one kind say
the same, so that the outline answers at once for a model of any size.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from portmoe.families.architecture import Architecture, Layer
from portmoe.model.decoder import Block
from portmoe.model.norm import RMSNorm
from portmoe.model.reference_table import reference_table
from portmoe.model.share import Calls, Share
from portmoe.model.vocabulary import Embedding, Head


@dataclass(frozen=True)
class Outline:
    """The modules of an ``Architecture``, without memory."""

    embedding: Embedding
    blocks: dict[Layer, Block]
    norm: RMSNorm
    head: Head

    def calls(self, share: Share) -> Calls:
        """Every operation a forward pass calls, with its site and its shapes; once for each kind of layer."""
        for part in (*self.blocks.values(), self.norm, self.head):
            yield from part.calls(share)


@lru_cache(maxsize=8)
def outline(model: Architecture) -> Outline:
    """The outline of ``model``."""
    ops = reference_table()
    with torch.device("meta"):
        return Outline(
            Embedding(model.vocabulary, model.hidden),
            {
                layer: Block(model, layer, places[0], ops, where=model.kind_name(layer))
                for layer, places in model.kinds.items()
            },
            RMSNorm(model.hidden, model.norm_epsilon, model.exact_norms, ops),
            Head(model.vocabulary, model.hidden, ops),
        )
