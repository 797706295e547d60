# SPDX-License-Identifier: Apache-2.0
"""Opens the way to FLARE's log calls at their source: in this process, and in the trainers that it starts.

The sender calls it before FLARE starts the trainer. In this process it replaces FLARE's log function. External trainers
run ``trainer/startup/sitecustomize.py``, since FLARE makes their ``PYTHONPATH`` of this process's ``sys.path``.
``docs/adr/0016-log-calls-at-their-source.md`` has the reasons.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trackhub.flare import flare_internals
from trackhub.flare.stock_records import StockRecords

__all__ = ["TAKE_OVER_ENV", "LogCallSource"]

TAKE_OVER_ENV = "TRACKHUB_TAKE_OVER"
"""Environment variable that has trainers take FLARE's log calls. Its value is the full name (FQCN) of the client's
cell, to which FLARE would send them: a trainer of another job ignores it."""

_FOLDER = str(Path(__file__).parent / "trainer" / "startup")


class LogCallSource:
    """Takes log calls at their source, while it is open. FLARE then fires no event for them, and sends nothing."""

    def __init__(self, records: StockRecords) -> None:
        """Prepare; ``open`` starts it.

        Args:
            records: what is logged in this process goes there. It must be open.
        """
        self._records = records
        self._restore: Callable[[], None] | None = None

    def open(self, engine: Any) -> bool:
        """Take log calls of this process, and of the trainers that it starts from now on.

        Returns:
            False if this client has one of FLARE's receivers. It listens to FLARE's events, and would get none.
        """
        if flare_internals.has_stock_receiver(engine):
            return False
        cell, calls = flare_internals.cell_name(engine), self._records.calls()
        self._restore = flare_internals.replace_in_process_log(calls)
        os.environ[TAKE_OVER_ENV] = cell
        sys.path.insert(0, _FOLDER)
        # For the processes that are not started by FLARE's executor, and inherit the environment as it is.
        os.environ["PYTHONPATH"] = os.pathsep.join([_FOLDER, *_python_path()])
        return True

    def close(self) -> None:
        """Leave FLARE as it was. Has no effect if it is not open."""
        if self._restore is None:
            return
        self._restore()
        self._restore = None
        os.environ.pop(TAKE_OVER_ENV, None)
        sys.path[:] = [entry for entry in sys.path if entry != _FOLDER]
        os.environ["PYTHONPATH"] = os.pathsep.join(entry for entry in _python_path() if entry != _FOLDER)


def _python_path() -> list[str]:
    value = os.environ.get("PYTHONPATH", "")
    return value.split(os.pathsep) if value else []
