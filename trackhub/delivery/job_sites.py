# SPDX-License-Identifier: Apache-2.0
"""The sites of a running job: which the receiver has heard from, which have ended, and how they ended.

The receiver notes here what each site sends. At the end of the job it waits here for the sites' final messages.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping

from trackhub.job_and_run_info import RunStatus

__all__ = ["JobSites"]

# Each start of a site's sender makes a session. More than this would not fit into memory.
_MAX_SESSIONS = 10_000


class JobSites:
    """Knows when each site was last heard, and which sites have sent their final message. Thread-safe.

    Attributes:
        without_sender: the sites that take part in the job and have no sender.
    """

    def __init__(self, silence_s: float) -> None:
        """Know of no site yet.

        Args:
            silence_s: a site that sends nothing for this long, in seconds, counts as silent. `wait` does not wait for
                it.
        """
        self.without_sender: set[str] = set()
        self._silence_s = silence_s
        self._changed = threading.Condition()
        self._heard_at: dict[str, float] = {}
        self._progress_at: dict[str, float] = {}
        self._failed: dict[str, bool] = {}
        self._sessions: defaultdict[str, set[str]] = defaultdict(set)
        self._expected: set[str] = set()

    def known(self) -> set[str]:
        """Return all sites that are expected, were heard (even if nothing was stored), or have no sender."""
        with self._changed:
            return self._expected | self._heard_at.keys() | self.without_sender

    def may_send_more(self) -> set[str]:
        """Return the sites that are expected or were heard, have a sender, and have not ended."""
        with self._changed:
            return (self._expected | self._heard_at.keys()) - self._failed.keys() - self.without_sender

    def expect(self, sites: Iterable[str]) -> None:
        """Note that these sites take part in the job."""
        with self._changed:
            self._expected |= set(sites)

    def heard(self) -> set[str]:
        """Return the sites that have sent something."""
        with self._changed:
            return set(self._heard_at)

    def restore(self, failed: Mapping[str, bool]) -> None:
        """Take over what the journal knows: site -> whether its training failed, for the sites that have ended."""
        self._failed.update(failed)

    def note_heard(self, site: str) -> None:
        """Note that a site has just sent something."""
        with self._changed:
            self._heard_at[site] = time.monotonic()

    def note_progress(self, site: str) -> None:
        """Note that more of a file of this site has arrived."""
        with self._changed:
            self._progress_at[site] = time.monotonic()

    def note_hello(self, site: str, session: str) -> None:
        """Note the first message of a sender.

        If the site had ended, it now runs again, unless the message is an old one.
        """
        with self._changed:
            known = self._sessions[site]
            if session and session not in known and len(known) < _MAX_SESSIONS:
                known.add(session)
                self._failed.pop(site, None)

    def note_final(self, site: str, *, failed: bool) -> None:
        """Note a site's final message, and whether its training failed."""
        with self._changed:
            self._failed[site] = failed
            self._changed.notify_all()

    def assume_ended(self, site: str) -> None:
        """Assume that a site's training ended well, unless the site has said otherwise."""
        self._failed.setdefault(site, False)

    def status(self, site: str, job: RunStatus, *, was_killed: bool) -> RunStatus:
        """Return how a site's run ended.

        Args:
            site: the site's name.
            job: how the job ended.
            was_killed: True if the job's processes were killed. Then the site's own final message counts, if it came.
        """
        if was_killed and site in self._failed:
            return RunStatus.FAILED if self._failed[site] else RunStatus.FINISHED
        if job is RunStatus.FINISHED and self._failed.get(site, True):  # a site that fell silent counts as failed
            return RunStatus.FAILED
        return job

    def wait(self, sites: Iterable[str], timeout_s: float, files_s: float = 0.0) -> set[str]:
        """Wait until each site has ended or is silent, and return the sites that have not ended.

        Args:
            sites: their names.
            timeout_s: the longest wait, in seconds.
            files_s: the longest wait while files of a site still arrive, in seconds.
        """
        waiting = set(sites)
        start = time.monotonic()
        with self._changed:
            self._expected |= waiting
            while True:
                now = time.monotonic()
                # A site that was never heard may still be starting, so its silence begins with this wait.
                missing = waiting - self._failed.keys()
                silent_at = {site: self._heard_at.get(site, start) + self._silence_s for site in missing}
                alive = {site: at for site, at in silent_at.items() if at > now}
                deadline = start + timeout_s
                if moving := [self._progress_at[site] for site in alive if site in self._progress_at]:
                    deadline = max(deadline, min(start + files_s, max(moving) + self._silence_s))
                if not alive or now >= deadline:
                    return missing
                self._changed.wait(min(deadline, *alive.values()) - now)
