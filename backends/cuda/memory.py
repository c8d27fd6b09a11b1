"""Memory of NVIDIA GPUs."""

import os
from collections.abc import Mapping

from portmoe.accelerator import Memory


class CudaMemory(Memory):
    """torch's caching allocator."""

    def environment(self) -> Mapping[str, str]:
        if "PYTORCH_ALLOC_CONF" in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ:
            return {}
        # Segments that grow keep packs of changing shape from fragmenting the memory.
        return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
