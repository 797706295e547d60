# SPDX-License-Identifier: Apache-2.0
"""What one process has dropped in one spool: when it last warned, and the drops that no stream's ledger counts.

A stream whose ledger cannot be made hands its drops to `ProcessDrops`. So they outlive the stream. As soon as there is
room, they are stored in a ledger of their own, which readers count as one more stream. Until then, the process has its
mark in the spool, and readers say that the site's counts are not complete.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
import uuid
from pathlib import Path

from trackhub.errors import SpoolError
from trackhub.process_lock import FORK_LOCK
from trackhub.spool.layout import SpoolInfo, create_expected, ledger_file, read_spool_info, spool_info
from trackhub.spool.uncounted_mark import Mark
from trackhub.spool.writer_ledger import DROP_REASONS, LEFT_OUT_REASONS, Ledger

__all__ = ["ProcessDrops", "process_drops", "store_drops"]

_TRY_EVERY_S = 0.5
_log = logging.getLogger(__name__)


class ProcessDrops:
    """What this process has dropped in one spool. All its writers share it. Thread-safe.

    Attributes:
        folder: the spool's folder.
        warned_at: when the process last warned about a drop, so that it warns at most once a minute.
        closed_files_at: when it last warned that the script has closed a stream's files.
        dropped: how many records it has dropped so far.
        is_owing: True while it has drops that no ledger counts.
    """

    def __init__(self, folder: Path, info: SpoolInfo) -> None:
        """Start with no drops.

        Args:
            folder: the spool's folder.
            info: whose spool it is.
        """
        self.folder = folder
        self.warned_at = self.closed_files_at = -math.inf
        self._info = info
        self._mark = Mark(folder)
        self._begin()

    def _begin(self) -> None:
        self.dropped = 0
        self.is_owing = False
        # Each line that changes a number has no call in it. So neither a thread nor a signal handler comes in between.
        self._counts = [0] * len(DROP_REASONS)
        self._left_out = [0] * len(LEFT_OUT_REASONS)
        self._ledger_id = uuid.uuid4().hex
        self._storing = threading.Lock()
        self._store_at = -math.inf

    def begin_in_child(self) -> None:
        """Begin anew after a fork: what was counted so far belongs to the parent process."""
        self._mark = self._mark.in_child()
        self._begin()

    def look_again(self) -> None:
        """Prepare for drops without a ledger, if that was not possible before. Never raises."""
        self._mark.look_again()

    def add(self, reason: str) -> None:
        """Count a dropped record whose stream has no ledger. Never raises.

        Args:
            reason: one of ``DROP_REASONS``.
        """
        counts, i = self._counts, DROP_REASONS.index(reason)
        counts[i] += 1
        self._owe()

    def leave_out(self, reason: str, values: int) -> None:
        """Count values that were left out of a record, whose stream has no ledger. Never raises.

        Args:
            reason: one of ``LEFT_OUT_REASONS``.
            values: how many.
        """
        left_out, i = self._left_out, LEFT_OUT_REASONS.index(reason)
        left_out[i] += values
        self._owe()

    def _owe(self) -> None:
        self.is_owing = True
        self._mark.set()
        self.store()

    def store(self, *, at_once: bool = False) -> None:
        """Store the drops that no ledger counts, if there are any and that is possible now. Never raises.

        Args:
            at_once: True to try in any case. By default, it tries at most twice a second.
        """
        if not self.is_owing or (not at_once and time.monotonic() < self._store_at):
            return
        storing = self._storing
        if not storing.acquire(blocking=False):  # another thread does it, or the call that a signal handler interrupted
            return
        try:
            self._store_at = time.monotonic() + _TRY_EVERY_S
            create_expected(self.folder)
            self._store()
        except (OSError, SpoolError) as e:
            _log.debug("the drops in %s cannot be stored yet: %s", self.folder, e)
        finally:
            storing.release()

    def _store(self) -> None:
        found = read_spool_info(self.folder)
        if (found.site, found.job) != (self._info.site, self._info.job):
            raise SpoolError(f"{self.folder} belongs to another job now; give each job its own folder")
        counts, left_out, mark = self._counts, self._left_out, self._mark
        stored, stored_left_out = list(counts), list(left_out)
        # Allow no fork before the ledger is closed: the child would keep it locked.
        with FORK_LOCK:
            # If an earlier attempt got only a part of the way, this goes on with its file.
            ledger = Ledger(ledger_file(self.folder, self._ledger_id))
            if self._counts is counts:
                ledger.set(sum(stored), stored, stored_left_out)
                ledger.close()
            else:
                ledger.abandon()
        if self._counts is not counts:  # a signal handler has forked during these lines, and this is the child
            return
        self._ledger_id = uuid.uuid4().hex
        for i, n in enumerate(stored):
            counts[i] -= n
        for i, n in enumerate(stored_left_out):
            left_out[i] -= n
        # Clear the mark first, and then look. A thread that drops a record meanwhile counts it first, and then marks.
        self.is_owing = False
        mark.clear()
        if any(counts) or any(left_out):
            self.is_owing = True
            mark.set()


_of: dict[tuple[str, str, str], ProcessDrops] = {}
"""(folder, site, job) -> what this process has dropped there."""


def process_drops(folder: Path, info: SpoolInfo) -> ProcessDrops:
    """Return what this process has dropped in a spool. All writers of the spool get the same object.

    Args:
        folder: the spool's folder.
        info: whose spool it is.
    """
    key = os.path.abspath(folder), info.site, info.job
    drops = _of.get(key)
    if drops is None:
        for other, old in list(_of.items()):
            if not old.is_owing and not _is_open(old.folder):
                _of.pop(other, None)
        drops = _of.setdefault(key, ProcessDrops(folder, info))
    drops.look_again()
    return drops


def _is_open(folder: Path) -> bool:
    try:
        return spool_info(folder).open
    except SpoolError:
        return False


def store_drops(folder: Path) -> None:
    """Store what this process has dropped in a spool and no ledger counts, if that is possible now. Never raises."""
    path = os.path.abspath(folder)
    for (other, _, _), drops in list(_of.items()):
        if other == path:
            drops.store(at_once=True)


def _store_all_at_exit() -> None:
    for drops in list(_of.values()):
        drops.store(at_once=True)
        if drops.is_owing:
            _log.warning(
                "this process has dropped %d records in %s, and could not store their number; the site's counts are "
                "not complete; free space on this disk, or make the folder writable, before the next job",
                drops.dropped, drops.folder,
            )  # fmt: skip


def _begin_in_child() -> None:
    for drops in list(_of.values()):
        drops.begin_in_child()


atexit.register(_store_all_at_exit)
os.register_at_fork(after_in_child=_begin_in_child)
