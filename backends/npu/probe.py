"""torch_npu, CANN and the Ascend driver, and how they go together, found without torch."""

import os
import platform
import re
from pathlib import Path

from portmoe.accelerator import Probe, Problem
from portmoe.accelerator.probing import installed_version, pci_devices, release

PCI_VENDOR, PCI_CLASSES = 0x19E5, (0x12,)
DEVICE_MANAGER = Path("/dev/davinci_manager")
DRIVER_VERSION = Path("/usr/local/Ascend/driver/version.info")
CANN_HOMES = (Path("/usr/local/Ascend/ascend-toolkit/latest"), Path("/usr/local/Ascend/cann"))

# torch_npu X.Y.Z needs torch X.Y.Z. The CANN its release notes pair it with; None: neither they nor the wheel
# name one. (The wheels' own tables end at release candidates of 2.12, with CANN 8.5.)
CANN_OF: dict[tuple[int, ...], tuple[int, ...] | None] = {
    (2, 11): (9, 1),
    (2, 12): (9, 1),
    (2, 13): None,
    (2, 14): None,
}
LATEST_CANN = (9, 1)  # what the guide in the wheel of 2.14 has one install

# Functions called here that these releases do not register as they are called, or not at all.
_MAX_SUM = (
    "npu_fused_linear_online_max_sum",
    "npu_fused_linear_cross_entropy_loss_with_max_sum_backward",
)
LACKING: dict[tuple[int, ...], tuple[str, ...]] = {(2, 11): _MAX_SUM, (2, 12): _MAX_SUM}

BOTH_ALLOCATORS = (2, 13)  # the release that knows torch's variable of the allocator, and refuses both
NO_SILENT_FALLBACK = (2, 13)  # the release that can be told not to compute on the CPU

# Read by torch_npu while it is imported.
ENVIRONMENT = {
    "TORCH_NPU_FALLBACK_CPU_DISABLE": "1",  # an operation without a kernel is an error, not a slow run
    "INF_NAN_MODE_ENABLE": "1",  # overflow gives inf, as everywhere else, instead of saturating
}

NEWEST = ".".join(map(str, max(CANN_OF)))
NEWEST_PAIR = f"pip install 'torch=={NEWEST}.*' 'torch_npu=={NEWEST}.*'"

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF")

INSTALL_CANN = (
    "install the CANN toolkit and kernels ({version}) and run `source <CANN>/set_env.sh` in the shell that "
    "starts portmoe"
)
INSTALL_DRIVER = "install the Ascend driver and firmware and see that `npu-smi info` lists the device"


def software() -> Probe:
    """Versions of torch_npu, CANN and the driver; what is missing, and pairs that do not go together."""
    probe = Probe()
    torch, plugin = installed_version("torch"), installed_version("torch_npu")
    home = cann_home()
    cann = cann_version(home) if home else None
    cards = pci_devices(PCI_VENDOR, PCI_CLASSES)
    probe.present = bool(cards) or DEVICE_MANAGER.exists()
    probe.facts["Ascend devices on the PCI bus"] = str(cards)
    probe.facts["Ascend driver"] = _value(DRIVER_VERSION, "version") or "none"
    probe.facts["CANN"] = f"{cann or 'version unknown'} in {home}" if home else "none"
    probe.facts["torch_npu"] = plugin or "none"
    if not DEVICE_MANAGER.exists():
        probe.fail("no Ascend device: /dev/davinci_manager does not exist", INSTALL_DRIVER)
    if not home:
        searched = ", ".join(["$ASCEND_HOME_PATH", "$ASCEND_TOOLKIT_HOME", *map(str, CANN_HOMES)])
        probe.fail(f"no CANN in {searched}", INSTALL_CANN.format(version=_cann_for(plugin or torch)))
    if plugin and release(plugin)[:2] < NO_SILENT_FALLBACK:
        probe.warn(
            f"torch_npu {plugin} computes on the CPU, silently, what it has no kernel for: "
            "TORCH_NPU_FALLBACK_CPU_DISABLE is unknown to it",
            f"watch its warnings, or install a newer pair: {NEWEST_PAIR}",
        )
    if {*ALLOCATOR_VARIABLES} <= os.environ.keys() and release(plugin or NEWEST)[:2] >= BOTH_ALLOCATORS:
        probe.warn(
            f"{' and '.join(ALLOCATOR_VARIABLES)} are both set, and torch_npu aborts at its first allocation",
            f"unset {ALLOCATOR_VARIABLES[0]}",
        )
    if torch:
        _check_plugin(probe, torch, plugin)
    for name in LACKING.get(release(plugin or "")[:2], ()):
        probe.warn(
            f"torch_npu {plugin} does not take {name} as it is called here, and something else computes",
            f"install a release that does: {NEWEST_PAIR}",
        )
    if plugin and cann:
        _check_cann(probe, plugin, cann)
    return probe


