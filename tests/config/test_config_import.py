"""``portmoe config import``: Python configs of InternEvo become ours, nothing is executed or lost unsaid."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import portmoe
from portmoe.cli import main as command
from portmoe.config.importers import import_config
from portmoe.config.literals import Unreadable, read_assignments
from portmoe.config.read import dump_config
from portmoe.costs.parameters import count_parameters
from portmoe.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = Path(__file__).parent / "internevo" / "7B_MoE4.py"


@pytest.fixture
def source(tmp_path):
    """``source(text)`` is the path of a config file with that text."""

    def write(text, name="theirs.py"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_the_benchmarks_config_is_the_packaged_one():
    imported = dict(leaves(yaml.safe_load(import_config(BENCHMARK).yaml())))
    packaged = dict(leaves(portmoe.load_config("7b_moe4").model_dump()))
    differing = {key: value for key, value in imported.items() if packaged[key] != value}
    assert differing == {
        "ckpt.save_ckpt_folder": "checkpoints/7b",  # the packaged config leaves folders to the run
        "ckpt.load_ckpt_folder": "checkpoints/7b_moe_train/",
        "ckpt.async_upload_tmp_folder": "/dev/shm/7b_moe_train",
        "data.total_steps": 50,  # the published log is of 200
        "lr_scheduler.total_steps": 50,  # null there: data.total_steps
        "beta2_scheduler.init_beta2": 0.95,  # null there: adam.adam_beta2
        "beta2_scheduler.c": 0,
        "model.dtype": "torch.bfloat16",  # the other spelling
    }
    assert packaged["data.total_steps"] == 200
    assert packaged["adam.adam_beta2"] == 0.95
    explicit = set(dict(leaves(yaml.safe_load((ROOT / "configs" / "7b_moe4.yaml").read_text()))))
    missing = explicit - imported.keys()
    assert missing == {
        "ckpt.load_ckpt_info",  # left out
        "monitor.alert.alert_file_path",  # left out
        "data.max_global_batch_size",  # a key of ours
    }


DENSE_7B = """
model = dict(num_attention_heads=32, vocab_size=103168, hidden_size=4096, num_layers=32, mlp_ratio=8/3,
             dtype="torch.bfloat16")
