# SPDX-License-Identifier: Apache-2.0
"""The receiver's core: accept a batch, put it into the journal, acknowledge it, and let the lanes deliver it.

It knows nothing of FLARE. Whoever carries the requests says which site they come from; that must be an identity that
the channel has verified, since a run is written under it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from trackhub import registry
from trackhub.delivery.blobs import BlobStore
from trackhub.delivery.journal.store import JOURNAL_NAME, Journal
from trackhub.delivery.lane.lane import Lane
from trackhub.delivery.report import DeliveryReport, format_report, write_report
from trackhub.delivery.wire import (
    Accepted,
    Batch,
    Busy,
    Bye,
    Chunk,
    Hello,
    NeedBlob,
    Refused,
    Reply,
    Report,
    decode_request,
    encode,
    is_compatible,
)
from trackhub.errors import BackendLoadError, ConfigError, JournalError, PluginError
from trackhub.framing import (
    DECODED_IN_TRANSIT,
    FORMAT_VERSION,
    CorruptFrameError,
    decode_body,
    decode_head,
    pass_metrics,
    scan_frames,
)
from trackhub.limits import Limits
from trackhub.records import MAX_STEP, Artifact, Gap, Image, Kind
from trackhub.run import JobInfo, RunStatus, Side
from trackhub.spi import Backend, BackendContext

__all__ = ["REPORT_NAME", "Receiver"]

REPORT_NAME = "delivery.json"
_OPEN, _CLOSED = "open", "closed"
_WARN_EVERY_S = 60.0
_log = logging.getLogger(__name__)


class Receiver:
    """One receiver: a journal and a lane for each backend.

    ``handle`` may be called from any number of threads; the other methods from one.
    """

    def __init__(
        self,
        folder: Path,
        workdir: Path,
        *,
        job: JobInfo,
        side: Side,
        backends: Mapping[str, Mapping[str, Any]],
        limits: Limits | None = None,
    ) -> None:
        """Prepare a receiver; ``start`` opens it.

        Args:
            folder: for trackhub's own files: journal, report, blobs.
            workdir: the job's run folder; each backend works in the folder of its name in it.
            backends: name to options.
        """
        self.folder = folder.absolute()
        self._workdir = workdir.absolute()
        self.job = job
        self._side = side
        self._backends = backends
        self._limits = limits or Limits()
        self._blobs = BlobStore(self.folder / "blobs", sync=self._limits.durability == "full")
        self._journal: Journal | None = None
        self._lanes: list[Lane] = []
        self._state = "not started yet"
        self._changed = threading.Condition()
        self._site_ids: dict[str, int] = {}
        self._last_seen: dict[str, float] = {}
        self._byes: dict[str, bool] = {}
        self._warned_at: dict[str, float] = {}

    def start(self, *, from_start: bool = False) -> None:
        """Open the journal, load the backends, check them, and start delivering. Blocks up to ``limits.preflight_s``.

        Args:
            from_start: deliver again what the lanes have delivered already.

        Raises:
            ConfigError: a backend or an option is unknown, or a backend says that it cannot be used as configured.
            PluginError: a backend's plugin cannot be used.
            JournalError: the journal cannot be opened.
        """
        backends = {name: self._load(name, options) for name, options in self._backends.items()}
        self._journal = Journal.open(
            self.folder / JOURNAL_NAME, job=self.job.id, side=self._side, durability=self._limits.durability
        )
        # As given, so that secrets stay references: a replay resolves them again, where it runs.
        known = msgspec.json.decode(self._journal.meta().get("backends", "{}"), type=dict[str, dict[str, Any]])
        self._journal.set_meta("backends", msgspec.json.encode({**known, **self._backends}).decode())
        self._byes = self._journal.byes()
        if from_start:
            for name in backends:
                self._journal.rewind(name)
        self._lanes = [
            Lane(
                name,
                backend,
                self._journal,
                job=self.job,
                side=self._side,
                blob_dir=self._blobs.folder,
                flush_s=self._limits.flush_s,
            )
            for name, backend in backends.items()
        ]
        for lane in self._lanes:
            lane.start()
        deadline = time.monotonic() + self._limits.preflight_s
        try:
            for lane in self._lanes:
                lane.wait_for_preflight(max(0.0, deadline - time.monotonic()))
        except ConfigError:
            self._close(RunStatus.FAILED, {}, 0.0)
            raise
        self._state = _OPEN

    def _load(self, name: str, options: Mapping[str, Any]) -> Backend[Any]:
        cls = registry.load(name)
        context = BackendContext(self._workdir / name, self.job, self._side)
        try:
            context.workdir.mkdir(parents=True, exist_ok=True)
            return cls(registry.build_options(name, cls, options), context)
        except (ConfigError, PluginError):
            raise
        except Exception as e:
            raise BackendLoadError(f"backend {name!r} cannot be set up: {type(e).__name__}: {e}") from e

    def handle(self, site: str, request: bytes) -> bytes:
        """Answer one request of this site. An accepted batch is in the journal when this returns. Never raises.

        Args:
            site: who sent it, as verified by the channel.
        """
        try:
            message = decode_request(request)
        except msgspec.DecodeError as e:
            return encode(Refused("malformed", f"not a request of format {FORMAT_VERSION}: {e}"))
        if self._state != _OPEN:
            return encode(Busy(f"the receiver is {self._state}"))
        try:
            with self._changed:
                self._last_seen[site] = time.monotonic()
            return encode(self._answer(site, message))
        except (JournalError, OSError) as e:
            self._warn_of(site, e)
            return encode(Busy(str(e)))
        except Exception as e:
            _log.exception("a request of site %s failed", site)
            return encode(Busy(f"{type(e).__name__}: {e}"))

    def _warn_of(self, site: str, error: Exception) -> None:
        """Say that the receiver cannot store what a site sent; not for every attempt, of which there are many."""
        now = time.monotonic()
        if now - self._warned_at.get(site, -_WARN_EVERY_S) >= _WARN_EVERY_S:
            self._warned_at[site] = now
            _log.warning(
                "the receiver cannot store what site %s sent: %s; the site keeps it and tries again", site, error
            )

    def _answer(self, site: str, message: Hello | Batch | Chunk | Report | Bye) -> Reply:
        if isinstance(message, Batch):
            return self._accept(site, message)
        if isinstance(message, Chunk):
            reached = self._blobs.add(site, message)
            if reached is None:
                return Refused("blob_damaged", f"blob {message.name!r} is not what its digest says")
            return Accepted(reached)
        if isinstance(message, Hello):
            if not is_compatible(message.version):
                return Refused(
                    "version",
                    f"site {site} speaks trackhub's format {message.version}, this receiver {FORMAT_VERSION}; they may be "
                    "one minor version apart: install the same flare-trackhub on both",
                )
            return Accepted(job=self.job.id)
        bye = isinstance(message, Bye)
        assert self._journal is not None
        failed = isinstance(message, Bye) and message.failed
        self._journal.note_site(self._site_id(site), message.ledger, bye=bye, failed=failed)
        if isinstance(message, Bye):
            with self._changed:
                self._byes[site] = message.failed
                self._changed.notify_all()
        return Accepted()

    def _accept(self, site: str, batch: Batch) -> Reply:
        records, explained, first = 0, Counter[str](), None
        blobs: list[str] = []
        try:
            offset = 0
            while frame := next(scan_frames(batch.frames, offset), None):
                body = batch.frames[frame.body : frame.end]
                first = first or decode_head(body)
                passed, offset = pass_metrics(batch.frames, frame.end)
                records += passed
                records += frame.kind != Kind.GAP
                payload = decode_body(body).payload if frame.kind in DECODED_IN_TRANSIT else None
                if isinstance(payload, Gap):
                    explained[payload.reason] += payload.count
                elif isinstance(payload, Image | Artifact):
                    blobs.append(payload.blob.name)
        except (CorruptFrameError, msgspec.DecodeError) as e:
            return Refused("malformed", str(e))
        if first is None or first.seq != batch.first_seq or not 0 <= first.seq <= batch.next_seq <= MAX_STEP:
            return Refused("malformed", f"the batch is numbered {batch.first_seq} to {batch.next_seq}, its records not")
        if records != batch.records or batch.next_seq - batch.first_seq != records + explained.total():
            return Refused("malformed", f"{batch.records} records announced, {records} found")
        missing = [name for name in blobs if not self._blobs.has(site, name)]
        if missing:
            return NeedBlob(missing[0])
        assert self._journal is not None
        site_id = self._site_id(site, first.time)
        if self._journal.append(site_id, batch, explained):
            for lane in self._lanes:
                lane.notify(site_id)
        return Accepted()

    def _site_id(self, site: str, created: float | None = None) -> int:
        found = self._site_ids.get(site)
        if found is None:
            assert self._journal is not None
            found = self._site_ids[site] = self._journal.add_site(site, created or time.time())
        return found

    def continue_site(self, site: str, position: int) -> None:
        """Let the positions of a site that is new here start at ``position``: another journal holds what comes before.

        Call it before the site's first request. Has no effect on a site that this journal knows already.
        """
        assert self._journal is not None
        self._site_ids[site] = self._journal.continue_site(site, time.time(), position)

    def wait_for_byes(self, sites: Iterable[str], gate_s: float | None = None) -> set[str]:
        """Wait until each site said that it is done, or fell silent, or the cap passed.

        Args:
            gate_s: the cap; by default ``limits.gate_s``.

        Returns:
            The sites that did not say so.
        """
        waiting = set(sites)
        start = time.monotonic()
        deadline = start + (self._limits.gate_s if gate_s is None else gate_s)
        with self._changed:
            while True:
                now = time.monotonic()
                missing = waiting - self._byes.keys()
                silent_at = {s: self._last_seen.get(s, start) + self._limits.silence_s for s in missing}
                alive = {s: at for s, at in silent_at.items() if at > now}
                if not alive or now >= deadline:
                    return missing
                self._changed.wait(min(deadline, *alive.values()) - now)

    def finish(self, status: RunStatus, *, deadline_s: float | None = None) -> DeliveryReport:
        """Take no more requests, deliver what is journaled, close everything, and report.

        Blocks up to the deadline (by default ``limits.deadline_s``), plus a second for each backend that hangs.

        Args:
            status: how the job ended. A site that did not finish its delivery, or said that it failed, ends as FAILED.
        """
        if self._journal is None:
            raise JournalError("the receiver was not started, so there is nothing to finish")
        try:
            sites = [name for name, _ in self._journal.sites().values()]
        except JournalError as e:
            _log.warning("%s; its runs end as failed", e)
            sites, status = [], RunStatus.FAILED
        by_site = {name: self._site_status(name, status) for name in sites}
        return self._close(status, by_site, self._limits.deadline_s if deadline_s is None else deadline_s)

    def _site_status(self, site: str, status: RunStatus) -> RunStatus:
        if status is RunStatus.FINISHED and self._byes.get(site, True):
            return RunStatus.FAILED
        return status

    def _close(self, status: RunStatus, by_site: Mapping[str, RunStatus], deadline_s: float) -> DeliveryReport:
        assert self._journal is not None
        self._state = _CLOSED
        deadline = time.monotonic() + deadline_s
        for lane in self._lanes:
            lane.begin_finish(by_site, status)
        for lane in self._lanes:
            if not lane.join(deadline - time.monotonic()):
                _log.warning("backend %s hangs and is left behind; its records stay in the journal", lane.name)
        try:
            self._journal.set_meta("status", status)
        except JournalError as e:
            _log.warning("the journal does not say how the job ended (%s): %s", status, e)
        try:
            report = self._journal.report([lane.name for lane in self._lanes])
        finally:
            self._journal.close()
        try:
            write_report(self.folder / REPORT_NAME, report)
        except OSError as e:
            _log.warning("cannot write %s: %s; `trackhub status` shows the same", REPORT_NAME, e)
        _log.info("%s", format_report(report))
        return report
