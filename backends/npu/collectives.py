"""Collectives between Ascend NPUs. Untested on hardware."""

from collections.abc import Mapping
from datetime import timedelta

from portmoe.accelerator import Collectives

CONNECT = 300, 7200  # seconds HCCL_CONNECT_TIMEOUT takes; torch_npu warns of fewer than 300
EXECUTE = 120, 2**31 - 1 - 60  # HCCL_EXEC_TIMEOUT; 0 would be never
LONGER = 60  # HCCL_EVENT_TIMEOUT must be above it, or torch_npu warns


class NpuCollectives(Collectives):
    """HCCL, whose own limits must not be shorter than the run's."""

    backend = "hccl"
    binds_device = False  # not documented to split groups; the current device is set before

    def environment(self, timeout: timedelta) -> Mapping[str, str]:
        seconds = int(timeout.total_seconds())
        execute = _within(seconds, EXECUTE)
        return {
            "HCCL_CONNECT_TIMEOUT": str(_within(seconds, CONNECT)),  # ranks may start minutes apart
            "HCCL_EXEC_TIMEOUT": str(execute),  # a rank that stopped is noticed then; default 1800
            "HCCL_EVENT_TIMEOUT": str(execute + LONGER),
        }


def _within(seconds: int, limits: tuple[int, int]) -> int:
    return min(max(seconds, limits[0]), limits[1])
