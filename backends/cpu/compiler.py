"""Compiling this folder's C files for the processor at hand, once, into the user's cache directory."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from portmoe.backends.cpu.probe import CPUINFO
from portmoe.cache import cache_folder
from portmoe.ops.workload import Workload

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # the types there are kernels for
FOLDER = Path(__file__).parent
FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
    # Where there are vectors of 512 bits, compilers still prefer half of that.
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
)
TIMEOUT = 120  # seconds; the compiler takes a fraction of one
COUNT, NUMBER, ADDRESS, THREADS = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
ATTENTION = (COUNT, ADDRESS, *[COUNT] * 5, NUMBER, ctypes.c_int, ADDRESS)  # sizes, scale, type and strides
ARGUMENTS = {
    "swiglu_backward_float32": (COUNT, *[ADDRESS] * 5, THREADS),
    "swiglu_backward_bfloat16": (COUNT, COUNT, *[ADDRESS] * 7, THREADS),
    "transpose_bfloat16": (COUNT, COUNT, *[ADDRESS] * 2, THREADS),
    "cross_entropy_gradients_float32": (*[COUNT] * 3, NUMBER, NUMBER, *[ADDRESS] * 5, THREADS),
    "cross_entropy_gradients_bfloat16": (*[COUNT] * 3, NUMBER, NUMBER, *[ADDRESS] * 6, THREADS),
    "attention": (*ATTENTION, *[ADDRESS] * 6, COUNT, THREADS),
    "attention_backward": (*ATTENTION, *[ADDRESS] * 11, COUNT, THREADS),
    "choices_of_rows": (COUNT, COUNT, *[ADDRESS] * 2),
    "copy_to_rows": (*[COUNT] * 3, *[ADDRESS] * 3, THREADS),
}
ALIKE_IN_ALL_TYPES = {
    "swiglu": (COUNT, *[ADDRESS] * 3, THREADS),
    "rms_norm": (COUNT, COUNT, NUMBER, *[ADDRESS] * 4, THREADS),
    "rms_norm_backward": (COUNT, COUNT, *[ADDRESS] * 6, THREADS),
    "rotary": (*[COUNT] * 5, ctypes.c_int, NUMBER, *[ADDRESS] * 4, THREADS),
    "cross_entropy_statistics": (*[COUNT] * 3, ctypes.c_int, *[ADDRESS] * 7, THREADS),
    "router": (*[COUNT] * 3, *[ADDRESS] * 3, THREADS),
    "router_backward": (*[COUNT] * 3, *[ADDRESS] * 5, THREADS),
    "sum_of_rows": (*[COUNT] * 4, *[ADDRESS] * 4, THREADS),
    "weighted_rows": (*[COUNT] * 3, *[ADDRESS] * 6, THREADS),
}
ARGUMENTS |= {
    f"{name}_{of_type}": arguments
    for name, arguments in ALIKE_IN_ALL_TYPES.items()
    for of_type in NAMES.values()
}


@cache
def kernels() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    compiler = shutil.which(os.environ.get("CC") or "gcc")
    if compiler is None:
        return "there is no C compiler: install gcc, or name one in CC"
    try:
        path = _path(compiler)
        if path.exists():
            try:
                return _loaded(path)
            except (OSError, AttributeError):  # cut short by a crash of the machine: made anew
                path.unlink()
        _compile(compiler, path)
        return _loaded(path)
    except Exception as error:  # whatever it is, torch's own operators compute the same
        return f"the kernels could not be compiled and loaded: {_short(error)}"


def require() -> ctypes.CDLL:
    """The loaded library; a RuntimeError where there is none."""
    library = kernels()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """The kernel of that name for numbers of ``dtype``."""
    return getattr(require(), f"{name}_{NAMES[dtype]}")


def addresses(*tensors: torch.Tensor) -> list[int]:
    """The addresses of the tensors' first numbers; the kernels read whole rows, one after the other."""
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError("the kernels need contiguous tensors")
    return [address(t) for t in tensors]


def address(t: torch.Tensor) -> int:
    """The address of the tensor's first number; a tensor that only wraps others has no memory of its own."""
    if t.numel() and not t.data_ptr():
        raise TypeError(f"the kernels need tensors with memory of their own, not a {type(t).__name__}")
    return t.data_ptr()


def supports(workload: Workload) -> str | None:
    """Whether the kernels compute in the workload's type, and can be had."""
    if workload.dtype not in NAMES:
        return f"the kernels compute {' and '.join(NAMES.values())}, not {workload.dtype}"
    library = kernels()
    return library if isinstance(library, str) else None


def _path(compiler: str) -> Path:
    """The library's file. What it was made of, and for which processor, is in its name."""
    made_of = (*(file.read_text(encoding="utf-8") for file in _sources()), *FLAGS)
    made_of += (compiler, str(os.stat(compiler).st_mtime), _instructions())
    key = hashlib.sha256("\0".join(made_of).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache_folder() / f"kernels-{key}.so"


def _sources() -> list[Path]:
    return sorted(FOLDER.glob("*.[ch]"))


def _compile(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        fresh = Path(scratch) / library.name
        units = [str(file) for file in _sources() if file.suffix == ".c"]
        command = [compiler, *FLAGS, *units, "-lm", "-o", str(fresh)]
        subprocess.run(command, check=True, capture_output=True, errors="replace", timeout=TIMEOUT)
        fresh.replace(library)  # in one move: several ranks may compile at once


def _loaded(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
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
