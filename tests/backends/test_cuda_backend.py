import os

import pytest
import torch

from portmoe.accelerator import discovery
from portmoe.backends.cuda import device, probe

PROPRIETARY = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)
"""
OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)
GCC version:  gcc version 12.3.0
"""


@pytest.fixture
def stack(tmp_path, monkeypatch, pci):
    """A machine with a driver of ``version_text`` and a torch distribution of ``torch_version``."""

    def make(version_text, torch_version):
        monkeypatch.setattr(probe, "DRIVER_VERSION", tmp_path / "version")
        monkeypatch.setattr(probe, "DRIVER_NODE", tmp_path / "nvidiactl")
        monkeypatch.setattr(probe, "WSL_NODE", tmp_path / "dxg")
        if version_text:
            (tmp_path / "version").write_text(version_text)
        monkeypatch.setattr(probe, "installed_version", lambda _: torch_version)

    return make


@pytest.mark.parametrize(("text", "version"), [(PROPRIETARY, "535.129.03"), (OPEN, "580.65.06"), ("", None)])
def test_the_drivers_version_is_read_from_both_kinds_of_module(stack, text, version):
    stack(text, "2.13.0+cu130")
    assert probe.driver_version() == version


def test_a_bare_machine_is_told_about_driver_and_torch(stack):
    stack("", "2.13.0+cpu")
    found = probe.software()
    assert not found.present
    assert ["driver" in p.summary or "+cpu" in p.summary for p in found.problems] == [True, True]
    assert any("pip install" in p.fix for p in found.problems)


def test_a_card_without_a_driver_is_present_but_unusable(stack, pci):
    stack("", "2.13.0")
    pci("0000:41:00.0", 0x10DE, 0x030200)
    pci("0000:41:00.1", 0x10DE, 0x040300)  # its audio function
    pci("0000:00:02.0", 0x8086, 0x030000)  # another vendor's card
    found = probe.software()
    assert found.present
    assert not found.usable
    assert found.facts["NVIDIA devices on the PCI bus"] == "1"


@pytest.mark.parametrize(
    ("build", "driver", "usable"),
    [
        ("2.13.0+cu130", OPEN, True),
        ("2.13.0+cu130", PROPRIETARY, False),
        ("2.11.0+cu128", PROPRIETARY, True),
        ("2.13.0", PROPRIETARY, True),  # PyPI's wheels do not name their CUDA: torch is asked later
    ],
)
def test_a_driver_older_than_torchs_cuda_is_named(stack, build, driver, usable):
    stack(driver, build)
    found = probe.software()
    assert found.usable is usable
    assert usable or "535.129.03 is older than CUDA 13" in found.problems[0].summary


@pytest.fixture
def gpu(monkeypatch, fake_device, stack):
    """A torch that sees one GPU."""

    def make(name="NVIDIA H100 80GB HBM3", capability=(9, 0), architectures=("sm_80", "sm_90"), cuda="13.0"):
        stack(OPEN, "2.13.0+cu130")
        module = fake_device("cuda", 1, name)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
        return module

    return make


def test_a_gpu_that_torch_sees_is_usable_and_described(gpu):
    gpu()
    found = device.CudaDevice().probe()
    assert found.usable
    assert found.problems == []
    assert found.facts["devices"] == "1 × NVIDIA H100 80GB HBM3"
    assert found.facts["compute capability"] == "9.0"


@pytest.mark.parametrize(
    ("capability", "architectures", "known"),
    [
        ((8, 6), ("sm_80", "sm_90"), True),  # runs the binary of an earlier minor
        ((8, 0), ("sm_86",), False),  # but not of a later one
        ((12, 0), ("sm_80", "sm_120"), True),
        ((7, 0), ("sm_80", "sm_90", "sm_90a"), False),
    ],
)
def test_a_generation_without_kernels_is_a_warning(gpu, capability, architectures, known):
    gpu(capability=capability, architectures=architectures)
    found = device.CudaDevice().probe()
    assert found.usable
    assert (found.problems == []) is known


def test_nccl_missing_is_fatal(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert "NCCL" in device.CudaDevice().probe().problems[0].summary


def test_a_torch_without_cuda_says_so_where_its_name_does_not(gpu, stack):
    gpu(cuda=None)
    stack(OPEN, "2.13.0")
    found = device.CudaDevice().probe()
    assert [p.summary for p in found.problems] == [
        f"the installed torch {torch.__version__} was built without CUDA"
    ]


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 494.5e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12, 51e12),
        ("NVIDIA H200", 989e12, 494.5e12, 67e12),
        ("NVIDIA H20", None, None, None),
        ("NVIDIA GeForce RTX 5090", None, None, None),
    ],
)
def test_peaks_follow_the_data_sheets(gpu, monkeypatch, name, bf16, tf32, fp32):
    gpu(name)
    monkeypatch.delenv("PORTMOE_PEAK_TFLOPS", raising=False)
    cuda = device.CudaDevice()
    assert cuda.peak_flops(torch.bfloat16) == cuda.peak_flops(torch.float16) == bf16
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert cuda.peak_flops(torch.float32) == fp32
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert cuda.peak_flops(torch.float32) == tf32
    assert cuda.peak_flops(torch.float64) is None


def test_determinism_sets_what_cublas_and_nccl_need(monkeypatch):
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    cuda = discovery.load("cuda").device
    cuda.set_deterministic(True)
    torch.use_deterministic_algorithms(False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_ALGO"] == "Ring"


@pytest.mark.parametrize("own", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_setting_gives_way_to_the_users(monkeypatch, own):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    memory = discovery.load("cuda").memory
    assert memory.environment() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setenv(own, "max_split_size_mb:128")
    assert memory.environment() == {}


def test_a_missing_cuda_library_is_explained_and_another_is_not():
    message = "ImportError: libcudart.so.13: cannot open shared object file: No such file or directory"
    assert "libcudart.so.13" in probe.explain_failed_import(message).summary
    assert probe.explain_failed_import("ImportError: libhccl.so: cannot open shared object file") is None


def test_grouped_mm_is_offered_for_bfloat16_only():
    from types import SimpleNamespace

    offered = {(i.op, i.name): i for i in discovery.load("cuda").ops.implementations()}
    grouped = offered["expert_ffn_ragged", "grouped_mm"]
    shape = {"hidden": 64, "ffn_width": 128}
    assert grouped.supports(SimpleNamespace(dtype=torch.bfloat16, **shape)) is None
    assert "bfloat16 only" in grouped.supports(SimpleNamespace(dtype=torch.float32, **shape))
