# SPDX-License-Identifier: Apache-2.0
"""A training process, which logs and notes which calls returned: ``python -m tests.faults.trainer_process PLAN``.

`tests.faults.job_processes` starts it. It logs the calls of `tests.faults.trainer_calls`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

import msgspec

from tests.faults.trainer_calls import Notes, call
from trackhub import Writer
from trackhub.spool import stream_writer

__all__ = ["TrainerPlan"]


class TrainerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a trainer does.

    Attributes:
        spool: the site's spool; empty for the one that the environment announces.
        notes: folder of the notes, and of the files that it logs.
        name: the writer's name. Every key begins with it.
        calls: how many log calls it makes.
        pause_s: pause after every 20 calls, for a step of training.
        files: whether some calls log artifacts.
        fork_at: fork after so many calls. The child logs as ``<name>-child``, and both go on.
        clock_back_at: set the clock back by an hour after so many calls.
        spawn_at: after so many calls, pickle the writer into a new process. It logs as ``<name>-spawned``.
        wait_at: after so many calls, wait for the file ``<name>.go`` beside the notes.
        segment_bytes: the size of a segment; 0 for the product's own.
        until: end as soon as this file exists; empty for none. It is looked for before every 20 calls.
    """

    spool: str
    notes: str
    name: str = "a"
    calls: int = 3000
    pause_s: float = 0.002
    files: bool = False
    fork_at: int = -1
    clock_back_at: int = -1
    spawn_at: int = -1
    wait_at: int = -1
    segment_bytes: int = 0
    until: str = ""


def main() -> int:
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=TrainerPlan)
    stream_writer.SEGMENT_BYTES = plan.segment_bytes or stream_writer.SEGMENT_BYTES
    train(plan, Writer(plan.spool or None))
    return 0


def train(plan: TrainerPlan, writer: Writer) -> None:
    """Make the calls of the plan, and close the writer."""
    folder = Path(plan.notes)
    name, notes = plan.name, Notes(folder / plan.name)
    (folder / f"{name}.pid").write_text(str(os.getpid()))
    clock, back_s = time.time, 0.0
    time.time = lambda: clock() - back_s
    child = -1
    start = 0
    spawned = None
    for i in range(plan.calls):
        if plan.until and i % 20 == 0 and os.path.exists(plan.until):
            break
        if i == plan.fork_at:
            child = os.fork()
            if child == 0:
                name, start, spawned = f"{plan.name}-child", i, None
                notes = Notes(folder / name)
                (folder / f"{name}.pid").write_text(str(os.getpid()))
        if i == plan.spawn_at and child != 0:
            calls = msgspec.structs.replace(plan, name=f"{name}-spawned", spawn_at=-1, fork_at=-1)
            spawned = multiprocessing.get_context("spawn").Process(target=train, args=(calls, writer))
            spawned.start()
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
    if spawned is not None:
        spawned.join()
    writer.close()


if __name__ == "__main__":
    sys.exit(main())
