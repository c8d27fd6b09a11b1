"""Steps made again from recorded states, by the trainer that makes them in a run."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from signal import Signals
from typing import Any

from portmoe.checkpoint.folder import folder_of
from portmoe.checkpoint.store import read
from portmoe.config import Config
from portmoe.data.fingerprint import described
from portmoe.errors import ConfigError
from portmoe.training.run import throughput_of
from portmoe.training.session import Session, open_session
from portmoe.training.starting_point import Progress
from portmoe.training.trainer import Trainer
from portmoe.verify.replay.recorded import Recorded


def recompute(
    config: Config,
    recorded: Recorded,
    backend: str,
    launcher: str,
    told: Callable[[str], None],
) -> Signals | None:
    """Make the step after each checkpoint as the rank this process is; the records go to ``run.directory``.

    Args:
        config: as ``config_of_replay`` makes it of ``recorded``.
        told: receives a line as each step begins, on rank 0.

    Returns:
        The signal that asked some rank to stop, or None.

    Raises:
        PortmoeError: anything a user, the machine or another rank can cause.
    """
    with open_session(config, config_name="replay", backend=backend, launcher=launcher) as session:
        trainer = Trainer(session)
        for number, (start, step) in enumerate(recorded.starts.items(), 1):
            if not session.machine.ranks.rank:
                told(f"[{number}/{len(recorded.starts)}] step {step}, from the checkpoint of {start} steps")
            _take(session, recorded.checkpoints, start)
            session.engine.follow(recorded.configs[step])
            session.progress.step = step
            stop = trainer.one_step(step, throughput_of(session), replayable=True)
            if stop:
                session.run.end("stopped")
                return Signals(stop)
        session.run.end("finished")
    return None


def _take(session: Session, checkpoints: Path, start: int) -> None:
    """Put the engine into the state of one checkpoint. Collective."""
    tensors = session.engine.tensors()
    state = read(folder_of(checkpoints, start), tensors, session.world)
    _require_data(session, start, state)
    session.engine.take(tensors)
    session.engine.load_state(state["engine"])
    for name, value in asdict(Progress(**state["progress"])).items():
        setattr(session.progress, name, value)


def _require_data(session: Session, start: int, state: Mapping[str, Any]) -> None:
    there, here = state.get("data"), session.data["train"]
    if there and there != here:
        raise ConfigError(
            f"the run had other data at step {start}: {described(there)}, and here it is {described(here)}; "
            "name its data with --set data.train_folder=…, or choose other checkpoints with --steps"
        )
