"""The NPU backend against a fake ``torch_npu`` and fake files: simulated, never run on hardware."""

import os
import platform
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from portmoe.accelerator import discovery
from portmoe.accelerator.preflight import preflight_of
from portmoe.backends.npu import device, memory, probe
from portmoe.backends.npu.product import product_named


@pytest.fixture
def stack(tmp_path, monkeypatch, pci):
    """A machine with these versions of torch, torch_npu and CANN; None: not there."""

    def make(torch_version="2.13.0+cpu", plugin="2.13.0", cann="9.1.0", node=True):
        versions = {"torch": torch_version, "torch_npu": plugin}
        monkeypatch.setattr(probe, "installed_version", versions.get)
        monkeypatch.setattr(probe, "DEVICE_MANAGER", tmp_path / "davinci_manager")
        monkeypatch.setattr(probe, "DRIVER_VERSION", tmp_path / "driver.info")
        monkeypatch.setattr(probe, "CANN_HOMES", (tmp_path / "usual",))
        for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "driver.info").write_text("Version=25.5.0\nascendhal_version=7.35\n")
        if node:
            (tmp_path / "davinci_manager").touch()
        if cann:
            info = tmp_path / "cann" / f"{platform.machine()}-linux" / "ascend_toolkit_install.info"
            info.parent.mkdir(parents=True)
            info.write_text(f"package_name=Ascend-cann-toolkit\nversion={cann}\n")
            monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))

    return make


def summaries(found, fatal):
    return [problem.summary for problem in found.problems if problem.fatal is fatal]


def test_versions_that_go_together_raise_nothing(stack):
    stack()
    found = probe.software()
    assert found.problems == []
    assert found.present
    assert found.facts["CANN"].startswith("9.1.0 in ")
    assert found.facts["Ascend driver"] == "25.5.0"


def test_a_bare_machine_is_told_everything_that_is_missing(stack):
    stack(plugin=None, cann=None, node=False)
    found = probe.software()
    missing = " | ".join(summaries(found, fatal=True))
    for what in ("/dev/davinci_manager", "no CANN in $ASCEND_HOME_PATH", "torch_npu is not installed"):
        assert what in missing
    fixes = " | ".join(problem.fix for problem in found.problems)
    assert "pip install 'torch_npu==2.13.0.*'" in fixes
    assert "CANN toolkit and kernels (9.1)" in fixes
    assert not found.present


def test_a_torch_without_a_plug_in_release_is_told_which_pair_to_install(stack):
    stack(torch_version="2.99.0", plugin=None)
    assert "'torch==2.14.*' 'torch_npu==2.14.*'" in probe.software().problems[0].fix


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"plugin": "2.11.0"}, "torch_npu 2.11.0 does not go with torch 2.13.0"),
        (
            {"torch_version": "2.12.0", "plugin": "2.12.0", "cann": "8.5.0"},
            "made for CANN 9.1, and 8.5.0 is active",
        ),
        ({"torch_version": "2.12.0", "plugin": "2.12.0"}, "FALLBACK_CPU_DISABLE is unknown to it"),
        ({"torch_version": "2.11.0", "plugin": "2.11.0"}, "does not take npu_fused_linear_online_max_sum"),
        ({"torch_version": "2.99.0", "plugin": "2.99.0"}, "not in our table"),
    ],
)
def test_versions_that_do_not_go_together_are_warned_of(stack, versions, said):
    stack(**versions)
    found = probe.software()
    assert found.usable
    assert any(said in summary for summary in summaries(found, fatal=False))


def test_a_newer_patch_of_the_plug_in_and_of_cann_is_fine(stack):
    stack(plugin="2.13.0.post3", cann="9.1.2")
    assert probe.software().problems == []


@pytest.mark.parametrize("release", ["2.13.0", "2.14.0"])
def test_releases_whose_cann_is_not_published_are_known_all_the_same(stack, release):
    stack(torch_version=release, plugin=release, cann="9.2.0")
    assert probe.software().problems == []


