"""The memory that may be used: the machine's, or the limit of the control group, of both versions."""

import os
import resource

import pytest

from portmoe.accelerator.host_memory import host_memory, likely_cause, process_limit

MIB = 2**20
MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def put(root, cgroup, **limits):
    for path, text in {"proc/self/cgroup": cgroup, **limits}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


V1 = "4:memory:/docker/a1\n1:cpu:/\n"
V2 = "0::/user.slice/job_7/step_0\n"


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "1048576000"}, 1000),  # a container sees its own group as the root
        (V2, {"user.slice/job_7/step_0/memory.max": "1048576000"}, 1000),
        (
            V2,
            {"user.slice/job_7/step_0/memory.max": "max", "user.slice/job_7/memory.max": "1048576000"},
            1000,
        ),
        (V2, {"user.slice/memory.max": "2097152000", "user.slice/job_7/memory.max": "1048576000"}, 1000),
        (V1, {"memory/docker/a1/memory.limit_in_bytes": "1048576000"}, 1000),
        (V1, {"memory/memory.limit_in_bytes": "1048576000"}, 1000),  # in the container
        ("5:cpu,memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "1048576000"}, 1000),
        (V1, {"memory/docker/a1/memory.limit_in_bytes": "9223372036854771712"}, None),
        (V2, {"user.slice/job_7/memory.max": "max"}, None),
        (V2, {}, None),
        ("", {}, None),
        ("nonsense\n:::\n", {"memory.max": "nonsense"}, None),
    ],
)
def test_the_least_limit_holds(tmp_path, cgroup, limits, expected):
    root = put(tmp_path, cgroup, **{f"sys/fs/cgroup/{path}": text for path, text in limits.items()})
    found = host_memory(root)
    assert found.total == (MACHINE if expected is None else expected * MIB)
    assert ("machine" if expected is None else "control group") in str(found)


def test_a_root_without_files_is_the_machine(tmp_path):
    assert host_memory(tmp_path / "nothing").total == MACHINE


def test_a_limit_of_one_process(monkeypatch):
    limits = {resource.RLIMIT_AS: resource.RLIM_INFINITY, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    assert process_limit() is None
    limits[resource.RLIMIT_AS] = 5 * MIB
    assert process_limit() == 5 * MIB


def test_what_is_said_of_a_killed_process():
    assert likely_cause().startswith("probably out of memory: the limit is ")
