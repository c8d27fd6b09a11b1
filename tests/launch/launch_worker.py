"""Ranks of the launch tests, run as ``python launch_worker.py MODE …`` or ``python -m launch_worker MODE …``.

The modes of ``ALONE`` need no torch, which takes seconds to import.
"""

import os
import signal
import sys
import time
from pathlib import Path

RANK = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def _say(line: str) -> None:
    """In one write: unbuffered, print sends a line and its end apart, and the ranks share a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def succeed() -> None:
    _say(f"threads {os.environ['OMP_NUM_THREADS']}")


def fail_with(code: str) -> None:
    """Rank 1 ends with the code; rank 0 would go on for long."""
    if RANK == 1:
        sys.exit(int(code))
    time.sleep(60)


def lose_a_peer() -> None:
    """Rank 1 is killed; rank 0 notices, as by a broken collective, and fails as a training does."""
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02)
    sys.exit(4)


def fail_first(folder: str) -> None:
    """Killed at the first attempt, well at the second."""
    mark = Path(folder, f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}-{RANK}")
    mark.touch()
    if RANK == 1 and mark.name == "attempt-0-1":
        while not Path(folder, "attempt-0-0").exists():  # or the end of this rank keeps rank 0 from starting
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    if mark.name == "attempt-0-0":
        time.sleep(60)


def count_attempts(folder: str, code: str) -> None:
    Path(folder, f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}").touch()
    sys.exit(int(code))


def save_when_asked(folder: str) -> None:
    """As the trainer does: note the signal, finish the step, save, and end when all have."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: asked.append(number))
    Path(folder, f"ready-{RANK}").write_text(str(os.getpid()))
    while not asked:
        time.sleep(0.02)
    time.sleep(0.5)
    Path(folder, f"saved-{RANK}").write_text(signal.Signals(asked[0]).name)
    while not Path(folder, f"saved-{1 - RANK}").exists():
        time.sleep(0.02)
    assert len(asked) == 1
    sys.exit(128 + asked[0])


ALONE = (succeed, fail_with, lose_a_peer, fail_first, count_attempts, save_when_asked)


def meet(timeout: str, folder: str = "", fault: str = "") -> None:
    """Start as a rank, sum the ranks, and report; with a fault, rank 1 is killed at the first attempt."""
    import torch
    import torch.distributed as dist

    from portmoe.accelerator import get_accelerator
    from portmoe.errors import PortmoeError
    from portmoe.launch import launch
    from portmoe.launch.ranks import detect

    ranks = detect()
    try:
        device = launch.start(get_accelerator("cpu"), ranks, int(timeout))
    except PortmoeError as error:
        _say(f"refused {error}")
        sys.exit(error.exit_code)
    total = torch.tensor([ranks.rank + 1.0])
    dist.all_reduce(total)
    _say(f"met {ranks.source} {ranks.rank} {ranks.local_world_size} {device} {total.item()}")
    if fault and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    if folder and not fault:
        Path(folder, f"ready-{RANK}").write_text(str(os.getpid()))
        time.sleep(60)
    launch.stop()


if __name__ == "__main__":
    {function.__name__: function for function in (*ALONE, meet)}[sys.argv[1]](*sys.argv[2:])
