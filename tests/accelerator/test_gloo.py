"""A group of gloo's has one worker: two would write to one string at a time."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from zygote import python

from portmoe.accelerator import gloo

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads by /proc")

# Linux keeps 15 characters of a thread's name. Every group has one thread that listens to its connections.
WORKER, LISTENER = "pt_gloo_runloop", "gloo_tcp_loop"
PROGRAM = """
import pathlib
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from portmoe import get_accelerator

collectives, seconds = get_accelerator("cpu").collectives, timedelta(seconds=7)
collectives.init(torch.device("cpu"), 0, 1, seconds, dist.HashStore())
mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
groups = [dist.group.WORLD, collectives.host_group(), *set(mesh.get_all_groups()) - {dist.group.WORLD}]
for group in groups:
    values = torch.ones(2)
    dist.all_reduce(values, group=group)
    assert values.tolist() == [1, 1]
backends = [group._get_backend(torch.device("cpu")) for group in groups]
backends.append(dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timeout=seconds))  # as plug-ins make theirs
for backend in backends:
    print("backend", len(backend.options._devices))
for backend in (backends[0], backends[-1]):  # a mesh's groups get torch's own
    assert backend.options._timeout == seconds
time.sleep(1)  # a thread gives itself its name
for task in pathlib.Path("/proc/self/task").iterdir():
    print((task / "comm").read_text().strip())
dist.destroy_process_group()
"""


def run(**variables: str) -> tuple[list[str], Counter[str]]:
    """What is printed of each group's backend, and how many threads have each name."""
    done = python(PROGRAM, os.environ | variables)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    backends = [line for line in lines if line.startswith("backend")]
    assert len(backends) >= 3
    return backends, Counter(lines)


def test_every_group_has_one_worker():
    backends, threads = run()
    assert set(backends) == {"backend 1"}
    assert threads[WORKER] == threads[LISTENER] == len(backends)


@pytest.mark.parametrize("named", ["lo,lo", "lo,lo,"])  # torch takes both
def test_the_interfaces_named_by_the_user_are_used(named):
    """GLOO_SOCKET_IFNAME: a listening thread for each, and still one worker."""
    backends, threads = run(GLOO_SOCKET_IFNAME=named)
    assert set(backends) == {"backend 2"}
    assert (threads[WORKER], threads[LISTENER]) == (len(backends), 2 * len(backends))


def test_options_of_a_caller_are_kept_but_for_the_workers():
    program = """
from datetime import timedelta

import torch.distributed as dist

from portmoe.accelerator import gloo

gloo.use_one_worker()
options = dist.ProcessGroupGloo._Options()
options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
options._timeout = timedelta(seconds=5)
for arguments, named in (((options,), {}), ((), {"options": options})):
    made = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, *arguments, **named).options
    print(made._threads, len(made._devices), made._timeout.total_seconds())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "1 1 5.0\n" * 2), done.stderr


def test_a_torch_without_gloo_is_left_as_it_is(monkeypatch):
    """``init_process_group`` then says so itself, which the launch explains."""
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "ProcessGroupGloo")
    gloo.use_one_worker.__wrapped__()