def test_a_release_that_does_not_take_a_call_is_named(stack, monkeypatch):
    monkeypatch.setattr(probe, "LACKING", {(2, 13): ("npu_swiglu",)})
    stack()
    (problem,) = probe.software().problems
    assert "torch_npu 2.13.0 does not take npu_swiglu as it is called here" in problem.summary
    assert not problem.fatal


SHARED = "cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(
    ("message", "said", "fix"),
    [
        # What the wheels of 2.11 to 2.14 say on a machine without CANN, and after its first library is there.
        (f"libhccl.so: {SHARED}", "CANN's libhccl.so", "set_env.sh"),
        (f"libacl_op_compiler.so: {SHARED}", "CANN's libacl_op_compiler.so", "set_env.sh"),
        (f"libascendcl.so: {SHARED}", "CANN's libascendcl.so", "set_env.sh"),
        (f"libascend_hal.so: {SHARED}", "driver's libascend_hal.so", "npu-smi"),
        (
            "/x/torch_npu/lib/libtorch_npu.so: undefined symbol: _ZN3c104cuda",
            "built for another torch",
            "same version",
        ),
        (
            "/x/torch_npu/lib/libtorch_npu.so: undefined symbol: aclrtGetSocName",
            "CANN has no aclrtGetSocName",
            "CANN toolkit",
        ),
        ("/x/lib64/libhccl.so: undefined symbol: rtGetDevice", "CANN has no rtGetDevice", "CANN toolkit"),
        (
            "ASCEND_OPP_PATH environment variable is not set. Please check whether the opp package",
            "ASCEND_OPP_PATH environment variable is not set",
            "set_env.sh",
        ),
        (
            "ASCEND_RUNTIME_PATH : /usr/local/Ascend/runtime does not exist. Please check",
            "ASCEND_RUNTIME_PATH : /usr/local/Ascend/runtime does not exist",
            "set_env.sh",
        ),
        (
            "Two accelerators cannot be used at the same time in PyTorch: npu and cuda.",
            "another accelerator",
            "whl/cpu",
        ),
    ],
)
def test_failed_imports_are_explained_with_the_loaders_own_words(message, said, fix):
    problem = probe.explain_failed_import(f"ImportError: {message}")
    assert said in problem.summary
    assert fix in problem.fix
    if SHARED in message or "undefined symbol" in message:
        assert message in problem.summary


@pytest.mark.parametrize(
    "message", ["libcudart.so.13: cannot open shared object file", "no module named 'acl'"]
)
def test_what_is_not_this_vendors_is_left_to_others(message):
    assert probe.explain_failed_import(message) is None


@pytest.fixture
def npu(monkeypatch, fake_device, stack):
    """A torch with a fake torch_npu that sees ``devices`` devices."""

    def make(devices=2):
        stack()
        monkeypatch.setitem(sys.modules, "torch_npu", ModuleType("torch_npu"))
        return fake_device("npu", devices, "Ascend910B2")

    return make


def test_devices_the_plug_in_sees_are_usable(npu):
    npu(devices=2)
    found = device.NpuDevice().probe()
    assert found.problems == []
    assert found.facts["devices"] == "2 × Ascend910B2"
    assert found.facts["product"] == "A2"


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("Ascend910B2", "A2"),
        ("Ascend910B4-1", "A2"),
        ("Ascend910_9392", "A3"),
        ("Ascend950PR", "950"),
        ("x", None),
    ],
)
def test_a_devices_name_says_its_product(name, product):
    assert product_named(name) == product


def test_a_plug_in_that_sees_none_is_unusable(npu):
    npu(devices=0)
    assert summaries(device.NpuDevice().probe(), fatal=True) == ["torch sees no npu device"]


def test_a_plug_in_that_does_not_load_is_explained(stack, monkeypatch, tmp_path):
    stack()
    (tmp_path / "torch_npu.py").write_text(
        "raise ImportError('libhccl.so: cannot open shared object file: gone')", encoding="utf-8"
    )
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert summaries(device.NpuDevice().probe(), fatal=True) == [
        "CANN's libhccl.so is not found: libhccl.so: cannot open shared object file: gone"
    ]


