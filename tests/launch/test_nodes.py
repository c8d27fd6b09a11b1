"""One command a machine: the variables of the environment, and two such commands that train one run."""

import shlex
import sys

import pytest
from click.testing import CliRunner
from free_port import free_port
from test_launch import SLURM, TORCHRUN, without
from test_launch_lines import README, assert_trained, small, start

import portmoe
from portmoe.cli.train import train
from portmoe.errors import BackendError, ConfigError
from portmoe.launch.nodes import Nodes, nodes_of
from portmoe.launch.ranks import detect, machine_of
from portmoe.parallel.layout import Layout

NODES = {"NPROC_PER_NODE": "8", "NNODES": "8", "PORT": "29600", "ADDR": "head", "NODE_RANK": "3"}
PLACE = Nodes(count=8, rank=3, address="head", port=29600, processes=8)
# As srun --nodes=8 --gres=gpu:8 --ntasks-per-node=8 sets them for the last task.
EIGHT_BY_EIGHT = {
    "SLURM_PROCID": "63",
    "SLURM_LOCALID": "7",
    "SLURM_NTASKS": "64",
    "SLURM_NODEID": "7",
    "SLURM_NNODES": "8",
    "SLURM_TASKS_PER_NODE": "8(x8)",
    "SLURM_NODELIST": "gpu[08-15]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}
ONE_A_NODE = SLURM | {"SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "1(x8)", "SLURM_NODEID": "5"}


def test_the_variables_of_a_machine():
    assert nodes_of(NODES) == PLACE
    few = without(NODES, "NPROC_PER_NODE", "PORT")
    assert nodes_of(few) == Nodes(8, 3, "head", 29500, None)


@pytest.mark.parametrize("name", ["NNODES", "NODE_RANK", "ADDR"])
@pytest.mark.parametrize("missing", [True, False])
def test_they_say_nothing_one_by_one(name, missing):
    environ = without(NODES, name) if missing else NODES | {name: ""}
    assert nodes_of(environ) is None
    assert machine_of("auto", environ) is None
    assert detect("auto", environ).source == "local"


@pytest.mark.parametrize(
    ("launcher", "environ", "place"),
    [
        ("auto", NODES, PLACE),
        ("nodes", NODES, PLACE),
        ("auto", NODES | TORCHRUN, None),
        ("auto", NODES | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, None),
        ("auto", NODES | EIGHT_BY_EIGHT, None),
        ("auto", NODES | ONE_A_NODE, PLACE),  # srun starts one command a machine
        ("auto", NODES | {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "64"}, PLACE),  # ssh into an allocation
        ("srun", NODES, None),
        ("local", NODES, None),
    ],
)
def test_who_starts_the_ranks(launcher, environ, place):
    assert machine_of(launcher, environ) == place


def test_srun_of_eight_machines_by_eight():
    ranks = detect("auto", EIGHT_BY_EIGHT | NODES)
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size) == (63, 7, 64, 8)
    assert (ranks.master_address, ranks.source) == ("gpu08", "srun")


def test_the_ranks_of_a_machine():
    """The agent that has started them numbers them from 0."""
    agent = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "localhost",
    }
    ranks = detect("nodes", NODES | agent)
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.local_world_size) == (25, 1, 64, 8)
    assert (ranks.master_address, ranks.master_port, ranks.source) == ("head", 29600, "nodes")
    assert machine_of("nodes", NODES | agent) is None
    with pytest.raises(BackendError, match=r"--launcher nodes needs .* ADDR is not set"):
        detect("nodes", without(NODES, "ADDR") | agent)


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("NNODES", "0", "1 and"),
        ("NNODES", "eight", "1 and"),
        ("NODE_RANK", "8", "0 and 7"),
        ("NODE_RANK", "-1", "0 and 7"),
        ("PORT", "65536", "1 and 65535"),
        ("NPROC_PER_NODE", "0", "1 and"),
    ],
)
def test_a_wrong_value_is_named(name, value, limits):
    with pytest.raises(
        ConfigError, match=rf"{name}='{value}' must be a whole number between {limits}.*unset NNODES"
    ):
        nodes_of(NODES | {name: value})


def test_two_numbers_of_processes_that_disagree():
    outcome = CliRunner(env=NODES).invoke(train, ["--nproc", "4"])
    assert outcome.exit_code == 2
    assert "--nproc 4 and NPROC_PER_NODE=8 in the environment disagree" in outcome.output


def test_the_readmes_lines_for_64_cards():
    """What they set, and a config that 64 ranks can train."""
    recipe = "deepseek_v2_chat_full_alpaca_e3"
    lines = [shlex.split(text) for text in README.read_text().splitlines() if f"--config {recipe} " in text]
    srun, machine = (words for words in lines if words[0] in ("srun", "NPROC_PER_NODE=8"))
    assert srun[1:4] == ["--nodes=8", "--gres=gpu:8", "--ntasks-per-node=8"]
    variables = dict(word.split("=") for word in machine[: machine.index("portmoe")])
    assert nodes_of(variables) == Nodes(8, 0, "HEAD", 29600, 8)
    for words in (srun, machine):
        command = words[words.index("portmoe") :]
        assert command[:4] == ["portmoe", "train", "--config", recipe]
        # the model's folder and the data are the reader's own
        assert command[5::2] == ["model.from_pretrained=FOLDER", "data.train_folder=FILE"]
        config = portmoe.load_config(recipe)
        assert config.expert_shard == 20
        assert Layout.plan(config, 64).data == 64


@pytest.mark.slow
def test_two_commands_train_one_run(tmp_path):
    variables = {"NPROC_PER_NODE": "1", "NNODES": "2", "PORT": str(free_port()), "ADDR": "localhost"}
    words = [sys.executable, "-m", "portmoe", "train", *small(tmp_path / "run")]
    commands = [start(words, **variables, NODE_RANK=rank) for rank in ("0", "1")]
    assert_trained(commands, 2, tmp_path / "run")
