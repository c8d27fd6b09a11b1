"""Collectives between devices."""

from collections.abc import Mapping
from datetime import timedelta

from portmoe.accelerator import Collectives


class NewvendorCollectives(Collectives):
    """The library's own limit must not be shorter than the run's."""

    backend = "gloo"  # yours: the name your library registers with torch.distributed

    def environment(self, timeout: timedelta) -> Mapping[str, str]:
        return {"NEWVENDOR_COLLECTIVE_TIMEOUT": str(int(timeout.total_seconds()))}
