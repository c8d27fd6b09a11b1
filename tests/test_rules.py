"""The project's own rules, checked on its source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = [ROOT / room for room in ("portmoe", "cli", "backends", "configs", "tests", "benchmarks", "docs")]
NEUTRAL = sorted((ROOT / "portmoe").rglob("*.py")) + sorted((ROOT / "cli").rglob("*.py"))
BACKENDS = sorted((ROOT / "backends").rglob("*.py"))
SOURCES = NEUTRAL + BACKENDS
MAX_LINES = 400

# Vendors, their devices and libraries: the long names anywhere, the short ones as a word of their own,
# where an underscore, a digit or a change of case ends a word ("is_npu", "NpuDevice", but not "input").
LONG = "cuda|nccl|hccl|xccl|rccl|nvidia|huawei|ascend(?!ing|s\\b|ed\\b)|rocm|cambricon|oneapi|openvino|triton"
SHORT = "npu|xpu|mlu|gcu|musa|cann|ipex|amd|intel|hip|mps"
VENDOR = re.compile(
    rf"(?:{LONG})|(?<![A-Za-z])(?:{SHORT})(?![a-z])|(?<![A-Z])(?:{SHORT.upper()})(?![A-Z])"
    rf"|(?:{'|'.join(name.capitalize() for name in SHORT.split('|'))})(?![a-z])"
)
LONG_ANY_CASE = re.compile(LONG, re.IGNORECASE)
VENDOR_MODULES = {
    "torch_npu",
    "intel_extension_for_pytorch",
    "oneccl_bindings_for_pytorch",
    "triton",
    "tutel",
    "liger_kernel",
    "megablocks",
    "flash_attn",
    "apex",
    "transformer_engine",
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def vendors_in(text):
    return [match.group() for pattern in (VENDOR, LONG_ANY_CASE) for match in pattern.finditer(text)]


def tree_of(path):
    return ast.parse(path.read_text(), str(path))


def imported(node):
    """The modules an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are written in full"
        return [node.module]
    return []


