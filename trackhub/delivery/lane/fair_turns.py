# SPDX-License-Identifier: Apache-2.0
"""Shares a lane's time among its runs. `Lane` asks it whose turn it is.

One site may have sent a million records, and another one ten. Without shares, the ten would wait for the million.
"""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["FairTurns"]

_AHEAD_S = 0.1
"""How much more time a run may use than another busy run, in seconds, before it must wait for that run."""


class FairTurns:
    """Counts the time that each run takes. Of N busy runs each gets 1/N. A run that is alone may use all."""

    def __init__(self) -> None:
        """Count from zero."""
        self._used_s: dict[int, float] = {}
        self._least_s: float | None = None

    def begin(self, active: Collection[int]) -> list[int]:
        """Begin a round, and return the runs in the order of their turns: the run that took the least time comes first.

        Args:
            active: the runs that may have something to deliver.
        """
        used = self._used_s = {run: s for run, s in self._used_s.items() if run in active}
        # A run that was idle has no claim to the time that it did not use.
        least = min(used.values(), default=0.0)
        for run in active:
            used.setdefault(run, least)
        self._least_s = None
        return sorted(active, key=used.__getitem__)

    def must_wait(self, run: int) -> bool:
        """Return whether another run that has something to do should get more time first."""
        return self._least_s is not None and self._used_s[run] > self._least_s + _AHEAD_S

    def add(self, run: int, used_s: float, *, moved: bool) -> None:
        """Count the time of a turn.

        Args:
            run: whose turn it was.
            used_s: how long it took, in seconds.
            moved: True if the run had something to do.
        """
        self._used_s[run] += used_s
        if moved and self._least_s is None:
            self._least_s = self._used_s[run]
