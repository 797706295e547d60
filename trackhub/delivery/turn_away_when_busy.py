# SPDX-License-Identifier: Apache-2.0
"""Admission control: decides which requests a receiver works on at this moment, and which it turns away at once.

`Receiver.handle` asks it first. A sender that is turned away keeps its records and comes again.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter

__all__ = ["Admission"]

_RECENT_S = 2.0
"""How long a site counts as busy after its last request or reply, and as crowding after it last asked too early."""


class Admission:
    """Admits one request of a site at a time, and few requests altogether. Thread-safe; never waits.

    A site sends its request again when the reply is late. Without this, the copies of a request that waits for a locked
    journal pile up in the transport's threads. FLARE's pool has 64 threads, for all messages of the job.

    A site *crowds* if it asks again before it has a reply. An honest sender does so only when a reply is late. If a
    site crowds all the time, its next request is here when its last one is done. The next requests of other sites are
    still on their way, so the crowding site would get most turns. So it gets a turn only if no other busy site has had
    fewer turns.
    """

    def __init__(self, at_once: int) -> None:
        """Admit at most ``at_once`` requests at a time."""
        self._at_once = at_once
        self._lock = threading.Lock()
        self._sites: set[str] = set()
        self._turns = Counter[str]()
        self._asked_at: dict[str, float] = {}
        self._crowded_at: dict[str, float] = {}

    def enter(self, site: str) -> bool:
        """Return whether a request of this site is admitted. If so, the caller must call ``leave`` when it is done."""
        now = time.monotonic()
        with self._lock:
            if site not in self._sites and now - self._asked_at.get(site, -math.inf) > _RECENT_S:
                self._begin(site, now)
            self._asked_at[site] = now
            if site in self._sites:
                self._crowded_at[site] = now
                return False
            if len(self._sites) >= self._at_once or (site in self._crowded_at and self._must_wait(site, now)):
                return False
            self._sites.add(site)
            self._turns[site] += 1
            return True

    def leave(self, site: str) -> None:
        """Say that the admitted request of this site is done."""
        with self._lock:
            self._sites.discard(site)
            self._asked_at[site] = time.monotonic()  # its next request is on its way

    def _begin(self, site: str, now: float) -> None:
        """Set the turns of a site that was idle to those of the busiest site.

        It has no claim to turns that it missed.
        """
        self._turns[site] = max((self._turns[other] for other in self._busy(site, now)), default=0)

    def _must_wait(self, site: str, now: float) -> bool:
        if now - self._crowded_at[site] > _RECENT_S:
            del self._crowded_at[site]
            return False
        mine = self._turns[site]
        return any(self._turns[other] < mine for other in self._busy(site, now))

    def _busy(self, site: str, now: float) -> list[str]:
        """Return the other sites that have a request here, or had one just now."""
        recent = [other for other, at in self._asked_at.items() if now - at <= _RECENT_S or other in self._sites]
        return [other for other in recent if other != site]