def at_import(tree):
    """The modules imported when the file itself is: not in functions, not for type checking only."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        yield from imported(node)
        pending += ast.iter_child_nodes(node)


def anywhere(tree):
    return [module for node in ast.walk(tree) for module in imported(node)]


def module_of(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "portmoe":
        parts.insert(0, "portmoe")
    return ".".join(parts).removesuffix(".__init__")


KERNELS = {module_of(path) for path in BACKENDS if "@triton.jit" in path.read_text()}


@pytest.mark.parametrize(
    "text",
    [
        "is_cuda",
        "CUDA_VISIBLE_DEVICES",
        "CUDAGraph",
        "torch.cuda",
        "nccl",
        "npu",
        "is_npu",
        "NPU_X",
        "NpuDevice",
        "torch_npu",
        "xpu2",
        "onXpu",
        "HCCL_TIMEOUT",
        "Ascend 910B",
        "Intel's",
        "CANN",
        "xccl",
        "NVIDIA",
    ],
)
def test_the_vendor_pattern_sees(text):
    assert vendors_in(text)


@pytest.mark.parametrize(
    "text",
    [
        "input",
        "Input",
        "inputs_TH",
        "INPUT",
        "cannot",
        "Cannot",
        "ascending",
        "intelligent",
        "ship",
        "chip",
        "lamps",
    ],
)
def test_the_vendor_pattern_passes(text):
    assert not vendors_in(text)


@pytest.mark.parametrize("path", NEUTRAL, ids=name_of)
def test_no_vendor_is_named_outside_the_backends(path):
    lines = enumerate(path.read_text().splitlines(), start=1)
    found = {number: names for number, line in lines if (names := vendors_in(line))}
    assert not found
    assert not vendors_in(name_of(path))


FAMILIES = re.compile(r"intern_?lm|mixtral|qwen|deepseek", re.IGNORECASE)
KNOWS_FAMILIES = ("portmoe/families/", "portmoe/config/internevo/", "portmoe/config/xtuner/")


@pytest.mark.parametrize("path", NEUTRAL, ids=name_of)
def test_no_family_is_named_outside_the_families_and_the_importers(path):
    if not name_of(path).startswith(KNOWS_FAMILIES):
        assert not FAMILIES.findall(path.read_text())


def test_the_pattern_of_families_sees_every_family_there_is():
    folders = [path.parent.name for path in ROOT.glob("portmoe/families/*/section.py")]
    assert folders
    assert all(FAMILIES.search(folder) for folder in folders)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_vendor_modules_are_imported_only_in_functions_of_the_backends(path):
    modules = at_import(tree_of(path)) if path in BACKENDS else anywhere(tree_of(path))
    assert not KERNELS & set(modules)
    # Kernels are compiled from a module's own functions: a file of them imports the compiler, and is
    # itself imported in functions only.
    own = {"triton"} if module_of(path) in KERNELS else set()
    assert not {module.split(".")[0] for module in modules} & (VENDOR_MODULES - own)


@pytest.mark.parametrize(
    "module", ["config", "config.read", "errors", "parallel.layout", "cli.main", "cli.train"]
)
def test_neither_torch_nor_numpy_is_needed_for(module):
    code = f"import sys, portmoe.{module}; sys.exit(bool({{'torch', 'numpy'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_unpickles_or_evaluates(path):
    tree = tree_of(path)
    banned = {"cPickle", "dill", "cloudpickle", "marshal"}
    assert not {module.split(".")[0] for module in anywhere(tree)} & banned
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
            methods = {member.name for member in node.body if isinstance(member, ast.FunctionDef)}
            assert "find_class" in methods, f"{node.name} must name the few classes it lets through"
        if isinstance(node, ast.Call):
            check_call(ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, path)


def check_call(called, keywords, path):
    assert called not in {"eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler"}
    assert called not in {"yaml.unsafe_load", "yaml.full_load"}
    if called == "torch.load":
        assert keywords.get("weights_only") == "True"
    if called in {"np.load", "numpy.load"}:
        assert keywords.get("allow_pickle") == "False"
    if called == "yaml.load":
        assert name_of(path) == "portmoe/config/yaml.py"  # with a SafeLoader of its own


# docs/architecture.md: no module imports one to its left. Lower stands on nothing higher.
LEVEL = {
    "errors": 0,
    "cache": 0,
    "cores": 0,
    "files": 0,
    "result": 0,
    "config": 0,
    "ops": 1,
    "checkpoint": 1,
    "accelerator": 2,
    "data": 2,
    "launch": 3,
    "model": 3,
    "costs": 4,
    "generation": 4,
    "parallel": 5,
    "profiling": 5,
    "record": 5,
    "planning": 6,
    "training": 7,
    "chat": 8,
    "verify": 8,
    "cli": 9,
}
BELOW_ALL = ("portmoe.config", "portmoe.families", "portmoe.errors", "portmoe.configs")


def room_of(module):
    """The room of a module of ours; None for the backends and the package itself."""
    if module.startswith(BELOW_ALL):
        return "config"
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "portmoe" and parts[1] in LEVEL else None


@pytest.mark.parametrize("path", NEUTRAL, ids=name_of)
def test_rooms_import_only_rooms_below_them(path):
    own = room_of(module_of(path))
    if own is None:
        assert module_of(path) in {"portmoe", "portmoe.__main__"}
        return
    for module in anywhere(tree_of(path)):
        room = room_of(module)
        if room is not None and room != own:
            assert LEVEL[room] < LEVEL[own], f"{own} imports {module}"


@pytest.mark.parametrize("path", NEUTRAL, ids=name_of)
def test_no_backend_is_imported_by_name(path):
    assert not [module for module in anywhere(tree_of(path)) if module.startswith("portmoe.backends")]


HOST_IS_KNOWN_IN = "portmoe/accelerator/interface.py"


def asks_for_the_host(node):
    """Whether this compares with the host's type, as ``device.type == "cpu"`` does, or is ``t.is_cpu``."""
    if isinstance(node, ast.Attribute):
        return node.attr == "is_cpu"
    if not isinstance(node, ast.Compare):
        return False
    return any(isinstance(n, ast.Constant) and n.value == "cpu" for n in ast.walk(node)) and not any(
        isinstance(n, ast.Call) for n in ast.walk(node)
    )


@pytest.mark.parametrize(
    ("code", "asks"),
    [
        ('device.type == "cpu"', True),
        ('"cpu" != self.device.type', True),
        ('device.type in ("cpu", "meta")', True),
        ("tensor.is_cpu", True),
        ("part.on_host", False),
        ('generator.device != torch.device("cpu")', False),  # a contract's, not what a device can do
    ],
)
def test_the_rule_sees_what_asks_for_the_host(code, asks):
    assert any(map(asks_for_the_host, ast.walk(ast.parse(code)))) == asks


@pytest.mark.parametrize("path", NEUTRAL, ids=name_of)
def test_neutral_code_asks_the_device_what_it_can_do_and_not_which_it_is(path):
    if name_of(path) != HOST_IS_KNOWN_IN:
        assert not [ast.unparse(n) for n in ast.walk(tree_of(path)) if asks_for_the_host(n)]


def test_no_module_imports_itself_in_a_circle():
    modules = {module_of(path): path for path in SOURCES}
    edges = {}
    for module, path in modules.items():
        edges[module] = {
            target
            for name in at_import(tree_of(path))
            for target in (name, name.rpartition(".")[0])
            if target in modules and target != module and not module.startswith(f"{target}.")
        }
    finished: set[str] = set()

    def visit(module, trail):
        assert module not in trail, " → ".join([*trail[trail.index(module) :], module])
        if module not in finished:
            for target in sorted(edges[module]):
                visit(target, [*trail, module])
            finished.add(module)

    for module in modules:
        visit(module, [])