def test_the_device_is_opened_through_its_module(npu, monkeypatch):
    module = npu()
    # Without the plug-in torch does not know the device type: a tuple stands for torch.device.
    fake_torch = SimpleNamespace(get_device_module=lambda _: module, device=lambda *device: device)
    monkeypatch.setattr(device, "torch", fake_torch)
    assert device.NpuDevice().open(1) == ("npu", 1)
    assert module.calls == [("set_device", 1)]


def test_the_device_is_seeded_and_waited_for_through_its_module(npu):
    module = npu()
    npu_device = discovery.load("npu").device
    npu_device.seed(7)
    npu_device.synchronize()
    assert module.calls == [("manual_seed_all", 7), ("synchronize",)]


def test_memory_is_asked_of_the_module(npu):
    module = npu()
    asked = discovery.load("npu").memory
    assert (asked.allocated(), asked.peak(), asked.total()) == (11, 22, 44)
    asked.reset_peak()
    assert module.calls[-1] == ("reset_peak_memory_stats",)


@pytest.mark.parametrize(
    ("timeout", "connect", "execute"),
    [(5, 300, 120), (600, 600, 600), (10**6, 7200, 10**6), (10**10, 7200, 2**31 - 61)],
)
def test_hccl_waits_as_long_as_the_run_within_its_own_bounds(timeout, connect, execute):
    """And its events wait longer than its execution: torch_npu warns where they do not."""
    environment = discovery.load("npu").collectives.environment(timedelta(seconds=timeout))
    assert environment == {
        "HCCL_CONNECT_TIMEOUT": str(connect),
        "HCCL_EXEC_TIMEOUT": str(execute),
        "HCCL_EVENT_TIMEOUT": str(execute + 60),
    }


def test_the_allocator_setting_gives_way_to_torchs_own_variable(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    ours = discovery.load("npu").memory.environment
    monkeypatch.setattr(memory, "installed_version", {"torch_npu": "2.13.0"}.get)
    assert ours() == {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    assert ours() == {}
    # Older releases do not know torch's variable: there both may be set, and ours alone is read.
    monkeypatch.setattr(memory, "installed_version", {"torch_npu": "2.11.0"}.get)
    assert ours() == {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}


def test_two_settings_of_the_allocator_are_warned_of(stack, monkeypatch):
    stack(torch_version="2.13.0+cpu", plugin="2.13.0")
    monkeypatch.delenv("PYTORCH_NPU_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert not any("aborts" in problem.summary for problem in probe.software().problems)
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")
    assert any("aborts" in problem.summary for problem in probe.software().problems)


def test_silent_cpu_fallback_is_off_before_torch_is_imported():
    environment = preflight_of(discovery.find("npu")).environment
    assert environment["TORCH_NPU_FALLBACK_CPU_DISABLE"] == "1"


def test_determinism_covers_the_collectives(monkeypatch):
    monkeypatch.setenv("HCCL_DETERMINISTIC", "x")
    monkeypatch.delenv("HCCL_DETERMINISTIC")
    discovery.load("npu").device.set_deterministic(True)
    torch.use_deterministic_algorithms(False)
    assert os.environ["HCCL_DETERMINISTIC"] == "true"


def test_no_peak_is_claimed_and_a_given_one_is_taken(monkeypatch):
    monkeypatch.delenv("PORTMOE_PEAK_TFLOPS", raising=False)
    assert discovery.load("npu").device.peak_flops(torch.bfloat16) is None
    monkeypatch.setenv("PORTMOE_PEAK_TFLOPS", "354")
    assert discovery.load("npu").device.peak_flops(torch.bfloat16) == 354e12


def test_what_the_plug_in_lacks_is_not_offered():
    offered = {(i.op, i.name) for i in discovery.load("npu").ops.implementations()}
    assert ("expert_ffn_ragged", "loop") in offered
    assert ("expert_ffn_ragged", "grouped_mm") not in offered
    assert ("adamw", "fused") in offered  # torch_npu has a kernel for it


def test_the_cann_home_named_by_its_script_goes_before_the_usual_places(stack, tmp_path):
    stack()
    (tmp_path / "usual").mkdir()
    assert probe.cann_home() == Path(os.environ["ASCEND_HOME_PATH"])
