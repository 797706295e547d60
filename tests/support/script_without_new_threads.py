# SPDX-License-Identifier: Apache-2.0
"""Runs a script that leaves its run open, and in which no thread can start once it has ended.

Python 3.12.0 to 3.12.2 start no new threads then. The script does the same on every Python.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trackhub.delivery.report import RunReport, read_report

__all__ = ["EndedScript", "run_script_without_new_threads"]

_SCRIPT = """
import json, sys, threading, time, trackhub
from pathlib import Path
from trackhub.delivery.journal.report_builder import read_journal_report

def refuse(thread):
    raise RuntimeError("can't create new thread at interpreter shutdown")

folder, backend, options = sys.argv[1:]
writer = trackhub.local({backend: json.loads(options)}, folder=folder, job="j")
# It is called before trackhub's own function, which was registered earlier.
threading._register_atexit(lambda: setattr(threading.Thread, "start", refuse))
for step in range(5):
    writer.log({"loss": step / 2}, step)
confirmed = 0
while confirmed < 5:
    time.sleep(0.01)
    lanes = read_journal_report(writer.folder / "trackhub" / "trackhub.db").lanes
    confirmed = sum(run.confirmed for run in lanes.get(backend, {}).values())
model = Path(folder, "model.bin")
model.write_bytes(b"weights")
writer.log_artifact(model, type="model")
writer.log({"loss": 9.0}, 5)
"""


class EndedScript(NamedTuple):
    """What a script left behind, and said."""

    run: RunReport
    stderr: str


def run_script_without_new_threads(folder: Path, backend: str, options: Mapping[str, Any]) -> EndedScript:
    """Run a script that logs 5 metrics, waits until they are confirmed, logs its model and a metric, and ends.

    Args:
        folder: the folder of the runs.
        backend: the name of the run's one backend.
        options: the backend's options.
    """
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder), backend, json.dumps(options)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    report = read_report(folder / "j" / "trackhub" / "delivery.json")
    return EndedScript(report.lanes[backend]["local"], done.stderr)
