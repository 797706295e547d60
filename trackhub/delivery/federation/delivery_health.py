# SPDX-License-Identifier: Apache-2.0
"""How delivery stands, as numbers for the federation run: what is pending or lost, what was sent again, and the lag.

`FederationRun` tells it of each row that the journal stores, and asks for the numbers when a round is written.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable, Sequence

from trackhub.delivery.journal.journal import Journal
from trackhub.job_and_run_info import FEDERATION

__all__ = ["Arrivals", "DeliveryHealth"]

_APART_S = 0.1
_MAX_MOMENTS = 10_000


class Arrivals:
    """Knows when the journal's rows were stored, at best to a tenth of a second. Thread-safe.

    It keeps moments, and for each moment the first row that was stored after it. If it has too many moments, it forgets
    every second one, and becomes less exact.
    """

    def __init__(self, now: float) -> None:
        """Begin. Rows stored earlier count as if stored now.

        Args:
            now: seconds of the clock that all other calls use.
        """
        self._rows = [0]
        self._moments = [now]
        self._lock = threading.Lock()

    def note(self, row: int, now: float) -> None:
        """Note that a row is stored."""
        with self._lock:
            if now - self._moments[-1] >= _APART_S:
                self._rows.append(max(row, self._rows[-1] + 1))
                self._moments.append(now)
                if len(self._rows) > _MAX_MOMENTS:
                    del self._rows[1:-1:2], self._moments[1:-1:2]
            elif len(self._rows) > 1 and self._rows[-2] < row < self._rows[-1]:
                self._rows[-1] = row  # two threads have stored rows, and the thread with the later row noted it first

    def age_s(self, row: int, now: float) -> float:
        """Return the age of a row in seconds, counted from the last known moment before the row was stored."""
        with self._lock:
            return now - self._moments[bisect.bisect_right(self._rows, row) - 1]


class DeliveryHealth:
    """Counts how delivery stands. ``note_stored`` may be called from any thread, ``values`` from one."""

    def __init__(self, journal: Journal, lanes: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with the rows that the journal has now.

        Args:
            journal: the journal.
            lanes: the names of all lanes.
            clock: gives seconds.
        """
        self._journal = journal
        self._lanes = lanes
        self._clock = clock
        self._arrivals = Arrivals(clock())

    def note_stored(self, row: int) -> None:
        """Note that the journal has stored a row. Does not block."""
        self._arrivals.note(row, self._clock())

    def values(self) -> dict[str, float]:
        """Return key -> number. A key that holds a site's name may be invalid for a record.

        Raises:
            JournalError: the journal cannot be read.
        """
        report = self._journal.report(self._lanes)
        runs = {lane: list(by_site.values()) for lane, by_site in report.lanes.items()}
        at_sites = {
            name: site.at_site for name, site in report.sites.items() if site.at_site is not None and name != FEDERATION
        }
        values: dict[str, float] = {
            "fl/delivery/dropped": sum(sum(counts.dropped.values()) for counts in at_sites.values()),
            "fl/delivery/refused": sum(sum(site.all_refused().values()) for site in report.sites.values()),
            "fl/delivery/rejected": sum(sum(run.rejected.values()) for lane in runs.values() for run in lane),
        }
        for lane, of_lane in runs.items():
            values[f"fl/delivery/pending/{lane}"] = sum(run.pending for run in of_lane)
            values[f"fl/delivery/lag_seconds/{lane}"] = self._lag_s(lane)
        for name, counts in at_sites.items():
            values[f"fl/delivery/spooled/{name}"] = counts.spooled
            values[f"fl/delivery/retries/{name}"] = counts.retries
        return {key: float(value) for key, value in values.items()}

    def _lag_s(self, lane: str) -> float:
        oldest = self._journal.oldest_unconfirmed(lane)
        return 0.0 if oldest is None else self._arrivals.age_s(oldest, self._clock())