def _check_plugin(probe: Probe, torch: str, plugin: str | None) -> None:
    wanted = ".".join(map(str, release(torch)))
    listed = release(torch)[:2] in CANN_OF
    same = (
        f"pip install 'torch_npu=={wanted}.*'"
        if listed
        else f"{NEWEST_PAIR} (torch {wanted} is not in our table)"
    )
    if plugin is None:
        probe.fail("torch_npu is not installed", same)
    elif release(plugin)[:2] != release(torch)[:2]:
        probe.warn(f"torch_npu {plugin} does not go with torch {torch}: the versions must agree", same)
    elif not listed:
        probe.warn(f"torch_npu {plugin} is not in our table of releases and their CANN", NEWEST_PAIR)


def _check_cann(probe: Probe, plugin: str, cann: str) -> None:
    wanted = CANN_OF.get(release(plugin)[:2])
    if wanted and release(cann)[:2] != wanted:
        probe.warn(
            f"torch_npu {plugin} is made for CANN {_cann_for(plugin)}, and {cann} is active",
            INSTALL_CANN.format(version=_cann_for(plugin)),
        )


def _cann_for(torch: str | None) -> str:
    wanted = CANN_OF.get(release(torch or "")[:2]) or LATEST_CANN
    return ".".join(map(str, wanted))


def cann_home() -> Path | None:
    """Where CANN is: what its set_env.sh says, otherwise the usual places."""
    named = [Path(os.environ[k]) for k in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME") if os.environ.get(k)]
    return next((home for home in (*named, *CANN_HOMES) if home.is_dir()), None)


def cann_version(home: Path) -> str | None:
    """CANN's version from the files its packages leave; None where none of them says."""
    files = (
        home / f"{platform.machine()}-linux" / "ascend_toolkit_install.info",
        home / "opp" / "version.info",
        home / "compiler" / "version.info",
        home / "runtime" / "version.info",
    )
    return next(filter(None, (_value(file, "version") for file in files)), None)


# torch_npu checks what set_env.sh sets before it loads: a variable that is not there, or a folder.
CHECKED = re.compile(r"ASCEND_(\w+)_PATH(?: environment variable is not set| : \S+ does not exist)")
DRIVER = ("libascend_hal", "libdrv", "libdcmi")
CANN = ("libhccl", "libascend", "libacl", "libge_", "libgraph", "libopapi", "libruntime", "libregister")


def explain_failed_import(message: str) -> Problem | None:
    """Why torch_npu did not load, with the loader's own words: CANN, the driver, or another torch."""
    cann = INSTALL_CANN.format(version=_cann_for(installed_version("torch_npu")))
    checked = CHECKED.search(message)
    library = re.search(r"(lib\w+\.so[.\d]*): cannot open shared object file[^\n]*", message)
    symbol = re.search(r"(\S+): undefined symbol: (\w+)", message)
    if checked:
        return Problem(f"torch_npu looks for CANN's packages before it loads: {checked[0]}", cann)
    if library and library[1].startswith(DRIVER):
        return Problem(f"the Ascend driver's {library[1]} is not found: {library[0]}", INSTALL_DRIVER)
    if library and library[1].startswith(CANN):
        return Problem(f"CANN's {library[1]} is not found: {library[0]}", cann)
    if symbol and re.match(r"acl|Hccl|ge[A-Z]|rt[A-Z]", symbol[2]):
        return Problem(f"the active CANN has no {symbol[2]}, which is asked for: {symbol[0]}", cann)
    if symbol and "torch_npu" in message:
        torch, plugin = installed_version("torch"), installed_version("torch_npu")
        return Problem(
            f"torch_npu {plugin} was built for another torch than {torch}: {symbol[0]}",
            "install the same version of both: pip install 'torch==X.Y.*' 'torch_npu==X.Y.*'",
        )
    if "Two accelerators cannot be used at the same time" in message:
        return Problem(
            "torch_npu does not load into a torch that has another accelerator",
            "use an environment of its own, with torch from https://download.pytorch.org/whl/cpu",
        )
    return None


def _value(file: Path, key: str) -> str | None:
    """The value of ``key=value`` in a file of such lines, in any case of letters."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{key}\s*=\s*\"?([^\s\"]+)", text, re.IGNORECASE | re.MULTILINE)
    return found[1] if found else None
