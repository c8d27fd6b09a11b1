"""Compiling the kernels of swiglu.c for the processor at hand, once, into the user's cache directory."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from portmoe.backends.cpu.probe import CPUINFO

SOURCE = Path(__file__).with_name("swiglu.c")
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
)
TIMEOUT = 120  # seconds; the compiler takes a fraction of one
COUNT, ADDRESS, THREADS = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
ARGUMENTS = {
    "swiglu_float32": (COUNT, *[ADDRESS] * 3, THREADS),
    "swiglu_bfloat16": (COUNT, *[ADDRESS] * 3, THREADS),
    "swiglu_backward_float32": (COUNT, *[ADDRESS] * 5, THREADS),
    "swiglu_backward_bfloat16": (COUNT, COUNT, *[ADDRESS] * 7, THREADS),
    "transpose_bfloat16": (COUNT, COUNT, *[ADDRESS] * 2, THREADS),
}


@cache
def kernels() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    compiler = shutil.which(os.environ.get("CC") or "gcc")
    if compiler is None:
        return "there is no C compiler: install gcc, or name one in CC"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{SOURCE.name} could not be compiled and loaded: {_short(error)}"
    for name, arguments in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _compiled(compiler: str) -> Path:
    """The library's file. What it was made of, and for which processor, is in its name."""
    made_of = (SOURCE.read_text(encoding="utf-8"), compiler, str(os.stat(compiler).st_mtime), *FLAGS)
    key = hashlib.sha256("\0".join((*made_of, _instructions())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "portmoe"
    library = folder / f"swiglu-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / library.name
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
            fresh.replace(library)  # in one move: several ranks may compile at once
    return library


def _instructions() -> str:
    """What -march=native goes by."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:  # no /proc
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _short(error: Exception) -> str:
    printed = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
    return next(iter((printed or str(error)).strip().splitlines()), type(error).__name__)
