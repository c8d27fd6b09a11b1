import json
import os
import subprocess
import sys

import pytest

import portmoe
from portmoe.accelerator import discovery
from portmoe.accelerator.preflight import explain_failed_import
from portmoe.errors import BackendError, ConfigError

GROUP = "portmoe.backends"

TOY = """
from dataclasses import replace

def accelerator():
    from portmoe.backends import cpu
    from portmoe.backends.cpu.device import CpuDevice

    class ToyDevice(CpuDevice):
        {body}

    return replace(cpu.accelerator(), name="{name}", device=ToyDevice(), priority={priority})
"""


def toy(name, body="pass", priority=50):
    return TOY.format(name=name, body=body, priority=priority)


def test_a_backend_of_another_package_is_found_and_preferred_by_its_priority(install):
    install("toy_package", toy("toy"), GROUP, "toy")
    assert "toy" in portmoe.accelerator.registered_names()
    assert portmoe.get_accelerator("toy").name == "toy"
    assert portmoe.get_accelerator("auto").name == "toy"


def test_auto_prefers_any_accelerator_to_the_cpu_and_passes_over_unusable_ones(install):
    install("a_broken", toy("a", "def probe(self): return broken()", 99), GROUP, "a")
    install("b_fine", toy("b", priority=10), GROUP, "b")
    assert portmoe.get_accelerator().name == "b"


def test_two_packages_claiming_one_name_is_an_error_naming_both(install):
    install("first_package", toy("toy"), GROUP, "toy")
    install("second_package", toy("toy"), GROUP, "toy")
    with pytest.raises(BackendError) as error:
        portmoe.get_accelerator("cpu")
    assert "first_package" in str(error.value)
    assert "second_package" in str(error.value)
    assert "'toy'" in str(error.value)


def test_an_unknown_name_gets_the_nearest_and_all_allowed():
    with pytest.raises(ConfigError) as error:
        portmoe.get_accelerator("ccpu")
    assert "did you mean 'cpu'" in str(error.value)
    for name in ("auto", "cpu", "cuda", "npu", "xpu"):
        assert name in str(error.value)


RAISING = "def probe(self): raise ValueError('the bus is on fire')"


def test_a_probe_that_raises_is_shown_when_asked_for_and_warned_of_otherwise(install, caplog):
    install("raising_package", toy("raising", RAISING), GROUP, "raising")
    with pytest.raises(BackendError, match="ValueError: the bus is on fire"):
        portmoe.get_accelerator("raising")
    with caplog.at_level("WARNING"):
        assert portmoe.get_accelerator("auto").name != "raising"
    assert "the bus is on fire" in caplog.text


def test_a_package_that_does_not_import_is_an_error_by_name_and_a_warning_for_auto(install, caplog):
    install("broken_package", "import no_such_module", GROUP, "broken")
    with pytest.raises(BackendError, match=r"broken_package.*no_such_module"):
        portmoe.get_accelerator("broken")
    with caplog.at_level("WARNING"):
        assert portmoe.get_accelerator("auto").name != "broken"
    assert "no_such_module" in caplog.text


MISSING = """def probe(self):
            from portmoe.accelerator import Probe
            probe = Probe({"driver": "none"})
            probe.fail("no driver in /dev", "install the driver")
            return probe"""


def test_the_message_says_what_was_looked_for_what_is_missing_and_what_to_install(install, monkeypatch):
    install("absent_package", toy("absent", MISSING), GROUP, "absent")
    with pytest.raises(BackendError) as error:
        portmoe.get_accelerator("absent")
    assert error.value.exit_code == 3
    for part in ("'absent'", "driver: none", "no driver in /dev", "install the driver"):
        assert part in str(error.value)
    only = {"absent": discovery.registered()["absent"]}
    monkeypatch.setattr(discovery, "registered", lambda: only)
    with pytest.raises(BackendError, match=r"no backend can be used[\s\S]*no driver in /dev"):
        portmoe.get_accelerator("auto")


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_backends_load_without_vendor_modules_and_preflights_without_torch():
    code = """
import json, sys
from portmoe.accelerator.discovery import registered, load
from portmoe.accelerator.preflight import preflight_of
points = registered()
for point in points.values():
    preflight_of(point).software()
early = "torch" in sys.modules
for name in points:
    load(name).ops.implementations()
vendors = ("torch_npu", "intel_extension_for_pytorch", "triton", "tutel", "acl")
print(json.dumps([early, sorted(set(vendors) & sys.modules.keys())]))
"""
    assert python(code) == [False, []]


PLUGIN = """
import os
seen = {key: os.environ.get(key) for key in ("TOY_FALLBACK", "TOY_MODE")}
def autoload():
    pass
"""
PREFLIGHT = """
from portmoe.accelerator import Preflight

def preflight():
    return Preflight(environment={"TOY_FALLBACK": "off", "TOY_MODE": "strict"})
"""


def test_a_plug_in_that_torch_loads_sees_the_preflight_environment_and_the_users(install):
    install("toy_plugin", PLUGIN, "torch.backends", "toy_plugin", "autoload")
    install("toy_package", toy("toy") + PREFLIGHT, GROUP, "toy")
    code = """
import json, portmoe
portmoe.get_accelerator("toy")
import toy_plugin
print(json.dumps(toy_plugin.seen))
"""
    assert python(code, TOY_MODE="lax") == {"TOY_FALLBACK": "off", "TOY_MODE": "lax"}


EXPLAINING = """
from portmoe.accelerator import Preflight, Problem

def explain(message):
    return Problem("the flux library is gone", "install flux") if "libflux" in message else None

def preflight():
    return Preflight(explain=explain)
"""


def test_a_plug_in_that_breaks_torch_is_named_and_explained_by_the_backend_that_knows(install):
    source = "raise ImportError('libflux.so: cannot open shared object file')"
    install("toy_plugin", source, "torch.backends", "toy_plugin", "autoload")
    install("toy_package", toy("toy") + EXPLAINING, GROUP, "toy")
    code = """
import json, portmoe
try:
    portmoe.get_accelerator("cpu")
except portmoe.PortmoeError as error:
    print(json.dumps([str(error), error.exit_code]))
"""
    message, exit_code = python(code)
    assert exit_code == 3
    for part in ("toy_plugin 1.5", "the flux library is gone", "install flux", "AUTOLOAD=0"):
        assert part in message


TRACEBACK = """Traceback (most recent call last):
  File "torch/__init__.py", line 3030, in _import_device_backends
    entrypoint = backend_extension.load()
ValueError: unheard of

The above exception was the direct cause of the following exception:

RuntimeError: Failed to load the backend extension: toy_plugin. You can disable extension auto-loading
"""


def test_a_plug_in_nobody_can_explain_is_named_with_its_first_error(install):
    install("toy_plugin", "", "torch.backends", "toy_plugin", "autoload")
    problem = explain_failed_import(TRACEBACK, [])
    assert problem.summary.endswith("plug-in toy_plugin 1.5 is broken: ValueError: unheard of")
    assert "uninstall toy_plugin 1.5" in problem.fix


def test_a_torch_broken_by_itself_is_not_blamed_on_a_plug_in(install):
    install("toy_plugin", "", "torch.backends", "toy_plugin", "autoload")
    problem = explain_failed_import("OSError: libtorch_cpu.so: file too short", [])
    assert "toy_plugin" not in problem.summary + problem.fix
    assert "libtorch_cpu.so: file too short" in problem.summary
