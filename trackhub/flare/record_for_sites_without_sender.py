# SPDX-License-Identifier: Apache-2.0
"""Finds the sites whose app has no `TrackhubSender`, and records what FLARE's own writers send from there.

The receiver's widget on the server uses it. A site without a sender has no spool and sends no final message. So the
server does not wait for it, and the delivery report names it. Its events, if its app sends any, become records of its
run.
"""

from __future__ import annotations

import threading
from typing import Any

from nvflare.apis.fl_component import FLComponent
from nvflare.apis.shareable import Shareable

from trackhub.delivery import Limits, Receiver, Sender, create_spool
from trackhub.flare.cell_channel import have_sender
from trackhub.flare.flare_internals import participants
from trackhub.flare.job_name_notes_tags import spool_info
from trackhub.flare.records_from_flare_writers import StockRecords
from trackhub.job_and_run_info import path_component
from trackhub.mark_own_threads import OwnThread
from trackhub.policy import SiteRules

__all__ = ["SitesWithoutSender"]

_ASK_EVERY_S = 2.0
_ANSWER_S = 1.0
_SPOOL_BYTES = 64 << 20
"""The most bytes that the server keeps in the spool of one such site: some 500,000 events. Without this limit the site
could fill the server's disk, since the receiver's own limits hold only for what comes from a sender."""


class SitesWithoutSender:
    """Asks silent sites whether they have a sender, and keeps a spool for each site that has none. Thread-safe."""

    def __init__(self, component: FLComponent, engine: Any, receiver: Receiver, limits: Limits) -> None:
        """Begin to ask, in a thread.

        Args:
            component: warnings go to this component's log.
            engine: FLARE's engine on the server.
            receiver: stores the records.
            limits: the limits of the job, for the spools and senders that are made here.
        """
        self._component = component
        self._engine = engine
        self._receiver = receiver
        self._limits = limits
        self._lock = threading.RLock()  # not held while a site is asked
        self._asking = threading.Lock()  # ask no site twice: without a sender, FLARE logs an error for each question
        self._asked: set[str] = set()
        self._started: set[str] = set()
        self._without_sender: set[str] = set()
        self._with_sender: set[str] = set()
        self._warned: set[str] = set()
        self._spools: dict[str, _SpoolOfSite] = {}
        self._stopped = threading.Event()
        # Asking late is enough: a site never gets or loses a sender. Most sites send something before the first
        # question, so they need not be asked.
        OwnThread(target=self._ask_again, name="trackhub-sites", daemon=True).start()

    def found(self) -> set[str]:
        """Return the sites without a sender, as far as is known."""
        with self._lock:
            return self._without_sender - self._heard()

    def note_started(self, site: str) -> None:
        """Note that a client asks for tasks. Its components have started, so its answer about a sender is right.

        A client that is still starting would say "no", and FLARE would log an error there.
        """
        self._started.add(site)

    def take(self, site: str, event: Shareable) -> None:
        """Record an analytics event of a site, if that site has no sender.

        At a site's first event, this asks the site and waits up to a second. FLARE handles the events of all sites in
        one thread. So a silent site must not cost a second at each event.
        """
        if site not in self._spools:
            self._started.add(site)  # a client that sends events has started
            if site in self._heard() or not self._says_no(site):
                return
        with self._lock:
            if site not in self._spools:
                self._warn_of(site)
                self._spools[site] = _SpoolOfSite(self._component, self._receiver, site, self._limits)
            self._spools[site].write(event)

    def ask_now(self) -> None:
        """Ask the sites from which no sender has sent anything. Blocks for a second at most."""
        started = participants(self._engine).keys() & self._started
        self._ask(sorted(started - self._heard() - self._with_sender - self._without_sender))
        with self._lock:
            for site in self.found():
                self._warn_of(site)

    def close(self, timeout_s: float) -> None:
        """Send the records made of the sites' events to the receiver, and end. Blocks up to ``timeout_s`` per site."""
        self._stopped.set()
        with self._lock:
            for spool in self._spools.values():
                spool.close(timeout_s)

    def _heard(self) -> set[str]:
        """Return the sites whose own sender has sent something."""
        return self._receiver.sites.heard() - self._spools.keys()

    def _ask_again(self) -> None:
        while not self._stopped.wait(_ASK_EVERY_S):
            try:
                self.ask_now()
            except Exception as e:
                self._component.logger.debug("sites could not be asked whether they have a sender: %s", e)

    def _says_no(self, site: str) -> bool:
        if site not in self._asked:  # afterwards, the thread asks again
            self._asked.add(site)
            self._ask([site])
        return site in self._without_sender

    def _ask(self, sites: list[str]) -> None:
        with self._asking:
            left = [site for site in sites if site not in self._without_sender | self._with_sender]
            for site, has_sender in have_sender(self._engine, left, _ANSWER_S).items() if left else ():
                (self._with_sender if has_sender else self._without_sender).add(site)

    def _warn_of(self, site: str) -> None:
        if site not in self._warned:
            self._warned.add(site)
            self._component.logger.warning(
                "tracking: site %s has no TrackhubSender in its app. What its script logs with trackhub is not "
                "recorded. What FLARE's own writers log there is recorded only if its app sends it. Add tracking to "
                "all client apps of the job", site,
            )  # fmt: skip


class _SpoolOfSite:
    """A spool on the server for one site, with its sender."""

    def __init__(self, component: FLComponent, receiver: Receiver, site: str, limits: Limits) -> None:
        folder = receiver.folder / "sites" / path_component(site)
        # The site's own rules cannot apply: FLARE has sent the events before trackhub could see them.
        most = min(limits.spool_bytes, _SPOOL_BYTES)
        create_spool(folder, spool_info(receiver.job, site, ("server",), most, SiteRules()))
        self._records = StockRecords(component)
        self._records.open(folder)
        self._sender = Sender(folder, receiver.channel(site), cursor="server", limits=limits)
        self._sender.facts.may_log_more = True  # nobody counts what FLARE loses on its way
        self._sender.start()

    def write(self, event: Shareable) -> None:
        self._records.write(event, by_message=True)
        self._sender.facts.by_message = self._records.by_message

    def close(self, timeout_s: float) -> None:
        self._records.close()
        self._sender.close(timeout_s)
