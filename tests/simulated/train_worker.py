"""Several short trainings in one process: ``train_worker.py BACKEND FOLDER < jobs.json``.

A job is {"name", "config": overrides, "faults": specifications}. Each one's run directory is FOLDER/name; the
exit code of one that failed as it should is written to FOLDER/name.failed with the message.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

from portmoe import load_config
from portmoe.errors import PortmoeError


def main(backend: str, folder: str) -> None:
    jobs = json.load(sys.stdin)
    from portmoe.training.run import train

    for job in jobs:
        directory = Path(folder, job["name"])
        config = load_config("tiny_moe4", [*job["config"], f"run.directory={directory}"])
        try:
            with planted(job["faults"]):
                train(config, "tiny_moe4", backend, "auto")
        except PortmoeError as error:
            directory.with_name(f"{job['name']}.failed").write_text(f"{error.exit_code} {error}")


def planted(specifications: list[str]):
    """The simulated device's faults; memory:BYTES leaves it no more than that, product:A3 is another one."""
    if not specifications:
        return nullcontext()
    from torch_npu import faults, npu

    if specifications[0].startswith("memory:"):
        free = int(specifications[0].removeprefix("memory:"))
        return faults.memory_limit(npu.memory_allocated(0) + free)
    if specifications[0].startswith("product:"):
        return faults.product(specifications[0].removeprefix("product:"))
    return faults.planted(*specifications)


if __name__ == "__main__":
    main(*sys.argv[1:])
