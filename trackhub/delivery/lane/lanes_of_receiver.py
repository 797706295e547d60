# SPDX-License-Identifier: Apache-2.0
"""All lanes of one receiver: they are checked together, start together, and end together within one deadline.

`trackhub.delivery.receiver` makes the lanes and calls this.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.lane.lane import Lane
from trackhub.errors import JournalError
from trackhub.job_and_run_info import RunStatus
from trackhub.runnable_commands import command_for

__all__ = ["EXTRA_S", "Lanes"]

EXTRA_S = 1.0
"""How many seconds a receiver's end may take beyond its deadline for a locked journal, and again for the federation
run. Also how long a receiver waits for each lane that it abandons."""

_log = logging.getLogger(__name__)


class Lanes:
    """The lanes of one receiver. Call ``check``, ``start`` and ``end``, or ``abandon`` if the receiver cannot start.

    No lane delivers before ``start``. So if one backend cannot be used, the others have changed no run.

    Attributes:
        names: the names of the lanes.
    """

    def __init__(self, journal: Journal, lanes: Iterable[Lane]) -> None:
        """Take over lanes whose threads do not run yet.

        Args:
            journal: where the lanes store how their runs ended.
            lanes: the lanes.
        """
        self._journal = journal
        self._lanes = tuple(lanes)
        self.names = [lane.name for lane in self._lanes]

    def check(self, timeout_s: float) -> None:
        """Let all backends check at the same time whether they can be used. Wait up to ``timeout_s`` for the answers.

        Raises:
            ConfigError: a backend cannot be used as configured.
        """
        for lane in self._lanes:
            lane.check()
        deadline = time.monotonic() + timeout_s
        for lane in self._lanes:
            lane.wait_for_preflight(max(0.0, deadline - time.monotonic()))

    def start(self) -> None:
        """Begin to deliver."""
        for lane in self._lanes:
            lane.start()

    def notify(self, site: int) -> None:
        """Tell the lanes that the journal has new rows of this site. Thread-safe; does not block."""
        for lane in self._lanes:
            lane.notify(site)

    def abandon(self) -> None:
        """Stop the lanes, and end no run.

        Blocks up to a second for each lane whose backend does not return from a call.
        """
        for lane in self._lanes:
            lane.abandon()
        for lane in self._lanes:
            lane.wait(EXTRA_S)

    def end(self, by_site: Mapping[str, RunStatus], otherwise: RunStatus, deadline_s: float) -> None:
        """Deliver what is left, and end.

        Blocks up to the deadline. Each lane that hangs adds a second, and a locked journal adds up to a second.

        Args:
            by_site: site -> the status of its run.
            otherwise: the status of the runs whose sites are not in ``by_site``.
            deadline_s: the longest time for all lanes together, in seconds.
        """
        deadline = time.monotonic() + deadline_s
        for lane in self._lanes:
            lane.begin_finish(by_site, otherwise, deadline_s)
        for lane in self._lanes:
            if not lane.join(deadline - time.monotonic()):
                _log.warning(
                    "backend %s does not return from a call. Its records stay in the journal. Deliver them with "
                    "`%s`", lane.name, command_for("trackhub replay", self._journal.path.parent),
                )  # fmt: skip
        # From here on, all waits for a locked journal together take a second at most. A second for each run could add
        # up to minutes.
        self._journal.limit_waits(time.monotonic() + EXTRA_S)
        self._store_ends()

    def _store_ends(self) -> None:
        """Store how the runs of all lanes ended, in one transaction."""
        ends = {key: end for lane in self._lanes for key, end in lane.unstored_ends().items()}
        if not ends:
            return
        try:
            self._journal.save_runs(ends)
        except JournalError as e:
            _log.warning("the journal cannot store how %d runs ended, and why records are pending: %s", len(ends), e)
