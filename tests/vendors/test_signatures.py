"""What the backends call, and what the stand-ins take, held to the vendors' own signatures."""

import ast
import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from calls import BACKENDS, SIGNATURES, Found, bind, calls
from read_wheels import defined, registered

from portmoe.backends.npu import probe, signatures

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
import standins

RELEASES = SIGNATURES["torch_npu"]
OPERATIONS = Path(__file__).parents[1] / "simulated" / "plugin" / "torch_npu" / "operations"
NPU_CALLS = [
    call
    for call in calls(sorted((BACKENDS / "npu").glob("*.py")))
    if re.fullmatch(r"torch_npu\.npu_\w+", call.function)
]


def schemas(release: str, name: str) -> list[torch.FunctionSchema]:
    """Every overload a release registers under a name."""
    functions = RELEASES[release]["functions"]
    return [torch._C.parse_schema(text) for full, text in functions.items() if full.partition(".")[0] == name]


def test_the_data_say_where_they_are_from():
    assert {*RELEASES} == {"2.11.0", "2.12.0", "2.13.0", "2.14.0"}
    for release, read in RELEASES.items():
        assert read["file"].startswith(f"torch_npu-{release}-")
        assert re.fullmatch(r"[0-9a-f]{64}", read["sha256"])
        for text in read["functions"].values():
            torch._C.parse_schema(text)


def test_every_call_of_the_backend_is_in_its_table():
    found = {(call.function.removeprefix("torch_npu."), call.positional, call.keywords) for call in NPU_CALLS}
    table = {(name, len(call.positional), call.keywords) for name, call in signatures.CALLS.items()}
    assert found == table


@pytest.mark.parametrize("release", RELEASES)
def test_every_call_binds_to_every_release_but_those_check_env_names(release):
    unbound = {
        name
        for name, call in signatures.CALLS.items()
        if all(call.why_not(schema) for schema in schemas(release, name))
    }
    minor = tuple(map(int, release.split(".")[:2]))
    assert unbound == {*probe.LACKING.get(minor, ())}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("f(Tensor input, Tensor gamma, float eps=1.0, *, Tensor? mask=None) -> Tensor", None),
        ("f(Tensor input, Tensor gamma, *, Tensor? mask=None) -> Tensor", None),
        ("f(Tensor self, Tensor gamma, *, Tensor? mask=None) -> Tensor", "begins with (self, gamma)"),
        ("f(Tensor gamma, Tensor input, *, Tensor? mask=None) -> Tensor", "begins with (gamma, input)"),
        ("f(Tensor input, *, Tensor gamma, Tensor? mask=None) -> Tensor", "begins with (input)"),
        ("f(Tensor input, Tensor gamma) -> Tensor", "has no parameter mask"),
        ("f(Tensor input, Tensor gamma, int dim, *, Tensor? mask=None) -> Tensor", "needs dim"),
    ],
)
def test_a_changed_schema_is_noticed(schema, reason):
    call = signatures.Call(("input", "gamma"), ("mask",))
    said = call.why_not(torch._C.parse_schema(schema))
    assert said is None if reason is None else reason in said


LOADED = json.loads((Path(__file__).parent / "kernels.json").read_text())


def test_what_was_read_as_text_is_what_the_library_registers():
    """Read from the strings of the library, and asked of the library itself, loaded into torch."""
    read = RELEASES[LOADED["torch_npu"]]["functions"]
    registered = {
        name.removeprefix("npu::"): torch._C.parse_schema(text) for name, text in LOADED["registered"].items()
    }
    assert {name: torch._C.parse_schema(f"npu::{text}") for name, text in read.items()} == registered


def stand_ins():
    """Name → definition of every function registered as documented: read, as only the device imports them."""
    for source in sorted(OPERATIONS.glob("*.py")):
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("npu_"):
                yield node.name, node


def parameters(arguments: ast.arguments) -> list[tuple]:
    """(name, keyword-only, default) in order; ... where there is no default."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [..., *[...] * len(plain), *map(ast.literal_eval, arguments.defaults)][-len(plain) :]
    by_keyword = [... if value is None else ast.literal_eval(value) for value in arguments.kw_defaults]
    return [(a.arg, False, d) for a, d in zip(plain, defaults, strict=True)] + [
        (a.arg, True, d) for a, d in zip(arguments.kwonlyargs, by_keyword, strict=True)
    ]


STAND_INS = dict(stand_ins())


@pytest.mark.parametrize("name", STAND_INS)
def test_a_stand_in_takes_what_the_wheel_registers(name):
    """Names, order, defaults and what is keyword-only, of the release it stands for."""
    overloads = {
        full: torch._C.parse_schema(text)
        for full, text in RELEASES["2.13.0"]["functions"].items()
        if full.partition(".")[0] == name
    }
    # With out= it is an overload of its own, which the stand-in joins to the plain one.
    schema = overloads.get(f"{name}.out", overloads.get(name))
    wanted = [
        (a.name, a.kwarg_only, a.default_value if a.has_default_value() else ...) for a in schema.arguments
    ]
    mine = parameters(STAND_INS[name].args)
    if f"{name}.out" in overloads:
        assert mine.pop() == ("out", True, None)
        assert wanted.pop() == ("out", True, ...)
    assert mine == wanted


@pytest.mark.parametrize("name", STAND_INS)
def test_a_stand_in_has_a_gradient_where_the_wheel_has_a_node_for_it(name):
    without = "without_autograd" in {ast.unparse(decorator) for decorator in STAND_INS[name].decorator_list}
    assert without == (name not in RELEASES["2.13.0"]["gradients"])


def test_the_same_functions_have_gradients_in_every_release():
    assert len({tuple(read["gradients"]) for read in RELEASES.values()}) == 1


def test_every_function_called_has_a_stand_in():
    assert {*signatures.CALLS} <= {*STAND_INS}


NPU_MODULE = OPERATIONS.parent / "npu.py"
# How the device's module is asked for: by the backends, and by the interface that serves all of them.
MODULE = re.compile(r"(?:npu\(\)|torch\.get_device_module\(.*?\))\.(\w+)")
PORTMOE = BACKENDS.parent / "portmoe"


def device_calls(backend: str):
    """Calls of functions of the device's own module."""
    sources = [*(BACKENDS / backend).glob("*.py"), *PORTMOE.rglob("*.py")]
    for call in calls(sources):
        asked = MODULE.fullmatch(call.function)
        if asked:
            yield asked[1], call


