# SPDX-License-Identifier: Apache-2.0
"""The receiver: accepts batches from sites, stores them in its journal, acknowledges them, and runs the lanes.

A transport calls it with each request: the FLARE widget, `trackhub.local_tracking`, `replay_journal_or_spool`, or the
transport of another system. It trusts the site's name. The transport must verify the name first.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from trackhub.conceal import clean_errors
from trackhub.delivery.blob_store import BlobStore
from trackhub.delivery.channel import Channel
from trackhub.delivery.check_received_batch import KnownKeys, examine
from trackhub.delivery.deliver_rest import deliver_rest
from trackhub.delivery.federation.federation_run import FederationOptions, FederationRun
from trackhub.delivery.job_in_journal import JobInJournal
from trackhub.delivery.job_sites import JobSites
from trackhub.delivery.journal.journal import JOURNAL_NAME, WAIT_S, Journal, TooManyStreamsError
from trackhub.delivery.journal.prune import check_not_pruned
from trackhub.delivery.lane.lane import Lane
from trackhub.delivery.lane.lanes_of_receiver import Lanes
from trackhub.delivery.report import DeliveryReport
from trackhub.delivery.retry_receiver_start import StartRetry
from trackhub.delivery.set_up_backend import set_up_backends
from trackhub.delivery.share_last_disk_room import DiskRoom
from trackhub.delivery.turn_away_when_busy import Admission
from trackhub.delivery.wire import (
    Accepted,
    Batch,
    Busy,
    Chunk,
    Final,
    Hello,
    KeepAlive,
    NeedBlob,
    Refused,
    Reply,
    Request,
    busy,
    decode_request,
    encode,
    is_compatible,
)
from trackhub.environment_trouble import is_environment_trouble
from trackhub.errors import JournalError, TrackhubError
from trackhub.framing import FORMAT_VERSION
from trackhub.job_and_run_info import JobInfo, RunStatus, Side, site_problem
from trackhub.limits import Limits
from trackhub.printable import printable
from trackhub.spi import Backend

__all__ = ["Receiver"]

_OPEN, _CLOSED = "open", "closed"
_WAITING = "waiting until it can start"
_AT_ONCE = 16
"""Requests that a receiver works on at a time. A quarter of the threads in which FLARE calls it (nvflare 2.9)."""

_WAIT_S = 0.25
"""The longest wait, in seconds, of one transaction for a journal that another program has locked. A request makes at
most two transactions. `note_status` makes one, and FLARE calls it in the thread that ends the job."""

_WARN_EVERY_S = 60.0
_NO_ROOM = "the receiver's disk is nearly full, and the site has stored more than the average of all sites"
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _KnownSite:
    """What the receiver remembers of a site. `Admission` lets one thread at a time use ``id`` and ``keys``."""

    id: int | None = None
    keys: KnownKeys = field(default_factory=KnownKeys)
    warned_at: float = -math.inf


class Receiver:
    """Receives the records of one job, and delivers them to the job's backends.

    Call ``start`` before the sites send, ``handle`` for each request, and ``finish`` when the job has ended. ``handle``
    and ``note_status`` may be called from any number of threads at once. Call the other methods from one thread.

    Attributes:
        job: the job whose records it receives.
        folder: where it keeps its journal, the blobs, and the delivery report as ``delivery.json``.
        federation: the job's federation run, once the receiver has started. None if the job has none.
        sites: the job's sites: from which the receiver has heard, which have ended, and which have no sender.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        job: JobInfo | str,
        side: Side,
        backends: Mapping[str, Mapping[str, Any]],
        limits: Limits | None = None,
        state_dir: Path | None = None,
        ended: RunStatus | None = None,
        federation: FederationOptions | None = None,
        say_where_to_look: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare a receiver; ``start`` opens it.

        Args:
            run_dir: the job's folder. Each backend has a folder of its name there.
            job: the job that all runs of this receiver belong to; a string is the job's id. A journal belongs to one
                job.
            side: where the receiver is. Receivers of one job on two sides write to different runs.
            backends: name -> options of each backend. Secrets are best given as ``${secret:NAME}``, which is resolved
                here and nowhere else.
            limits: sizes, pauses and waits, as in `trackhub.limits.Limits`.
            state_dir: the folder for the journal, the blobs and the report; by default ``<run_dir>/trackhub``.
            ended: for a replay, how the job ended. The final messages then come from the replay, so they do not say how
                training ended. None for a running job.
            federation: what the job's federation run holds; None for no such run. It needs the records of all sites.
            say_where_to_look: called with each text that says how to look at the running job: up to four for each
                backend, as its first runs open. The lanes' threads call it, and it must not raise. None logs the texts.
        """
        self.job = JobInfo(job) if isinstance(job, str) else job
        self.folder = (run_dir / "trackhub" if state_dir is None else state_dir).absolute()
        self._run_dir = run_dir.absolute()
        self._side = side
        self._backends = backends
        self._limits = limits or Limits()
        self._ended = ended
        self.federation: FederationRun | None = None
        self._blobs = BlobStore(self.folder / "blobs", sync=self._limits.durability == "full")
        self._journal: Journal | None = None
        self._lanes: Lanes | None = None
        self._state = "not started yet"
        self._start_error: Exception | None = None
        self._admission = Admission(_AT_ONCE)
        self.sites = JobSites(self._limits.silence_s)
        self._known: defaultdict[str, _KnownSite] = defaultdict(_KnownSite)
        self._job_in_journal = JobInJournal(
            self.job, side, self._run_dir, self.sites, silence_s=self._limits.silence_s, federation=federation,
            ended=ended,
        )  # fmt: skip
        self._room = DiskRoom(self.folder, self._run_dir, self.sites.may_send_more)
        self._start_retry = StartRetry()
        self._say_where_to_look = say_where_to_look

    def start(self, *, from_start: bool = False) -> None:
        """Open the journal, load and check the backends, and start delivering. Blocks up to ``limits.preflight_s``.

        If another program has the journal locked, this blocks up to ten seconds more. On an existing journal of the
        same job, the receiver goes on where the last one stopped. If the start fails, the journal keeps the job's
        status and backends, the report stays, and no run changes. A new journal then says that the job failed.

        Trouble of the environment, such as a full disk, raises an error for a replay. For a running job, it is not a
        failed start: the receiver replies `Busy`, and tries to start again at later requests.

        Args:
            from_start: deliver again what the lanes have delivered already.

        Raises:
            ConfigError: a backend or an option is unknown, or a backend cannot be used as configured.
            PluginError: the plugin of a backend cannot be used.
            JournalError: the journal is in use, damaged, or of another job or side. For a replay, also if the
                environment keeps it from being opened.
            OSError: for a replay, the environment keeps a backend from being set up.
        """
        try:
            self._open(from_start=from_start, wait_s=_WAIT_S if self._state == _WAITING else WAIT_S)
        except Exception as e:
            if self._ended is not None or not is_environment_trouble(e):
                raise  # also in a replay, since somebody reads its error
            if self._state != _WAITING:
                _log.warning(
                    "the receiver in %s cannot start yet: %s. Training goes on. What the sites log stays in their "
                    "spools, and the receiver takes it as soon as it can start", self.folder, e,
                )  # fmt: skip
            self._state = _WAITING

    def _set_up_backends(self) -> dict[str, Backend[Any]]:
        return set_up_backends(self._backends, run_dir=self._run_dir, job=self.job, side=self._side)

    @clean_errors()
    def _open(self, *, from_start: bool, wait_s: float) -> None:
        backends = self._set_up_backends()
        journal = Journal.open(
            self.folder / JOURNAL_NAME, job=self.job.id, side=self._side, durability=self._limits.durability,
            wait_s=wait_s,
        )  # fmt: skip
        try:
            self._begin(journal, backends, from_start=from_start)
        except BaseException:
            journal.close()
            raise
        self._state = _OPEN
        # Another thread may have called `note_status` while this one was starting.
        self._job_in_journal.note_status(journal, _WAIT_S)

    def _begin(self, journal: Journal, backends: Mapping[str, Backend[Any]], *, from_start: bool) -> None:
        """Check options and backends. Then change what the journal says of the job, and begin to deliver."""
        lanes = Lanes(journal, [self._lane(name, backend, journal) for name, backend in backends.items()])
        try:
            self._job_in_journal.read_earlier(journal)
            check_not_pruned(journal, backends, goes_on=self._ended is None, from_start=from_start)
            lanes.check(self._limits.preflight_s)
            self.sites.restore(journal.ended())
            federation = self._make_federation(journal, lanes)
            self._job_in_journal.store_start(journal, self._backends)
            for name in backends if from_start else ():
                journal.rewind(name)  # before the lanes read their cursors
            if federation is not None:
                federation.start()
            lanes.start()
        except BaseException as e:
            lanes.abandon()
            if not is_environment_trouble(e):
                self._job_in_journal.store_failed_start(journal, lanes.names)
            raise
        self._journal, self._lanes, self.federation = journal, lanes, federation

    def _make_federation(self, journal: Journal, lanes: Lanes) -> FederationRun | None:
        options = self._job_in_journal.federation
        if options is None:
            return None
        return FederationRun(
            journal, options, lanes.notify, self.job.id, self._blobs, lanes=lanes.names, is_replay=bool(self._ended)
        )

    def _try_again(self) -> None:
        """Start if the receiver still waits and the pause is over. Do nothing if another thread is starting it."""
        with self._start_retry.turn() as is_due:
            try:
                if is_due and self._state == _WAITING:
                    self.start()
            except TrackhubError as e:  # a wrong configuration, which could not be seen earlier
                self._state, self._start_error = _CLOSED, e
                _log.error("%s. The receiver does not start. What the sites log stays in their spools", e)

    def _try_last_time(self, deadline_s: float) -> None:
        """Start now if the receiver still waits."""
        with self._start_retry.last_turn():
            if self._state != _WAITING:
                return
            try:
                self._open(from_start=False, wait_s=min(WAIT_S, deadline_s))
            except Exception as e:
                self._state, self._start_error = _CLOSED, e

    def _lane(self, name: str, backend: Backend[Any], journal: Journal) -> Lane:
        return Lane(
            name, backend, journal, job=self.job, side=self._side, blob_dir=self._blobs.folder,
            run_folder=self._run_dir, room=self._room, flush_s=self._limits.flush_s, workdir=self._run_dir / name,
            is_running=lambda: not self._job_in_journal.status, say_where_to_look=self._say_where_to_look,
        )  # fmt: skip

    def channel(self, site: str) -> Channel:
        """Return a channel for a sender of this site in the receiver's own process.

        A request is answered in the sender's thread.
        """
        return lambda request, timeout_s: self.handle(site, request)

    def handle(self, site: str, request: bytes) -> bytes:
        """Answer one request of a site. A transport calls it, from several threads at once. Never raises.

        An accepted batch is in the journal when this returns. That takes one SQLite transaction, about 0.1 ms with
        ``durability="normal"``, and two for a site's first batch. While the journal is locked, the reply is `Busy`
        after half a second at most. The reply is `Busy` at once while the receiver works on another request of this
        site, or on 16 of other sites, or if `Admission` lets other sites go first. So a disk that does not answer
        blocks few threads, however often the sites ask. While a receiver waits to start, one request at a time makes
        the next attempt, which blocks up to ``limits.preflight_s``.

        Args:
            site: who sent the request, as the transport has verified. Never take it from the request itself.
            request: what a sender's channel was given.

        Returns:
            The reply, for the sender's channel to return. It is small, usually less than 1 KiB.
        """
        try:
            return encode(self._reply(site, request))
        except (JournalError, OSError) as e:
            self._warn_of(site, f"the receiver cannot store the request: {e}; the site keeps it and tries again")
            return busy(str(e))
        except Exception as e:
            # A defect of trackhub. The site keeps the records after "busy"; after a refusal, it would drop them.
            self._warn_of(site, f"a request failed: {type(e).__name__}: {e}; the site tries again", exc_info=True)
            return busy(type(e).__name__)

    def _reply(self, site: str, request: bytes) -> Reply:
        if self._state == _WAITING:
            self._try_again()
        if self._state != _OPEN:
            return Busy(f"the receiver is {self._state}")
        if problem := site_problem(site):
            return Refused("bad_site", f"the site's name {site!r} {problem}")
        self.sites.note_heard(site)
        if not self._admission.enter(site):
            return Busy("the receiver is still working on earlier requests")
        try:
            reply = self._answer(site, request)
        finally:
            self._admission.leave(site)
        if isinstance(reply, Refused):
            self._warn_of(site, f"a request is refused ({reply.reason}): {reply.detail}")
        return reply

    def _warn_of(self, site: str, problem: str, *, exc_info: bool = False) -> None:
        """Warn about a site's request, at most once a minute for each site, since it may send thousands in a second."""
        now, known = time.monotonic(), self._known[site]
        if now - known.warned_at >= _WARN_EVERY_S:
            known.warned_at = now
            _log.warning("site %s: %s", printable(site), printable(problem), exc_info=exc_info or None)

    def _answer(self, site: str, data: bytes) -> Reply:
        try:
            request: Request = decode_request(data)
        except msgspec.DecodeError as e:
            return Refused("malformed", f"not a request of format {FORMAT_VERSION}: {e}")
        match request:
            case Batch():
                return self._accept(site, request)
            case Chunk():
                return self._add_chunk(site, request)
            case Hello():
                return self._welcome(site, request)
            case KeepAlive():
                self._note_counts(site, request)
                return Accepted()
            case Final():
                self._note_counts(site, request)
                if self._ended is None:
                    self.sites.note_final(site, failed=request.failed)
                return Accepted(status=self._job_in_journal.status)

    def _add_chunk(self, site: str, chunk: Chunk) -> Reply:
        if not self._room.allows(site, len(chunk.data), makes_file=chunk.offset == 0):
            return Busy(_NO_ROOM)
        reply, is_longer = self._blobs.answer(site, chunk)
        if is_longer:  # a piece that comes again must not delay the end of the job
            self.sites.note_progress(site)
        return reply

    def _welcome(self, site: str, hello: Hello) -> Reply:
        if not is_compatible(hello.version):
            return Refused(
                "version",
                f"site {site} uses version {hello.version} of trackhub's format, this receiver {FORMAT_VERSION}. At "
                "most one minor version of difference is allowed: install the same flare-trackhub on both",
            )
        if self._ended is None:
            self.sites.note_hello(site, hello.session)
        assert self._journal is not None
        return Accepted(
            job="" if self._journal.continues else self.job.id,
            streams=self._journal.stream_states(site, hello.streams) if hello.streams else {},
        )

    def _note_counts(self, site: str, message: KeepAlive | Final) -> None:
        assert self._journal is not None
        site_id, is_replay = self._site_id(site), self._ended is not None
        self._journal.note_counts(site_id, message, keep_end=is_replay, wait_s=_WAIT_S)

    def _accept(self, site: str, batch: Batch) -> Reply:
        federation = self.federation
        digest = None if federation is None else federation.expect_batch()
        path = partial(self._blobs.path, site)
        contents = examine(batch, self._known[site].keys, path, None if digest is None else digest.add)
        if isinstance(contents, Refused):
            return contents
        if not self._room.allows(site, len(batch.frames)):
            return Busy(_NO_ROOM)
        # A backend needs the bytes together with the record, so no record is stored before its blobs.
        if (missing := self._blobs.missing(site, contents.blobs)) is not None:
            return NeedBlob(missing)
        assert self._journal is not None
        site_id = self._site_id(site, contents.time)
        stored = partial(federation.notify, site, digest, contents.batch.records) if federation and digest else None
        self._blobs.note_named(site, contents.blobs)  # before the commit, or the job's end could delete the blobs
        # The site deletes what is acknowledged. So the reply follows the commit, which survives a kill.
        try:
            new = self._journal.append(
                site_id, contents.batch, contents.gaps,
                refused=contents.refused, began=contents.time, stored=stored, wait_s=_WAIT_S,
            )  # fmt: skip
        except TooManyStreamsError as e:
            return Refused("too_many_streams", str(e))
        if new:
            assert self._lanes is not None
            self._lanes.notify(site_id)
        if contents.refused:
            self._warn_of(site, f"{len(contents.refused)} records are refused; the first is {contents.detail}")
        return Accepted(refused=dict(Counter(reason for _, reason in contents.refused)))

    def _site_id(self, site: str, created: float | None = None) -> int:
        known = self._known[site]
        if known.id is None:  # a known id spares a transaction for each batch
            assert self._journal is not None
            known.id = self._journal.add_site(site, created or time.time(), wait_s=_WAIT_S)
        return known.id

    def continue_site(self, site: str, position: int) -> None:
        """Number the records of a new site from ``position`` on, because another journal holds the earlier records.

        A replay needs it. Call it before the site's first request. A site that this journal knows keeps its positions.
        """
        assert self._journal is not None
        self._known[site].id = self._journal.continue_site(site, time.time(), position)

    def note_status(self, status: RunStatus) -> None:
        """Note how the job ends, before ``finish``, for replies to the sites' final messages and for a later replay.

        It may be called before ``start``, and while another thread starts or ends the receiver. Blocks for a quarter of
        a second at most, and never raises. If the journal cannot be written now, ``finish`` stores the status.
        """
        self._job_in_journal.status = status
        if self._state == _OPEN:
            assert self._journal is not None
            self._job_in_journal.note_status(self._journal, _WAIT_S)

    def assume_ended(self, site: str) -> None:
        """Assume that a site's training ended well. A replay calls it if the site's final message never came."""
        self.sites.assume_ended(site)

    def wait_for_sites(self, sites: Iterable[str], timeout_s: float | None = None) -> set[str]:
        """Wait until each site has sent its final message, or has been silent for ``limits.silence_s``.

        Call it at the end of the job, before ``finish``.

        Args:
            sites: their names.
            timeout_s: the longest wait, in seconds; by default ``limits.sites_s``. While files still arrive, it is
                ``limits.files_s`` if that is longer.

        Returns:
            The sites whose final message has not come. Their spools hold whatever they have not sent.
        """
        return self.sites.wait(sites, self._limits.sites_s if timeout_s is None else timeout_s, self._limits.files_s)

    def finish(self, status: RunStatus, *, deadline_s: float | None = None, moves_to: str = "") -> DeliveryReport:
        """Take no more batches, deliver what the journal has, end the runs, close everything, and report.

        Blocks up to the deadline. Each backend that hangs, the federation run and a locked journal may each add a
        second. If the receiver could not start yet, a last attempt comes first (see ``start``). What is then not
        delivered stays in the journal, for ``trackhub replay``. Ctrl-C skips the waits, and then is raised.

        Args:
            status: how the job ended. If it finished, the run of a site still ends as failed when its training failed,
                or when its final message did not come.
            deadline_s: the longest time for all backends together, in seconds; by default ``limits.deadline_s``.
            moves_to: if the job's folder moves after this, a sentence that says where to; see `format_report`.

        Raises:
            JournalError: the receiver was not started, has ended already, or could not start.
        """
        deadline_s = self._limits.deadline_s if deadline_s is None else deadline_s
        self._try_last_time(deadline_s)
        if self._state != _OPEN:
            error = self._start_error
            what = f"could not start: {error}" if error else f"is {self._state}; call start(), then finish() once"
            raise JournalError(f"the receiver in {self.folder} {what}. The sites' spools keep their records") from error
        assert self._journal is not None
        assert self._lanes is not None
        stored = [name for name, known in self._known.copy().items() if known.id is not None]
        by_site = self._job_in_journal.run_statuses(self._journal, stored, status)
        # Close before the lanes end. Otherwise a request could add a batch after a lane has looked for the last time.
        self._state = _CLOSED
        self._job_in_journal.status = status
        # Nobody knows how the sites outside ``by_site`` ended.
        otherwise = self.sites.status("", status, was_killed=False)
        close = partial(self._job_in_journal.close, self._journal, self._lanes.names, status, moves_to)
        try:
            deliver_rest(self._journal, self._lanes, self.federation, by_site, otherwise, deadline_s)
        except BaseException:  # such as Ctrl-C. This process must not keep the journal locked
            with contextlib.suppress(Exception):
                close()
            raise
        finally:
            self._blobs.delete_unused()
        return close()

    def abandon(self) -> None:
        """End a started receiver without delivering what is left, because the spool or the sender failed afterwards.

        The job's status is `JobInJournal.status_after_failure`. Does nothing after ``finish``. Never raises.
        """
        with self._start_retry.last_turn():
            if self._state == _OPEN:
                self.finish(self._job_in_journal.status_after_failure(), deadline_s=0.0)
            self._state = _CLOSED
