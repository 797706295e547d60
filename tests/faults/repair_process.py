# SPDX-License-Identifier: Apache-2.0
"""A repair in a process of its own that dies at a step: ``python -m tests.faults.repair_process JOURNAL STEP``.

A step is a call that changes a file: a link, a rename, a removal, or a statement of SQLite that commits. The process
is killed before the step with this number. It prints how many steps there were if it gets to its end.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trackhub.delivery.journal.repair import repair


class Steps:
    """Counts steps, and ends the process before one of them."""

    def __init__(self, last: int) -> None:
        self.done = 0
        self._last = last

    def before(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            self.count()
            return work(*arguments, **named)

        return step

    def count(self) -> None:
        if self.done == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.done += 1


def main() -> int:
    steps = Steps(int(sys.argv[2]))
    if sys.argv[3:] == ["without-links"]:

        def no_link(*arguments: Any, **named: Any) -> None:
            raise PermissionError("this file system has no links")

        os.link = no_link
    else:
        os.link = steps.before(os.link)
    os.replace = steps.before(os.replace)
    os.unlink = steps.before(os.unlink)
    shutil.copyfile = steps.before(shutil.copyfile)
    connect = sqlite3.connect

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            if sql in ("BEGIN", "COMMIT"):
                steps.count()
            return super().execute(sql, *arguments)

    sqlite3.connect = lambda *arguments, **named: connect(*arguments, factory=Connection, **named)  # type: ignore[assignment]
    repair(Path(sys.argv[1]))
    print(steps.done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
