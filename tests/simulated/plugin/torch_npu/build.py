"""Compiling the device: once per source, compiler and torch, into a cache folder."""

import fcntl
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = "SIMULATED_NPU_CACHE"  # the folder; unset: one under the system's temporary folder


def library() -> Path:
    """The shared library of ``device.cpp``, compiled where it is not there yet."""
    home = Path(torch.__file__).parent
    command = [
        os.environ.get("CXX", "g++"),
        *("-std=c++20", "-O1", "-fPIC", "-shared", "-w"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{home}/include{below}" for below in ("", "/torch/csrc/api/include")),
        *(str(SOURCE), f"-L{home}/lib", "-ltorch_cpu", "-lc10"),
    ]
    key = hashlib.sha256(SOURCE.read_bytes() + "\0".join([torch.__version__, *command]).encode()).hexdigest()
    default = Path(tempfile.gettempdir()) / f"portmoe-simulated-npu-{os.getuid()}"
    folder = Path(os.environ.get(CACHE, default))
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"device-{key[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several ranks may start at once
        if not built.exists():
            partial = built.with_suffix(".partial")
            done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the simulated npu does not compile: {' '.join(command)}\n{done.stderr}")
            partial.rename(built)
    return built
