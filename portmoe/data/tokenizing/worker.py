"""A process that makes parts: it reads what to make as lines of JSON, and answers each when it is made.

It is started as a program of its own, so that it does not import what its parent has, whatever script that
is, and ends when its parent is gone: nobody writes to it then.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from portmoe import errors
from portmoe.data.text.parts import Part
from portmoe.data.tokenizing.part import write_part
from portmoe.data.tokenizing.recipe import Given, Maker, Recipe

Work = tuple[int, Given, Part]  # number of the part, and what it is of


def make_parts(
    recipe: Recipe, maker: Maker, work: Sequence[Work], folder: Path, jobs: int, done: Callable[[Path], None]
) -> None:
    """Make parts by ``jobs`` processes, by this one alone where that is enough.

    Raises what ``write_part`` does, as one of ``errors``.
    """
    if min(jobs, len(work)) < 2:
        for number, given, part in work:
            write_part(maker, given, part, folder, number)
            done(given.path)
        return
    forms = sorted({given.form for _, given, _ in work})
    workers = [_Worker(recipe, forms, folder) for _ in range(min(jobs, len(work)))]
    idle = list(workers)
    try:
        with ThreadPoolExecutor(len(workers)) as pool:
            futures = {pool.submit(_make, idle, item): item for item in work}
            try:
                for future in as_completed(futures):
                    future.result()
                    done(futures[future][1].path)
            except BaseException:
                for worker in workers:
                    worker.process.kill()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    finally:
        for worker in workers:
            worker.close()


def _make(idle: "list[_Worker]", item: Work) -> None:
    """As many threads as workers: there is always an idle one."""
    worker = idle.pop()
    worker.make(item)
    idle.append(worker)


class _Worker:
    """The parent's side."""

    def __init__(self, recipe: Recipe, forms: Sequence[str], folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._first = {"recipe": asdict(recipe), "forms": list(forms), "folder": str(folder)}

    def make(self, item: Work) -> None:
        number, given, part = item
        told = {"number": number, "path": str(given.path), "form": given.form}
        line = json.dumps(self._first | told | {"start": part.start, "end": part.end})
        try:
            print(line, file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline() or "null")
        except (OSError, ValueError):
            answer = None
        if answer is None:
            code = self.process.wait()
            raise errors.BackendError(
                f"a process that tokenizes {given.path} ended ({code}); what is made is kept, and the same "
                "command goes on"
            )
        if answer["error"]:
            raise getattr(errors, answer["error"])(answer["message"])

    def close(self) -> None:
        self.process.communicate()


def _serve() -> None:
    maker = None
    for line in sys.stdin:
        told = json.loads(line)
        answer = {"error": None}
        try:
            maker = maker or Maker(Recipe(**told["recipe"]), told["forms"])
            part = Part(Path(told["path"]), told["start"], told["end"])
            write_part(maker, Given(part.path, told["form"]), part, Path(told["folder"]), told["number"])
        except errors.PortmoeError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        except OSError as error:
            said = f"{error.filename} cannot be written ({error.strerror}); give data.cache_folder room"
            answer = {"error": errors.ConfigError.__name__, "message": said}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        _serve()
    except (BrokenPipeError, KeyboardInterrupt):  # the parent is gone, or ends this one
        os._exit(1)
