# SPDX-License-Identifier: Apache-2.0
"""Many short-lived trainers, forked one after another: ``python -m tests.faults.crowd_process PLAN``.

`tests.faults.job_processes` starts it. Each trainer logs the calls of `tests.faults.trainer_calls` and ends without
closing its writer, as a worker of a data loader does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from tests.faults.trainer_calls import Notes, call
from trackhub import Writer

__all__ = ["CrowdPlan"]


class CrowdPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the trainers do.

    Attributes:
        spool: the site's spool.
        notes: folder of the notes, and of the files that they log.
        names: the trainers' names.
        calls: how many log calls each makes.
        at_once: how many of them live at the same time.
        files: whether some calls log artifacts.
    """

    spool: str
    notes: str
    names: list[str]
    calls: int
    at_once: int
    files: bool = False


def main() -> int:
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=CrowdPlan)
    alive: set[int] = set()
    statuses = []
    for name in [*plan.names, *[""] * plan.at_once]:
        if alive and (len(alive) == plan.at_once or not name):
            pid, status = os.wait()
            alive.discard(pid)
            statuses.append(status)
        if name:
            if (pid := os.fork()) == 0:
                train(plan, name)
            alive.add(pid)
    return max(statuses)


def train(plan: CrowdPlan, name: str) -> None:
    """Log all calls of one trainer, and end this process."""
    status = 1
    try:
        folder = Path(plan.notes)
        notes, writer = Notes(folder / name), Writer(plan.spool)
        for i in range(plan.calls):
            call(writer, name, i, folder, files=plan.files)
            notes.add(i, 0.0, 0.0)
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