@pytest.mark.parametrize("release", RELEASES)
def test_calls_of_the_devices_module_bind_to_the_wheels_python(release):
    device = RELEASES[release]["device"]
    seen = {name: bind(device[name], call) for name, call in device_calls("npu")}
    assert set(seen.values()) == {None}
    assert {"set_device", "mem_get_info", "max_memory_allocated", "manual_seed_all", "get_rng_state"} <= {
        *seen
    }


def test_the_simulated_module_takes_what_the_wheels_does():
    device = RELEASES["2.13.0"]["device"]
    mine = {
        node.name: f"({ast.unparse(node.args)})"
        for node in ast.parse(NPU_MODULE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    assert {name: taken for name, taken in mine.items() if name in device} == {
        name: device[name] for name in mine if name in device
    }
    # A class there; and what torch asks of a device's module, whoever defines it.
    assert {name for name in mine if name not in device} <= {"device", "get_amp_supported_dtype"}


def test_what_is_asked_of_intels_devices_is_upstream():
    """Of the extension's device functions none is needed that torch.xpu does not have itself."""
    (read,) = SIGNATURES["intel-extension-for-pytorch"].values()
    asked = {name for name, _ in device_calls("xpu")}
    assert asked
    assert all(hasattr(torch.xpu, name) for name in asked)
    of_its_own = {name for name in read["device"] if not hasattr(torch.xpu, name)}
    assert not asked & of_its_own
    assert {"memory_allocated", "set_device", "get_rng_state"}.isdisjoint(of_its_own)


PYTHON = {package: read for package, read in SIGNATURES.items() if package != "torch_npu"}
CALLERS = {
    "tutel": ("tutel.moe.", BACKENDS / "cuda" / "tutel.py"),
    "liger-kernel": ("liger_kernel.", BACKENDS / "triton" / "liger.py"),
}


@pytest.mark.parametrize("package", CALLERS)
def test_calls_of_a_python_package_bind_to_its_source(package):
    prefix, source = CALLERS[package]
    for release, read in PYTHON[package].items():
        seen = 0
        for call in calls([source]):
            # A method of what a call returned: the dispatcher's.
            method = re.fullmatch(r"_?dispatcher(\(.*\))?\.(update|encode|decode)", call.function)
            name = f"tutel.moe.fast_dispatcher.{method[2]}" if method else call.function
            if name.startswith(prefix):
                assert bind(read["functions"][name], call) is None, f"{call} with {package} {release}"
                seen += 1
        assert seen >= 2


@pytest.mark.parametrize(
    ("name", "stand_in"),
    [
        ("tutel.moe.fast_cumsum_sub_one", standins.fast_cumsum_sub_one),
        ("tutel.moe.fast_dispatcher", standins.FastDispatcher),
        ("tutel.moe.fast_dispatcher.update", standins.FastDispatcher.update),
        ("tutel.moe.fast_dispatcher.encode", standins.FastDispatcher.encode),
        ("tutel.moe.fast_dispatcher.decode", standins.FastDispatcher.decode),
        ("liger_kernel.ops.rms_norm.LigerRMSNormFunction.apply", standins.LigerRMSNormFunction.apply),
    ],
)
def test_stand_ins_of_python_packages_take_what_the_source_does(name, stand_in):
    mine = [p for p in inspect.signature(stand_in).parameters.values() if p.name != "self"]
    for read in PYTHON[{"tutel": "tutel", "liger_kernel": "liger-kernel"}[name.partition(".")[0]]].values():
        namespace: dict = {}
        exec(f"def function{read['functions'][name]}: pass", namespace)
        theirs = inspect.signature(namespace["function"]).parameters.values()
        assert [(p.name, p.kind, p.default) for p in mine] == [(p.name, p.kind, p.default) for p in theirs]


def test_a_call_that_does_not_bind_is_noticed():
    call = Found("f", 2, ("dim",), "here")
    assert bind("(x, y, dim=0)", call) is None
    assert "unexpected keyword" in bind("(x, y)", call)
    assert "too many positional" in bind("(x, *, dim=0)", call)
    assert "missing" in bind("(x, y, z, dim=0)", call)


def test_definitions_are_read_without_running_them():
    source = "LIMIT = 3\nclass F:\n    @staticmethod\n    def forward(ctx, x: int, *, n=LIMIT, k=2): boom()\n"
    assert defined(source, "F.forward") == "(x, *, n=..., k=2)"
    library = b"\0npu_swiglu(Tensor input, int dim=-1) -> Tensor\0npu_other(Tensor x) -> Tensor\0"
    assert dict(registered(library)) == {"npu_swiglu": "npu_swiglu(Tensor input, int dim=-1) -> Tensor"}
