"""What looking at a machine found: facts, and problems with their fixes. Works without torch."""

from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from portmoe.result import Result

PCI_DEVICES = Path("/sys/bus/pci/devices")


class Problem(Result):
    """The result of a probe that found something wrong, as a backend says it.

    Args:
        fatal: the backend cannot train until it is fixed.
    """

    def __init__(self, summary: str, fix: str, fatal: bool = True) -> None:
        super().__init__("fail" if fatal else "warn", "probe", summary, fix)

    @property
    def summary(self) -> str:
        """What is wrong."""
        return self.detail

    @property
    def fatal(self) -> bool:
        """Whether the backend cannot train."""
        return self.status == "fail"


@dataclass
class Probe:
    """The outcome of looking for a backend's software and devices.

    ``present`` says that the hardware is in the machine, whether it can be used or not: a present but
    unusable accelerator is worth a warning where an absent one is not.
    """

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    present: bool = False

    @property
    def usable(self) -> bool:
        """True when nothing fatal was found."""
        return not any(problem.fatal for problem in self.problems)

    def fail(self, summary: str, fix: str) -> None:
        self.problems.append(Problem(summary, fix, fatal=True))

    def warn(self, summary: str, fix: str) -> None:
        self.problems.append(Problem(summary, fix, fatal=False))

    def extend(self, other: "Probe") -> None:
        """Take over everything ``other`` found."""
        self.facts.update(other.facts)
        self.problems.extend(other.problems)
        self.present = self.present or other.present


def describe(error: BaseException) -> str:
    """An exception in one line: its type and message."""
    return f"{type(error).__name__}: {error}"


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, from its metadata; nothing is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.12.0.post3+cpu" → (2, 12, 0)."""
    numbers = []
    for part in text.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def pci_devices(vendor: int, classes: tuple[int, ...], besides: tuple[str, ...] = ()) -> int:
    """How many PCI devices of this vendor are in the machine.

    Args:
        vendor: the PCI vendor number.
        classes: the upper 8 bits of the PCI class: 0x03 display controller, 0x12 processing accelerator.
        besides: addresses not to be counted, as "0000:00:02.0".
    """
    devices = sorted(PCI_DEVICES.iterdir()) if PCI_DEVICES.is_dir() else []
    return sum(
        _pci_number(device / "vendor") == vendor
        and _pci_number(device / "class") >> 16 in classes
        and device.name not in besides
        for device in devices
    )


def _pci_number(file: Path) -> int:
    try:
        return int(file.read_text(encoding="ascii"), 16)
    except (OSError, ValueError):
        return 0
