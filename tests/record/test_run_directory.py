"""Which directory a run gets, who may have it, and that its files are never half written."""

import json
import os
from pathlib import Path

import pytest

from portmoe.config import Config
from portmoe.errors import ConfigError, TrainingError
from portmoe.record.run_directory import RunDirectory, first_difference


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(**sections):
    return Config.model_validate(sections)


DATA = {"train": {"samples": 100, "tokens": 6400, "packs": 50, "sha256": "0123456789"}}
GROWN = {"train": {"samples": 120, "tokens": 7400, "packs": 57, "sha256": "abcdef0123"}}


def open_run(configuration, name="tiny", data=DATA):
    run = RunDirectory.open(configuration, name, data, 0, lambda outcome: outcome)
    run.write_json("environment.json", {"data": data})
    return run


def make_step(run, step=0):
    with open(run.path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step}) + "\n")


def make_checkpoint(folder, step):
    (folder / f"step-{step:08d}").mkdir(parents=True)
    (folder / f"step-{step:08d}" / "state.json").write_text("{}")


def killed(run):
    """What a kill does: the lock goes, everything else stays."""
    run.close()


def test_fresh_run_gets_the_name_of_its_config():
    run = open_run(config())
    assert str(run.path) == "runs/tiny"
    assert not run.resuming
    assert (run.path / "config.yaml").is_file()
    run.close()


def test_unfinished_run_of_the_same_config_goes_on():
    run = open_run(config())
    make_step(run)
    make_checkpoint(run.checkpoints, 1)
    killed(run)
    again = open_run(config())
    assert again.path == run.path
    assert again.resuming
    again.close()


def test_a_start_that_made_no_step_leaves_its_directory_to_the_next():
    killed(open_run(config()))
    run = open_run(config(adam={"lr": 1e-3}))
    assert str(run.path) == "runs/tiny"
    run.close()


@pytest.mark.parametrize(
    "why", ["finished", "locked", "other config", "nothing to resume from", "auto_resume off"]
)
def test_another_run_gets_the_next_number(why):
    run = open_run(config())
    make_step(run)
    if why != "nothing to resume from":
        make_checkpoint(run.checkpoints, 1)
    if why == "finished":
        run.end("finished")
    if why != "locked":
        run.close()
    changed = {"other config": {"adam": {"lr": 1e-3}}, "auto_resume off": {"ckpt": {"auto_resume": False}}}
    other = open_run(config(**changed.get(why, {})))
    assert str(other.path) == "runs/tiny-2"
    assert not other.resuming
    other.close()
    run.close()


def test_given_directory_is_taken_and_continued(tmp_path):
    given = config(run={"directory": str(tmp_path / "deep" / "here")})
    run = open_run(given)
    assert not run.resuming
    make_step(run)
    make_checkpoint(run.checkpoints, 5)
    run.end("finished")
    run.close()
    longer = config(run={"directory": str(tmp_path / "deep" / "here")}, data={"total_steps": 100})
    again = open_run(longer)
    assert again.resuming
    again.close()


def test_given_directory_in_use_is_refused():
    given = config(run={"directory": "here"})
    run = open_run(given)
    with pytest.raises(ConfigError, match=r"run\.directory='here' is in use"):
        open_run(given)
    run.close()
    open_run(given).close()


def test_given_directory_of_another_config_is_refused_by_key_and_values():
    run = open_run(config(run={"directory": "here"}))
    make_step(run)
    run.close()
    with pytest.raises(ConfigError, match=r"moe\.top_k=2.*moe\.top_k=1.*set moe\.top_k to 2"):
        open_run(config(run={"directory": "here"}, moe={"top_k": 1}))
    open_run(config(run={"directory": "here"})).close()  # the refusal held no lock


def test_given_directory_with_checkpoints_and_auto_resume_off_is_refused():
    run = open_run(config(run={"directory": "here"}))
    make_checkpoint(run.checkpoints, 5)
    run.close()
    with pytest.raises(ConfigError, match=r"ckpt\.auto_resume"):
        open_run(config(run={"directory": "here"}, ckpt={"auto_resume": False}))


def test_checkpoints_elsewhere_belong_to_their_config():
    saving = {"enable_save_ckpt": True, "save_ckpt_folder": "store"}
    run = open_run(config(ckpt=saving))
    make_checkpoint(run.checkpoints, 5)
    run.close()
    assert open_run(config(ckpt=saving), "elsewhere").resuming
    with pytest.raises(ConfigError, match=r"'store' holds a run with adam\.lr"):
        open_run(config(ckpt=saving, adam={"lr": 1e-3}), "another")


@pytest.mark.parametrize("directory", ["file", "file/below", "nul\0", "~nobody-of-this-name/x", "x" * 300])
def test_unusable_directory_is_a_config_error(directory):
    with open("file", "w", encoding="utf-8"):
        pass
    with pytest.raises(ConfigError, match=r"run.directory|nobody"):
        open_run(config(run={"directory": directory}))


