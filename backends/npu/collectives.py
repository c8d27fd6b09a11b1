"""Collectives between Ascend NPUs. Untested on hardware."""

from collections.abc import Mapping
from datetime import timedelta

from portmoe.accelerator import Collectives

SHORTEST, LONGEST = 120, 7200  # seconds HCCL_CONNECT_TIMEOUT takes


class NpuCollectives(Collectives):
    """HCCL, whose own limits must not be shorter than the run's."""

    backend = "hccl"
    binds_device = False  # not documented to split groups; the current device is set before

    def environment(self, timeout: timedelta) -> Mapping[str, str]:
        seconds = min(max(int(timeout.total_seconds()), SHORTEST), LONGEST)
        return {
            "HCCL_CONNECT_TIMEOUT": str(seconds),  # ranks of a large world start minutes apart; default 120
            "HCCL_EXEC_TIMEOUT": str(seconds),  # a rank that stopped is noticed then; default 1800
        }
