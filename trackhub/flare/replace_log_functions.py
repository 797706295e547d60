# SPDX-License-Identifier: Apache-2.0
"""Replaces log functions, in this process and in the trainers that it starts, so that each call itself makes a record.

The sender's widget calls it before FLARE starts the trainer. In this process it replaces FLARE's log functions and
those of the SDKs that the job captures. External trainers run ``trainer/startup/sitecustomize.py``, since FLARE builds
their ``PYTHONPATH`` from this process's ``sys.path``. ``docs/adr/0016-log-calls-at-their-source.md`` and
``docs/adr/0020-capture.md`` give the reasons.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from trackhub.flare import flare_internals
from trackhub.flare.find_analytics_listeners import listeners
from trackhub.flare.records_from_flare_writers import StockRecords
from trackhub.flare.trainer.capture import CAPTURE_ENV, Capture, CaptureSetting
from trackhub.flare.trainer.import_hook import ImportHook

__all__ = ["TAKE_OVER_ENV", "LogCallSource"]

TAKE_OVER_ENV = "TRACKHUB_TAKE_OVER"
"""Environment variable that makes trainers record FLARE's log calls. Its value is the full name (FQCN) of the client's
cell, to which FLARE would send these calls. A trainer of another job has another cell, and ignores the variable."""

_FOLDER = str(Path(__file__).parent / "trainer" / "startup")


class LogCallSource:
    """While it is open, each log call itself makes a record. FLARE fires no event for the call, and sends nothing."""

    def __init__(self, records: StockRecords) -> None:
        """Prepare; ``open`` starts it.

        Args:
            records: takes what is logged in this process. It must be open.
        """
        self._records = records
        self._undo: list[Callable[[], None]] = []

    def open(self, engine: Any, setting: CaptureSetting, spool: Path, *, take_over: bool) -> bool:
        """Take log calls of this process, and of the trainers that it starts from now on.

        Args:
            engine: FLARE's engine.
            setting: which SDKs to capture. The use of any other SDK is noted for the report.
            spool: the site's spool.
            take_over: take the calls of FLARE's own writers.

        Returns:
            True if FLARE's calls are taken. False without ``take_over``, or if a component of this client listens to
            FLARE's events: the component would get no events.
        """
        take_over = take_over and not listeners(flare_internals.components(engine))
        if take_over:
            cell, calls = flare_internals.cell_name(engine), self._records.calls()
            self._undo.append(flare_internals.replace_in_process_log(calls))
            self._announce(TAKE_OVER_ENV, cell)
        self._announce(CAPTURE_ENV, setting.written())
        self._capture_in_process(setting, spool)
        sys.path.insert(0, _FOLDER)
        # Processes that FLARE's executor does not start inherit the environment as it is.
        os.environ["PYTHONPATH"] = os.pathsep.join([_FOLDER, *_python_path()])
        self._undo.append(_take_folder_out)
        return take_over

    def _announce(self, variable: str, value: str) -> None:
        os.environ[variable] = value

        def withdraw() -> None:
            os.environ.pop(variable, None)

        self._undo.append(withdraw)

    def _capture_in_process(self, setting: CaptureSetting, spool: Path) -> None:
        """Capture the SDKs that this process has loaded, and those that it loads from now on."""
        capture = Capture(setting, spool, self._records.calls().writer, self._records.warn)

        def take(module: ModuleType) -> None:
            try:
                capture.take(module)
            except Exception as e:
                self._records.warn(
                    f"trackhub cannot capture {module.__name__}: {e!r}. Its version may be one that trackhub does not "
                    "know. The script goes on, and the calls of this module are not recorded"
                )

        hook: Any = ImportHook(Capture.MODULES, take, sys.meta_path)
        sys.meta_path.insert(0, hook)
        self._undo += [capture.undo, lambda: sys.meta_path.remove(hook)]
        for name in Capture.MODULES:
            if (module := sys.modules.get(name)) is not None:
                take(module)

    def close(self) -> None:
        """Leave FLARE and all SDKs as they were. Has no effect if it is not open."""
        while self._undo:
            self._undo.pop()()


def _take_folder_out() -> None:
    sys.path[:] = [entry for entry in sys.path if entry != _FOLDER]
    os.environ["PYTHONPATH"] = os.pathsep.join(entry for entry in _python_path() if entry != _FOLDER)


def _python_path() -> list[str]:
    value = os.environ.get("PYTHONPATH", "")
    return value.split(os.pathsep) if value else []
