"""``compile_kernels.py CAPABILITY`` compiles every Triton kernel for such GPUs and prints its name.

The operations run once with a launcher that only notes the arguments; from these come the types that each
kernel is compiled for.
"""

import sys
from pathlib import Path

import torch
import triton
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parent.parent))
from agreement import samples, workload

from portmoe.backends.triton.ops import TRITON
from portmoe.ops import OPERATIONS

LAUNCHES = {}  # keyed by kernel and types, so that each is compiled once


def launcher(kernel, grid):
    def note(*args):
        types, constants = {}, {}
        for parameter, value in zip(kernel.params, args, strict=True):
            if parameter.is_constexpr:
                types[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                types[parameter.name] = type_of(value)
        LAUNCHES[kernel, tuple(types.items()), tuple(constants.items())] = (types, constants)

    return note


TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}


def type_of(value):
    return TYPES[value.dtype] if isinstance(value, torch.Tensor) else {int: "i32"}[type(value)]


def main(capability):
    JITFunction.__getitem__ = launcher
    shapes = workload(torch.bfloat16, tokens=300, experts=40)
    for implementation in TRITON:
        sample = samples(OPERATIONS[implementation.op], shapes)[0]
        outputs = tree_leaves(implementation.function(*sample.args, **sample.kwargs))
        differentiable = [t for t in outputs if isinstance(t, torch.Tensor) and t.requires_grad]
        torch.autograd.backward(differentiable, [torch.ones_like(t) for t in differentiable])
    for (kernel, _, _), (types, constants) in LAUNCHES.items():
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]
        print(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
