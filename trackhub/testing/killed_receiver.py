# SPDX-License-Identifier: Apache-2.0
"""A receiver in a process of its own, which delivers what a journal holds and dies by SIGKILL on the way.

The checks of ``checks/delivery.py`` call `deliver_until_killed`, which starts the process. There `main` runs a receiver
on the same journal and store, until SIGKILL ends it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from trackhub.delivery.journal.journal import JOURNAL_NAME
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.job_and_run_info import JobInfo, Side
from trackhub.limits import Limits
from trackhub.spi import Backend
from trackhub.testing.faulty_backend import FaultyBackend, KillPoint
from trackhub.testing.receiver_rig import ReceiverOfClass, ReceiverRig

__all__ = ["deliver_until_killed", "main"]

_PATIENCE_S = 60.0
_PROCESS_S = 120.0
_START = "import sys; from trackhub.testing.killed_receiver import main; sys.exit(main())"


class _Plan(msgspec.Struct, frozen=True):
    """What the process does.

    Attributes:
        module: the module of the backend's class.
        qualname: the class's name in it.
        source: the file of a module that cannot be imported by its name.
        path: ``sys.path``.
        name: the backend's name.
        options: the backend's options.
        folder: the receiver's folder, with the journal.
        run_dir: the job's run folder.
        job: the job.
        side: where the receiver is.
        kill: when to die; None to die when all is delivered and the journal knows it.
        max_batch: most entries in one ``write``.
    """

    module: str
    qualname: str
    source: str
    path: list[str]
    name: str
    options: dict[str, Any]
    folder: str
    run_dir: str
    job: JobInfo
    side: Side
    kill: KillPoint | None
    max_batch: int


def deliver_until_killed(rig: ReceiverRig, kill: KillPoint | None, *, max_batch: int) -> int:
    """Deliver what a finished receiver's journal holds, from a process that is killed on the way.

    Args:
        rig: the receiver.
        kill: when the process dies; None for when all is delivered.
        max_batch: most entries in one ``write``.

    Returns:
        How many entries were confirmed when it died; -1 without a kill point.

    Raises:
        AssertionError: the process ended in another way. The message shows what it wrote.
    """
    path = [os.path.abspath(part) for part in sys.path]
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder, "plan.json")
        plan.write_bytes(msgspec.json.encode(_plan(rig, path, kill, max_batch)))
        done = subprocess.run(
            [sys.executable, "-c", _START, str(plan)],
            capture_output=True,
            text=True,
            timeout=_PROCESS_S,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            check=False,
        )
    if done.returncode != -signal.SIGKILL:
        raise AssertionError(
            f"the process that was to be killed while it delivers ended by itself, with status {done.returncode}. "
            f"It wrote:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return int(Path(kill.note).read_text(encoding="utf-8")) if kill else -1


def _plan(rig: ReceiverRig, path: list[str], kill: KillPoint | None, max_batch: int) -> _Plan:
    cls = rig.hooks.backend
    return _Plan(
        module=cls.__module__,
        qualname=cls.__qualname__,
        source=getattr(sys.modules[cls.__module__], "__file__", None) or "",
        path=path,
        name=rig.hooks.name,
        options=dict(rig.context.options),
        folder=str(rig.folder),
        run_dir=str(rig.root),
        job=rig.job,
        side=rig.context.side,
        kill=kill,
        max_batch=max_batch,
    )


def main() -> int:
    """Deliver until killed, as the plan in the file ``sys.argv[1]`` says. Return 1 if still alive after a minute."""
    logging.basicConfig(level=logging.INFO)
    plan = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=_Plan)
    receiver = ReceiverOfClass(
        FaultyBackend(kill=plan.kill, max_batch=plan.max_batch).around(_load(plan)),
        Path(plan.run_dir),
        state_dir=Path(plan.folder),
        job=plan.job,
        side=plan.side,
        backends={plan.name: plan.options},
        limits=Limits(flush_s=0.05, preflight_s=_PATIENCE_S),
    )
    receiver.start()
    deadline = time.monotonic() + _PATIENCE_S
    pause = threading.Event()
    while time.monotonic() < deadline:
        if plan.kill is None and _is_delivered(plan):
            os.kill(os.getpid(), signal.SIGKILL)
        pause.wait(0.02)
    report = read_journal_report(Path(plan.folder, JOURNAL_NAME))
    sys.stderr.write(f"still alive after {_PATIENCE_S:g} s: {report.lanes}\n")
    return 1


def _is_delivered(plan: _Plan) -> bool:
    lane = read_journal_report(Path(plan.folder, JOURNAL_NAME)).lanes.get(plan.name, {})
    return bool(lane) and all(run.pending == 0 for run in lane.values())


def _load(plan: _Plan) -> type[Backend[Any]]:
    """Import the backend's class, by its module's name or else from its file, as for a module of tests."""
    module: ModuleType
    try:
        module = importlib.import_module(plan.module)
    except ImportError:
        spec = importlib.util.spec_from_file_location(plan.module, plan.source)
        if spec is None or spec.loader is None:
            raise
        module = importlib.util.module_from_spec(spec)
        sys.modules[plan.module] = module
        spec.loader.exec_module(module)
    cls = reduce(getattr, plan.qualname.split("."), module)
    assert isinstance(cls, type)
    assert issubclass(cls, Backend)
    return cls
