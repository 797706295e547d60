# SPDX-License-Identifier: Apache-2.0
"""A training process, which logs and notes which calls returned: ``python -m tests.faults.trainer_process PLAN``.

`tests.faults.job_processes` starts it. It logs the calls of `tests.faults.calls`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import msgspec

from tests.faults.calls import Notes, call
from trackhub import Writer

__all__ = ["TrainerPlan"]


class TrainerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a trainer does.

    Attributes:
        spool: the site's spool.
        notes: folder of the notes, and of the files that it logs.
        name: the writer's name. Every key begins with it.
        calls: how many log calls it makes.
        pause_s: pause after every 20 calls, for a step of training.
        files: whether some calls log artifacts.
        fork_at: fork after so many calls. The child logs as ``<name>-child``, and both go on.
        clock_back_at: set the clock back by an hour after so many calls.
        wait_at: after so many calls, wait for the file ``<name>.go`` beside the notes.
    """

    spool: str
    notes: str
    name: str = "a"
    calls: int = 3000
    pause_s: float = 0.002
    files: bool = False
    fork_at: int = -1
    clock_back_at: int = -1
    wait_at: int = -1


def main() -> int:
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=TrainerPlan)
    folder = Path(plan.notes)
    name, notes = plan.name, Notes(folder / plan.name)
    writer = Writer(plan.spool)
    clock, back_s = time.time, 0.0
    time.time = lambda: clock() - back_s
    child = -1
    start = 0
    for i in range(plan.calls):
        if i == plan.fork_at:
            child = os.fork()
            if child == 0:
                name, start = f"{plan.name}-child", i
                notes = Notes(folder / name)
        if i == plan.clock_back_at:
            back_s = 3600.0
        while i == plan.wait_at and not (folder / f"{plan.name}.go").exists():
            time.sleep(0.01)
        before = time.time()
        call(writer, name, i - start, folder, files=plan.files)
        notes.add(i - start, before, time.time())
        if i % 20 == 19:
            time.sleep(plan.pause_s)
    if child > 0:
        os.waitpid(child, 0)
    writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