parallel = dict(zero1=8, tensor=1)
"""


@pytest.mark.parametrize("text", [DENSE_7B, f'model_type = "INTERNLM"{DENSE_7B}'])
def test_without_a_type_the_model_is_dense_as_at_its_source(source, text):
    imported = import_config(source(text))
    assert count_parameters(imported.config).total == 7_321_948_160
    assert imported.left_out == []


def test_experts_of_a_dense_type_are_left_out_and_said(source):
    imported = import_config(source("model = dict(num_layers=2, num_experts=4)"))
    assert count_parameters(imported.config).experts == 0
    assert [(item.key, item.line) for item in imported.left_out] == [("model.num_experts", 1)]
    assert "is dense" in imported.left_out[0].why


def test_what_the_file_does_not_give_is_what_its_program_takes_and_is_listed(source):
    imported = import_config(source('model_type = "INTERNLM_MoE"\nadam = dict(lr=1e-6)'))
    config = imported.config
    assert (config.loss.moe_loss_coeff, config.hybrid_zero_optimizer.clip_grad_norm) == (1.0, 0.0)
    assert (config.data.min_length, config.ckpt.enable_save_ckpt) == (0, True)
    assert (config.model.dtype, config.model.num_experts, config.moe.top_k) == ("float16", 1, 1)
    assert config.lr_scheduler.eta_min == 0.0  # with portmoe's it would be over the file's lr
    sections = {name.partition(".")[0] for name in imported.defaults}
    assert {"data", "ckpt", "loss", "hybrid_zero_optimizer", "grad_scaler", "parallel", "moe"} <= sections
    assert not any(name.startswith("adam.lr =") for name in imported.defaults)


def test_a_vocabulary_too_small_for_the_dummy_data_is_noted_and_no_obstacle(source, capsys):
    path = source('model_type = "INTERNLM_MoE"\nmodel = dict(vocab_size=512, num_experts=4)')
    assert command.run(["config", "import", str(path)]) == 0
    told = capsys.readouterr().err
    assert "note: model.vocab_size=512 is too small" in told
    assert "names no data" in told


def test_what_is_left_out_is_listed_with_its_line():
    lines = BENCHMARK.read_text().splitlines()
    left_out = import_config(BENCHMARK).left_out
    assert [item.key for item in left_out] == [
        "ckpt.load_ckpt_info",
        "monitor.alert.alert_file_path",
        "metric_dtype",
    ]
    for item in left_out:
        assert item.key.rpartition(".")[2] in lines[item.line - 1]
        assert item.why


MINIMAL = 'model_type = "INTERNLM_MoE"\n'


def carried(path):
    return dict(leaves(import_config(path).tree))


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("parallel = dict(zero1=8, tensor=2, pipeline=dict(size=4))", "parallel.zero1.size", 8),
        ("parallel = dict(expert=dict(size=-1, no_tp=False))", "parallel.expert.size", None),
        ("model = dict(num_experts=8, top_k=3)", "moe.top_k", 3),
        ("model = dict(moe_layer_kwargs=dict(capacity_factor=1.5))", "moe.capacity_factor", 1.5),
        ('model = dict(moe_type="MegaBlock-Dropless")', "model.moe_type", "MegaBlock-D"),
        ('data = dict(train_folder="local:/data/a")', "data.train_folder", "/data/a"),
        ('model = {"hidden_size": 64, "num_attention_heads": 4}', "model.hidden_size", 64),
        ("base = dict(lr=0.5)\nadam = dict(**base)", "adam.lr", 0.5),
        ("X: int = 3\nmodel = dict(num_layers=X)", "model.num_layers", 3),
        ("A = B = 3\nmodel = dict(num_layers=B)", "model.num_layers", 3),
        ("N = 2\nN = N + 1\nmodel = dict(num_layers=N)", "model.num_layers", 3),
        ("sizes = [1, 5]\nmodel = dict(num_layers=sizes[1])", "model.num_layers", 5),
    ],
)
def test_carried_over(source, text, key, value):
    assert carried(source(MINIMAL + text))[key] == value


@pytest.mark.parametrize(
    ("text", "key", "line", "why"),
    [
        (
            "model = dict(\n  num_kv_attention_heads=8,\n)",
            "model.num_kv_attention_heads",
            3,
            "every attention",
        ),
        ('model = dict(moe_type="FMoe")', "model.moe_type", 2, "one of 'GShard'"),
        ("model = dict(hidden_size=64.5)", "model.hidden_size", 2, "an integer"),
        ('data = dict(train_folder="boto3:s3://x")', "data.train_folder", 2, "object store"),
        ("model = dict(num_experts=4, top_k=1)\nmoe = dict(top_k=2)", "moe.top_k", 3, "line 2 says 1"),
        ("generation = dict(beams=2)", "generation", 2, "no such key"),
        ('data = dict(skip_batches="a-b")', "data.skip_batches", 2, "range of steps"),
    ],
)
def test_left_out(source, text, key, line, why):
    (item,) = import_config(source(MINIMAL + text)).left_out
    assert (item.key, item.line) == (key, line)
    assert why in item.why


EXPRESSIONS = st.recursive(
    st.one_of(
        st.integers(0, 9).map(str), st.sampled_from(["0.5", "2.0", "1e-3", "A", "B['x']", "True", "1_000"])
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), inner).map(
            lambda parts: f"({' '.join(parts)})"
        ),
        inner.map(lambda x: f"-{x}"),
        inner.map(lambda x: f"int({x})"),
        inner.map(lambda x: f"float({x})"),
        inner.map(lambda x: f"[{x}, 1][0]"),
    ),
    max_leaves=6,
)
NAMES = {"A": 7, "B": {"x": 0.25}}


@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS)
def test_values_are_those_python_computes(expression):
    names = read_assignments(f"A = 7\nB = dict(x=0.25)\nvalue = {expression}", "x.py").names
    value = names["value"]
    if isinstance(value, Unreadable):
        try:
            python = eval(expression, {}, dict(NAMES))
        except (ArithmeticError, ValueError):
            return
        assert isinstance(python, complex) or abs(python) >= 2**1024 or "**" in expression
    else:
        python = eval(expression, {}, dict(NAMES))
        assert (type(value), repr(value)) == (type(python), repr(python))


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("model = dict(hidden_size=open('/etc/passwd').read())", "computed"),
        ("model = dict(hidden_size=__import__('os').getpid())", "computed"),
        ("model = dict(hidden_size=[x for x in (1, 2)])", "computed"),
        ("model = dict(hidden_size=(lambda: 1)())", "computed"),
        ("model = dict(hidden_size=1 if True else 2)", "computed"),
        ("model = dict(hidden_size=SIZE)", "SIZE is not assigned"),
        ("model = dict(hidden_size=2**99999)", "too large"),
        ("model = dict(hidden_size=10**300**2)", "too large"),
        ("model = dict(hidden_size=9**9**9)", "too large"),
        ("model = dict(hidden_size=1 / 0)", "zero"),
        ("model = dict(hidden_size=int(1e999))", "infinity"),
        ("model = dict(hidden_size=float(10**308 * 10))", "too large"),
        ("data = dict(train_folder='a' * 10**9)", "other than numbers"),
        ("data = dict(train_folder='\\ud800')", "cannot be printed"),
        ("data = dict(train_folder=f'{1:999999999}')", "a format"),
        ("A = 'x' * 1\ndata = dict(train_folder=A)", "other than numbers"),
        ("model = dict(hidden_size={}['x'])", "no such item"),
        ("model = dict(hidden_size=dict(a=1)[[]])", "no such item"),
        ("model = dict(hidden_size=-'x')", "the sign"),
        ("model = dict(**3)", "something other than a dict"),
        ("model = dict(num_layers=2)\nmodel.update(num_layers=3)", "not read"),
        ("model = dict(num_layers=2)\nmodel['num_layers'] = 3", "not read"),
        ("from base import *", "not read"),
        ("if True:\n    model = dict()", "not read"),
        ("with read():\n    from base import *", "not read"),
        ("import os\ndata = dict(train_folder=os.environ['HOME'])", "computed"),
        ("from os import environ\ndata = dict(train_folder=environ)", "nothing is imported"),
        ("def size(): return 1\nmodel = dict(hidden_size=size)", "nothing is executed"),
    ],
)
def test_what_is_computed_is_named_with_its_line(source, statement, why, tmp_path, capsys):
    path = source(MINIMAL + statement)
    output = tmp_path / "ours.yaml"
    assert command.run(["config", "import", str(path), "-o", str(output)]) == 2
    error = capsys.readouterr().err
    assert why in error
    third = ("update", "['num_layers'] = 3", "os.environ")  # on the line after
    assert f"line {3 if any(part in statement for part in third) else 2}: " in error
    assert "allowed are literals" in error
    assert not output.exists()


@pytest.mark.parametrize(
    "content",
    [
        "model = dict(",
        "model = dict(a=1, a=2)",
        "x = 1\n\0",
        "x = " + "(" * 5000 + ")" * 5000,
        "x = " + "[" * 150 + "]" * 150 + "\nmodel = dict(hidden_size=x)",
        "x = " + "-" * 20000 + "1\nmodel = dict(hidden_size=x)",
        "x = " + "+".join(["1"] * 50000) + "\nmodel = dict(hidden_size=x)",
        "x = " + "9" * 5000,
        "model = dict(hidden_size=" + "9" * 400 + ")",
        'model = dict(hidden_size="\\d")\nmodel_type = 3',
        b"\xff\xfe\x00",
        "模型 = dict()".encode("gbk"),
        b"",
        b"\xef\xbb\xbf",
        "key: value",
        'model = dict(type="LlavaModel", llm=dict(num_layers=2))',
        "model = 3",
        'model = "internlm/internlm-7b"\ndata = dict(seq_len=16)',
        b"x = 1\n" * 100_000,
    ],
    ids=range(19),
)
def test_no_file_ends_in_a_traceback(source, content, capsys):
    code = command.run(["config", "import", str(source(content))])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert code == 2
    assert captured.err.startswith("error: ")


@pytest.mark.parametrize("name", ["", "/", "missing.py", "7b_moe4", "a\0b", "\udcff"])
def test_files_that_cannot_be_read(name, capsys):
    assert command.run(["config", "import", name]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_shared_values_do_not_multiply(source):
    text = MINIMAL + "a0 = [1, 1]\n" + "".join(f"a{n} = [a{n - 1}, a{n - 1}]\n" for n in range(1, 60))
    found = import_config(source(text + "ckpt = dict(load_ckpt_info=None)\nmoe = dict(top_k=a59)"))
    assert "moe.top_k" in {item.key for item in found.left_out}


def test_no_key_can_break_the_yaml(source):
    text = MINIMAL + "model = {'num_layers': 3, 'evil\\nmodel: {num_layers: 7}\\n#': 1}"
    imported = import_config(source(text, name="x.py"))
    assert imported.config.model.num_layers == 3


def test_the_expression_itself_is_shown(source, capsys):
    path = source(MINIMAL + "data = dict(名=1, train_folder='é' + str(5),  # a folder\n  seq_len=8)")
    assert command.run(["config", "import", str(path)]) == 2
    assert "line 2: 'str(5)': this is computed" in capsys.readouterr().err


def test_output_files(source, tmp_path, capsys):
    path, output = source(MINIMAL + "model = dict(num_layers=7)"), tmp_path / "ours.yaml"
    run = ["config", "import", str(path), "--output", str(output)]
    assert command.run(run) == 0
    first = output.read_text()
    assert portmoe.load_config(output).model.num_layers == 7
    path.write_text(MINIMAL + "model = dict(num_layers=8)")
    assert command.run(run) == 2
    assert "--force" in capsys.readouterr().err
    assert output.read_text() == first
    assert command.run([*run, "--force"]) == 0
    assert portmoe.load_config(output).model.num_layers == 8
    for impossible in (tmp_path, tmp_path / "no" / "folder", "a\0b"):
        assert command.run(["config", "import", str(path), "-o", str(impossible), "--force"]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_without_output_the_result_is_printed_and_the_rest_goes_to_stderr(source, capsys):
    path = source(MINIMAL + "model = dict(num_layers=7, extra=1)")
    assert command.run(["config", "import", str(path)]) == 0
    captured = capsys.readouterr()
    assert yaml.safe_load(captured.out)["model"]["num_layers"] == 7
    assert "not carried over: line 2: model.extra = 1" in captured.err
    assert "may be another model" in captured.err
    assert "model.hidden_size = 2048" in captured.err  # InternEvo's default, which holds
    assert "loss.moe_loss_coeff = 1.0" in captured.err


def test_config_still_prints_the_resolved_config(capsys):
    assert command.run(["config", "--set", "moe.top_k=1"]) == 0
    assert capsys.readouterr().out == dump_config(portmoe.load_config("tiny_moe4", ["moe.top_k=1"]))


def test_options_of_config_do_not_go_with_import(capsys):
    assert command.run(["config", "--set", "moe.top_k=1", "import", str(BENCHMARK)]) == 2
    assert "do not go with 'import'" in capsys.readouterr().err


def test_an_unreadable_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        import_config(tmp_path)