def test_every_rank_gets_rank_0s_outcome():
    sent = []
    run = RunDirectory.open(config(), "tiny", DATA, 0, lambda outcome: sent.append(outcome) or outcome)
    other = RunDirectory.open(config(), "tiny", DATA, 1, lambda outcome: sent[0])
    assert (other.path, other.checkpoints, other.resuming) == (run.path, run.checkpoints, run.resuming)
    other.write_json("ops.json", {"written": "by rank 1"})
    assert not (run.path / "ops.json").exists()
    run.close()
    failure = ConfigError("in use")
    with pytest.raises(ConfigError, match="in use"):
        RunDirectory.open(config(), "tiny", DATA, 1, lambda outcome: failure)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_former_file(monkeypatch, call):
    run = open_run(config())
    run.write_json("ops.json", {"first": 1})

    def full(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(TrainingError, match=r"ops\.json cannot be written: No space left on device"):
        run.write_json("ops.json", {"second": 2})
    assert json.loads((run.path / "ops.json").read_text()) == {"first": 1}
    run.close()


@pytest.mark.parametrize(
    ("section", "change", "same"),
    [
        ("run", {"seed": 1}, False),
        ("run", {"collective_timeout": 5}, True),
        ("model", {"num_layers": 2}, False),
        ("model", {"checkpoint": 0.5}, True),
        ("moe", {"use_fused_gating": False}, False),
        ("moe", {"use_tutel": True}, True),
        ("data", {"micro_bsz": 2}, False),
        ("data", {"micro_num": 2}, True),
        ("data", {"diag_outlier_ratio": 2.0}, True),
        ("parallel", {"zero1": {"size": 1}}, True),
        ("lr_scheduler", {"eta_min": 1e-6}, False),
    ],
)
def test_what_makes_two_configs_one_run(section, change, same):
    difference = first_difference(config(), config(**{section: change}))
    assert (difference is None) == same
    if not same:
        assert difference[0] == f"{section}.{next(iter(change))}"


def trained(configuration, data=DATA):
    """A stopped run of this config that holds a checkpoint."""
    run = open_run(configuration, data=data)
    make_step(run)
    make_checkpoint(run.checkpoints, 5)
    run.close()
    return run.path


@pytest.mark.parametrize("key", [{"train_folder": "/y/ok"}, {"num_samples": 7}, {"min_length": 3}])
def test_the_same_data_under_another_name_is_the_same_run(tmp_path, key):
    here = {"directory": str(tmp_path / "run")}
    trained(config(run=here, data={"train_folder": "/x/ok"}))
    assert open_run(config(run=here, data={"train_folder": "/x/ok"} | key)).resuming


def test_other_data_under_the_same_name_is_refused_unless_it_is_allowed(tmp_path):
    here = {"directory": str(tmp_path / "run")}
    trained(config(run=here))
    with pytest.raises(ConfigError, match=r"100 samples.* now it is 120 samples.*num_samples=100.*allow_cha"):
        open_run(config(run=here), data=GROWN)
    assert open_run(config(run=here, ckpt={"allow_changed_data": True}), data=GROWN).resuming


def test_other_data_gets_another_directory_where_none_is_given():
    assert trained(config()) == Path("runs/tiny")
    assert open_run(config(), data=GROWN).path == Path("runs/tiny-2")
    allowed = open_run(config(ckpt={"allow_changed_data": True}), data=GROWN)
    assert (allowed.path, allowed.resuming) == (Path("runs/tiny"), True)


def test_where_the_data_is_not_known_its_keys_decide(tmp_path):
    here = {"directory": str(tmp_path / "run")}
    path = trained(config(run=here, data={"num_samples": 7}))
    (path / "environment.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"data\.num_samples=7, and this config has data\.num_samples=8"):
        open_run(config(run=here, data={"num_samples": 8}))


@pytest.mark.parametrize(
    ("error", "state"),
    [(TrainingError("full"), "failed"), (KeyboardInterrupt(), "aborted"), (None, "running")],
)
def test_the_status_is_true_after_any_end_that_can_be_caught(error, state):
    run = open_run(config())
    try:
        with run:
            if error:
                raise error
    except (TrainingError, KeyboardInterrupt):
        pass
    assert json.loads((run.path / "status.json").read_text()) == {"state": state}
    open_run(config(run={"directory": str(run.path)})).close()  # the lock is free


def test_what_it_had_ended_in_stays_where_something_fails_after_that():
    run = open_run(config())
    run.end("finished")
    run.__exit__(TrainingError, TrainingError("the summary cannot be written"), None)
    assert json.loads((run.path / "status.json").read_text()) == {"state": "finished"}


def test_a_run_says_why_it_is_where_it_is():
    first = open_run(config())
    assert first.origin == "new: nothing is saved"
    make_step(first)
    first.end("finished")
    first.close()
    saving = {"ckpt": {"enable_save_ckpt": True}}
    second = open_run(config(**saving))
    assert second.origin == "new: if stopped, the same command goes on with it; runs/tiny is finished"
    make_step(second)
    make_checkpoint(second.checkpoints, 1)
    second.close()
    third = open_run(config(**saving))
    assert third.origin == "continued; runs/tiny is finished"
    other = open_run(config(adam={"lr": 1e-3}))
    assert other.origin == "new: nothing is saved; runs/tiny-2 is in use by another run"
    third.close()


def test_a_name_takes_the_place_of_the_configs():
    run = open_run(config(run={"name": "my try/1"}))
    assert str(run.path) == "runs/my_try_1"
    run.close()
