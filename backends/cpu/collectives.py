"""Collectives between CPU processes."""

from portmoe.accelerator import Collectives


class CpuCollectives(Collectives):
    """gloo, which every build of torch for Linux has."""

    backend = "gloo"
