"""Write ``kernels.json``: which of torch's operations the vendor's plug-in has kernels for.

    python tests/vendors/load_wheel.py FOLDER

FOLDER holds a torch_npu wheel unpacked (``unzip``), of the installed torch's version. Kernels are registered
when the library is loaded, which needs the driver stack's libraries but none of their work: for those that
are missing, this compiles libraries of the names asked for, whose functions do nothing. There is no device,
and nothing is computed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from read_wheels import FUNCTIONS

KERNELS = Path(__file__).with_name("kernels.json")

# Run where the plug-in loads: the names of the operations with a kernel of the device's own.
LISTING = """
import json, sys, torch, torch_npu
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::") and has(n, "PrivateUse1")]
schemas = {}
for name in torch._C._dispatch_get_all_op_names():
    if name.startswith("npu::npu_"):
        packet, _, overload = name.removeprefix("npu::").partition(".")
        schemas[name] = str(getattr(getattr(torch.ops.npu, packet), overload or "default")._schema)
json.dump({"torch_npu": torch_npu.__version__, "torch": torch.__version__, "kernels": sorted(names),
           "registered": schemas}, open(sys.argv[1], "w"))
"""


def symbols(library: Path, kind: str) -> set[str]:
    """The dynamic symbols a library leaves undefined, or defines."""
    listed = subprocess.run(["nm", "-D", f"--{kind}-only", library], capture_output=True, text=True)
    return {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines() if line.strip()}


def stand_ins(plugin: Path, folder: Path) -> None:
    """Libraries for every name the plug-in needs and this machine lacks; the first has all functions."""
    mine = [*plugin.rglob("*.so"), *plugin.parent.glob("torch_npu.libs/*")]
    torchs = [*(Path(torch.__file__).parent / "lib").glob("*.so*")]
    needed = set()
    for library in mine:
        header = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
        needed |= set(re.findall(r"NEEDED.*\[(.*?)\]", header))
    system = [
        Path(folder)
        for folder in ("/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu", "/lib64")
        if Path(folder).is_dir()
    ]
    known = {library.name for library in (*mine, *torchs)}
    missing = [
        name for name in sorted(needed - known) if not any((place / name).exists() for place in system)
    ]
    defined = set().union(*(symbols(library, "defined") for library in (*mine, *torchs)))
    undefined = set().union(*(symbols(library, "undefined") for library in mine)) - defined
    functions = [
        name for name in sorted(undefined) if re.fullmatch(r"(acl|Hccl|ge|rt|Msprof|_ZN3atb)\w*", name)
    ]
    for number, name in enumerate(missing):
        source = folder / f"{name}.c"
        source.write_text(
            "".join(f"long {f}(void) {{ return 0; }}\n" for f in functions) if not number else ""
        )
        built = [
            "gcc",
            "-w",
            "-fPIC",
            "-shared",
            f"-Wl,-soname,{name}",
            "-o",
            str(folder / name),
            str(source),
        ]
        subprocess.run(built, check=True)


def main(unpacked: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stand_ins(unpacked / "torch_npu", folder)
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(folder),
            "PYTHONPATH": str(unpacked),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        }
        subprocess.run([sys.executable, "-c", LISTING, str(folder / "out")], env=environment, check=True)
        found = json.loads((folder / "out").read_text())
    wanted = {f"npu::{name}" for name in FUNCTIONS}
    found["registered"] = {k: v for k, v in found["registered"].items() if k.partition(".")[0] in wanted}
    KERNELS.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
