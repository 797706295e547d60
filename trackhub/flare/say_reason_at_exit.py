# SPDX-License-Identifier: Apache-2.0
"""Writes once more why trackhub stopped a job, when the server's process ends.

FLARE logs the reason among a hundred lines, and ends with "return code 2". People read the last lines first.
`flare_internals.stop_job` calls this on the server only, since FLARE's simulator kills the processes of clients.
"""

from __future__ import annotations

import contextlib
import multiprocessing.util
import sys

__all__ = ["say_reason_at_exit"]

_said: set[str] = set()


def say_reason_at_exit(reason: str) -> None:
    """Write the reason to stderr when this process ends. The same reason is written only once.

    Args:
        reason: why the job stops. It begins with "trackhub: ".
    """
    if reason not in _said:
        _said.add(reason)
        # FLARE's simulator runs the server in a process of multiprocessing, in which atexit runs nothing.
        multiprocessing.util.Finalize(None, _say, (reason,), exitpriority=0)


def _say(reason: str) -> None:
    with contextlib.suppress(Exception):  # stderr may be closed
        sys.stderr.write(f"\n{reason}\nTherefore the job was stopped before training.\n")
        sys.stderr.flush()
