"""Memory of Ascend NPUs. Untested on hardware."""

import os
from collections.abc import Mapping

from portmoe.accelerator import Memory
from portmoe.accelerator.probing import installed_version, release
from portmoe.backends.npu.device import npu
from portmoe.backends.npu.probe import BOTH_ALLOCATORS, NEWEST


class NpuMemory(Memory):
    """torch_npu's caching allocator."""

    def environment(self) -> Mapping[str, str]:
        # torch_npu aborts where its own variable and torch's are both set; older ones know their own alone.
        plugin = installed_version("torch_npu") or NEWEST
        if "PYTORCH_ALLOC_CONF" in os.environ and release(plugin)[:2] >= BOTH_ALLOCATORS:
            return {}
        return {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}

    def allocated(self) -> int:
        return npu().memory_allocated()

    def peak(self) -> int:
        return npu().max_memory_allocated()

    def reset_peak(self) -> None:
        npu().reset_peak_memory_stats()

    def total(self) -> int:
        return npu().mem_get_info()[1]
