# SPDX-License-Identifier: Apache-2.0
"""Lets a forked child leave its parent's files alone before any signal handler can run in the child.

`trackhub.process_lock` and `trackhub.spool.writing` say what a child must do. A handler that ran earlier could close
the parent's writer in the child, and so unlock the parent's stream. Its reader would take the stream as ended.
"""

from __future__ import annotations

import contextlib
import logging  # noqa: F401  # see below: it must register its lock first
import os
import signal
import threading
from collections.abc import Callable
from functools import partial

__all__ = ["FORK_LOCK", "do_in_child"]

FORK_LOCK = threading.RLock()
"""Held while a file is opened, locked and noted, and while a log call imports a module. Another thread that forks waits
for it. Otherwise the child would inherit a locked file that it does not know of, and would keep it locked. Or it would
inherit a half imported module, and wait for ever for the thread that imports it. A signal handler that interrupts the
holder may fork."""

_in_child: list[Callable[[], object]] = []
_mask_before: set[int] = set()
"""The signals that the forking thread had blocked itself."""

_mask_lock = threading.RLock()
"""Held until the forking thread has its signals back. Another thread that forks would change `_mask_before`."""


def do_in_child(work: Callable[[], object]) -> None:
    """Call this in each forked child, after the work that was given earlier, and before a signal handler runs there."""
    _in_child.append(work)


def _block_signals() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    _mask_before.clear()
    _mask_before.update(before)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def _begin_child() -> None:
    FORK_LOCK.release()
    for work in _in_child:
        with contextlib.suppress(Exception):  # the rest must still be done
            work()
    _give_signals_back()


# A signal waits for this call. Python alone forgets the signals that reach a child before its first statement, if there
# is a handler: `end_runs_at_script_end` sets one for SIGTERM, and then ``Process.terminate`` would end no new child. In
# the parent this is a function of C: a handler that raises in a Python function would keep the signals blocked.
_give_signals_back = partial(signal.pthread_sigmask, signal.SIG_SETMASK, _mask_before)

# Python calls what is "before" in reverse order: it takes our locks, blocks the signals, takes the lock of `logging`.
# In another order, a fork would hold the lock of `logging` and wait for ever for a thread that holds ours and logs. In
# the parent it releases FORK_LOCK first, since a handler may end the runs, and their threads need it.
os.register_at_fork(before=_block_signals, after_in_parent=FORK_LOCK.release)
os.register_at_fork(before=_mask_lock.acquire, after_in_parent=_give_signals_back, after_in_child=_begin_child)
os.register_at_fork(before=FORK_LOCK.acquire, after_in_parent=_mask_lock.release, after_in_child=_mask_lock.release)
