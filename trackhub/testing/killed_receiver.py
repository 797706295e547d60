# SPDX-License-Identifier: Apache-2.0
"""``python -m trackhub.testing.killed_receiver PLAN``: a receiver in a process of its own, which dies by SIGKILL.

It delivers what a journal holds, and the plan says at which point of that it kills itself. It never ends in order.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import sys
import threading
import time
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

from trackhub.delivery.journal.counts import read_journal_report
from trackhub.delivery.journal.store import JOURNAL_NAME
from trackhub.limits import Limits
from trackhub.spi import Backend, JobInfo
from trackhub.testing.fault_proxy import Watch, watched
from trackhub.testing.receiver_rig import Child, KitReceiver, read_child

__all__ = ["main"]

_PATIENCE_S = 60.0


def main() -> int:
    """Deliver until killed. Returning at all, with a status above 0, is a failure."""
    logging.basicConfig(level=logging.INFO)
    child = read_child(Path(sys.argv[1]))
    watch = Watch(kill=child.kill, max_batch=child.max_batch)
    receiver = KitReceiver(
        watched(_load(child), watch),
        Path(child.folder),
        Path(child.workdir),
        job=JobInfo(child.job),
        side=child.side,
        backends={child.name: child.options},
        limits=Limits(flush_s=0.05, preflight_s=_PATIENCE_S),
    )
    receiver.start()
    deadline = time.monotonic() + _PATIENCE_S
    pause = threading.Event()
    while time.monotonic() < deadline:
        if child.kill is None and _is_delivered(child):
            os.kill(os.getpid(), signal.SIGKILL)
        pause.wait(0.02)
    report = read_journal_report(Path(child.folder, JOURNAL_NAME))
    sys.stderr.write(f"still alive after {_PATIENCE_S:g} s: {report.lanes}\n")
    return 1


def _is_delivered(child: Child) -> bool:
    lane = read_journal_report(Path(child.folder, JOURNAL_NAME)).lanes.get(child.name, {})
    return bool(lane) and all(run.pending == 0 for run in lane.values())


def _load(child: Child) -> type[Backend[Any]]:
    """Import the backend's class, by its module's name or else from its file, as for a module of tests."""
    module: ModuleType
    try:
        module = importlib.import_module(child.module)
    except ImportError:
        spec = importlib.util.spec_from_file_location(child.module, child.source)
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        sys.modules[child.module] = module
        spec.loader.exec_module(module)
    cls = reduce(getattr, child.qualname.split("."), module)
    assert isinstance(cls, type)
    assert issubclass(cls, Backend)
    return cls


if __name__ == "__main__":
    sys.exit(main())
