"""Write ``signatures.json``: what the vendors' own packages say their functions take.

    python tests/vendors/read_wheels.py FOLDER

FOLDER holds the packages as their index gives them, never unpacked into this tree and never imported:

    pip download --no-deps -d FOLDER torch_npu==2.13.0        (each release)
    pip download --no-deps -d FOLDER liger-kernel==0.8.5
    pip download --no-deps -d FOLDER intel-extension-for-pytorch==2.8.0
    tutel has no wheel: a commit's archive from github.com/microsoft/tutel, as FOLDER/tutel-COMMIT

torch_npu registers its functions from C++: their schemas are strings in its library. The others are Python,
whose definitions are read, not run.
"""

import ast
import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

SIGNATURES = Path(__file__).with_name("signatures.json")

PLUGIN = "torch_npu"
LIBRARY = "torch_npu/lib/libtorch_npu.so"
# What is called, what could be, and what the pages name beside them.
FUNCTIONS = {
    "npu_add_rms_norm",
    "npu_apply_adam_w",
    "npu_clipped_swiglu",
    "npu_cross_entropy_loss",
    "npu_fused_cross_entropy_loss_with_max_sum",
    "npu_fused_linear_cross_entropy_loss_with_max_sum_backward",
    "npu_fused_linear_online_max_sum",
    "npu_fusion_attention",
    "npu_fusion_attention_v2",
    "npu_fusion_attention_v3",
    "npu_grouped_matmul",
    "npu_grouped_matmul_add",
    "npu_grouped_matmul_add_",
    "npu_interleave_rope",
    "npu_moe_gating_top_k",
    "npu_moe_gating_top_k_backward",
    "npu_moe_gating_top_k_softmax",
    "npu_moe_gating_top_k_softmax_v2",
    "npu_moe_init_routing_v2",
    "npu_moe_re_routing",
    "npu_moe_token_permute",
    "npu_moe_token_permute_with_routing_map",
    "npu_moe_token_unpermute",
    "npu_moe_token_unpermute_with_routing_map",
    "npu_rms_norm",
    "npu_rms_norm_backward",
    "npu_rotary_mul",
    "npu_swiglu",
    "npu_swiglu_backward",
}

# Of a device's module: the folder its functions are defined in.
DEVICES = {PLUGIN: "torch_npu/npu/", "intel-extension-for-pytorch": "intel_extension_for_pytorch/xpu/"}

# Per Python package: where a function or a class is defined, by the name it is called by.
PYTHON = {
    "liger-kernel": {
        "liger_kernel.ops.rms_norm.LigerRMSNormFunction.apply": (
            "liger_kernel/ops/rms_norm.py",
            "LigerRMSNormFunction.forward",
        ),
        "liger_kernel.ops.fused_linear_cross_entropy.LigerFusedLinearCrossEntropyFunction.apply": (
            "liger_kernel/ops/fused_linear_cross_entropy.py",
            "LigerFusedLinearCrossEntropyFunction.forward",
        ),
    },
    "tutel": {
        "tutel.moe.fast_cumsum_sub_one": ("tutel/jit_kernels/gating.py", "fast_cumsum_sub_one"),
        "tutel.moe.fast_dispatcher": ("tutel/impls/fast_dispatch.py", "TutelMoeFastDispatcher.__init__"),
        "tutel.moe.fast_dispatcher.update": (
            "tutel/impls/fast_dispatch.py",
            "TutelMoeFastDispatcher.update",
        ),
        "tutel.moe.fast_dispatcher.encode": (
            "tutel/impls/fast_dispatch.py",
            "TutelMoeFastDispatcher.encode",
        ),
        "tutel.moe.fast_dispatcher.decode": (
            "tutel/impls/fast_dispatch.py",
            "TutelMoeFastDispatcher.decode",
        ),
    },
    "intel-extension-for-pytorch": {
        "intel_extension_for_pytorch.optimize": (
            "intel_extension_for_pytorch/frontend.py",
            "optimize",
        ),
    },
}


def registered(library: bytes) -> Iterator[tuple[str, str]]:
    """Name with its overload, and schema, of every function in ``FUNCTIONS`` that a library registers."""
    found = re.findall(rb"\b((npu_\w+)(?:\.\w+)?\([ -~]*?\) -> [ -~]+)\0", library)
    for schema, name in sorted(set(found)):
        if name.decode() in FUNCTIONS:
            text = schema.decode()
            yield text.partition("(")[0], text


def gradients(library: bytes) -> list[str]:
    """The functions of ``FUNCTIONS`` that have a node in autograd's graph."""
    return [name for name in sorted(FUNCTIONS) if f"{_camel(name)}Backward0".encode() in library]


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def defined(source: str, name: str) -> str:
    """The parameters of a function or method as written, without self, ctx or annotations."""
    body: list[ast.stmt] = ast.parse(source).body
    *classes, function = name.split(".")
    for part in classes:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == part)
    # Of two definitions of one name, the later one counts.
    *_, node = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == function)
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    if classes:
        del arguments.args[0]
    # A default that is a name of the module means a value that only the module knows.
    arguments.defaults = [_constant(value) for value in arguments.defaults]
    arguments.kw_defaults = [value and _constant(value) for value in arguments.kw_defaults]
    return f"({ast.unparse(arguments)})"


def all_defined(sources: Iterable[str]) -> dict[str, str]:
    """The public functions at the top of these modules, by name, and what they take."""
    found = {}
    for source in sources:
        names = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        found |= {name: defined(source, name) for name in names if not name.startswith("_")}
    return found


def _constant(value: ast.expr) -> ast.expr:
    try:
        ast.literal_eval(value)
    except ValueError:
        return ast.Constant(Ellipsis)
    return value


def read(folder: Path) -> dict[str, dict[str, dict]]:
    """Per package and release: the file it came from, its hash, and what its functions take."""
    packages: dict[str, dict[str, dict]] = {PLUGIN: {}, **{package: {} for package in PYTHON}}
    for wheel in sorted(folder.rglob("*.whl")):
        name, release, *_ = wheel.name.split("-")
        package = next((known for known in packages if known.replace("-", "_") == name), None)
        if package is None:
            continue
        with zipfile.ZipFile(wheel) as archive:
            more: dict = {}
            if package == PLUGIN:
                library = archive.read(LIBRARY)
                functions, more = dict(registered(library)), {"gradients": gradients(library)}
            else:
                functions = {
                    called: defined(archive.read(path).decode(), name)
                    for called, (path, name) in PYTHON[package].items()
                }
            files = [name for name in archive.namelist() if _is_of_device(package, name)]
            device = all_defined(archive.read(name).decode() for name in sorted(files))
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        packages[package][release] = {"file": wheel.name, "sha256": sha256, "functions": functions, **more}
        if device:
            packages[package][release]["device"] = device
    for source in sorted(path for path in folder.iterdir() if path.is_dir()):
        package, _, commit = source.name.partition("-")
        if package in PYTHON and commit:
            functions = {
                called: defined((source / path).read_text(encoding="utf-8"), name)
                for called, (path, name) in PYTHON[package].items()
            }
            packages[package][commit] = {"file": source.name, "functions": functions}
    return packages


def _is_of_device(package: str, file: str) -> bool:
    folder = DEVICES.get(package)
    return folder is not None and re.fullmatch(rf"{folder}\w+\.py", file) is not None


if __name__ == "__main__":
    SIGNATURES.write_text(json.dumps(read(Path(sys.argv[1])), indent=1, sort_keys=True) + "\n")
