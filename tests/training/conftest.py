import pytest
import torch.distributed as dist

import portmoe
from portmoe.launch import launch
from portmoe.launch.ranks import detect


@pytest.fixture
def one_rank():
    """A process group of this process alone; gives the CPU group that norms and metrics need."""
    device = launch.start(portmoe.get_accelerator("cpu"), detect("local"), 60)
    assert device.type == "cpu"
    yield dist.new_group(backend="gloo")
    launch.stop()
