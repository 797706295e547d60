# SPDX-License-Identifier: Apache-2.0
"""Admission control: decides which requests a receiver works on at this moment, and which it turns away at once.

`Receiver.handle` asks it first. A sender that is turned away keeps its records and comes again.
"""

from __future__ import annotations

import threading

__all__ = ["Admission"]


class Admission:
    """Admits one request of a site at a time, and few requests altogether. Thread-safe; never waits.

    A site sends its request again when the reply is late. Without this, the copies of a request that waits for a locked
    journal pile up in the transport's threads. FLARE's pool has 64 of them, for all that the job sends.
    """

    def __init__(self, at_once: int) -> None:
        """Admit at most ``at_once`` requests at a time."""
        self._at_once = at_once
        self._lock = threading.Lock()
        self._sites: set[str] = set()

    def enter(self, site: str) -> bool:
        """Return whether a request of this site is admitted. If so, the caller must call ``leave`` when it is done."""
        with self._lock:
            if site in self._sites or len(self._sites) >= self._at_once:
                return False
            self._sites.add(site)
            return True

    def leave(self, site: str) -> None:
        """Say that the admitted request of this site is done."""
        with self._lock:
            self._sites.discard(site)
