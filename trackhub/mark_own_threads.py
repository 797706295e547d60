# SPDX-License-Identifier: Apache-2.0
"""Marks the threads that are trackhub's own, such as those of lanes, and the threads that backends start in them.

A backend may call the same SDK as the training script, in the same process. `trackhub.flare.trainer.capture` records
only the script's calls, so it asks this module whether a thread is trackhub's own. Lanes are threads of the class
`OwnThread`.
"""

from __future__ import annotations

import threading

__all__ = ["OwnThread", "is_own_thread", "mark_as_own"]

_MARK = "_trackhub_own"


class OwnThread(threading.Thread):
    """A thread of trackhub's own."""

    _trackhub_own = True


def is_own_thread() -> bool:
    """Return whether the present thread is one of trackhub's own."""
    return getattr(threading.current_thread(), _MARK, False)


def mark_as_own(thread: threading.Thread) -> None:
    """Make a thread one of trackhub's own, such as a thread that a backend starts."""
    setattr(thread, _MARK, True)
