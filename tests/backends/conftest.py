"""Stand-ins for what a vendor's stack shows of itself; nothing here is hardware."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from portmoe.accelerator import probing


@pytest.fixture
def pci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``pci(address, vendor, class_code)`` puts a device on an otherwise empty PCI bus."""
    bus = tmp_path / "pci"
    bus.mkdir()
    monkeypatch.setattr(probing, "PCI_DEVICES", bus)

    def add(address: str, vendor: int, class_code: int) -> None:
        (bus / address).mkdir()
        (bus / address / "vendor").write_text(f"0x{vendor:04x}\n")
        (bus / address / "class").write_text(f"0x{class_code:06x}\n")

    return add


class FakeDeviceModule(SimpleNamespace):
    """The part of ``torch.<device>`` that the backends call, for ``devices`` devices of one name."""

    def __init__(self, devices: int, name: str) -> None:
        super().__init__(calls=[], devices=devices, name=name)

    def is_available(self) -> bool:
        return self.devices > 0

    def device_count(self) -> int:
        return self.devices

    def get_device_name(self) -> str:
        return self.name

    def __getattr__(self, function: str) -> Callable[..., object]:
        if function.startswith("__"):
            raise AttributeError(function)

        def record(*args: object) -> object:
            self.calls.append((function, *args))
            return RETURNED.get(function)

        return record


RETURNED = {"memory_allocated": 11, "max_memory_allocated": 22, "mem_get_info": (33, 44)}


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeDeviceModule]:
    """``fake_device(type, devices, name)`` makes torch take that for its accelerator."""

    def install(device_type: str, devices: int = 1, name: str = "Fake") -> FakeDeviceModule:
        module = FakeDeviceModule(devices, name)
        seen = SimpleNamespace(type=device_type)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: seen)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
        monkeypatch.setattr(torch, "get_device_module", lambda *_: module)
        return module

    return install
