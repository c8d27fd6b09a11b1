"""The XPU backend against a fake torch and fake files: simulated, never run on hardware."""

import os

import pytest
import torch
from agreement import workload

from portmoe import load_config
from portmoe.accelerator import discovery
from portmoe.accelerator.preflight import preflight_of
from portmoe.backends import extension as module
from portmoe.backends.xpu import device, probe
from portmoe.ops import OPERATIONS, choose


@pytest.fixture
def stack(tmp_path, monkeypatch, pci):
    """A machine with these distributions and ``nodes`` render nodes."""

    def make(torch_version="2.13.0+xpu", extension=None, nodes=1):
        versions = {"torch": torch_version, module.PACKAGE: extension}
        for place in (probe, module):
            monkeypatch.setattr(place, "installed_version", versions.get)
        monkeypatch.setattr(probe, "RENDER_NODES", tmp_path / "dri")
        (tmp_path / "dri").mkdir()
        for number in range(nodes):
            (tmp_path / "dri" / f"renderD{128 + number}").touch()

    return make


def test_upstream_torch_on_an_intel_gpu_needs_nothing_else(stack, pci):
    stack()
    pci("0000:03:00.0", 0x8086, 0x038000)
    found = probe.software()
    assert found.present
    assert found.problems == []


def test_the_graphics_inside_a_processor_are_not_an_accelerator(stack, pci):
    stack()
    pci("0000:00:02.0", 0x8086, 0x030000)
    assert not probe.software().present


@pytest.mark.parametrize("build", ["2.13.0+cpu", "2.13.0+cu130"])
def test_a_torch_for_something_else_is_named(stack, build):
    stack(torch_version=build)
    found = probe.software()
    assert build in found.problems[0].summary
    assert "whl/xpu" in found.problems[0].fix


def test_without_a_driver_there_are_no_render_nodes(stack):
    stack(nodes=0)
    assert "renderD" in probe.software().problems[0].summary


def test_render_nodes_this_user_may_not_open(stack, monkeypatch):
    stack()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "usermod -aG render" in probe.software().problems[0].fix


@pytest.mark.parametrize(("extension", "warned"), [("2.8.10+xpu", True), ("2.13.0", False), (None, False)])
def test_the_old_extension_is_never_required_and_warned_of_when_it_does_not_fit(stack, extension, warned):
    stack(extension=extension)
    found = probe.software()
    assert found.usable
    assert bool(found.problems) is warned


@pytest.fixture
def gpu(stack, fake_device, monkeypatch):
    def make(xccl=True, sycl="20250201"):
        stack()
        monkeypatch.setattr(torch.version, "xpu", sycl, raising=False)
        monkeypatch.setattr(torch.distributed, "is_xccl_available", lambda: xccl)
        return fake_device("xpu", 1, "Intel(R) Data Center GPU Max 1550")

    return make


def test_a_gpu_that_torch_sees_is_usable(gpu):
    gpu()
    found = device.XpuDevice().probe()
    assert found.problems == []
    assert found.facts["devices"] == "1 × Intel(R) Data Center GPU Max 1550"


def test_missing_xccl_is_fatal(gpu):
    gpu(xccl=False)
    assert "XCCL" in device.XpuDevice().probe().problems[0].summary


def test_a_torch_without_sycl_says_so(gpu):
    gpu(sycl=None)
    assert "not built for Intel GPUs" in device.XpuDevice().probe().problems[0].summary


def test_the_device_is_set_before_the_group_is_made_and_bound_to_it(gpu, monkeypatch):
    from datetime import timedelta

    gpu()
    calls = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: calls.append(("set", index)))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda name, **k: calls.append((name, k["device_id"]))
    )
    xpu = discovery.load("xpu")
    opened = xpu.open(1)
    xpu.collectives.init(opened, 1, 2, timedelta(seconds=5), torch.distributed.HashStore())
    assert calls == [("set", 1), ("cpu:gloo,xpu:xccl", torch.device("xpu", 1))]


def test_cpu_fallback_is_off_and_what_is_left_of_it_is_named_before_torch_is_imported():
    environment = preflight_of(discovery.find("xpu")).environment
    assert environment == {"PYTORCH_ENABLE_XPU_FALLBACK": "0", "PYTORCH_DEBUG_XPU_FALLBACK": "1"}


def test_a_missing_runtime_library_is_explained():
    message = "ImportError: libsycl.so.8: cannot open shared object file"
    assert "libsycl.so.8" in probe.explain_failed_import(message).summary
    assert probe.explain_failed_import("libcudart.so.13: cannot open shared object file") is None


def test_the_kernels_need_a_triton_with_the_compiler_for_these_gpus(monkeypatch):
    compilers = pytest.importorskip("triton.backends").backends
    monkeypatch.delitem(compilers, "intel", raising=False)
    shapes = workload(torch.bfloat16, torch.device("xpu"))
    settings = load_config("tiny_moe4", ["model.use_flash_attn=true"])

    def chosen():
        return choose(OPERATIONS, discovery.load("xpu").ops.implementations(), shapes, settings).record()

    for op in ("swiglu", "topk_gating", "dispatch", "combine"):
        kernel, *others = chosen()[op]["candidates"]
        assert kernel["name"] == "triton"
        assert kernel["reason"].endswith("not for intel")
        assert any(other["chosen"] for other in others)
    monkeypatch.setitem(compilers, "intel", object())
    assert {op for op, record in chosen().items() if record["chosen"] == "triton"} == {
        "swiglu",
        "topk_gating",
        "dispatch",
        "combine",
    }
    shared = discovery.load("cuda").ops.implementations()
    assert [i for i in discovery.load("xpu").ops.implementations() if i.name == "triton"] == [
        i for i in shared if i.name == "triton"
    ]
